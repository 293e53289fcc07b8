"""Which device and precision to run in, how much memory a piece of code takes, and seeding."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def pick_device() -> torch.device:
    """The best device at hand: CUDA, then Apple's MPS, then the CPU.

    >>> isinstance(pick_device(), torch.device)
    True
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype to hand to ``torch.autocast``: bfloat16 where the hardware multiplies it fast, else float16 or float32.

    On a CPU that is with AMX or AVX512-BF16; float32 means: do not autocast.

    >>> autocast_dtype("cpu") in (torch.bfloat16, torch.float32)
    True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu.get_capabilities()
        return torch.bfloat16 if fast.get("amx_bf16") or fast.get("avx512_bf16") else torch.float32
    return torch.float16


@dataclass
class PeakMemory:
    """What :func:`peak_memory` fills in: ``bytes`` of tensor memory at the worst moment, above what was there before."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """Measure the peak of newly allocated tensor memory inside the block.

    On CUDA it is the allocator's own figure. On a CPU torch's allocations are traced, which slows the block: measure
    memory and time in separate runs.

    >>> with peak_memory() as peak:
    ...     _ = torch.ones(1000) + torch.ones(1000)
    >>> peak.bytes >= 8000
    True
    """
    device, result = torch.device(device), PeakMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        torch.cuda.synchronize(device)
        result.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports on stderr, and that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield result
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    changes = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        result.bytes = max(result.bytes, held)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices).

    >>> seed_everything(0)
    >>> first = torch.rand(3)
    >>> seed_everything(0)
    >>> torch.equal(torch.rand(3), first)
    True
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32 inside the block, whatever the user allows outside (TF32, bfloat16).

    >>> with full_precision():
    ...     _ = torch.ones(2, 2) @ torch.ones(2, 2)
    """
    if torch.compiler.is_compiling():
        yield
        return
    engines: Any = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [engine.fp32_precision for engine in engines]
    if not {"tf32", "bf16"}.intersection(before):
        yield
        return
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to sum up what was set by torch.backends.*.fp32_precision
        overall = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(overall)
        for engine, precision in zip(engines, before, strict=True):
            engine.fp32_precision = precision
