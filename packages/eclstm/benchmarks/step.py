"""Time and memory of one training step and of inference: ours, the literal cell, a textbook ConvLSTM-1D, a flat nn.LSTM.

All in one process, in turn, round after round, so that a machine whose speed drifts treats them alike: quote the ratios.
The literal cell is the tests' reference (one convolution for each gate and depth, as the authors' Keras layer does it).

    uv run python packages/eclstm/benchmarks/step.py            # table on stdout; --compile adds torch.compile
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from eclstm import ECLSTM, ECLSTMRegressor
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from literal import keras_arrays, literal_eclstm

SENSORS, ROWS = 15, 20  # FD001 in the naive setting: T = 5, L = 16


class Literal(nn.Module):
    """An ECLSTM layer that computes with the literal cell; same parameters, same results."""

    def __init__(self, layer: ECLSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        cell = self.layer.cell
        output, state = literal_eclstm(x, keras_arrays(cell), cell.recurrent_activation, cell.conv_activation)
        return (output if self.layer.return_sequences else output[:, -1]), state

    def forward_segment(self, segment: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.forward(segment.unfold(1, self.layer.input_size[0], 1).permute(0, 1, 4, 2, 3))


def contestants(compile: bool) -> dict[str, nn.Module]:
    features = [f"sensor_{i}" for i in range(SENSORS)]
    torch.manual_seed(0)
    literal = ECLSTMRegressor(features)
    literal.network.layers = nn.ModuleList(Literal(layer) for layer in literal.network.layers)
    models: dict[str, nn.Module] = {
        "ECLSTM (ours)": ECLSTMRegressor(features),
        "ECLSTM, literal": literal,
        "ConvLSTM-1D, textbook": ECLSTMRegressor(features, network="convlstm"),
        "nn.LSTM, flat": ECLSTMRegressor(features, network="lstm"),
    }
    if compile:
        models["ECLSTM (ours), torch.compile"] = torch.compile(ECLSTMRegressor(features))
    device = pick_device()
    return {name: model.to(device) for name, model in models.items()}


def training_step(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return step


def inference(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        model.eval()
        model(batch)

    return run


def medians(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    cuda = torch.cuda.is_available()
    for round in range(rounds + 3):
        for name, run in runs.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            if round >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[15, 128, 512])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    models = contestants(options.compile)
    device = pick_device()
    optimizers = {name: torch.optim.Adam(model.parameters(), fused=True) for name, model in models.items()}
    ours = next(iter(models))
    print(
        f"{datetime.date.today()}. {machine()}, {options.threads} threads. "
        + ", ".join(f"{k} {v}" for k, v in versions("eclstm").items())
    )
    print(f"Command: `python packages/eclstm/benchmarks/step.py {' '.join(sys.argv[1:])}`\n")
    rows = []
    for size in options.batches:
        batch = torch.randn(size, ROWS, SENSORS, device=device)
        steps = medians({n: training_step(m, batch, optimizers[n]) for n, m in models.items()}, options.rounds)
        predictions = medians({n: inference(m, batch) for n, m in models.items()}, options.rounds)
        memory = {}
        for name, model in models.items():
            with peak_memory(device) as peak:
                training_step(model, batch, optimizers[name])()
            memory[name] = peak.bytes / 2**20
        for name in models:
            row = [str(size), name]
            for figures in (steps, predictions, memory):
                row += [f"{figures[name]:.1f}", f"{figures[name] / figures[ours]:.2f}"]
            rows.append(row)
    columns = ["batch", "network", "step (ms)", "/ ours", "inference (ms)", "/ ours", "step memory (MiB)", "/ ours"]
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
