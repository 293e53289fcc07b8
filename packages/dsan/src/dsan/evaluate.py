"""Judging a model by labelled crops; the verb ``eval``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from tqdm.auto import tqdm

from dsan.data import read_data
from dsan.images import Size, fit
from dsan.metrics import GROUPS, scores, simplify
from dsan.model import DSAN
from dsan.read import SearchOptions, load_model, recognise


@dataclass
class EvalOptions:
    """What to judge, and how."""

    model: str = flag("folder that `dsan train` wrote")
    data: list[str] = flag(
        "sample (rendered); iiit5k (its 3000 test crops, in $PAPERCORE_DATA/dsan); or paths: LMDB folders, folders or zips with "
        "gt.txt or labels.json, joined",
        ["sample"],
    )
    decode: list[str] = flag("branches to judge: ctx, enh, fuse (of each word the surer one)", ["ctx"])
    cased: bool = flag("compare upper and lower case", False)
    punctuation: bool = flag("compare all characters, not 0-9 and a-z alone", False)
    min_length: int = flag(
        "leave out words with fewer characters, as older papers do: 3 for lexicon protocols on SVT and IC13", 0
    )
    alphanumeric: bool = flag("leave out words with other characters than 0-9, a-z and A-Z, as older papers do", False)
    output: str | None = flag(
        "JSON file for scores and every prediction; eval-DATA.json in the model's folder if not given", None
    )


def evaluate_checkpoint(options: EvalOptions, search: SearchOptions) -> dict[str, dict[str, float]]:
    """The verb ``eval``: a table and a JSON file. Returns :func:`dsan.metrics.scores` of each branch.

    The title always says how many words of how many are judged, and how they are compared: figures of different choices are not
    comparable.

    Raises:
        ValueError: if no word is left, and as the readers, :func:`dsan.read.load_model` and :func:`dsan.read.recognise`.
    """
    model = load_model(options.model)
    keywords = search.keywords()
    names, truths, fitted = _words(options.data, model.size)
    kept = [i for i, truth in enumerate(truths) if _belongs(truth, options)]
    if not kept:
        raise ValueError(f"{' '.join(options.data)}: no word to judge is left of {len(truths)}")
    judged = [truths[i] for i in kept]
    bar = tqdm(kept, "reading", unit="crop", delay=2, leave=False, disable=None)
    readings = recognise(model, (fitted(i) for i in bar), options.decode, **keywords)
    compare = {"cased": options.cased, "punctuation": options.punctuation}
    texts = {branch: [reading.text for reading in found] for branch, found in readings.items()}
    results = {branch: scores(found, judged, **compare) for branch, found in texts.items()}
    variant = _variant(len(kept), len(truths), options)
    found_by = "lexicon" if search.lexicon else search.search
    _print(f"{options.model} on {' '.join(options.data)}: {variant}; search {found_by}", results)
    for line in _notes(judged, model, compare):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    record = {"model": options.model, "data": options.data, "variant": variant, "read": len(truths), **compare}
    record |= {"min_length": options.min_length, "alphanumeric": options.alphanumeric, "search": vars(search)}
    predictions = [
        {"name": names[i], "truth": truths[i]}
        | {branch: {"text": r[row].text, "confidence": r[row].confidence} for branch, r in readings.items()}
        for row, i in enumerate(kept)
    ]
    label = re.sub(r"[^\w.-]+", "-", "-".join(Path(path).stem for path in options.data))
    path = Path(options.output or Path(options.model) / f"eval-{label}.json")
    write_json(path, record | {"scores": results, "predictions": predictions})
    console.print(str(path), soft_wrap=True)
    return results


def _words(data: Sequence[str], size: Size) -> tuple[Sequence[str], list[str], Callable[[int], NDArray[np.uint8]]]:
    """Names and labels of crops, and a function from a position to the fitted crop."""
    if list(data) == ["sample"]:
        from dsan.sample import sample_words

        words = sample_words(size)[1]
        return words.names, words.labels, lambda i: words.arrays([i])[0]
    crops = read_data(data, "test")
    return crops.names, crops.labels, lambda i: fit(crops.open(i), **asdict(size))


def _belongs(truth: str, options: EvalOptions) -> bool:
    if options.alphanumeric and re.search("[^0-9a-zA-Z]", truth):
        return False
    return len(truth) >= options.min_length


def _variant(kept: int, read: int, options: EvalOptions) -> str:
    """Which words are judged, and what counts as right.

    >>> _variant(1015, 1095, EvalOptions("m", min_length=3, alphanumeric=True))
    '1015 of 1095 words (left out: shorter than 3, or with a character other than 0-9, a-z and A-Z), compared by a-z and 0-9'
    """
    reasons = [f"shorter than {options.min_length}"] if options.min_length > 1 else []
    reasons += ["with a character other than 0-9, a-z and A-Z"] if options.alphanumeric else []
    words = f"{kept} of {read} words (left out: {', or '.join(reasons)})" if reasons else f"all {kept} words"
    compared = "all characters" if options.punctuation else "a-z and 0-9"
    return f"{words}, compared by {compared}" + (", case counts" if options.cased else "")


def _notes(truths: Sequence[str], model: DSAN, compare: dict[str, bool]) -> Iterator[str]:
    """What a reader of the figures should know."""
    compared = [simplify(truth, **compare) for truth in truths]
    empty = sum(not text for text in compared)
    if empty:
        yield f"{empty} words have nothing to compare, and right is who reads nothing: --punctuation compares all characters"
    known = set(model.charset.characters)
    known |= set() if compare["cased"] else {c.lower() for c in known}
    beyond = [truth for truth, text in zip(truths, compared, strict=True) if not known.issuperset(text)]
    if beyond:
        yield f"{len(beyond)} words, such as {beyond[0]!r}, have characters that the model has not: it gets none of them right"


def _print(title: str, results: dict[str, dict[str, float]]) -> None:
    first = next(iter(results.values()))
    said = {"digit": "with a digit", "short": "of 1 or 2 characters", "repeat": "with a doubled one"}
    columns = {"accuracy": "accuracy %", "exact": "exact %", "similarity": "1 - NED %"}
    for group in GROUPS:
        if f"words_{group}" in first:
            columns[f"accuracy_{group}"] = f"{first[f'words_{group}']} {said[group]} %"
    rows = [[branch, *(f"{100 * found[key]:.2f}" for key in columns)] for branch, found in results.items()]
    print_table(title, ["branch", *columns.values()], rows)
