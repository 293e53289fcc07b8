from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dsan.readers import read_crops
from dsan.synth import SynthOptions, synth
from PIL import Image


@pytest.mark.parametrize(("name", "to"), [("words", "folder"), ("words.zip", "zip"), ("words", "lmdb")])
def test_what_is_written_is_read_again(tmp_path: Path, name: str, to: str) -> None:
    synth(SynthOptions(str(tmp_path / name), count=7, workers=1, to=to))
    crops = read_crops(tmp_path / name)
    assert len(crops) == 7
    assert crops.boxes is not None
    for position, label in enumerate(crops.labels):
        assert crops.open(position).height == 32
        assert crops.boxes[position].shape == (len(label), 4)
    sheet = Image.open(tmp_path / "words_sheet.png")
    assert np.asarray(sheet.convert("L")).std() > 10


def test_the_same_flags_give_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("alpha beta")
    for name in ("a", "b"):
        synth(SynthOptions(str(tmp_path / name), count=3, workers=1, words=str(tmp_path / "list.txt"), seed=4))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
