"""The verb ``train``: tune a model with in-context examples; on the sample, beside the arms without them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.training import resumable
from papercore.ops import pick_device, seed_everything
from transformers import AutoTokenizer

from mmict.corpus import Corpus, new_sampler, prepare
from mmict.data import DataOptions, Splits, load_samples
from mmict.hub import MHub, MHubConfig
from mmict.judge import Judgement, judge
from mmict.lm import add_lora, checkpoint_layers, is_seq2seq, load_lm
from mmict.metrics import scores
from mmict.model import MMICTConfig, MMICTModel
from mmict.plots import plot_dialogs, plot_training
from mmict.processor import Processor
from mmict.small import SmallOptions, small_model
from mmict.trainer import ARMS, MMICTTrainer, MMICTTrainingConfig
from mmict.vision import load_vision

# Ours, for a few minutes of two cores: the schedule of a small model, and its three stages.
SMALL: dict[str, Any] = {
    "max_steps": 200, "per_device_train_batch_size": 24, "learning_rate": 1e-3, "warmup_steps": 0.1, "max_grad_norm": 1.0,
}  # fmt: skip
STAGES = SmallOptions(steps=(500, 300, 200))
SIDE_BY_SIDE = ("ft", "ict", "mmict")
SHOWN = 6  # queries in the picture


@dataclass
class ModelOptions:
    """What to begin with."""

    init: str | None = flag(
        "small (made from the training samples, for CPUs; the default); a folder or Hub name of BLIP-2 or InstructBLIP "
        "(official: BLIP-2); or a checkpoint of mmict",
        None,
    )
    bert: str | None = flag("for BLIP-2, which has no text branch: a BERT (official: bert-base-uncased)", None)
    vision: str | None = flag("instead of --init: an encoder, of transformers or timm/NAME; with --lm", None)
    lm: str | None = flag("instead of --init: a language model of transformers; with --vision", None)
    hub_tokenizer: str | None = flag("with --vision and --lm: the hub's tokenizer; that of --lm if not given", None)
    queries: int = flag("with --vision and --lm: queries of the new hub (official: 32)", 32)
    layers: int = flag("with --vision and --lm: layers of the new hub (official: 12)", 12)
    compare: bool | None = flag(
        "also tune without demonstrations and by vanilla in-context tuning; on the sample yes", None
    )

    def __post_init__(self) -> None:
        if (self.vision is None) != (self.lm is None):
            raise ValueError("--vision and --lm come together")
        if self.init is not None and self.vision is not None:
            raise ValueError("give --init, or --vision and --lm, not both")


def new_model(
    options: ModelOptions,
    splits: Splits,
    folder: Path,
    config: MMICTConfig,
    stages: SmallOptions = STAGES,
    dtype: torch.dtype | None = None,
) -> MMICTModel:
    """What :class:`ModelOptions` says, joined as ``config`` says.

    Args:
        folder, stages: what is made from samples is made there, once, and in how many steps.
        dtype: of a language model that is loaded; None: float32.
    """
    lm: Any
    if options.vision is not None and options.lm is not None:
        vision, lm = load_vision(options.vision), load_lm(options.lm, dtype)
        own = AutoTokenizer.from_pretrained(options.lm)
        hub_tokenizer = AutoTokenizer.from_pretrained(options.hub_tokenizer or options.lm)
        shape = MHubConfig(
            vision_width=vision.width, lm_width=lm.get_input_embeddings().weight.shape[1], queries=options.queries,
            layers=options.layers, vocabulary=len(hub_tokenizer),
        )  # fmt: skip
        return MMICTModel(vision, MHub(shape), lm, Processor(hub_tokenizer, own, causal=not is_seq2seq(lm)), config)
    if options.init in (None, "small"):
        model = small_model(folder / "small", splits.train, options=stages)
        model.config = config
        return model
    record = Path(options.init) / "config.json"
    if record.exists() and "mmict" in json.loads(record.read_text()):
        return MMICTModel.from_pretrained(options.init, **dataclasses.asdict(config))
    return MMICTModel.from_blip2(options.init, bert=options.bert, config=config, dtype=dtype)


def fit(
    model: MMICTModel, corpus: Corpus, config: MMICTTrainingConfig, *record: Any, validation: Corpus | None = None
) -> MMICTTrainer:
    """Tune a model, or go on with it, in ``config.output_dir``, where it is saved. ``record``: other options of the run."""
    folder = Path(str(config.output_dir))
    checkpoint = resumable(folder, config, *record)
    seed_everything(config.seed)
    if config.lora_rank and not hasattr(model.lm, "peft_config"):
        model.lm = add_lora(model.lm, config.lora_rank, 2 * config.lora_rank)
    if config.gradient_checkpointing or getattr(config, "activation_checkpointing", False):  # the newer name
        checkpoint_layers(model.lm)
        config = copy.copy(config)  # the engine's own needs a model of transformers
        config.activation_checkpointing = config.gradient_checkpointing = False
    trainer = MMICTTrainer(
        model=model, args=config, corpus=corpus, validation=validation,
        sampler=new_sampler(corpus, config.sampler, config.k, config.seed),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        model.save_pretrained(folder)
    return trainer


def measure(found: Judgement, queries: Corpus) -> dict[str, float]:
    """All metrics that apply."""
    samples = queries.samples
    return scores(
        found.predictions, samples.references, samples.questions, nll=found.nll, tokens=found.tokens,
        demonstrations=found.demonstrations,
    )  # fmt: skip


def train(data: DataOptions, options: ModelOptions, config: MMICTTrainingConfig) -> dict[str, dict[str, float]]:
    """The verb ``train``.

    Returns:
        metrics on the first test set by arm, each with the demonstrations that it was tuned with.
    """
    config.output_dir = config.output_dir or f"runs/mmict-{name_of(data.data)}"
    folder = Path(config.output_dir)
    splits = load_samples(data)
    most = config.max_steps if config.max_steps > 0 else max(STAGES.steps)  # a run cut short is short in all its parts
    stages = dataclasses.replace(STAGES, steps=tuple(min(steps, most) for steps in STAGES.steps))
    small = options.init in (None, "small") and options.vision is None
    if small:
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        config = dataclasses.replace(config, **{k: v for k, v in SMALL.items() if getattr(config, k) == defaults[k]})
    compare = data.data.startswith("sample") if options.compare is None else options.compare
    arms = [arm for arm in SIDE_BY_SIDE if compare and arm != config.arm] + [config.arm]
    histories, predictions, results = {}, {}, {}
    first = next(iter(splits.tests), None)
    corpus = queries = None
    cache = (folder / "small" if small else folder) / "features.npy"
    for arm in arms:
        own = dataclasses.replace(config, arm=arm, output_dir=str(folder if arm == config.arm else folder / arm))
        dtype = torch.bfloat16 if own.bf16 else None
        model = new_model(options, splits, folder, own.model_config(), stages, dtype).to(pick_device())
        if corpus is None:  # the frozen parts are the same in all arms
            with own.main_process_first(local=False):  # the others read it
                corpus = prepare(model, splits.train, cache)
            queries = None if first is None else prepare(model, splits.tests[first])
        console.print(f"{arm}: {own.shown} demonstrations ({ARMS[arm][0]})", soft_wrap=True)
        trainer = fit(
            model, corpus, own, data, options, validation=None if own.eval_strategy == "no" else queries
        )  # fmt: skip
        if not trainer.is_world_process_zero():
            continue
        histories[arm] = trainer.state.log_history
        if queries is not None:
            sampler = new_sampler(corpus, own.sampler, own.k, own.seed)
            found = judge(model, queries, corpus, sampler, own.shown, num_beams=1)
            results[arm] = measure(found, queries)
            predictions[arm] = found
    if histories:
        plot_training(folder / "training.png", histories)
        console.print(f"checkpoint {folder}, loss {folder / 'training.png'}", soft_wrap=True)
    if first is not None and predictions:
        write_json(folder / "metrics.json", results)
        names = list(dict.fromkeys(name for found in results.values() for name in found))
        rows = [[arm, *(f"{found[n]:.3f}" if n in found else "" for n in names)] for arm, found in results.items()]
        print_table(f"{len(splits.tests[first])} {first} samples, greedy", ["arm", *names], rows)
        _picture(folder / "dialogs.png", splits, first, predictions)
        console.print(f"queries, demonstrations and texts: {folder / 'dialogs.png'}", soft_wrap=True)
    return results


def _picture(path: Path, splits: Splits, test: str, found: dict[str, Judgement]) -> None:
    """Some queries with the demonstrations of the last arm, and what each arm says."""
    samples, train = splits.tests[test], splits.train
    count = min(SHOWN, len(samples))
    chosen = [i * len(samples) // count for i in range(count)]
    shown = list(found.values())[-1].rows

    def picture(of: Any, row: int) -> Any:
        return [of.open(frame) for frame in of.frames[row]] if len(of.frames[row]) > 1 else of.open(of.frames[row][0])

    plot_dialogs(
        path,
        [picture(samples, row) for row in chosen],
        [[(picture(train, other), train.texts[other]) for other in shown[row]] for row in chosen],
        [samples.references[row] for row in chosen],
        {arm: [judgement.predictions[row] for row in chosen] for arm, judgement in found.items()},
        [samples.questions[row] for row in chosen] if any(samples.questions) else None,
    )


def name_of(data: str) -> str:
    """Of a data set, for a folder."""
    return re.sub(r"\W+", "-", Path(data.rstrip("/")).stem).strip("-") or "data"
