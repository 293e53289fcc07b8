"""Does keeping the order inside sub-windows pay? The paper's network against its nearest relatives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from papercore.lab.study import Metric, Scale, Study

from eclstm.cmapss import SUBSETS
from eclstm.evaluate import evaluate
from eclstm.model import NAIVE_LAYERS
from eclstm.sources import DataOptions, load
from eclstm.trainer import ECLSTMConfig, fit

# OneCycle's shape without its momentum: warm up to 3e-3, then a cosine down to 0.
SHORT = {
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.25,
}


def train_and_evaluate(options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One cell of the study: an arm's options on one data set from one seed."""
    fields = {f.name for f in dataclasses.fields(DataOptions)}
    data = DataOptions(**{k: v for k, v in options.items() if k in fields})
    rest = {k: v for k, v in options.items() if k not in fields}
    config = ECLSTMConfig(output_dir=str(folder), seed=seed, disable_tqdm=True, **rest)
    training, test = load(data, seed)
    return evaluate(fit(data, config, training).model, test).metrics


CMAPSS = {subset: {"data": "cmapss", "subset": subset} for subset in SUBSETS}

study = Study(
    name="eclstm",
    claim="Keeping the order inside a sub-window beats flattening it.",
    metrics=[
        Metric("rmse", lower_is_better=True, unit="cycles"),
        Metric("score", lower_is_better=True),
        Metric("rmse_raw", lower_is_better=True, unit="cycles"),
    ],
    baseline="flat LSTM",
    method="ECLSTM",
    arms={
        "flat LSTM": {"network": "lstm"},
        "flat LSTM, as small as ECLSTM": {"network": "lstm", "layers": [31, 31]},
        "CNN + flat LSTM": {"network": "cnn-lstm"},
        "ConvLSTM": {"network": "convlstm"},
        "ECLSTM, no cell convolution": {"layers": [{**layer, "cell_convolution": False} for layer in NAIVE_LAYERS]},
        "ECLSTM, one convolution a gate": {
            "layers": [
                {"filters": [10], "kernel_sizes": [5], "fusion": ["early"]},
                {"filters": [20], "kernel_sizes": [5], "fusion": ["early"]},
            ]
        },
        "ECLSTM": {},
    },
    scales={
        "quick": Scale({"simulated": {}}, seeds=1, options={**SHORT, "num_train_epochs": 3}),
        "small": Scale(
            {"FD001": CMAPSS["FD001"], "FD002": {**CMAPSS["FD002"], "every": 4}},
            seeds=3,
            options={**SHORT, "num_train_epochs": 6},
        ),
        "full": Scale(CMAPSS, seeds=3, options={**SHORT, "per_device_train_batch_size": 256, "num_train_epochs": 40}),
        # The authors' recipe for their naive network: thousands of steps, so their slow batch-norm momentum suits.
        "paper": Scale(CMAPSS, seeds=3, options={"norm_momentum": 0.01}),
        # A fifth of its epochs, and the short schedule.
        "brief": Scale(CMAPSS, seeds=3, options={**SHORT, "num_train_epochs": 6}),
    },
    run=train_and_evaluate,
    paper={"ECLSTM": {"FD001": 14.92, "FD002": 18.11, "FD003": 13.85, "FD004": 20.11}},
)
