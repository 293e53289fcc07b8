"""Commands of the READMEs: how to find them, cut them short, and start them without importing torch and transformers anew."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

SHORT = {  # flags of each package's `train` for less of the sample, where that saves seconds
    "eclstm": ["--every", "20"],
    "sinkd": ["--max_train", "100"],
    "peg": [],
    "disco": [],
    "softclip": [],
    "dsan": ["--max_test", "50"],
    "iqa-distill": [],
    "mmict": ["--max_test", "24"],
}

# A process that has imported these and done nothing else; those of the tests are its forks.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["papercore.lab.training", "papercore.lab.report", "matplotlib.figure", "torchvision"])


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a Markdown page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


class Command:
    """``sys.exit(app(words))`` of a package's ``cli`` module, running."""

    def __init__(self, module: str, words: list[str], error: Path) -> None:
        self.error = error
        self.process: Any = SERVER.Process(target=_run, args=(module, [str(word) for word in words], str(error)))
        self.process.start()

    def wait_for(self, folder: Path, pattern: str) -> Command:
        """Until a file or folder of that name is there, or the command has ended."""
        while not list(folder.rglob(pattern)) and self.process.is_alive():
            time.sleep(0.01)
        return self

    def end(self, send: signal.Signals | None = None) -> tuple[int, str]:
        """Its exit code, negative for a signal, and what it wrote to stderr; after sending it a signal, if one is given."""
        if send is not None and self.process.is_alive():
            os.kill(self.process.pid, send)
        self.process.join(300)
        assert not self.process.is_alive(), f"did not end: {self.error.read_text()}"
        return self.process.exitcode, self.error.read_text()


def _run(module: str, words: list[str], error: str) -> None:
    os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(importlib.import_module(module).app(words))
