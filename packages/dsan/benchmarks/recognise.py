"""Time, memory and accuracy of recognition, each beside what it is compared with, in one process and in turn: quote the ratios.

    read     a model of `dsan train` against rapidocr's recogniser (bundled with it), both on decoded crops
    greedy   best-path decoding against a loop over frames, batch 1024
    beam     prefix beam search of width 10 over 3000 words of 25 frames
    step     a training step of the base network with text attention and the enhancement branch against one without

    uv run --group peers python packages/dsan/benchmarks/recognise.py PART [--model FOLDER] [--crops ZIP] [--threads 1]

rapidocr reads punctuation, capitals and more alphabets, and was trained on large real sets: a yardstick, not an equal.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from dsan import DSAN, CTCCharset, DoubleSupervisionLoss, ctc_beam, ctc_greedy
from dsan.metrics import exact_accuracy, word_accuracy
from dsan.read import load_model
from dsan.readers import read_crops
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from papercore.ops import peak_memory, pick_device
from torch import Tensor

CHUNK = 250  # crops that one recogniser reads before it is the other's turn


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def median_times(contestants: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Each once to warm up, then all of them in turn, round after round."""
    for run in contestants.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(timed(run, device)[0])
    return {name: statistics.median(values) for name, values in found.items()}


def read(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    from rapidocr import RapidOCR
    from rapidocr.ch_ppocr_rec import TextRecInput

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": args.threads for kind in ("intra", "inter")}
    rapid = RapidOCR(params={"Global.log_level": "error", **threads})
    recognise = rapid._load_rec_model()  # recognition alone: the crops are words
    crops, device = read_crops(args.crops), pick_device()
    images = [crops.open(i).convert("RGB") for i in range(min(len(crops), args.count))]
    truths = crops.labels[: len(images)]
    model = load_model(args.model)

    def theirs(part: list[Any]) -> list[str]:
        pixels = [np.ascontiguousarray(np.asarray(image)[..., ::-1]) for image in part]  # blue first
        return list(recognise(TextRecInput(img=pixels)).txts or [])

    def ours(branch: str) -> Callable[[list[Any]], list[str]]:
        return lambda part: [reading.text for reading in model.read(part, decode=branch)]

    readers = {"ours, ctx": ours("ctx")}
    readers |= {"ours, enh": ours("enh")} if model.enhancement is not None else {}
    readers["rapidocr, recognition"] = theirs
    seconds = dict.fromkeys(readers, 0.0)
    texts: dict[str, list[str]] = {name: [] for name in readers}
    for run in readers.values():
        run(images[:64])  # warms up
    for start in range(0, len(images), CHUNK):
        for name, run in readers.items():
            spent, found = timed(lambda run=run: run(images[start : start + CHUNK]), device)  # type: ignore[misc]  # noqa: B023
            seconds[name] += spent
            texts[name] += found
    rapid_seconds = seconds["rapidocr, recognition"]
    rows = [
        [
            name, f"{len(images) / seconds[name]:.0f}", f"{rapid_seconds / seconds[name]:.2f}",
            f"{100 * word_accuracy(texts[name], truths):.2f}", f"{100 * exact_accuracy(texts[name], truths):.2f}",
        ]
        for name in readers
    ]  # fmt: skip
    return [f"{len(images)} crops", "images/s", "times rapidocr's speed", "accuracy, %", "exact, %"], rows


def loop(logits: Tensor, charset: CTCCharset, lists: bool) -> list[tuple[str, list[float]]]:
    """Best path frame by frame: over a tensor's elements, as it is often written, or over lists, as Python is fast at."""
    best, ids = logits.softmax(-1).max(-1)
    rows = zip(ids.tolist(), best.tolist(), strict=True) if lists else zip(ids, best, strict=True)
    words = []
    for row, peaks in rows:
        text, scores, previous = "", [], 0
        for current, peak in zip(row, peaks, strict=True):
            if current != 0 and current != previous:
                text += charset.characters[current - 1]
                scores.append(float(peak))
            elif current != 0:
                scores[-1] = max(scores[-1], float(peak))
            previous = current
        words.append((text, scores))
    return words


def peaked_logits(batch: int, frames: int, classes: int) -> Tensor:
    """As a trained network gives them: mostly blank, sure of most frames."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, classes, (batch, frames), generator=generator)
    ids[torch.rand(batch, frames, generator=generator) < 0.6] = 0
    logits = torch.randn(batch, frames, classes, generator=generator)
    return logits.scatter_add(2, ids.unsqueeze(2), torch.full((batch, frames, 1), 6.0))


def greedy(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    charset = CTCCharset()
    logits = peaked_logits(1024, 25, len(charset) + 1)
    words = loop(logits, charset, lists=True)
    readings = ctc_greedy(logits, charset)
    assert [reading.text for reading in readings] == [text for text, _ in words]
    for reading, (_, scores) in zip(readings, words, strict=True):
        assert np.allclose([score for _, score in reading.characters], scores)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: ctc_greedy(logits, charset),
        "loop over lists": lambda: loop(logits, charset, lists=True),
        "loop over a tensor's elements": lambda: loop(logits, charset, lists=False),
    }
    times = median_times(runs, args.rounds, torch.device("cpu"))
    rows = [[name, f"{1000 * spent:.2f}", f"{spent / times['ours']:.1f}"] for name, spent in times.items()]
    return ["1024 x 25 frames, 36 characters", "ms", "times ours"], rows


def beam(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    charset = CTCCharset()
    logits = peaked_logits(3000, 25, len(charset) + 1)
    times = median_times({"width 10": lambda: ctc_beam(logits, charset, beam_width=10)}, args.rounds, logits.device)
    rows = [[name, f"{spent:.2f}"] for name, spent in times.items()]
    return ["3000 x 25 frames, 36 characters", "seconds"], rows


def step(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    device = pick_device()
    batch = args.batch
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(batch, 1, 32, 100, generator=generator) * 2 - 1).to(device)
    targets = torch.randint(1, 37, (5 * batch,), generator=generator).to(device)
    lengths = torch.full((batch,), 5)

    def training_step(attention: bool, enhancement: str | None) -> Callable[[], None]:
        torch.manual_seed(0)
        model = DSAN(backbone="base", attention=attention, enhancement=enhancement).to(device).train()
        criterion = DoubleSupervisionLoss()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def run() -> None:
            optimizer.zero_grad()
            output = model(images)
            criterion(output.context, output.enhancement, targets, lengths).loss.backward()
            optimizer.step()

        return run

    runs: dict[str, Callable[[], Any]] = {
        "context branch alone": training_step(False, None),
        "with attention and enhancement": training_step(True, "ctc"),
    }
    times = median_times(runs, args.rounds, device)
    memory = {}
    for name, run in runs.items():
        with peak_memory(device) as peak:
            run()
        memory[name] = peak.bytes / 2**20
    first = "context branch alone"
    rows = [
        [
            name, f"{times[name]:.3f}", f"{times[name] / times[first]:.3f}", f"{memory[name]:.0f}",
            f"{memory[name] / memory[first]:.3f}",
        ]
        for name in runs
    ]  # fmt: skip
    return [f"base, batch {batch} of 32 x 100", "seconds a step", "ratio", "MiB", "ratio"], rows


def main() -> None:
    parts = {"read": read, "greedy": greedy, "beam": beam, "step": step}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--model", help="read: folder of `dsan train`")
    parser.add_argument("--crops", help="read: labelled crops, such as iiit5k_test.zip")
    parser.add_argument("--count", type=int, default=3000, help="read: crops at most")
    parser.add_argument("--batch", type=int, default=32, help="step: images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.part == "read" and not (args.model and args.crops):
        parser.error("read needs --model and --crops")
    torch.set_num_threads(args.threads)
    print(markdown_table(*parts[args.part](args)))
    print(f"{datetime.date.today()}, {machine()}, {args.threads} threads, {versions('dsan')}")


if __name__ == "__main__":
    main()
