"""Judging a model by images with human scores; the verb ``eval``."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table

from iqa_distill.data import DataOptions, read_data, split
from iqa_distill.metric import load_model, model_folder
from iqa_distill.metrics import correlations, krcc, plcc, srcc
from iqa_distill.plots import plot_scatter
from iqa_distill.readers import RatedImages
from iqa_distill.scoring import score_images


@dataclass
class EvalOptions:
    """What to judge, and by which images."""

    model: str = flag("folder that `iqa-distill train` wrote")
    data: str | None = flag(
        "data set, as `train` takes it: the test part of its column split, or all of it; if not given, or if it is what the "
        "model was trained on, the test part of that run",
        None,
    )
    lower_better: bool | None = flag("whether low scores of --data are good; by default for LIVE and CSIQ alone", None)
    logistic: int = flag("parameters of the curve that is fitted before PLCC and RMSE: 4 (CVRKD-IQA) or 5 (VQEG)", 4)
    max_crops_per_batch: int = flag("bounds the memory; it does not change a score", 64)
    skip_bad: bool = flag("leave out images that cannot be read, and list them, instead of stopping", False)
    output: str | None = flag(
        "JSON file for correlations and predictions, beside it a picture; eval-DATA.json in the model's folder if not given",
        None,
    )


def evaluate(options: EvalOptions) -> dict[str, float]:
    """The verb ``eval``: a table, a JSON file and a picture. Returns :func:`iqa_distill.metrics.correlations`.

    No image that the run trained on is judged: of its own data set it is the same test part again, by the options that the run
    recorded.

    Raises:
        ValueError: for a model without a record of its data, if none is given; for data without test images; for an image that
            cannot be read, naming it; and as :func:`iqa_distill.readers.read_ratings` and
            :func:`iqa_distill.metrics.correlations`. OSError: as :func:`iqa_distill.metric.load_model`.
    """
    model = load_model(options.model)
    name, rated, part = _judged(options)
    kept: list[int] = []
    found = score_images(
        model, _opened(rated, kept, options.skip_bad), max_crops_per_batch=options.max_crops_per_batch, progress=True
    )
    rated = rated.select(kept)
    results = correlations(found, rated.scores, options.logistic)
    groups = _by_distortion(found, rated)
    _print(
        f"{options.model} on {name}: {len(found)} images ({part}), {model.preprocessing.crops} crops each",
        results,
        groups,
        options,
    )
    label = re.sub(r"[^\w.-]+", "-", Path(name.rstrip("/")).stem)
    path = Path(options.output or model_folder(options.model) / f"eval-{label}.json")
    rows = {"image": rated.names, "prediction": found.tolist(), "score": rated.scores.tolist()}
    rows |= {"reference": rated.references} if rated.references else {}
    rows |= {"distortion": rated.distortions} if rated.distortions else {}
    record = {"model": options.model, "data": name, "part": part, "logistic": options.logistic, "correlations": results}
    record |= {
        "by_distortion": groups,
        "predictions": [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)],
    }
    write_json(path, record)
    plot_scatter(path.with_suffix(".png"), found, rated.scores, rated.distortions, f"SRCC {results['srcc']:.3f}")
    console.print(f"{path}, {path.with_suffix('.png').name}", soft_wrap=True, markup=False, highlight=False)
    return results


def trained_on(folder: str | Path) -> DataOptions | None:
    """The data of the run that wrote a folder; None where it has no record."""
    record = Path(folder) / "options.json"
    if not record.is_file():
        return None
    options = json.loads(record.read_text())
    return DataOptions(**{f.name: options[f.name] for f in dataclasses.fields(DataOptions) if f.name in options})


def _judged(options: EvalOptions) -> tuple[str, RatedImages, str]:
    """Name of the data, the images to judge, and which part of the data they are."""
    own = trained_on(model_folder(options.model))
    if options.data is None and own is None:
        raise ValueError(f"{options.model} has no options.json, which says what it was trained on: give --data")
    if own is not None and (options.data is None or _same(options.data, own.data)):
        rated = read_data(own)
        chosen, part = split(rated, own)[2], "the run's test part"
        name = own.data
    else:
        assert options.data is not None
        name = options.data
        rated = read_data(DataOptions(data=name, lower_better=options.lower_better))
        test = np.flatnonzero([word == "test" for word in rated.splits or ()])
        chosen, part = (test, "its test part") if rated.splits else (np.arange(len(rated)), "all")
    if not len(chosen):
        raise ValueError(f"{name}: {part} has no images")
    return name, rated.select(chosen), part


def _same(data: str, other: str) -> bool:
    return data == other or (Path(data).exists() and Path(other).exists() and Path(data).samefile(other))


def _opened(rated: RatedImages, kept: list[int], skip_bad: bool) -> Iterator[Any]:
    """The images in turn; numbers of those that can be opened are appended."""
    for i, name in enumerate(rated.names):
        try:
            image = rated.open(i)
        except (ValueError, OSError) as error:
            if not skip_bad:
                raise ValueError(f"{name}: {error}; --skip_bad true leaves such images out") from None
            print(f"iqa-distill: left out {name}: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        kept.append(i)
        yield image


def _by_distortion(found: np.ndarray, rated: RatedImages) -> dict[str, dict[str, float]]:
    """For each kind of distortion with at least 3 images."""
    labels = np.array(rated.distortions or [])
    groups = {}
    for kind in np.unique(labels):
        x, y = found[labels == kind], rated.scores[labels == kind]
        if len(x) >= 3:
            groups[str(kind)] = {"images": len(x), "srcc": srcc(x, y), "krcc": krcc(x, y), "plcc": plcc(x, y)}
    return groups


def _print(title: str, results: dict[str, float], groups: dict[str, dict[str, float]], options: EvalOptions) -> None:
    columns = {"srcc": "SRCC", "krcc": "KRCC", "plcc": "PLCC, raw"}
    fitted = {
        key: f"{key[:4].upper()}, fitted ({options.logistic} parameters)" for key in ("plcc_fitted", "rmse_fitted")
    }
    rows = [["all", *(f"{results[key]:.4f}" for key in (*columns, *fitted))]]
    rows += [[kind, *(f"{group[key]:.4f}" for key in columns), "", ""] for kind, group in groups.items()]
    print_table(title, ["images", *columns.values(), *fitted.values()], rows)
