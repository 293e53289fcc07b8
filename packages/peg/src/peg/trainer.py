"""The SentenceTransformerTrainer with progressive weights, batches of any size, and every text encoded once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import datasets
from papercore.lab.cli import flag
from papercore.lab.training import OneBar, adapt_to_machine
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import nn
from transformers import TrainerCallback

from peg.batches import PegCollator
from peg.loss import HardnessSchedule, WeightSchedule
from peg.sentence_loss import ProgressiveContrastiveLoss


@dataclass
class PegConfig(SentenceTransformerTrainingArguments):
    """Loss, batch and training. The paper gives 5 hard negatives and 80,000 negatives in a batch; the rest is ours.

    >>> config = PegConfig(target_negatives=600, hard_negatives=5, hardness_end=3.0)  # 100 queries, each with 6 candidates
    >>> config.per_device_train_batch_size, config.schedule().end
    (100, 3.0)
    """

    target_negatives: int | None = flag(
        "candidates in a step, over all devices: sets the batch to this / (1 + hard_negatives) queries (paper: 80,000)",
        None,
    )
    hard_negatives: int = flag("mined hard negatives of each query (paper: 5)", 5)
    temperature: float = flag("of the cosines, above 0 (paper: not found)", 0.02)
    hardness_start: float = flag("lambda at first, a factor of the cosine; below 0 favours easy negatives (ours)", 0.0)
    hardness_end: float = flag("lambda at last; 0 with hardness_start 0: plain InfoNCE (ours)", 5.0)
    hardness_ramp: float = flag("share of training in which lambda moves, above 0 to 1 (ours)", 0.8)
    hardness_shape: str = flag("how it moves: linear, cosine, step or constant (ours)", "linear")
    difficulty: str = flag("of a negative: cosine, or margin, cosine less that of the positive (ours)", "cosine")
    normalise: str = flag("none, or mean1: weights of a query have mean 1 (ours)", "none")
    apply_to: str = flag("weighted negatives: all, hard (the query's own mined ones), in_batch (all others)", "all")
    query_weighting: str = flag("none, or loss: hard queries weigh more as training goes on", "none")
    pairs_until: float = flag("share of training before which hard negatives are left out, 0 to 1", 0.0)
    false_negative_margin: float | None = flag("mask what is more similar than the positive by more than this", None)
    margin_strategy: str = flag("that margin is absolute, or relative to the positive's cosine", "absolute")
    mask_known: bool = flag("mask candidates that are known positives of the query, by id and by text", True)
    in_batch: str = flag("negatives: all of the batch, own (of the query's source), none (its hard negatives)", "all")
    own_sources: list[str] = flag("sources whose queries see candidates of their own source alone", [])
    lone_sources: list[str] = flag("sources whose queries see their own hard negatives alone", [])
    same_source_batches: bool = flag("fill each batch from one source", False)
    gather: bool | None = flag("negatives of all devices; none: where there are several", None)
    micro_batch_tokens: int | None = flag(
        "encode twice, in micro-batches of so many tokens, so that memory does not grow with the batch; none: at once",
        16_384,
    )
    query_length: int = flag("tokens of a query, at most (paper: not found)", 64)
    passage_length: int = flag("tokens of a passage, at most (paper: not found)", 256)
    query_prompt: str | None = flag("put before queries; none: the model's own", None)
    passage_prompt: str | None = flag("put before passages; none: the model's own", None)

    output_dir: str | None = flag("folder of the model, checkpoints and results; runs/peg-DATA if not given", "")
    num_train_epochs: float = flag("epochs (paper: not found)", 3)
    per_device_train_batch_size: int = flag("queries in a step, on each device, where target_negatives is none", 512)
    learning_rate: float = flag("of AdamW (paper: not found; 2e-5 for base and large models)", 5e-5)
    weight_decay: float = flag("of AdamW (paper: not found)", 0.01)
    warmup_steps: float = flag("steps, or their share of all", 0.05)
    lr_scheduler_type: str = flag("schedule", "linear")
    logging_steps: float = flag("steps between logs, or their share of all", 0.05)
    save_strategy: str = flag("when to save", "epoch")
    save_total_limit: int | None = flag("checkpoints to keep", 1)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")
    seed: int = flag("of data order, draws and new weights", 0)

    def __post_init__(self) -> None:
        if self.hard_negatives < 0:
            raise ValueError(f"hard_negatives must be at least 0, got {self.hard_negatives}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.target_negatives is not None and self.target_negatives < 1 + self.hard_negatives:
            raise ValueError(
                f"target_negatives {self.target_negatives} is less than the {1 + self.hard_negatives} candidates of one query"
            )
        if self.target_negatives is not None and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "gradient_accumulation_steps adds no negatives: leave it out, target_negatives and micro_batch_tokens are what "
                "makes large batches fit"
            )
        self.schedule()  # complains about what it cannot do
        adapt_to_machine(self)
        super().__post_init__()
        if self.target_negatives is not None:
            queries = math.ceil(self.target_negatives / (1 + self.hard_negatives))
            self.per_device_train_batch_size = math.ceil(queries / self.world_size)
        if self.gather is None:
            self.gather = self.world_size > 1

    def schedule(self) -> HardnessSchedule:
        """The hardness schedule that these flags describe."""
        return HardnessSchedule(
            self.hardness_start, self.hardness_end, self.hardness_ramp, self.hardness_shape, self.difficulty
        )


class PegTrainer(OneBar, SentenceTransformerTrainer):
    """The SentenceTransformerTrainer on rows of query, positives and hard negatives.

    It saves what that trainer saves: folders that ``SentenceTransformer(path)`` loads. The hardness follows the optimiser's
    steps and goes on where a resumed run stopped.

    Args:
        model: the SentenceTransformer. args: a :class:`PegConfig`.
        train_dataset: a datasets.Dataset of ``query`` (text), ``pos`` (texts), and where there are any ``neg`` (texts),
            ``pos_ids``, ``neg_ids`` and ``source``, as :func:`peg.data.load_rows` gives it.
        schedule: a schedule of your own (:class:`peg.loss.WeightSchedule`), instead of the configuration's.
        kwargs: of SentenceTransformerTrainer.

    Raises:
        ValueError: for rows without these columns, or fewer of them than a step needs.

    Example:
        >>> import tempfile
        >>> from peg.models import new_model
        >>> texts = ["open the file", "close the file", "count the lines", "read a line"]
        >>> rows = datasets.Dataset.from_list([{"query": f"how to {text}", "pos": [text]} for text in texts])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     step = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
        ...     args = PegConfig(output_dir=folder, disable_tqdm=True, use_cpu=True, **step)
        ...     PegTrainer(new_model("static:8", texts), args, rows).train().global_step
        1
    """

    args: PegConfig

    def __init__(
        self,
        model: SentenceTransformer,
        args: PegConfig,
        train_dataset: datasets.Dataset,
        *,
        schedule: WeightSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        if missing := {"query", "pos"} - set(train_dataset.column_names):
            raise ValueError(
                f"training rows need a text `query` and a list of texts `pos`; there is no {' and no '.join(sorted(missing))} "
                f"among {', '.join(train_dataset.column_names)}: peg.data.load_rows reads other names"
            )
        if args.target_negatives is not None and len(train_dataset) < args.train_batch_size * args.world_size:
            raise ValueError(
                f"target_negatives {args.target_negatives} needs {args.train_batch_size * args.world_size} queries in a step, "
                f"the data has {len(train_dataset)}"
            )
        use_prompts(model, args)
        self.weight_schedule = schedule or args.schedule()
        self.source_names = sorted(set(train_dataset["source"])) if self._uses_sources(args) else []
        rows: Any = train_dataset
        if args.same_source_batches:
            rows = datasets.DatasetDict(
                {
                    name or "unnamed": train_dataset.filter(lambda row, name=name: row["source"] == name)
                    for name in self.source_names
                }
            )
        kwargs.setdefault("loss", self.get_default_loss)
        super().__init__(model=model, args=args, train_dataset=rows, **kwargs)
        self.add_callback(_Follow(self))
        if isinstance(self.loss, ProgressiveContrastiveLoss):
            self.add_callback(self.loss.callback())

    @staticmethod
    def _uses_sources(args: PegConfig) -> bool:
        return bool(args.own_sources or args.lone_sources or args.same_source_batches or args.in_batch != "all")

    def get_default_loss(self, model: nn.Module) -> ProgressiveContrastiveLoss:
        args = self.args
        for name in (*args.own_sources, *args.lone_sources):
            if name not in self.source_names:
                raise ValueError(f"no source {name!r} in the data; there are {', '.join(self.source_names)}")
        rules = {**dict.fromkeys(args.own_sources, "own"), **dict.fromkeys(args.lone_sources, "none")}
        return ProgressiveContrastiveLoss(
            model, self.weight_schedule, temperature=args.temperature, normalise=args.normalise, apply_to=args.apply_to,
            false_negative_margin=args.false_negative_margin, margin_strategy=args.margin_strategy,
            query_weighting=args.query_weighting, pairs_until=args.pairs_until,
            in_batch=[rules.get(name, args.in_batch) for name in self.source_names] or "all",
            gather=bool(args.gather), micro_batch_tokens=args.micro_batch_tokens,
        )  # fmt: skip

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> Any:
        return PegCollator(
            model.preprocess, args.hard_negatives, args.seed, sources=self.source_names, mask_known=args.mask_known,
            query_prompt=model.prompts.get("query"), passage_prompt=model.prompts.get("document"),
            query_length=args.query_length, passage_length=args.passage_length,
        )  # fmt: skip

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Name the loss in the model's card, but put no texts of the training data there, as the base class does."""
        self.model.model_card_data.add_tags("generated_from_trainer")  # or an old card would stay
        self.model.model_card_data.set_losses([self.loss])  # type: ignore[list-item]

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[Any], Any]:
        return [inputs["queries"], inputs["passages"]], inputs["batch"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and isinstance(self.loss, ProgressiveContrastiveLoss) and self.loss.output is not None:
            parts = self.loss.output._asdict()
            logs = logs | {name: float(value) for name, value in parts.items() if name != "loss" and value is not None}
            logs["hardness"] = self.loss.hardness()
        super().log(logs, *args, **kwargs)


def use_prompts(model: SentenceTransformer, args: PegConfig) -> None:
    """Make the configuration's prompts the model's own, saved with it: search must put before texts what training did."""
    for side, prompt in (("query", args.query_prompt), ("document", args.passage_prompt)):
        if prompt is not None:
            model.prompts[side] = prompt


class _Follow(TrainerCallback):
    """Draws positives and negatives anew in each epoch."""

    def __init__(self, trainer: PegTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer.data_collator, PegCollator):
            self.trainer.data_collator.epoch = int(state.epoch or 0)  # of a resumed run it has a fraction
