"""Tuning with in-context examples on the transformers engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from papercore.lab.cli import flag
from papercore.lab.training import ModuleTrainer, adapt_to_machine
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from mmict.corpus import Corpus, augmented
from mmict.demonstrations import SAMPLERS, DemonstrationSampler
from mmict.dialogs import make_dialogs
from mmict.model import MMICTConfig, MMICTModel
from mmict.texts import IMAGE_PROMPTS

# What each arm of the comparison shows of a demonstration, and whether the query's features are guided by its prompt.
ARMS = {
    "ft": ("none", False),
    "ft+text": ("none", True),
    "ict": ("visual+raw_text", False),
    "mmict": ("vt_text", True),
    "mmict-text": ("text", True),
    "mmict-raw": ("raw_text", True),
    "mmict-visual": ("visual", True),
    "mmict-tv": ("tv_visual", True),
    "mmict-both": ("vt_both", True),
}


@dataclass
class MMICTTrainingConfig(TrainingArguments):
    """How to tune. "official" is the authors' code.

    >>> config = MMICTTrainingConfig(arm="ict", k=4)
    >>> config.model_config().demonstration, config.shown, MMICTTrainingConfig(arm="ft").shown
    ('visual+raw_text', 4, 0)
    """

    arm: str = flag(
        "mmict; ft: no demonstrations; ft+text: the same with features guided by the prompt; ict: features and text of each "
        "demonstration as they are; mmict-text, -raw, -visual, -tv, -both: other features of a demonstration",
        "mmict",
    )
    k: int = flag("demonstrations for each query, 0 to 8 (official: not known)", 2)
    vary_k: bool = flag("draw 0 to k for each batch, so that one model serves all", False)
    sampler: str = flag(
        "demonstrations: random, or neighbours: visual, text (of questions), mixed (official: not known)", "random"
    )
    reduction: str = flag("loss: mean over all target tokens (token), or of each dialog's mean (dialog)", "token")
    lora_rank: int = flag("adapt the language model by LoRA of this rank; 0: keep it frozen (paper)", 0)
    augment: bool = flag("random crops and flips (official); features are then encoded anew in each step", False)
    output_dir: str | None = flag("checkpoint folder; runs/mmict-DATA if not given", "")
    learning_rate: float = flag("peak (official: 1e-5)", 1e-5)
    weight_decay: float = flag("of matrices (official: 0.05)", 0.05)
    num_train_epochs: float = flag("passes over the data (official: 5)", 5.0)
    per_device_train_batch_size: int = flag(
        "queries in a step; their demonstrations come on top (official: 48 pictures in all)", 16
    )
    warmup_steps: float = flag("of linear warm-up (official: 1000), or a share of all steps below 1", 1000)
    lr_scheduler_type: str = flag("after it (official: cosine by whole epochs)", "cosine")
    max_grad_norm: float = flag("clip gradients to this norm; 0: never (official)", 0.0)
    seed: int = flag("of all that is random (official: 42)", 42)
    eval_strategy: str = flag("validation loss: no, steps or epoch; of the first test set", "no")
    save_strategy: str = flag("checkpoints to resume from: no, steps or epoch", "epoch")
    logging_steps: float = flag("steps between logs, or their share of all", 0.02)
    save_total_limit: int | None = flag("checkpoints to keep", 1)
    report_to: str = flag("where to log: tensorboard, wandb, ... or none", "none")

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}; got {self.arm!r}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        if self.fp16:
            raise ValueError("float16 overflows in T5 and is not supported: take --bf16")
        adapt_to_machine(self)
        super().__post_init__()

    @property
    def shown(self) -> int:
        """Demonstrations of a query in this arm."""
        return 0 if ARMS[self.arm][0] == "none" else self.k

    def model_config(self, **changes: Any) -> MMICTConfig:
        """Of the model that this arm trains."""
        demonstration, guided = ARMS[self.arm]
        return MMICTConfig(**{"demonstration": demonstration, "guided": guided, "reduction": self.reduction, **changes})


class Rows(Dataset[Any]):
    """The numbers of the samples: a batch is a list of them, from which the trainer makes dialogs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"rows": torch.tensor(rows)}


class PartTrainer(ModuleTrainer):
    """The engine for a model whose checkpoints are what it trains, without its frozen parts."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The engine would miss the frozen parts."""
        assert not load_result.unexpected_keys, load_result.unexpected_keys


class MMICTTrainer(PartTrainer):
    """The transformers Trainer for :class:`mmict.MMICTModel`.

    Demonstrations are drawn anew in each epoch, from the seed, the epoch and the query alone; the prompt of a caption anew in
    each step. A resumed run draws the same.

    Args:
        model, args: as the Trainer's. corpus: what to learn from; also the pool of demonstrations. sampler: draws them.
        validation: what eval_loss is measured on, with demonstrations from the same pool.

    Example:
        >>> import tempfile
        >>> from mmict.corpus import new_sampler, prepare
        >>> from mmict.hub import MHub, MHubConfig
        >>> from mmict.processor import Processor
        >>> from mmict.sample import render_shapes
        >>> from mmict.small import word_tokenizers
        >>> from mmict.vision import VisionEncoder
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> shapes = render_shapes(6)  # pictures of coloured shapes, with captions
        >>> processor = Processor(*word_tokenizers(shapes.texts, most=50))
        >>> vision = VisionEncoder(nn.Conv2d(3, 8, 16, 16), source="mine", image_size=48)
        >>> hub = MHub(MHubConfig(8, 16, queries=2, hidden=16, layers=1, heads=2, intermediate=16, vocabulary=100))
        >>> size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
        >>> lm = T5ForConditionalGeneration(T5Config(vocab_size=100, decoder_start_token_id=0, **size))
        >>> model = MMICTModel.from_parts(vision, hub, lm, processor)
        >>> corpus = prepare(model, shapes)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     step = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
        ...     args = MMICTTrainingConfig(output_dir=folder, disable_tqdm=True, use_cpu=True, **step)
        ...     MMICTTrainer(model=model, args=args, corpus=corpus, sampler=new_sampler(corpus)).train().global_step
        1
    """

    args: MMICTTrainingConfig

    def __init__(
        self, *, model: MMICTModel, args: MMICTTrainingConfig, corpus: Corpus, sampler: DemonstrationSampler,
        validation: Corpus | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.corpus, self.sampler, self.validation = corpus, sampler, validation
        self.views = augmented(corpus, model.vision) if args.augment else corpus
        judged = None if validation is None else Rows(len(validation))
        super().__init__(model=model, args=args, train_dataset=Rows(len(corpus)), eval_dataset=judged, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; see :class:`mmict.MMICTModel`."""
        rows, generator = inputs["rows"].tolist(), self.batch_generator()
        k = self.args.shown
        if self.args.vary_k:
            k = int(torch.randint(k + 1, (), generator=generator))
        choices = torch.randint(len(IMAGE_PROMPTS), (len(rows),), generator=generator).tolist()
        shown = self.corpus.demonstrations(rows, self.sampler, self.corpus, k, int(self.state.epoch or 0))
        with torch.random.fork_rng(devices=[]):  # for crops
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            dialogs = make_dialogs(self.views, rows, self.views, shown, choices)
        output = model(dialogs.to(self.args.device))
        return (output.loss, {}) if return_outputs else output.loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean negative log-likelihood of a token, on the validation samples."""
        corpus = eval_dataset or self.validation
        assert isinstance(corpus, Corpus)
        self.model.eval()
        rows = list(range(len(corpus)))
        shown = corpus.demonstrations(rows, self.sampler, self.corpus, self.args.shown)
        nll = tokens = 0.0
        size = self.args.per_device_eval_batch_size
        with torch.no_grad():
            for part in (rows[start : start + size] for start in range(0, len(rows), size)):
                found = self.model(
                    make_dialogs(corpus, part, self.corpus, [shown[i] for i in part]).to(self.args.device)
                )
                nll, tokens = nll + float(found.nll.sum()), tokens + float(found.tokens.sum())
        metrics = {f"{metric_key_prefix}_loss": nll / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices (official: all but biases, norms and vectors)."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad]
