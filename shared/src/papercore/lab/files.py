"""Writing results so that an interrupted run never leaves half a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> Path:
    """Write under a temporary name beside ``path``, then rename; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """:func:`write_text` of indented JSON."""
    return write_text(path, json.dumps(value, indent=2, default=str) + "\n")
