"""For all tests: one thread, and command lines that are started as users start them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from commands import Command

# Their models are tiny, and a process that a test starts must compute the same bits.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``launch("eclstm.cli", ["train", ...])`` is a started :class:`Command`."""
    folder, number, started = tmp_path_factory.mktemp("stderr"), itertools.count(), []

    def start(module: str, words: list[str]) -> Command:
        started.append(Command(module, words, folder / str(next(number))))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
