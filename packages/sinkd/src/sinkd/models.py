"""Teachers and students: from a folder, the Hub, another model's first layers, or from scratch for the sample."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from papercore.lab.cli import flag
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)
from transformers.utils import logging

from sinkd.tasks import Task

AUTO = {
    "encoder": AutoModelForSequenceClassification,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "decoder": AutoModelForCausalLM,
}


@dataclass
class ModelOptions:
    """Who teaches whom."""

    teacher: str | None = flag(
        "folder or Hub name of a model fine-tuned on this task (see --finetune_teacher), or scratch:WIDTHxLAYERS; none given: on "
        "the sample scratch:64x2, elsewhere plain fine-tuning of the student",
        None,
    )
    finetune_teacher: bool = flag("fine-tune the teacher on this task first, in OUTPUT_DIR/teacher", False)
    teacher_epochs: float | None = flag("epochs of that; num_train_epochs if not given", None)
    teacher_learning_rate: float | None = flag("learning rate of that; learning_rate if not given", None)
    student: str | None = flag(
        "folder or Hub name the student starts from, or scratch:WIDTHxLAYERS; the teacher if not given (on the sample, without a "
        "teacher either: scratch:32x1)",
        None,
    )
    student_layers: int | None = flag("keep only so many of its first layers (paper: 6 of BERT-base's 12)", None)
    student_init: str = flag(
        "pretrained, or copy: then take over all tensors that the fine-tuned teacher has, too", "pretrained"
    )
    architecture: str | None = flag(
        "encoder, encoder-decoder or decoder; what the student's config says if not given", None
    )
    teacher_cache: str | None = flag("folder that `sinkd cache-teacher` wrote, instead of running the teacher", None)

    def __post_init__(self) -> None:
        if self.architecture not in (None, *AUTO):
            raise ValueError(f"architecture must be one of {', '.join(AUTO)}; got {self.architecture!r}")
        if self.student_init not in ("pretrained", "copy"):
            raise ValueError(f"student_init must be pretrained or copy, got {self.student_init!r}")
        if self.student_layers is not None and self.student_layers < 1:
            raise ValueError(f"student_layers must be at least 1, got {self.student_layers}")


def architecture_of(model: PreTrainedModel | PreTrainedConfig) -> str:
    """ "encoder", "encoder-decoder" or "decoder", as a model's class or its config tells."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    names = [type(model).__name__] if isinstance(model, PreTrainedModel) else config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "encoder"
    if config.is_encoder_decoder:
        return "encoder-decoder"
    return "decoder" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) else "encoder"


def scratch_size(name: str | None) -> tuple[int, int] | None:
    """Width and layers of "scratch:WIDTHxLAYERS"; None for any other name.

    >>> scratch_size("scratch:64x2"), scratch_size("bert-base-uncased")
    ((64, 2), None)

    Raises:
        ValueError: for scratch with anything else behind it.
    """
    if name is None or name.partition(":")[0] != "scratch":
        return None
    size = re.fullmatch(r"scratch:([1-9]\d*)x([1-9]\d*)", name)
    if size is None:
        raise ValueError(f"{name}: a model from scratch is named by its width and layers, such as scratch:64x2")
    return int(size[1]), int(size[2])


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad, on the right."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, architecture: str, task: Task, layers: int | None = None, new_head: bool = False
) -> PreTrainedModel:
    """A model with this task's labels, or its first ``layers`` layers.

    Args:
        new_head: allow weights that the checkpoint lacks, such as the classifier of a model that is yet to be fine-tuned.

    Raises:
        ValueError: if it has fewer layers, lacks weights, or was fine-tuned for other labels. OSError: if it is not found.
    """
    config = AutoConfig.from_pretrained(name)
    if architecture == "encoder":
        check_labels(name, config, task)
        names = task.labels or ("LABEL_0",)
        labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        config = AutoConfig.from_pretrained(name, **labels)
    if layers is not None:
        cut_layers(config, layers, name)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights is an error below, or meant
    try:
        model, info = AUTO[architecture].from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"] and not new_head:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{name} lacks weights ({missing}): it is not fine-tuned for {task.name} yet")
    return model


def label_names(config: PreTrainedConfig) -> list[str]:
    """In the order of the classes."""
    names: dict[Any, Any] = dict(config.id2label or {})
    return [str(names[i]) for i in sorted(names)]


def check_labels(name: str, config: PreTrainedConfig, task: Task) -> None:
    """A classifier that was fine-tuned for other labels, or the same in another order, is no teacher for this task."""
    theirs = label_names(config)
    named = not all(label.startswith("LABEL_") for label in theirs)
    fine_tuned = any(n.endswith("ForSequenceClassification") for n in config.architectures or [])
    if fine_tuned and named and task.labels is not None and theirs != list(task.labels):
        pairs = ", ".join(
            f"{i}: {a!r} / {b!r}" for i, (a, b) in enumerate(zip(theirs, task.labels, strict=False)) if a != b
        )
        raise ValueError(
            f"{name} has {len(theirs)} labels, {task.name} has {len(task.labels)}; they differ in {pairs or 'number'}: "
            "reorder or fine-tune it for this task"
        )


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, architecture: str, allow_truncation: bool) -> None:
    """Student and teacher must be of one kind and have the same labels, or the same vocabulary.

    Raises:
        ValueError: naming what differs.
    """
    theirs = architecture_of(teacher)
    if theirs != architecture:
        raise ValueError(f"the student is of the kind {architecture}, the teacher {theirs}: both must be the same")
    if architecture != "encoder":
        sizes = student.get_output_embeddings().weight.shape[0], teacher.get_output_embeddings().weight.shape[0]
        if sizes[0] != sizes[1] and not allow_truncation:
            raise ValueError(
                f"the student has {sizes[0]} tokens, the teacher {sizes[1]}: if only padding differs, allow_vocab_truncation"
            )
        return
    if student.config.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"the student has {student.config.num_labels} classes, the teacher {teacher.config.num_labels}"
        )
    pairs = list(zip(label_names(student.config), label_names(teacher.config), strict=True))
    named = not any(label.startswith("LABEL_") for pair in pairs for label in pair)
    if named and any(ours != label for ours, label in pairs):
        different = ", ".join(f"{i}: {a!r} / {b!r}" for i, (a, b) in enumerate(pairs) if a != b)
        raise ValueError(f"student and teacher name their labels differently ({different}): give them one order")


def cut_layers(config: PreTrainedConfig, layers: int, name: str) -> None:
    """Make the config one of the first layers alone; per-layer lists in it are cut, too."""
    before = config.num_hidden_layers
    if layers > before:
        raise ValueError(f"student_layers {layers}: {name} has only {before}")
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, key, value[:layers])
    if config.model_type == "gpt_neo":  # its list of layers is derived from this one
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = layers
    if getattr(config, "num_decoder_layers", None) is not None:
        config.num_decoder_layers = min(layers, config.num_decoder_layers)


def copy_shared(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Copy every tensor of the teacher that the student has by name and shape (paper's "copy"); returns how many."""
    theirs: Mapping[str, torch.Tensor] = teacher.state_dict()
    ours = student.state_dict()
    shared = {name: t for name, t in theirs.items() if name in ours and ours[name].shape == t.shape}
    if not shared:
        raise ValueError("student_init copy: teacher and student have no tensor in common")
    student.load_state_dict(shared, strict=False)
    return len(shared)


def from_scratch(
    architecture: str, task: Task, tokenizer: PreTrainedTokenizerBase, width: int, layers: int
) -> PreTrainedModel:
    """A randomly initialised BERT, T5 or Llama of this size."""
    heads = max(1, width // 32)
    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if architecture == "encoder":
        config: PreTrainedConfig = BertConfig(  # type: ignore[call-arg]
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            max_position_embeddings=512, num_labels=1 if task.labels is None else len(task.labels), **tokens,
        )  # fmt: skip
        if task.labels is not None:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
    elif architecture == "encoder-decoder":
        config = T5Config(  # type: ignore[call-arg]
            d_model=width, d_kv=width // heads, d_ff=4 * width, num_layers=layers, num_heads=heads,
            decoder_start_token_id=tokenizer.pad_token_id, **tokens,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            max_position_embeddings=512, **tokens,
        )  # fmt: skip
    return AUTO[architecture].from_config(config)
