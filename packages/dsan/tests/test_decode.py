import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from dsan import CTCCharset, Reading, ctc_beam, ctc_greedy, ctc_lexicon
from dsan.decode import edit_distances
from dsan.loss import ctc_loss
from dsan.metrics import levenshtein

GOLDEN = np.load(Path(__file__).parent / "golden/double_ctc.npz")
BEAM = json.loads((Path(__file__).parent / "golden/beam_cases.json").read_text())
ABC = CTCCharset("abc")


def slow_greedy(logits, charset, length):
    """Text and confidences, frame by frame."""
    best, ids = logits.softmax(1).max(1)
    text, scores, before = "", [], 0
    for t in range(length):
        c = int(ids[t])
        if c and c != before:
            text += charset.characters[c - 1]
            scores.append(float(best[t]))
        elif c:
            scores[-1] = max(scores[-1], float(best[t]))
        before = c
    return text, scores


@pytest.mark.parametrize("branch", ["ctx", "enh"])
def test_golden_best_paths(branch):
    logits = torch.tensor(GOLDEN[f"logits_{branch}"])
    for kind, name in (("mean", "meanchar"), ("min", "min"), ("prod", "prod")):
        readings = ctc_greedy(logits, CTCCharset(), confidence=kind)
        assert [r.text for r in readings] == [str(word) for word in GOLDEN[f"greedy_{branch}"]]
        np.testing.assert_allclose([r.confidence for r in readings], GOLDEN[f"conf_{name}_{branch}"], atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_a_loop(seed):
    torch.manual_seed(seed)
    logits, lengths = torch.randn(40, 9, 4) * 3, torch.randint(10, (40,))
    for row, n, reading in zip(logits, lengths.tolist(), ctc_greedy(logits, ABC, lengths), strict=True):
        text, scores = slow_greedy(row, ABC, n)
        assert reading.text == text
        assert reading.scores == pytest.approx(scores)
        assert reading.characters == list(zip(text, reading.scores, strict=True))
        assert reading.confidence == pytest.approx(np.mean(scores) if scores else 0.0)


@pytest.mark.parametrize("case", BEAM)
def test_golden_beams(case):
    logits = torch.tensor(case["logits"])[None]
    (reading,) = ctc_beam(logits, ABC, beam_width=300)
    assert reading.text == ABC.decode(case["best"])
    assert np.log(reading.confidence) == pytest.approx(case["logp_best"], abs=1e-6)
    assert ctc_greedy(logits, ABC)[0].text == ABC.decode(case["greedy"])
    (scored,) = ctc_lexicon(logits, ABC, [ABC.decode(case["greedy"])])
    assert np.log(scored.confidence) == pytest.approx(case["logp_greedy"], abs=1e-4)


def slow_beam(probabilities, width):
    """Prefix beam search with dictionaries: {prefix: (ends in blank, ends in its last character)}."""
    beams = {(): (1.0, 0.0)}
    for frame in probabilities:
        new = {}

        def add(prefix, blank, last, new=new):
            b, n = new.get(prefix, (0.0, 0.0))
            new[prefix] = (b + blank, n + last)

        for prefix, (b, n) in beams.items():
            add(prefix, (b + n) * frame[0], n * frame[prefix[-1]] if prefix else 0.0)
            for c in range(1, len(frame)):
                add((*prefix, c), 0.0, (b if prefix and prefix[-1] == c else b + n) * frame[c])
        beams = dict(sorted(new.items(), key=lambda item: -sum(item[1]))[:width])
    prefix, p = max(beams.items(), key=lambda item: sum(item[1]))
    return prefix, sum(p)


@pytest.mark.parametrize("width", [1, 2, 5, 60])
def test_beam_equals_dictionaries(width):
    torch.manual_seed(width)
    logits, lengths = torch.randn(30, 7, 4, dtype=torch.float64) * 2, torch.randint(1, 8, (30,))
    readings = ctc_beam(logits, ABC, lengths, beam_width=width)
    for row, n, reading in zip(logits.softmax(2), lengths.tolist(), readings, strict=True):
        prefix, p = slow_beam(row[:n].tolist(), width)
        assert reading.text == ABC.decode(prefix)
        assert reading.confidence == pytest.approx(p if prefix else 0.0)


def test_a_wide_beam_finds_the_most_probable_word():
    logits = torch.randn(1, 4, 3, dtype=torch.float64)
    words = [w for n in range(5) for w in product((1, 2), repeat=n)]
    charset = CTCCharset("ab")
    losses = {}
    for w in words:
        each, feasible = ctc_loss(
            logits, torch.tensor(w, dtype=torch.int64), torch.tensor([len(w)]), on_infeasible="skip"
        )
        losses[w] = float(each) if feasible else np.inf
    assert ctc_beam(logits, charset, beam_width=40)[0].text == charset.decode(min(losses, key=losses.get))


def test_lexicon_is_exact_and_can_be_narrowed():
    logits = torch.randn(3, 8, 4)
    lexicon = ["".join(w) for n in (1, 2, 3) for w in product("abc", repeat=n)]
    readings = ctc_lexicon(logits, ABC, lexicon)
    for row, reading in zip(logits, readings, strict=True):
        losses = [float(ctc_loss(row[None], *ABC.encode([w]))[0]) for w in lexicon]
        assert reading.text == lexicon[int(np.argmin(losses))]
        assert -np.log(reading.confidence) == pytest.approx(min(losses), abs=1e-4)
    near = ctc_lexicon(logits, ABC, lexicon, max_edits=1)
    for reading, greedy in zip(near, ctc_greedy(logits, ABC), strict=True):
        if any(levenshtein(w, greedy.text) <= 1 for w in lexicon):
            assert levenshtein(reading.text, greedy.text) <= 1


def test_lexicon_by_edits_takes_the_first_of_equals():
    logits = torch.full((1, 5, 4), -9.0)
    for t, c in enumerate((1, 0, 2, 0, 3)):  # abc
        logits[0, t, c] = 9.0
    assert ctc_lexicon(logits, ABC, ["bb", "abb", "AC c", "aba"], mode="edit")[0].text == "abb"
    assert ctc_lexicon(logits, ABC, ["acc", "abb"], mode="edit")[0].text == "acc"


def test_a_word_longer_than_the_frames_is_never_chosen():
    assert ctc_lexicon(torch.randn(1, 2, 4), ABC, ["abcabc", "a"])[0].text == "a"


def test_edit_distances():
    words = ["", "a", "sitting", "sunday", "kitten"]
    assert edit_distances("kitten", words).tolist() == [levenshtein("kitten", w) for w in words]
    assert edit_distances("", words).tolist() == [0, 1, 7, 6, 6]


@pytest.mark.parametrize("decode", [ctc_greedy, ctc_beam])
def test_empty_words_and_batches(decode):
    blank = torch.zeros(2, 4, 4)
    blank[..., 0] = 9
    assert [(r.text, r.confidence) for r in decode(blank, ABC)] == [("", 0.0)] * 2
    assert decode(torch.zeros(0, 4, 4), ABC) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ctc_greedy(x, CTCCharset()), "logits have 4 classes; 36 characters and the blank are 37"),
        (lambda x: ctc_greedy(x, ABC, confidence="max"), "confidence must be one of"),
        (lambda x: ctc_beam(x, ABC, beam_width=0), "beam_width must be at least 1"),
        (lambda x: ctc_lexicon(x, ABC, ["--"]), "lexicon has no word"),
        (lambda x: ctc_lexicon(x, ABC, ["a"], mode="x"), "mode must be"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 3, 4))


def test_certainty_is_the_geometric_mean():
    assert Reading("ab", 0.5, [0.9, 0.4]).certainty == pytest.approx(0.6)
    assert Reading("ab", 0.25).certainty == pytest.approx(0.5)
    assert Reading("", 0.0).certainty == 0.0
