"""The verb ``train``: a teacher, its student, and on the sample what other losses would have given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.training import resumable
from papercore.ops import seed_everything
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from sinkd.encode import (
    Collator,
    Features,
    encode_language,
    encode_prompts,
    encode_texts,
    fingerprint,
    numbered,
    with_teacher_inputs,
)
from sinkd.evaluate import judge, write_record
from sinkd.metrics import likeness
from sinkd.models import (
    ModelOptions,
    architecture_of,
    copy_shared,
    from_scratch,
    load_model,
    load_tokenizer,
    scratch_size,
)
from sinkd.plots import plot_training
from sinkd.prompts import Prompt, prompt_for, render
from sinkd.readers import DataOptions, Splits, load
from sinkd.sample import train_tokenizer
from sinkd.teacher_cache import TeacherCache
from sinkd.trainer import SinKDConfig, SinKDTrainer


@dataclass
class TrainOptions:
    """What is learnt from the texts, and what it is compared with."""

    objective: str = flag("classify the texts, or language: learn a decoder to predict them", "classify")
    prompt: str | None = flag(
        "language models: template with {first}, {second}, ...; the task's own if not given", None
    )
    compare: bool | None = flag(
        "also train the student alone and with KD alone; if not given: on the sample only", None
    )

    def __post_init__(self) -> None:
        if self.objective not in ("classify", "language"):
            raise ValueError(f"objective must be classify or language, got {self.objective!r}")


FROM_SCRATCH = {"learning_rate": 2e-3, "num_train_epochs": 8, "max_length": 48}  # what such models need


def suited(data: DataOptions, models: ModelOptions, config: SinKDConfig) -> tuple[ModelOptions, SinKDConfig]:
    """On the sample, two small models where none is named. For models from scratch, another recipe where the defaults stand."""
    if data.data == "sample":
        if models.teacher is None and models.student is None:
            models = dataclasses.replace(models, student="scratch:32x1")
        if models.teacher is None and models.teacher_cache is None:
            models = dataclasses.replace(models, teacher="scratch:64x2")
    if scratch_size(models.student or models.teacher):
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        changes: dict[str, Any] = {k: v for k, v in FROM_SCRATCH.items() if getattr(config, k) == defaults[k]}
        config = dataclasses.replace(config, **changes)
    return models, config


@dataclass
class Setting:
    """Everything that is the same for a teacher and all its students.

    Attributes:
        tokenizer: the student's. teacher_tokenizer: the teacher's, if it is another one.
    """

    splits: Splits
    architecture: str
    objective: str
    prompt: Prompt | None
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Features:
        """The training texts."""
        if self.objective == "language":
            return encode_language(self.splits.train.first, tokenizer, self.max_length)
        if self.architecture == "encoder":
            return encode_texts(self.splits.train, tokenizer, self.max_length)
        assert self.prompt is not None
        return encode_prompts(render(self.splits.train, self.prompt), tokenizer, self.max_length, self.architecture)

    def answer_ids(self) -> list[int]:
        """The first token of each answer of the prompt."""
        assert self.prompt is not None
        firsts = [self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in self.prompt.choices]
        return list(dict.fromkeys(firsts))

    def judge(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Metrics on the test split, and the logits behind them."""
        return judge(model, tokenizer, self.splits.test, self.max_length, self.objective, self.prompt)


def prepare(data: DataOptions, models: ModelOptions, options: TrainOptions, max_length: int, seed: int) -> Setting:
    """Read the data, settle on an architecture, load the tokenizers."""
    transformers.utils.logging.disable_progress_bar()  # of weights read and written: milliseconds
    splits = load(data, seed)
    names = [name for name in (models.student, models.teacher) if name is not None]
    if not names:
        raise ValueError(
            "give --teacher, a folder, a Hub name or scratch:WIDTHxLAYERS, or --student alone to fine-tune it without a teacher"
        )
    pretrained = [name for name in names if scratch_size(name) is None]
    kind = models.architecture or (architecture_of(AutoConfig.from_pretrained(pretrained[0])) if pretrained else None)
    architecture = kind or ("decoder" if options.objective == "language" else "encoder")
    if options.objective == "language" and architecture != "decoder":
        raise ValueError(f"--objective language needs a decoder, not an {architecture}")
    texts = splits.train.first + (splits.train.second or [])
    tokenizer = load_tokenizer(pretrained[0]) if pretrained else train_tokenizer(texts)
    theirs = load_tokenizer(pretrained[-1]) if models.teacher in pretrained else None
    if theirs is not None and theirs.get_vocab() == tokenizer.get_vocab():
        theirs = None
    if theirs is not None and architecture != "encoder":
        raise ValueError(
            "teacher and student must share the vocabulary: a language model's outputs are compared token by token"
        )
    prompt = None
    if architecture != "encoder" and options.objective == "classify":
        prompt = prompt_for(splits.train.task, options.prompt)
    return Setting(splits, architecture, options.objective, prompt, max_length, tokenizer, theirs)


def fit_teacher(setting: Setting, models: ModelOptions, config: SinKDConfig) -> PreTrainedModel:
    """The teacher, fine-tuned on the labels alone first if it is asked for, or from scratch; in OUTPUT_DIR/teacher."""
    task = setting.splits.train.task
    assert models.teacher is not None
    size = scratch_size(models.teacher)
    if size is None and not models.finetune_teacher:
        return load_model(models.teacher, setting.architecture, task)
    own = dataclasses.replace(
        config,
        output_dir=str(Path(str(config.output_dir)) / "teacher"),
        num_train_epochs=models.teacher_epochs or config.num_train_epochs,
        learning_rate=models.teacher_learning_rate or config.learning_rate,
    )
    seed_everything(config.seed)
    tokenizer = setting.teacher_tokenizer or setting.tokenizer
    if size:
        model = from_scratch(setting.architecture, task, tokenizer, *size)
    else:
        model = load_model(models.teacher, setting.architecture, task, new_head=True)
    return run(model, None, setting, own, tokenizer, setting.encode(tokenizer)).model


def new_student(
    setting: Setting, models: ModelOptions, config: SinKDConfig, teacher: PreTrainedModel | None
) -> PreTrainedModel:
    """The student before training, the same for each loss."""
    seed_everything(config.seed)
    task, name = setting.splits.train.task, models.student or models.teacher
    assert name is not None
    size = scratch_size(name)
    if size:
        return from_scratch(setting.architecture, task, setting.tokenizer, *size)
    student = load_model(name, setting.architecture, task, models.student_layers, new_head=True)
    if models.student_init == "copy":
        if teacher is None:
            raise ValueError("--student_init copy needs a --teacher to copy from")
        copy_shared(student, teacher)
    return student


def run(
    model: PreTrainedModel,
    teacher: PreTrainedModel | TeacherCache | None,
    setting: Setting,
    config: SinKDConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Features,
    *record: Any,
) -> SinKDTrainer:
    """Train, or go on with training, in ``config.output_dir``."""
    checkpoint = resumable(str(config.output_dir), config, *record)
    live, cache = (None, teacher) if isinstance(teacher, TeacherCache) else (teacher, None)
    trainer = SinKDTrainer(
        model,
        live,
        config,
        teacher_cache=cache,
        vocab_ids=setting.answer_ids() if config.answers_only else None,
        train_dataset=rows if cache is None else numbered(rows),
        processing_class=tokenizer,
        data_collator=Collator(tokenizer, setting.teacher_tokenizer),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        trainer.save_model(str(config.output_dir))
        prompt = None if setting.prompt is None else dataclasses.asdict(setting.prompt)
        write_record(
            Path(str(config.output_dir)), objective=setting.objective, prompt=prompt, max_length=setting.max_length
        )
    return trainer


def train(
    data: DataOptions, models: ModelOptions, options: TrainOptions, config: SinKDConfig
) -> dict[str, dict[str, float]]:
    """The verb ``train``: fit, save, judge on the test split, and draw."""
    config.output_dir = config.output_dir or f"runs/sinkd-{data.name}"
    folder = Path(config.output_dir)
    models, config = suited(data, models, config)
    setting = prepare(data, models, options, config.max_length, config.seed)
    rows = setting.encode(setting.tokenizer)
    results: dict[str, dict[str, float]] = {}
    teacher: PreTrainedModel | TeacherCache | None = None
    teacher_scores = None
    if models.teacher_cache is not None:
        teacher = TeacherCache.open(models.teacher_cache, fingerprint(rows))
    elif models.teacher is not None:
        teacher = fit_teacher(setting, models, config)
        results["teacher"], teacher_scores = setting.judge(teacher, setting.teacher_tokenizer or setting.tokenizer)
    own = "student alone" if teacher is None else "SinKD"
    arms: dict[str, dict[str, Any]] = {own: {}}
    if teacher is not None and (options.compare if options.compare is not None else data.data == "sample"):
        arms = {"student alone": {}, "KD alone": {"beta": 0.0}, **arms}
    if setting.teacher_tokenizer is not None and isinstance(teacher, PreTrainedModel):
        rows = with_teacher_inputs(rows, setting.encode(setting.teacher_tokenizer))
    histories = {}
    for arm, changes in arms.items():
        place = folder if arm == own else folder / arm.replace(" ", "-")
        own_config = dataclasses.replace(config, output_dir=str(place), **changes)
        student = new_student(setting, models, config, teacher if isinstance(teacher, PreTrainedModel) else None)
        guide = None if arm == "student alone" else teacher
        trainer = run(student, guide, setting, own_config, setting.tokenizer, rows, data, models, options)
        results[arm], scores = setting.judge(trainer.model, setting.tokenizer)
        if scores is not None and teacher_scores is not None and setting.splits.test.task.labels is not None:
            results[arm] |= likeness(scores, teacher_scores, config.tau)
        histories[arm] = trainer.state.log_history
    if trainer.is_world_process_zero():
        write_json(folder / "metrics.json", results)
        columns = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
        table = [[arm, *(f"{m[c]:.4f}" if c in m else "" for c in columns)] for arm, m in results.items()]
        print_table(
            f"{setting.splits.test.task.name}, {len(setting.splits.test)} test rows", ["model", *columns], table
        )
        plot_training(histories, results, folder / "training.png")
        console.print(f"checkpoint {folder}, plot {folder / 'training.png'}", soft_wrap=True)
    return results
