"""Some of the tensors of a transformers checkpoint, without loading the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging
from transformers.utils.hub import cached_file

PARTS = {"blip-2", "instructblip"}  # model types whose checkpoints hold a vision and a language model


def read_tensors(name: str, *prefixes: str) -> dict[str, Tensor]:
    """The tensors whose names begin with one of ``prefixes``.

    Args:
        name: folder, or Hub name, of a checkpoint in safetensors, in one file or several.

    Raises:
        OSError: if it has no safetensors.
    """
    try:
        index = json.loads(Path(str(cached_file(name, "model.safetensors.index.json"))).read_text())
        files = sorted({file for key, file in index["weight_map"].items() if key.startswith(prefixes)})
    except OSError:
        files = ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(str(cached_file(name, file)), "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefixes)}  # noqa: SIM118
    return found


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bars, and its reports of weights that are unknown, missing or not tied: here they are meant, or
    errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
