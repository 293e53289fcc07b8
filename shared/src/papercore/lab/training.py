"""What every Trainer of this house shares: checkpoints that from_pretrained reads, resuming, one progress bar."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from papercore.lab.files import write_json


class OneBar:
    """For a transformers Trainer, before it among the bases: one progress bar with loss and time left is all that is printed,
    early stopping goes on where a run was interrupted, and a finished run that is given again stays as it is."""

    def __init__(self, *positional: Any, **kwargs: Any) -> None:
        # Or early stopping would count epochs without improvement anew.
        kwargs["args"].restore_callback_states_from_checkpoint = True
        super().__init__(*positional, **kwargs)
        trainer: Any = self
        self.bar = ProgressBar() if trainer.pop_callback(ProgressCallback) else None
        if self.bar:
            trainer.add_callback(self.bar)
        trainer.pop_callback(PrinterCallback)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(f"{resume_from_checkpoint}/trainer_state.json")
            stopped = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
            if stopped and state.global_step < state.max_steps:  # early; the engine would train on before it noticed
                self.args.max_steps = state.global_step  # type: ignore[attr-defined]
        try:
            return trainer.train(resume_from_checkpoint, *args, **kwargs)
        finally:  # also when interrupted: what is said next stands on a line of its own
            if self.bar:
                self.bar.close()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, if a run is resumed that has ended within an epoch: the engine would take one more step."""
        state = self.state  # type: ignore[attr-defined]
        if state.global_step < state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]


class ModuleTrainer(OneBar, Trainer):
    """A transformers Trainer for models that are ``PyTorchModelHubMixin`` modules.

    Its checkpoints are what the model's own ``save_pretrained`` writes (safetensors and config.json) beside the engine's
    state, and a data set with ``__getitems__`` hands over whole batches.
    """

    model: Any  # the module itself, not one of the engine's own classes

    def __init__(self, **kwargs: Any) -> None:
        self.terms: dict[str, list[Tensor]] = {}
        self.at = (-1, 0)  # the latest step, and which of its accumulated batches
        if hasattr(kwargs["train_dataset"], "__getitems__"):
            kwargs.setdefault("data_collator", whole_batch)
            kwargs["args"].remove_unused_columns = False  # the engine would look for them item by item
        super().__init__(**kwargs)

    def note(self, **terms: Tensor) -> None:
        """Parts of this batch's loss: their means are logged along with it, but for those that are 0, which an arm lacks."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.terms:
            means = {
                name: float(torch.stack([v.float() for v in values]).mean()) for name, values in self.terms.items()
            }
            logs |= {name: mean for name, mean in means.items() if mean}
            self.terms = {}
        super().log(logs, *args, **kwargs)

    def batch_generator(self) -> torch.Generator:
        """For what is random in a batch; call it once for each. A resumed run draws the same."""
        args, step = self.args, self.state.global_step
        self.at = (step, self.at[1] + 1 if self.at[0] == step else 0)
        batch = (step * args.gradient_accumulation_steps + self.at[1]) * args.world_size + args.process_index
        return torch.Generator().manual_seed(1_000_003 * args.seed + batch)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)


def adapt_to_machine(args: TrainingArguments) -> None:
    """Call before ``TrainingArguments.__post_init__``: without an accelerator, say so, or each process of a ``torchrun`` trains
    alone; and pin no memory."""
    if not torch.accelerator.is_available():
        args.use_cpu = True
        args.dataloader_pin_memory = False


def whole_batch(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch


class ProgressBar(TrainerCallback):
    """One bar for the whole training, with the latest loss and evaluation; nothing else is printed."""

    bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            often = 0.1 if sys.stderr.isatty() else 20
            looks: Any = {"desc": "train", "unit": "step", "dynamic_ncols": True, "mininterval": often}
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, **looks)
            self.latest: dict[str, str] = {}

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            hidden = ("runtime", "per_second", "epoch", "grad_norm", "total_flos", "train_loss")
            told = {k: v for k, v in (logs or {}).items() if isinstance(v, float) and not k.endswith(hidden)}
            self.latest.update({k: f"{v:.4g}" for k, v in told.items()})
            self.bar.set_postfix(self.latest)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def resumable(output_dir: str | Path, *options: Any, may_change: Collection[str] = ()) -> str | None:
    """The newest complete checkpoint of ``output_dir`` to resume from, or None to start.

    Records the options of a run beside it, so that the same command goes on and another one is refused.

    Args:
        output_dir: the run's folder. options: the dataclasses that define the run.
        may_change: fields that a continued run may have otherwise.

    Raises:
        ValueError: if the folder holds a run with other options; the message names one.
    """
    output_dir = Path(output_dir)
    record = output_dir / "options.json"
    now = json.loads(
        json.dumps({k: v for o in options for k, v in _defining(o).items() if k not in may_change}, default=str)
    )
    if record.exists() and any(path != record for path in output_dir.iterdir()):  # else that run never began
        before = json.loads(record.read_text())
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{output_dir} holds a run with {key} {before.get(key)!r}, now {now.get(key)!r}: "
                    "give another --output_dir, or delete that folder to start anew"
                )
    else:
        write_json(record, now)
    numbered = [(int(p.name.rsplit("-", 1)[1]), p) for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for _, checkpoint in sorted(numbered, reverse=True):
        try:  # the engine writes this file last, so a readable one means a complete checkpoint
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


# Where a run is, and how it shows itself, does not change what it computes.
_INCIDENTAL = "output_dir logging_dir run_name disable_tqdm report_to log_level hub_token local_rank"


def _defining(options: Any) -> dict[str, Any]:
    values = options.to_dict() if isinstance(options, TrainingArguments) else dataclasses.asdict(options)
    return {key: value for key, value in values.items() if key not in _INCIDENTAL.split()}
