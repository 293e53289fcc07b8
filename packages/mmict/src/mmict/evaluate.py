"""Judging a model by test samples, with and without demonstrations; the verb ``eval``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table

from mmict.corpus import new_sampler, prepare
from mmict.data import DataOptions, load_samples
from mmict.describe import GenerationOptions, load_model
from mmict.judge import judge
from mmict.metrics import TOKENIZER, scores

COPIES = 0.1  # a share of wrong copies that a reader should know of
COLUMNS = {  # of the table: what it is called (NLL: nats per token; CIDEr-D: 0 to 10; copies: wrong ones), times what
    "nll": ("NLL", 1),
    "token_f1": ("F1 %", 100),
    "exact_match": ("exact %", 100),
    "cider_d": ("CIDEr-D", 1),
    "bleu_4": ("BLEU-4 %", 100),
    "rouge_l": ("ROUGE-L %", 100),
    "copy_rate": ("copies %", 100),
    "vqa_accuracy": ("VQA acc. %", 100),
    "yes_no": ("yes/no %", 100),
    "other": ("other %", 100),
    "copy_rate_other": ("copies, other %", 100),
}


@dataclass
class EvalOptions:
    """What to judge, and how. Without any flag of the data, it is the data that the model was trained on."""

    model: str = flag("folder that `mmict train` wrote")
    k: list[int] | None = flag(
        "demonstrations of each query; several to compare. By default 0 and as in training", None
    )
    sampler: str | None = flag("how they are chosen: random, visual, text, mixed; by default as in training", None)
    seed: int = flag("of demonstrations drawn at random", 0)
    batch_size: int = flag("queries at a time; it does not change the results", 32)
    output: str | None = flag(
        "JSON file for scores and every prediction; eval-DATA.json in the model's folder if not given", None
    )


def evaluate(
    options: EvalOptions, data: DataOptions, generation: GenerationOptions
) -> dict[str, dict[int, dict[str, float]]]:
    """The verb ``eval``: a table and a JSON file.

    Demonstrations come from the training samples. A model that does without is not helped by them, so both are shown: k = 0, and
    the k of its training. A line says where many predictions only repeat a demonstration's text.

    Returns:
        For each part of the test data and each k, what :func:`mmict.metrics.scores` measures.

    Raises:
        ValueError: for data without test samples, a negative k or a batch_size below 1; and as :func:`mmict.data.load_samples`,
            :func:`mmict.corpus.new_sampler` and :meth:`mmict.MMICTModel.from_pretrained`.
    """
    if options.batch_size < 1 or any(k < 0 for k in options.k or []):
        raise ValueError(
            f"expected k of 0 or more and batch_size of 1 or more, got {options.k} and {options.batch_size}"
        )
    model = load_model(options.model)
    run = _record(options.model)
    if data == DataOptions():
        data = DataOptions(**{f.name: run[f.name] for f in fields(DataOptions) if f.name in run})
    trained_with = 0 if model.config.demonstration == "none" else run.get("k", 2)
    sampler = options.sampler or run.get("sampler", "random")
    splits = load_samples(data)
    if not splits.tests:
        raise ValueError(f"{data.data}: there are no test samples to judge on: give --test or --test_share 0.1")
    pool = prepare(model, splits.train)
    draw = new_sampler(pool, sampler, seed=options.seed)
    results: dict[str, dict[int, dict[str, float]]] = {}
    predictions = []
    for name, samples in splits.tests.items():
        queries = prepare(model, samples)
        results[name] = {}
        for k in sorted({*(options.k or (0, trained_with))}):
            found = judge(model, queries, pool, draw, k, batch_size=options.batch_size, **asdict(generation))
            results[name][k] = scores(
                found.predictions,
                samples.references,
                samples.questions,
                nll=found.nll,
                tokens=found.tokens,
                demonstrations=found.demonstrations,
            )
            columns: dict[str, Any] = {
                "id": samples.ids,
                "question": samples.questions,
                "prediction": found.predictions,
            }
            columns |= {"references": samples.references, "demonstrations": found.demonstrations}
            columns |= {"nll": list(map(float, found.nll)), "tokens": list(map(int, found.tokens))}
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            predictions += [{"test": name, "k": k} | row for row in rows]
    sizes = ", ".join(f"{len(samples)} {name}" for name, samples in splits.tests.items())
    _print(
        f"{options.model} on {data.data}: {sizes} samples; {sampler} demonstrations of {len(splits.train)}; NLL in nats a token",
        results,
    )
    label = re.sub(r"[^\w.-]+", "-", Path(data.data).stem)
    path = Path(options.output or Path(options.model) / f"eval-{label}.json")
    record = {"model": options.model, "data": asdict(data), "sampler": sampler, "seed": options.seed}
    record |= {"tokenizer": f"{TOKENIZER} on lower-case text", "generation": asdict(generation)}
    write_json(path, record | {"scores": results, "predictions": predictions})
    console.print(str(path), soft_wrap=True, markup=False, highlight=False)
    return results


def _record(folder: str) -> dict[str, Any]:
    """The options of the run that wrote a folder, as far as they are known."""
    record = Path(folder) / "options.json"
    found: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    return found


def _print(title: str, results: dict[str, dict[int, dict[str, float]]]) -> None:
    each = [(name, k, found) for name, by_k in results.items() for k, found in by_k.items()]
    columns = {key: COLUMNS[key] for key in COLUMNS if any(key in found for _, _, found in each)}
    rows = [
        [name, str(k), *(f"{times * found[key]:.3g}" if key in found else "" for key, (_, times) in columns.items())]
        for name, k, found in each
    ]
    print_table(title, ["test", "k", *(head for head, _ in columns.values())], rows)
    for name, k, found in each:
        copies = max(found.get("copy_rate", 0.0), found.get("copy_rate_other", 0.0))
        if copies > COPIES:
            text = (
                f"{name}, k = {k}: {copies:.0%} of the texts are wrong and repeat a demonstration; compare with k = 0"
            )
            console.print(text, soft_wrap=True, markup=False, highlight=False)
