"""Distillation on the Hugging Face engine: its configuration and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from papercore.lab.cli import flag
from papercore.lab.training import ModuleTrainer, adapt_to_machine
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from sinkd.loss import SinKDLoss
from sinkd.models import AUTO, architecture_of, check_pair
from sinkd.teacher_cache import TeacherCache
from sinkd.tokens import select_token_logits


@dataclass
class SinKDConfig(TrainingArguments):
    """Loss and training of one student. The loss is (1 - alpha) CE + alpha KD + beta scale Sinkhorn.

    >>> config = SinKDConfig(beta=0.05, tau=4.0, num_train_epochs=10)
    >>> config.criterion().tau, SinKDConfig(preset="rte").criterion().kd_temperature
    (4.0, 3.5)
    """

    preset: str | None = flag(
        "weights of the authors' code for cola, mnli, mrpc, qnli, qqp, rte, sst2 or t0, instead of the flags of the loss",
        None,
    )
    alpha: float = flag("weight of the sample-wise KD term, 0 to 1 (authors: 0.8 to 1)", 0.9)
    beta: float = flag(
        "weight of the Sinkhorn term, on the mean over the batch; 0: none (authors: 0.8 x 0.001 on the sum, which is 0.026 on "
        "the mean of a batch of 32; in our study 0.8 does harm)",
        0.03,
    )
    ce_weight: float | None = flag("weight of the cross-entropy with the labels; 1 - alpha if not given", None)
    kd: str = flag("KD term: kl, xent, reverse_kl, js, generalized_jsd, tvd, sample_l1, or none (authors: xent)", "kl")
    kd_temperature: float = flag("temperature of the KD term (authors: 1 to 4)", 2.0)
    anneal: bool = flag("let that fall to 1 over the epochs (authors: for mnli, mrpc and qqp)", False)
    tau: float = flag("temperature of the Sinkhorn term (authors: 2)", 2.0)
    eps: float = flag("entropic weight of the Sinkhorn term, in the cost's unit, which is 0 to 2 (authors: 0.1)", 0.1)
    n_iters: int = flag("Sinkhorn iterations (authors: 20)", 20)
    cost_p: int = flag("norm of the cost, 1 or 2 (authors: 1)", 1)
    reduction: str = flag("mean: over the batch; sum: grows with it (authors)", "mean")
    scale: float = flag("factor of the Sinkhorn term (authors: 0.001 or 0.0008)", 1.0)
    debias: bool = flag("Sinkhorn divergence, which is 0 for equal outputs (authors: no)", False)
    sinkhorn: str = flag("batch, or to compare with: sample, over the classes of each sample", "batch")
    gather: bool = flag("one cloud over all processes, not one for each", False)
    granularity: str = flag("language models: rows of a cloud are token_batch, sequence, or first_token", "token_batch")
    topk: int | None = flag("language models: compare the k tokens likeliest to the teacher, and the rest as one", None)
    max_rows: int | None = flag("language models: compare at most so many tokens of a batch", 512)
    answers_only: bool = flag("language models: compare only the first tokens of the prompt's choices", False)
    allow_vocab_truncation: bool = flag("language models: leave out columns that one of the two models lacks", False)
    max_length: int = flag("tokens of a text, longer ones are cut (authors: 128; models from scratch: 48)", 128)
    log_gradient_ratio: bool = flag(
        "log the Sinkhorn term's gradient relative to the rest's; costs two backward steps", False
    )

    output_dir: str | None = flag("folder of checkpoints and results; runs/sinkd-DATA if not given", "")
    num_train_epochs: float = flag("epochs (authors: 2 to 20; models from scratch: 8)", 3)
    per_device_train_batch_size: int = flag(
        "texts in a step, on each device: the rows of a cloud (authors: 16 or 32)", 32
    )
    per_device_eval_batch_size: int = flag("texts in an evaluation step", 128)
    learning_rate: float = flag("of AdamW (authors: 2e-5 to 5e-5; models from scratch: 2e-3)", 5e-5)
    weight_decay: float = flag("of AdamW (authors: 0)", 0.0)
    lr_scheduler_type: str = flag("schedule (authors: linear, no warm-up)", "linear")
    logging_steps: float = flag("steps between logs, or their share of all", 0.05)
    save_strategy: str = flag("when to save", "epoch")
    save_total_limit: int | None = flag("checkpoints to keep", 1)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")
    seed: int = flag("of new weights, data order and held-out rows", 0)

    def __post_init__(self) -> None:
        for name, known in (
            ("granularity", ("token_batch", "sequence", "first_token")),
            ("reduction", ("mean", "sum")),
            ("sinkhorn", ("batch", "sample")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        self.remove_unused_columns = False  # the collator's teacher_inputs and index are used
        self.label_names = ["labels"]
        adapt_to_machine(self)
        super().__post_init__()

    def criterion(self, mode: str = "classification") -> SinKDLoss:
        """The loss that this configuration describes."""
        if self.preset is not None:
            return SinKDLoss.paper(self.preset, mode=mode)
        return SinKDLoss(
            alpha=self.alpha, beta=self.beta, ce_weight=self.ce_weight, kd=self.kd, kd_temperature=self.kd_temperature,
            anneal=self.anneal, tau=self.tau, eps=self.eps, n_iters=self.n_iters, cost_p=self.cost_p,
            reduction=self.reduction, scale=self.scale, debias=self.debias, sinkhorn=self.sinkhorn, mode=mode,
            gather=self.gather,
        )  # fmt: skip


class SinKDTrainer(ModuleTrainer):
    """The transformers Trainer with a teacher. Without one it fine-tunes on the labels alone.

    The cloud of the Sinkhorn term is the micro-batch of one process: gradient accumulation does not enlarge it, ``args.gather``
    does. The teacher runs in eval mode, without gradients, and is never saved.

    Args:
        model: student: a transformers model for sequence classification, or a language model.
        teacher: the same kind of model, with the same labels or vocabulary; or its folder or Hub name.
        args: a :class:`SinKDConfig`.
        train_dataset: rows of input_ids, attention_mask, labels; ``teacher_inputs`` where the teacher's tokenizer is another one;
            ``index`` with a ``teacher_cache``.
        teacher_cache: the teacher's logits on disk, instead of ``teacher``.
        vocab_ids: language models: compare these columns only.

    Raises:
        ValueError: if student and teacher differ in kind, labels or vocabulary.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> student, teacher = BertForSequenceClassification(size), BertForSequenceClassification(size)
        >>> rows = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4, 5, 6], "labels": 1}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = SinKDConfig(output_dir=folder, max_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True)
        ...     SinKDTrainer(student, teacher, args, train_dataset=rows).train().global_step
        1
    """

    args: SinKDConfig

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | str | None = None,
        args: SinKDConfig | None = None,
        *,
        train_dataset: Any = None,
        teacher_cache: TeacherCache | None = None,
        vocab_ids: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or SinKDConfig()
        self.architecture = architecture_of(model)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        # The mean over all of a step's rows, however they are spread over micro-batches.
        self.model_accepts_loss_kwargs = True
        if isinstance(teacher, str):
            teacher = cast(PreTrainedModel, AUTO[self.architecture].from_pretrained(teacher))
        if teacher is not None:
            check_pair(model, teacher, self.architecture, args.allow_vocab_truncation)
            teacher.eval().requires_grad_(False).to(args.device)
        self.teacher: PreTrainedModel | None = teacher
        self.teacher_cache, self.vocab_ids = teacher_cache, vocab_ids
        regression = self.architecture == "encoder" and model.config.num_labels == 1
        self.criterion = args.criterion("regression" if regression else "classification")
        self.ce_weight = self.criterion.ce_weight
        if self.architecture != "encoder":
            self.criterion.ce_weight = 0.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        index, teacher_inputs = inputs.pop("index", None), inputs.pop("teacher_inputs", None)
        labels = inputs.pop("labels") if self.architecture == "encoder" else inputs["labels"]
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self._teacher_logits(inputs, teacher_inputs, index, labels)
        parts: dict[str, Tensor] = {}
        if teacher_logits is None:
            loss = self._labels_alone(outputs, labels)
            parts = {"ce": loss.detach()}
        elif self.architecture == "encoder":
            loss, parts = self._distil(outputs.logits, teacher_logits, labels)
        else:
            loss, parts = self._distil_tokens(outputs, teacher_logits, labels)
        if model.training:
            self.note(**parts)
            if num_items_in_batch is not None:  # the mean over all rows of a step, however many micro-batches it has
                counted = (
                    labels[..., 1:] if getattr(self, "_loss_shifts_labels", False) else labels
                )  # as the engine counts
                loss = loss * (counted != -100).sum() / num_items_in_batch
                if self.args.average_tokens_across_devices:
                    loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _labels_alone(self, outputs: Any, labels: Tensor) -> Tensor:
        if self.architecture != "encoder":
            return outputs.loss
        if self.criterion.mode == "regression":
            return F.mse_loss(outputs.logits.squeeze(1), labels.to(outputs.logits))
        return F.cross_entropy(outputs.logits.float(), labels)

    def _distil(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        epochs = max(1, int(self.args.num_train_epochs))
        temperature = self.criterion.kd_temperature_at(min(int(self.state.epoch or 0), epochs - 1), epochs)
        given = student_logits, teacher_logits, labels, mask, temperature
        out = self.criterion(*given)
        parts = {"ce": out.ce, "kd": out.kd, "sinkhorn": out.sinkhorn}
        if (
            self.args.log_gradient_ratio
            and self.model.training
            and self.state.global_step % self.state.logging_steps == 0
        ):
            parts["gradient_ratio"] = torch.as_tensor(self.criterion.gradient_ratio(*given))
        return out.loss, parts

    def _distil_tokens(self, outputs: Any, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy is the model's own, over its whole vocabulary; the other terms are over what is selected."""
        args = self.args
        # Of the step's number, so that a resumed run draws what it would have drawn.
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + self.state.global_step)
        chosen = select_token_logits(
            outputs.logits, teacher_logits, labels, granularity=args.granularity, shift=self.architecture == "decoder",
            vocab_ids=self.vocab_ids, topk=args.topk, tau=args.tau, max_rows=args.max_rows, generator=generator,
            allow_vocab_truncation=args.allow_vocab_truncation,
        )  # fmt: skip
        golds = (
            None if self.vocab_ids is None else chosen.labels
        )  # rows whose answer is another token teach nothing here
        loss, parts = self._distil(chosen.student, chosen.teacher, golds, chosen.mask)
        return loss + self.ce_weight * outputs.loss, {**parts, "ce": outputs.loss.detach()}

    def _teacher_logits(self, inputs: dict[str, Any], teacher_inputs: Any, index: Any, labels: Tensor) -> Tensor | None:
        if self.teacher_cache is not None:
            logits = self.teacher_cache.logits(index.cpu()).to(labels.device)
            return logits if self.architecture == "encoder" else spread(logits, labels, self.architecture == "decoder")
        if self.teacher is None:
            return None
        return self.teacher(**(teacher_inputs or inputs)).logits

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(str(output_dir or self.args.output_dir))


def spread(rows: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """Cached logits (tokens, vocabulary) of the predicted tokens, in their places among (batch, length, vocabulary)."""
    logits = rows.new_zeros(*labels.shape, rows.shape[1])
    valid = labels != -100
    if shift:  # the logits at one place predict the next
        valid = F.pad(valid[:, 1:], (0, 1))
    logits[valid] = rows
    return logits
