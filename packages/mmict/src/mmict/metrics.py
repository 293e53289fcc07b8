"""How generated captions and answers are scored, in pure Python: BLEU, ROUGE-L, CIDEr-D, VQA accuracy and a few more.

All are 0..1 but CIDEr-D, which is 0..10. The formulas for captions are those of the COCO tool; :func:`tokens` is not its PTB
tokeniser: say so beside the numbers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

TOKENIZER = "[a-z0-9']+"
TINY, SMALL = 1e-15, 1e-9  # they keep BLEU defined where nothing matches

DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(DIGITS.split())}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody's someone's something's
    that'd that'd've that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all you'd you'd've you'll you're you've
"""


def _spellings(word: str) -> Iterator[str]:
    """The word with and without each of its apostrophes."""
    parts = word.split("'")
    for marks in product(("", "'"), repeat=len(parts) - 1):
        yield parts[0] + "".join(map("".join, zip(marks, parts[1:], strict=True)))


APOSTROPHES = {spelling: word for word in CONTRACTIONS.split() for spelling in _spellings(word)}


def tokens(text: str) -> list[str]:
    """Words, figures and apostrophes of the lower-case text.

    >>> tokens("A dog's ball, No. 2!")
    ['a', "dog's", 'ball', 'no', '2']
    """
    return re.findall(TOKENIZER, text.lower())


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> list[float]:
    """BLEU-1 to BLEU-n of the corpus, 0..1; the brevity penalty takes each prediction's closest reference, of two the shorter.

    Args:
        predictions: a caption each. references: one or more captions for each.

    Raises:
        ValueError: if there are no predictions, or not one or more references for each.

    >>> [round(value, 4) for value in bleu(["a red kite flies"], [["a red kite flies high", "a kite"]])]
    [0.7788, 0.7788, 0.7788, 0.7788]
    """
    _check(predictions, references)
    right, guessed = np.zeros(n), np.zeros(n)
    length = wanted = 0
    for prediction, captions in zip(predictions, references, strict=True):
        words, others = tokens(prediction), [tokens(caption) for caption in captions]
        counts = [_ngrams(other, n) for other in others]
        for gram, count in _ngrams(words, n).items():
            right[len(gram) - 1] += min(count, max(grams[gram] for grams in counts))
        guessed += [max(0, len(words) - i) for i in range(n)]
        length += len(words)
        wanted += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    ratio = (length + TINY) / (wanted + SMALL)
    penalty = math.exp(min(0.0, 1 - 1 / ratio))
    precisions = np.cumprod((right + TINY) / (guessed + SMALL))
    return [float(penalty * precisions[i] ** (1 / (i + 1))) for i in range(n)]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over items of ROUGE-L, 0..1: precision and recall of the longest common subsequence, each of its best reference, by
    F with beta 1.2.

    Arguments and errors: as :func:`bleu`.

    >>> rouge_l(["a red kite"], [["a red kite", "two dogs"]]), round(rouge_l(["a red kite"], [["a kite in the sky"]]), 4)
    (1.0, 0.4784)
    """
    _check(predictions, references)
    return float(np.mean([_rouge_l(*item) for item in zip(predictions, references, strict=True)]))


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, NDArray[np.float64]]:
    """CIDEr-D, 0..10: its mean over items, and of each item (n,).

    Document frequencies are counted over these references, so figures of different test sets are not comparable. They weigh
    every n-gram 0 where there is one image alone: then all is 0, and a warning says so.

    Arguments and errors: as :func:`bleu`.

    >>> mean, items = cider_d(["a red kite flies", "a cat sleeps"], [["a red kite flies"], ["two dogs run"]])
    >>> items.round(4).tolist()
    [10.0, 0.0]
    """
    _check(predictions, references)
    if len(predictions) < 2:
        warnings.warn("CIDEr-D of fewer than 2 images is 0: it weighs words by how few images have them", stacklevel=2)
    counts = [[_ngrams(tokens(caption)) for caption in captions] for captions in references]
    seen = Counter(gram for captions in counts for gram in set().union(*captions))
    unseen = math.log(len(counts))
    rarity = {gram: unseen - math.log(count) for gram, count in seen.items()}
    items = np.zeros(len(predictions))
    for i, (prediction, captions) in enumerate(zip(predictions, counts, strict=True)):
        grams = _ngrams(tokens(prediction))
        mine = {gram: count * rarity.get(gram, unseen) for gram, count in grams.items()}
        my_squares = [0.0] * 4  # of the length of each size's vector
        for gram, weight in mine.items():
            my_squares[len(gram) - 1] += weight * weight
        for caption in captions:
            squares, shared = [0.0] * 4, [0.0] * 4
            for gram, count in caption.items():
                weight = count * rarity[gram]
                squares[len(gram) - 1] += weight * weight
                if gram in mine:
                    shared[len(gram) - 1] += min(mine[gram], weight) * weight
            cosines = (s / math.sqrt(a * b) for s, a, b in zip(shared, my_squares, squares, strict=True) if a * b > 0)
            longer = _words(grams) - _words(caption)
            items[i] += 10 * sum(cosines) / 4 * math.exp(-(longer**2) / 72) / len(captions)  # a sigma of 6 words
    return float(items.mean()), items


def normalized_answer(text: str) -> str:
    """An answer as VQA compares it: lower case, no punctuation or articles, figures for small numbers, apostrophes mended.

    Ours: the contractions are a list of our own, and prediction and answers are always normalised, also where all annotators
    agree.

    >>> normalized_answer("The two dogs, dont ask."), normalized_answer("2,000"), normalized_answer("black/white")
    ("2 dogs don't ask", '2000', 'black white')
    """
    joined = bool(re.search(r"\d,\d", text))
    found = text
    for mark in PUNCTUATION:
        found = found.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    words = (NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", found).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[float, NDArray[np.float64]]:
    """VQAv2's accuracy, 0..1 (its own tool prints per cent): the mean, and of each item (n,).

    Each annotator is left out in turn; an answer that 3 of the others gave is right, one of theirs a third right. Ours: with
    fewer than 4 annotators as many as there are others must agree, and a lone answer must be met exactly.

    Args:
        predictions: an answer each. answers: the annotators' answers for each, 10 in VQAv2.

    Raises:
        ValueError: as :func:`bleu`.

    >>> vqa_accuracy(["Yes."], [["yes"] * 2 + ["no"] * 8])[0]
    0.6
    """
    _check(predictions, answers)
    items = np.empty(len(predictions))
    for i, (prediction, given) in enumerate(zip(predictions, answers, strict=True)):
        found = normalized_answer(prediction)
        equal = [normalized_answer(answer) == found for answer in given]
        if len(given) == 1:
            items[i] = equal[0]
            continue
        enough, hits = min(3, len(given) - 1), sum(equal)
        items[i] = np.mean([min(1.0, (hits - mine) / enough) for mine in equal])
    return float(items.mean()), items


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over items of the F1 of words as a bag, 0..1, with the best reference.

    Arguments and errors: as :func:`bleu`.

    >>> token_f1(["a red dog"], [["the red dog"]])
    0.6666666666666666
    """
    _check(predictions, references)
    best = []
    for prediction, captions in zip(predictions, references, strict=True):
        words = Counter(tokens(prediction))
        others = [Counter(tokens(caption)) for caption in captions]
        best.append(max(2 * (words & other).total() / max(1, words.total() + other.total()) for other in others))
    return float(np.mean(best))


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions whose words are those of a reference, 0..1. Arguments and errors: as :func:`bleu`."""
    _check(predictions, references)
    return sum(matches(p, r) for p, r in zip(predictions, references, strict=True)) / len(predictions)


def copy_rate(
    predictions: Sequence[str],
    demonstrations: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]] | None = None,
) -> float:
    """Share of predictions that are the text of one of their demonstrations, 0..1.

    Args:
        predictions: a text each. demonstrations: captions, or answers without their questions, of each item's demonstrations;
            an item may have none. references: where given, a copy that is also a reference is not counted.

    Raises:
        ValueError: if there are no predictions, or not a row of the others for each.
    """
    references = [[]] * len(predictions) if references is None else references
    _check(predictions, demonstrations, least=0)
    _check(predictions, references, least=0)
    rows = zip(predictions, demonstrations, references, strict=True)
    return sum(matches(p, shown) and not matches(p, right) for p, shown, right in rows) / len(predictions)


def matches(prediction: str, texts: Iterable[str]) -> bool:
    """Whether the words of the prediction are those of one of the texts."""
    words = tokens(prediction)
    return any(tokens(text) == words for text in texts)


def scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    questions: Sequence[str],
    *,
    nll: ArrayLike,
    tokens: ArrayLike,
    demonstrations: Sequence[Sequence[str]],
) -> dict[str, float]:
    """All that applies to judged samples, by name.

    nll: nats per target token, over all samples. Of captions: token_f1, exact_match, cider_d, bleu_4, rouge_l, copy_rate. Of
    questions: vqa_accuracy, of it yes_no and other (by the commonest answer), copy_rate_other. The copy rates count copies
    that are wrong, of questions among the others alone: a wrong yes is a demonstration's answer by chance. There are none
    without demonstrations.

    Args:
        predictions: (n,) texts. references: captions or annotators' answers of each. questions: (n,), "" for a caption.
        nll: (n,) nats, summed over the target's tokens. tokens: (n,) how many these are. demonstrations: as :func:`copy_rate`.

    Raises:
        ValueError: as :func:`bleu`.
    """
    _check(predictions, references)
    lengths = np.asarray(tokens)
    found = {"nll": float(np.asarray(nll, dtype=np.float64).sum() / lengths.sum())}
    captions = [i for i, question in enumerate(questions) if not question]
    asked = [i for i, question in enumerate(questions) if question]

    def rows(chosen: Sequence[int]) -> tuple[list[str], list[Sequence[str]], list[Sequence[str]]]:
        return [predictions[i] for i in chosen], [references[i] for i in chosen], [demonstrations[i] for i in chosen]

    if captions:
        texts, right, shown = rows(captions)
        found |= {"token_f1": token_f1(texts, right), "exact_match": exact_match(texts, right)}
        found |= {
            "cider_d": cider_d(texts, right)[0],
            "bleu_4": bleu(texts, right)[3],
            "rouge_l": rouge_l(texts, right),
        }
        found |= {"copy_rate": copy_rate(texts, shown, right)} if any(shown) else {}
    if asked:
        texts, right, _ = rows(asked)
        found["vqa_accuracy"], items = vqa_accuracy(texts, right)
        polar = np.array([_commonest(answers) in ("yes", "no") for answers in right])
        found |= {
            name: float(items[mask].mean()) for name, mask in (("yes_no", polar), ("other", ~polar)) if mask.any()
        }
        texts, right, shown = rows(np.array(asked)[~polar].tolist())
        found |= {"copy_rate_other": copy_rate(texts, shown, right)} if any(shown) else {}
    return found


def _check(predictions: Sequence[str], others: Sequence[Sequence[str]], least: int = 1) -> None:
    if not len(predictions):
        raise ValueError("there are no predictions to score")
    if len(predictions) != len(others):
        raise ValueError(f"{len(predictions)} predictions, but {len(others)} rows of texts to compare them with")
    for i, texts in enumerate(others):
        if isinstance(texts, str) or len(texts) < least:
            raise ValueError(f"item {i}: expected a list of {'one or more ' * least}texts, got {texts!r}")


def _ngrams(words: Sequence[str], n: int = 4) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to n words stands there."""
    return Counter(gram for size in range(1, n + 1) for gram in zip(*(words[i:] for i in range(size)), strict=False))


def _words(grams: Counter[tuple[str, ...]]) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _rouge_l(prediction: str, captions: Sequence[str]) -> float:
    words, others = tokens(prediction), [tokens(caption) for caption in captions]
    common = [_common(words, other) for other in others]
    if not max(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / max(1, len(other)) for length, other in zip(common, others, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: bit-parallel, a zero bit for each of its members in ``a``."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = rows = (1 << len(a)) - 1
    for word in b:
        hit = rows & places.get(word, 0)
        rows = (rows + hit | rows - hit) & every
    return (every ^ rows).bit_count()


def _commonest(answers: Sequence[str]) -> str:
    return Counter(map(normalized_answer, answers)).most_common(1)[0][0]
