"""A small pretrained model from scratch: its stages, what each learns from, and that it can be gone on with."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from mmict import MMICTModel
from mmict.corpus import prepare
from mmict.dialogs import make_dialogs
from mmict.model import PLAIN
from mmict.processor import Processor
from mmict.sample import render_shapes
from mmict.samples import Samples
from mmict.small import (
    SPECIAL,
    Completing,
    Naming,
    SmallOptions,
    StageTrainer,
    WarmUp,
    _related,
    cold_model,
    small_model,
    word_tokenizers,
    words_of,
)

TINY = SmallOptions((2, 2, 2), image_size=16, patch=8, vision_width=16, width=16, queries=2, layers=2, vocabulary=100)
EXTRA = ["a bus near the sea", "two birds sit on a bus"]


@pytest.fixture(scope="module")
def shapes():
    return render_shapes(30, size=16)


@pytest.fixture(scope="module")
def made(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_model(folder, shapes, EXTRA, TINY)
    return folder


def weights(folder):
    return {part: (folder / part / "model.safetensors").read_bytes() for part in ("vision", "lm", "warm")}


class TestSmallModel:
    def test_writes_parts_that_others_can_load(self, made, shapes):
        model = MMICTModel.from_pretrained(made / "warm")
        assert (model.vision.tokens, model.vision.width, model.vision.image_size) == (5, 16, 16)
        assert not any(p.requires_grad for part in (model.vision, model.lm) for p in part.parameters())
        assert len(model.generate([shapes.images[0]], num_beams=1, max_new_tokens=2)) == 1

    def test_what_is_there_is_not_made_again(self, made, shapes, monkeypatch):
        before = weights(made)
        monkeypatch.setattr(StageTrainer, "train", None)
        small_model(made, shapes, EXTRA, TINY)
        assert weights(made) == before

    def test_goes_on_where_it_was_stopped(self, made, shapes, tmp_path, monkeypatch):
        """In the middle of the last stage, whose frozen parts are in no checkpoint."""
        step, count = StageTrainer.training_step, 0

        def stop(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count == 6:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(StageTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            small_model(tmp_path, shapes, EXTRA, TINY)
        assert not (tmp_path / "warm").exists()
        small_model(tmp_path, shapes, EXTRA, TINY)
        assert count == 7
        assert weights(tmp_path) == weights(made)

    def test_other_samples_or_sizes_need_another_folder(self, made, shapes, tmp_path):
        """Or a language model would be used that has read what are test samples now."""
        copy = tmp_path / "copy"
        shutil.copytree(made, copy)
        for samples, texts, options in (
            (shapes.select(range(29)), EXTRA, TINY),
            (shapes, [], TINY),
            (shapes, EXTRA, dataclasses.replace(TINY, steps=(2, 2, 3))),
        ):
            with pytest.raises(ValueError, match="holds a run with"):
                small_model(copy, samples, texts, options)

    def test_warm_and_cold_begin_alike_and_differ(self, made):
        cold, warm = cold_model(made, TINY), MMICTModel.from_pretrained(made / "warm")
        assert torch.equal(cold.hub.query_tokens, cold_model(made, TINY).hub.query_tokens)
        change = (cold.hub.query_tokens - warm.hub.query_tokens).abs().max()
        assert 0 < change < 0.1

    def test_three_questions_will_do(self, tmp_path):
        model = small_model(tmp_path, render_shapes(3, size=16, questions=True), (), TINY)
        known = model.processor.lm_tokenizer.get_vocab()
        assert {"what", "?", "question", ":"} <= set(known)


class TestVocabulary:
    def test_is_one_for_both_with_marks_of_their_own(self):
        hub, lm = word_tokenizers(["A red cat, here"], 100)
        assert hub.get_vocab() == lm.get_vocab()
        assert hub.convert_ids_to_tokens(hub("a red cat")["input_ids"]) == ["[CLS]", "a", "red", "cat", "[SEP]"]
        assert lm.convert_ids_to_tokens(lm("A red, dog")["input_ids"]) == ["a", "red", ",", "<unk>", "</s>"]
        assert [lm.get_vocab()[token] for token in SPECIAL] == list(range(6))

    def test_the_rarest_words_are_left_out_but_never_those_of_the_prompts(self):
        lm = word_tokenizers(["cat cat dog"] * 50 + ["emu"], 2)[1]
        assert lm.convert_tokens_to_ids("cat") != lm.unk_token_id == lm.convert_tokens_to_ids("emu")
        assert lm.unk_token_id not in lm("Can you briefly explain what you see in the video?")["input_ids"]

    def test_of_the_training_samples_alone(self, made, shapes):
        known = Processor.from_pretrained(made / "tokenizers").lm_tokenizer.get_vocab()
        assert {"bus", *" ".join(shapes.texts).split()} <= set(known)
        assert len(known) < 100


class TestNaming:
    def test_learns_words_of_all_the_texts_of_an_image(self):
        pictures = [np.full((16, 16, 3), i, np.uint8) for i in range(4)]
        texts = ["red cat", "red dog", "red emu", "cat", "cat", "dog"]
        frames = [(0,), (1,), (2, 3), (0,), (1,), (1,)]
        names = [str(i) for i in range(6)]
        stage = Naming(Samples(pictures, frames, texts, [""] * 6, names, names, [[t] for t in texts]), TINY)
        assert stage.count == 4
        wanted = stage.words.toarray()
        assert wanted.tolist() == [[1], [1], [1], [1]]  # red is in three images; cat and dog are in fewer
        loss, _ = stage(torch.tensor([3, 0]), torch.Generator())
        assert torch.isfinite(loss)


class TestCompleting:
    @pytest.fixture
    def stage(self, made, shapes):
        model = cold_model(made, TINY)
        return Completing(model.lm, model.processor, shapes, EXTRA)

    def test_each_distinct_text_is_there_once(self, stage, shapes):
        assert stage.count == len({*shapes.texts, *EXTRA})

    def test_reads_related_texts_some_words_and_a_prompt(self, stage, monkeypatch):
        given = []
        run = stage.lm.forward
        monkeypatch.setattr(stage.lm, "forward", lambda **inputs: (given.append(inputs), run(**inputs))[1])
        rows = torch.arange(stage.count)
        stage(rows, torch.Generator().manual_seed(0))
        stage(rows, torch.Generator().manual_seed(0))
        assert torch.equal(given[0]["input_ids"], given[1]["input_ids"])
        known = stage.processor.lm_tokenizer
        chunks, hidden = [], 0
        for row, ids in enumerate(given[0]["input_ids"].tolist()):
            *before, last = _parts(known, ids)
            chunks.append(len(before))
            related = {tuple(stage.shown[i]) for i in stage.related[row]}
            assert {tuple(part) for part in before} <= related
            assert tuple(stage.shown[row]) not in {tuple(part) for part in before}
            words = known.convert_ids_to_tokens(last)
            hidden += sum(word not in words for word in stage.hints[row])
            assert given[0]["labels"][row][given[0]["labels"][row] != -100].tolist() == stage.targets[row]
        assert set(chunks) == {0, 1, 2, 3, 4}
        assert 0.4 < hidden / sum(map(len, stage.hints)) < 0.75

    def test_hints_of_a_question_are_all_answers_about_that_picture(self, made):
        texts, asked = ["red", "cat", "yes"], ["colour?", "kind?", "is it?"]
        found = Samples(
            [np.zeros((16, 16, 3), np.uint8)] * 2, [(0,), (0,), (1,)], texts, asked,
            ["a", "a", "b"], list("xyz"), [[t] for t in texts],
        )  # fmt: skip
        model = cold_model(made, TINY)
        assert Completing(model.lm, model.processor, found, ()).hints == [["red", "cat"], ["red", "cat"], ["yes"]]


def _parts(tokenizer, ids):
    """Cut behind each end-of-chunk token."""
    parts = [[]]
    for token in ids:
        if token == tokenizer.convert_tokens_to_ids("<|endofchunk|>"):
            parts.append([])
        elif token != tokenizer.pad_token_id:
            parts[-1].append(token)
    return parts


class TestWarmUp:
    def test_terms(self, made, shapes):
        """Caption: from the picture alone, unguided. Copy: the pair is its own demonstration. Align: its rows, word by word."""
        model = MMICTModel.from_pretrained(made / "warm")
        corpus = prepare(model, shapes)
        rows, generator = torch.tensor([4, 0, 9]), torch.Generator().manual_seed(5)
        with torch.no_grad():
            loss, terms = WarmUp(model, corpus)(rows, generator)
            choices = torch.randint(6, (3,), generator=torch.Generator().manual_seed(5)).tolist()
            alone = make_dialogs(corpus, rows.tolist(), corpus, [[]] * 3, choices)
            caption = model(alone, asked=PLAIN).loss
            near = []
            for row in rows.tolist():
                ids = torch.tensor([corpus.hub_texts[row]])
                found = model.hub(ids, torch.ones_like(ids), corpus.pictures(torch.tensor([row])), mode="VT->T")
                near.append(
                    (model.hub.proj(found) - model.lm.get_input_embeddings()(ids))[0, 1:-1]
                )  # without the marks
        assert set(terms) == {"caption", "copy", "align"}
        assert float(loss) == pytest.approx(sum(float(term) for term in terms.values()))
        assert float(terms["caption"]) == pytest.approx(float(caption))
        assert float(terms["align"]) == pytest.approx(float(torch.cat(near).square().mean()), rel=1e-5)

    def test_copy_reads_the_text_but_not_the_picture_of_the_query(self, made, shapes):
        model = MMICTModel.from_pretrained(made / "warm")
        corpus = prepare(model, shapes)
        given = []
        context = model.context
        model.context = lambda *args: (given.append(context(*args)), given[-1])[1]
        with torch.no_grad():
            WarmUp(model, corpus)(torch.tensor([4]), torch.Generator().manual_seed(5))
        prompt = given[0].rows[len(corpus.hub_texts[4]) + 1 :]
        choice = int(torch.randint(6, (1,), generator=torch.Generator().manual_seed(5)))
        ids = torch.tensor(corpus.prompt(4, choice)[1])
        torch.testing.assert_close(prompt, model.lm.get_input_embeddings()(ids))


def test_related_texts_share_words_and_rare_ones_count_more():
    texts = ["a red cat", "a red dog", "a blue cat", "an emu", "a red emu", "a red bus", "a red car"]
    found = _related(texts, most=2)
    assert found.shape == (7, 2)
    assert all(row not in of for row, of in enumerate(found.tolist()))
    assert 2 in found[0]  # cat is rarer than red
    assert 4 in found[3]
    assert _related(texts).shape == (7, 6)


def test_words_of():
    found = words_of(["A cat's cat, a DOG", "dog", ""], least=1)
    assert found.shape == (3, 4)  # a, cat, cat's, dog
    assert found.toarray().sum(1).tolist() == [4, 1, 0]
    assert words_of(["a b", "b", "b c"], least=3).toarray().tolist() == [[1], [1], [1]]


def test_encoder_learns(shapes):
    """More steps, a smaller loss."""
    torch.manual_seed(0)
    stage = Naming(shapes, TINY)
    rows, optimizer = torch.arange(30), torch.optim.Adam(stage.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss, _ = stage(rows, torch.Generator())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
