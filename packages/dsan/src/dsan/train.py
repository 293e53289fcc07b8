"""The verb ``train``: fit a recogniser, read the test crops by each branch, and draw."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.training import resumable
from papercore.ops import seed_everything

from dsan.charset import ALPHANUMERIC
from dsan.data import DataOptions, Splits, Words, load_words
from dsan.decode import Reading
from dsan.images import normalize
from dsan.metrics import scores
from dsan.model import DSAN
from dsan.plots import contact_sheet, plot_training
from dsan.trainer import DSANConfig, DSANTrainer

# Ours, for a few minutes of two cores.
SAMPLE: dict[str, Any] = {
    "num_train_epochs": 6, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "augment": False,
}  # fmt: skip
SHOWN = 24  # crops on the contact sheet


@dataclass
class ModelOptions:
    """What is trained. By default the paper's method with a network for CPUs."""

    backbone: str = flag(
        "tiny, base, vgg or timm/NAME (paper: not known; base is the usual network of its time)", "tiny"
    )
    widths: list[int] | None = flag("channels of the backbone's layers: 4 for tiny, 1 for base and vgg", None)
    hidden: int | None = flag("of the recurrent layers, each way; 64 for tiny, else 256", None)
    context: str = flag("the context branch: ctc, or attn (paper: not known)", "ctc")
    enhancement: str | None = flag("the enhancement branch: ctc, attn, frame (needs boxes), or none", "ctc")
    attention: bool = flag("text attention", True)
    attention_mode: str = flag("residual: (1 + A) F, or gate: A F", "residual")
    attention_maps: str = flag("spatial: one map; channel: one for each channel", "spatial")
    characters: str = flag("what can be read; other characters of labels are dropped, and counted", ALPHANUMERIC)
    max_length: int = flag("characters at most, of attention decoders", 25)
    width: int = flag("to which crops are stretched, pixels; their height is 32", 100)
    keep_ratio: bool = flag("keep the crops' proportions instead", False)
    max_width: int = flag("widest crop whose proportions are kept, pixels", 800)
    channels: int = flag("1: grey, 3: colour", 1)
    rotate_tall: bool = flag("turn crops that are more than 1.5 times as high as wide", False)
    pretrained: str | None = flag("start from the weights of this folder; it says all of the above", None)


def new_model(options: ModelOptions, seed: int) -> DSAN:
    """With random weights of ``seed``, or those it is to start from.

    Raises:
        ValueError: as :class:`dsan.DSAN`; for a folder that holds none.
    """
    if options.pretrained is not None:
        from dsan.read import load_model

        return load_model(options.pretrained)
    torch.manual_seed(seed)
    chosen = dataclasses.asdict(options)
    chosen.pop("pretrained")
    return DSAN(**chosen)


def fit(model: DSAN, splits: Splits, config: DSANConfig, *record: Any) -> DSANTrainer:
    """Train, or go on with training, in ``config.output_dir``, where the model is saved.

    Args:
        record: the other options that define the run.
    """
    checkpoint = resumable(Path(str(config.output_dir)), config, *record)
    seed_everything(config.seed)
    trainer = DSANTrainer(model, config, train_dataset=splits.train, validation=splits.validation)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        trainer.save_model(str(config.output_dir))
    return trainer


def readings_of(model: DSAN, words: Words) -> dict[str, list[Reading]]:
    """What each branch reads, and both together where there are two."""
    branches = ["ctx"] if model.enhancement is None or model.enhancement_kind == "frame" else ["ctx", "enh", "fuse"]
    arrays = words.arrays()
    return {branch: model.read_fitted(arrays, decode=branch, batch_size=256) for branch in branches}


def judge(readings: dict[str, list[Reading]], labels: list[str]) -> dict[str, dict[str, float]]:
    """:func:`dsan.metrics.scores` of each."""
    return {branch: scores([r.text for r in found], labels) for branch, found in readings.items()}


def train(data: DataOptions, options: ModelOptions, config: DSANConfig) -> dict[str, dict[str, float]]:
    """The verb ``train``."""
    config.output_dir = config.output_dir or f"runs/dsan-{name_of(data)}"
    if data.data == ["sample"]:
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        config = dataclasses.replace(config, **{k: v for k, v in SAMPLE.items() if getattr(config, k) == defaults[k]})
    folder = Path(str(config.output_dir))
    model = new_model(options, config.seed)
    splits = load_words(data, model.charset, model.size, model.frames)
    for line in splits.audit:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    trainer = fit(model, splits, config, data, options)
    results: dict[str, dict[str, float]] = {}
    if trainer.is_world_process_zero():
        plot_training(folder / "training.png", trainer.state.log_history)
        written = [folder / "training.png"]
        if splits.test is not None:
            results = judge(readings_of(model, splits.test), splits.test.labels)
            write_json(folder / "metrics.json", results)
            columns = {"accuracy": "accuracy %", "similarity": "1 - NED %", "accuracy_digit": "with a digit %"}
            columns = {k: v for k, v in columns.items() if k in results["ctx"]}
            rows = [[branch, *(f"{100 * found[k]:.1f}" for k in columns)] for branch, found in results.items()]
            print_table(f"{len(splits.test)} test words", ["branch", *columns.values()], rows)
            written.append(folder / "predictions.png")
            draw(model, splits.test, written[-1])
        console.print(f"checkpoint {folder}, pictures {' and '.join(map(str, written))}", soft_wrap=True)
    return results


def draw(model: DSAN, words: Words, path: Path) -> None:
    """A contact sheet of some test words, with what was read, and where the attention looks."""
    arrays = words.arrays(range(min(SHOWN, len(words))))
    device = next(model.parameters()).device
    maps = None
    if model.attention is not None:
        maps = [model.attention_map(normalize(torch.tensor(a[None]).to(device)))[0].cpu().numpy() for a in arrays]
    contact_sheet(path, arrays, model.read_fitted(arrays), words.labels[: len(arrays)], maps)


def name_of(data: DataOptions) -> str:
    """Of a data set, for a folder."""
    first = data.data[0] if data.data else "synthetic"
    return re.sub(r"\W+", "-", Path(first.rstrip("/")).stem).strip("-") or "data"
