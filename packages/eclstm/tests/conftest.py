import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from eclstm.cmapss import SENSORS, SETTINGS


@pytest.fixture(scope="session")
def tiny_frame():
    """10 units of 30 to 44 cycles: two sensors that wear, one that is noise, one constant."""
    rng = np.random.default_rng(0)
    frames = []
    for unit in range(1, 11):
        life = int(rng.integers(30, 45))
        wear = np.linspace(0, 1, life) ** 2
        frames.append(
            pd.DataFrame(
                {
                    "unit": unit,
                    "cycle": np.arange(1, life + 1),
                    "heat": 500 + 20 * wear + rng.normal(0, 1, life),
                    "flow": 3 - wear + rng.normal(0, 0.05, life),
                    "noise": rng.normal(0, 1, life),
                    "serial": 7.0,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="session")
def tiny_table(tiny_frame, tmp_path_factory) -> Path:
    """The same as a CSV file."""
    path = tmp_path_factory.mktemp("table") / "tiny.csv"
    tiny_frame.to_csv(path, index=False)
    return path


@pytest.fixture
def cmapss_folder(tmp_path) -> Path:
    """A C-MAPSS set in miniature: units of 25 and 30 cycles to train on, of 22, 8 and 27 to test on, 40, 150 and 10 left."""
    columns = len(SETTINGS) + len(SENSORS)
    rng = np.random.default_rng(1)

    def text(lengths):
        rows = [[u, c, *rng.normal(size=columns).round(4)] for u, n in enumerate(lengths, 1) for c in range(1, n + 1)]
        return "".join(" ".join(map(str, row)) + "  \n" for row in rows)  # NASA's lines end in two blanks

    folder = tmp_path / "CMAPSS"
    folder.mkdir()
    (folder / "train_FD001.txt").write_text(text([25, 30]))
    (folder / "test_FD001.txt").write_text(text([22, 8, 27]))
    (folder / "RUL_FD001.txt").write_text("40 \n150 \n10 \n")
    return folder


@pytest.fixture
def pack():
    """Packs a folder's files into an archive of a kind (zip, xz, gz) and returns its path."""

    def pack(folder, kind, path):
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as bundle:
                for file in folder.iterdir():
                    bundle.write(file, f"CMAPSSData/{file.name}")
        else:
            with tarfile.open(path, f"w:{kind}") as bundle:
                bundle.add(folder, ".")
        return path

    return pack
