"""From CTC logits to words: best path, prefix beam search, and the best word of a lexicon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsan.charset import CTCCharset

CONFIDENCES = ("mean", "min", "prod")


@dataclass
class Reading:
    """A word that was read. Confidences are 0 to 1; that of an empty word is 0.

    ``scores`` are those of its characters; searches that do not know them leave it empty. ``branch`` made the word.

    >>> reading = Reading("no", 0.8, [0.9, 0.7])
    >>> reading.characters, round(reading.certainty, 3)
    ([('n', 0.9), ('o', 0.7)], 0.794)
    """

    text: str
    confidence: float
    scores: list[float] = field(default_factory=list)
    branch: str = "ctx"

    @property
    def characters(self) -> list[tuple[str, float]]:
        """Characters with their confidences."""
        return list(zip(self.text, self.scores, strict=False))

    @property
    def certainty(self) -> float:
        """The geometric mean of its characters' confidences, or of its own over the characters where these are not known."""
        if not self.text:
            return 0.0
        whole = math.prod(self.scores) if self.scores else self.confidence
        return whole ** (1 / len(self.text))


def ctc_greedy(
    logits: Float[Tensor, "batch frames classes"],
    charset: CTCCharset,
    lengths: Tensor | None = None,
    *,
    confidence: str = "mean",
) -> list[Reading]:
    """The most probable class of each frame, repeats merged, blanks removed.

    A character's confidence is the greatest winning probability among the frames of its run.

    Args:
        logits: (batch, frames, K + 1), not normalised. lengths: (batch,), frames that count.
        confidence: of the word: "mean" of its characters'; "min" or "prod" of the winning probabilities of all frames, blanks
            included.

    Raises:
        ValueError: for logits of other than K + 1 classes, and an unknown confidence.

    Example:
        >>> frames = torch.tensor([[[0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.1, 0.3, 0.6]]])
        >>> ctc_greedy(frames.log(), CTCCharset("ab"))[0].text
        'ab'
    """
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}; got {confidence!r}")
    _check(logits, charset)
    logits = logits.detach().float()
    ids = logits.argmax(2).to(torch.int16).cpu().numpy()
    counts = _counting(ids.shape, lengths)
    ids[~counts] = 0
    texts, keep, ends = collapse(ids, charset)
    used = ids != 0  # the frames of all runs, one after the other; a run starts where a character is kept
    starts = keep[used].nonzero()[0]
    winning = _winning(logits[torch.from_numpy(used).to(logits.device)])
    scores = np.maximum.reduceat(winning, starts).tolist() if len(starts) else []
    spans = list(zip([0, *ends], ends, strict=False))
    if confidence == "mean":
        words = [sum(scores[a:b]) / (b - a) if b > a else 0.0 for a, b in spans]
    else:
        over = np.where(counts, _winning(logits), 1.0)
        each = over.min(1) if confidence == "min" else over.prod(1, dtype=np.float64)
        words = [float(value) if b > a else 0.0 for value, (a, b) in zip(each, spans, strict=True)]
    return [Reading(text, word, scores[a:b]) for text, word, (a, b) in zip(texts, words, spans, strict=True)]


def collapse(ids: npt.NDArray[np.integer], charset: CTCCharset) -> tuple[list[str], npt.NDArray[np.bool_], list[int]]:
    """Words of (batch, frames) best classes: repeats merged, then blanks (0) removed.

    Returns:
        The words, which frames made a character, and where each word ends in the row of all characters.
    """
    keep = ids != 0
    keep[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    ends: list[int] = keep.sum(1).cumsum().tolist()
    return _split(ids[keep], ends, charset), keep, ends


def _split(ids: npt.NDArray[np.integer], ends: list[int], charset: CTCCharset) -> list[str]:
    """Words of the ids of all their characters in one row."""
    everything = charset.table[ids].astype("<U1").tobytes().decode("utf-32-le")
    return [everything[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _winning(logits: Tensor) -> npt.NDArray[np.float32]:
    """The probability of the most probable class."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp().cpu().numpy()


def _counting(shape: tuple[int, ...], lengths: Tensor | None) -> npt.NDArray[np.bool_]:
    if lengths is None:
        return np.ones(shape, dtype=bool)
    return np.arange(shape[1]) < lengths.cpu().numpy()[:, None]


def _check(logits: Tensor, charset: CTCCharset) -> None:
    if logits.shape[2] != len(charset) + 1:
        raise ValueError(
            f"logits have {logits.shape[2]} classes; {len(charset)} characters and the blank are {len(charset) + 1}"
        )


def ctc_beam(
    logits: Float[Tensor, "batch frames classes"],
    charset: CTCCharset,
    lengths: Tensor | None = None,
    *,
    beam_width: int = 10,
) -> list[Reading]:
    """The most probable word by prefix beam search (Graves 2008; Hannun et al. 2014), all words of a batch at once.

    A word's confidence is its probability, summed over the paths that the beam has kept.

    Args:
        logits: (batch, frames, K + 1), not normalised. lengths: (batch,), frames that count. beam_width: prefixes kept, >= 1.

    Raises:
        ValueError: for logits of other than K + 1 classes, or a beam narrower than 1.

    Example:
        >>> frames = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]])  # blank, then "a"
        >>> (word,) = ctc_beam(frames.log(), CTCCharset("a"))  # of the 4 paths 3 read "a"; the best single one reads nothing
        >>> word.text, round(word.confidence, 4)
        ('a', 0.64)
    """
    _check(logits, charset)
    if beam_width < 1:
        raise ValueError(f"beam_width must be at least 1, got {beam_width}")
    batch, frames, classes = logits.shape
    if batch == 0 or frames == 0:
        return [Reading("", 0.0) for _ in range(batch)]
    probabilities = logits.detach().double().softmax(2).cpu()
    if lengths is not None:  # a sure blank changes nothing
        beyond = torch.arange(frames) >= lengths.cpu().unsqueeze(1)
        probabilities[beyond] = F.one_hot(torch.tensor(0), classes).double()
    # Of each kept prefix: the probability of its paths that end in blank and in its last character, that character, a hash of
    # the prefix and of the prefix without it. Probabilities are scaled to a maximum of 1 at each frame.
    blank, last_p = torch.zeros(2, batch, beam_width, dtype=torch.float64)
    blank[:, 0] = 1.0
    last = torch.zeros(batch, beam_width, dtype=torch.int64)
    names = torch.zeros(batch, beam_width, dtype=torch.int64)
    names[:, 1:] = -torch.arange(1, beam_width)  # places without a prefix: all different, probability 0
    parents = torch.full_like(names, torch.iinfo(torch.int64).min)
    history: list[tuple[Tensor, Tensor]] = []
    log_scale = torch.zeros(batch, dtype=torch.float64)
    ids = torch.arange(1, classes)
    for frame in probabilities.unbind(1):
        total = blank + last_p
        grown = total.unsqueeze(2) * frame[:, None, 1:]  # (batch, beam, K): each prefix with one more character
        again = (last > 0).unsqueeze(2) & (ids == last.unsqueeze(2))
        grown = torch.where(again, blank.unsqueeze(2) * frame[:, None, 1:], grown)
        stay_blank, stay_last = total * frame[:, :1], last_p * frame.gather(1, last)
        # A prefix that is another one's with one more character: its paths join.
        joins = (parents.unsqueeze(2) == names.unsqueeze(1)) & (last > 0).unsqueeze(2)  # (batch, longer, shorter)
        at = (last - 1).clamp_min(0)
        gain = grown.gather(2, at.unsqueeze(1).expand(-1, beam_width, -1)).mT  # (batch, longer, shorter)
        stay_last = stay_last + torch.where(joins, gain, 0.0).sum(2)
        b, longer, shorter = joins.nonzero(as_tuple=True)
        grown[b, shorter, at[b, longer]] = 0.0
        scores = torch.cat([stay_blank + stay_last, grown.flatten(1)], 1)
        top, chosen = scores.topk(min(beam_width, scores.shape[1]), dim=1)
        stays = chosen < beam_width
        source = torch.where(stays, chosen, (chosen - beam_width) // (classes - 1))
        character = torch.where(stays, 0, (chosen - beam_width) % (classes - 1) + 1)
        history.append((source, character))
        scale = top[:, :1].clamp_min(1e-300)
        log_scale += scale.squeeze(1).log()
        came = names.gather(1, source)
        blank = torch.where(stays, stay_blank.gather(1, source), 0.0) / scale
        last_p = torch.where(stays, stay_last.gather(1, source), top) / scale
        parents = torch.where(stays, parents.gather(1, source), came)
        last = torch.where(stays, last.gather(1, source), character)
        names = torch.where(stays, came, came * 1_000_003 + character + 7)
    best = (blank + last_p).argmax(1)
    confidence = ((blank + last_p).amax(1).log() + log_scale).exp().tolist()
    place, steps = best, []
    for source, character in reversed(history):
        steps.append(character.gather(1, place.unsqueeze(1)).squeeze(1))
        place = source.gather(1, place.unsqueeze(1)).squeeze(1)
    written = torch.stack(steps[::-1], 1).numpy()
    kept = written != 0
    texts = _split(written[kept], kept.sum(1).cumsum().tolist(), charset)
    return [Reading(text, p if text else 0.0) for text, p in zip(texts, confidence, strict=True)]


def ctc_lexicon(
    logits: Float[Tensor, "batch frames classes"],
    charset: CTCCharset,
    lexicon: Sequence[str],
    lengths: Tensor | None = None,
    *,
    mode: str = "ctc",
    max_edits: int | None = None,
) -> list[Reading]:
    """The best word of a lexicon, which is normalised as labels are.

    Args:
        logits: (batch, frames, K + 1), not normalised. lengths: (batch,), frames that count.
        mode: "ctc": the most probable, exactly; "edit": the nearest to the best path's word in single-character edits, the first
            in the lexicon among equals.
        max_edits: with "ctc", look only at words so near to the best path's word (3 is usual); at all, if none is.

    Returns:
        Readings with the probability of the word as confidence.

    Raises:
        ValueError: for a lexicon without words, or an unknown mode.

    Example:
        >>> frames = torch.tensor([[[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.1, 0.5, 0.4]]])
        >>> ctc_greedy(frames.log(), CTCCharset("ab"))[0].text, ctc_lexicon(frames.log(), CTCCharset("ab"), ["ab", "b"])[0].text
        ('aa', 'ab')
    """
    words = list(dict.fromkeys(filter(None, map(charset.normalize, lexicon))))
    if not words:
        raise ValueError(f"the lexicon has no word with characters of the charset {charset.characters!r}")
    if mode not in ("ctc", "edit"):
        raise ValueError(f"mode must be ctc or edit; got {mode!r}")
    _check(logits, charset)
    targets, sizes = charset.encode(words)
    padded = torch.zeros(len(words), int(sizes.max()), dtype=torch.int64)
    padded[torch.arange(padded.shape[1]) < sizes.unsqueeze(1)] = targets
    log_p = logits.detach().float().log_softmax(2).cpu()
    frames = torch.full((len(logits),), logits.shape[1]) if lengths is None else lengths.cpu()
    readings = []
    for i, greedy in enumerate(ctc_greedy(logits, charset, lengths)):
        rows = torch.arange(len(words))
        if mode == "edit" or max_edits is not None:
            edits = torch.from_numpy(edit_distances(greedy.text, words))
            most = int(edits.min()) if mode == "edit" else max_edits or 0
            near = (edits <= most).nonzero().squeeze(1)
            near = near[:1] if mode == "edit" else near
            rows = near if len(near) else rows
        scores = torch.cat([_word_log_p(log_p[i, : frames[i]], padded[r], sizes[r]) for r in rows.split(4096)])
        best = int(scores.argmax())
        readings.append(Reading(words[int(rows[best])], float(scores[best].exp())))
    return readings


def _word_log_p(log_p: Tensor, words: Tensor, sizes: Tensor) -> Tensor:
    """log p of each of n padded words under one image's (frames, classes); -inf where frames do not suffice."""
    n, frames = len(words), len(log_p)
    each = F.ctc_loss(
        log_p.unsqueeze(1).expand(-1, n, -1), words, torch.full((n,), frames), sizes, blank=0, reduction="none"
    )
    return -each


def edit_distances(word: str, lexicon: Sequence[str]) -> npt.NDArray[np.int64]:
    """Levenshtein's distance of ``word`` from every word of a lexicon at once.

    >>> edit_distances("kitten", ["sitting", "kitten", ""]).tolist()
    [3, 0, 6]
    """
    sizes = np.array([len(w) for w in lexicon])
    letters = np.zeros((len(lexicon), sizes.max(initial=0)), dtype=np.int32)
    letters[np.arange(letters.shape[1]) < sizes[:, None]] = [ord(c) for w in lexicon for c in w]
    steps = np.arange(letters.shape[1] + 1)
    row = np.broadcast_to(steps, (len(lexicon), len(steps)))
    for i, c in enumerate(word, 1):
        new = np.empty_like(row)
        new[:, 0] = i
        new[:, 1:] = np.minimum(row[:, 1:] + 1, row[:, :-1] + (letters != ord(c)))
        row = np.minimum.accumulate(new - steps, axis=1) + steps  # insertions, left to right
    return row[np.arange(len(lexicon)), sizes].astype(np.int64)
