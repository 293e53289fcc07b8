import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from eclstm.cmapss import CMAPSS, SENSORS, SETTINGS, SUBSETS
from eclstm.data import Segments, select_features
from numpy.testing import assert_array_equal

GOLDEN = Path(__file__).parent / "golden" / "labels_scores_windows.json"
COUNTS = json.loads(GOLDEN.read_text())["window_counts_T5_L16"]

real_data = pytest.mark.skipif(
    "PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA, the folder of the real data sets, is unset"
)


class TestCmapss:
    @pytest.fixture(params=["folder", "nested folder", "zip", "tar.xz", "tar.gz", "archive in a folder"])
    def root(self, request, cmapss_folder, tmp_path, pack):
        if request.param in ("folder", "nested folder"):
            return cmapss_folder if request.param == "folder" else tmp_path
        if request.param == "archive in a folder":
            (tmp_path / "download").mkdir()
            pack(cmapss_folder, "xz", tmp_path / "download" / "CMAPSSData.tar.xz")
            return tmp_path / "download"
        return pack(cmapss_folder, request.param.removeprefix("tar."), tmp_path / f"set.{request.param}")

    def test_reads_folders_and_archives_alike(self, root):
        sets = CMAPSS(root, "FD001")
        assert sets.train.columns == sets.test.columns == SETTINGS + SENSORS
        assert_array_equal(sets.train.lengths, [25, 30])
        assert_array_equal(sets.test.lengths, [22, 8, 27])
        assert_array_equal(sets.train.remaining, [0, 0])
        assert_array_equal(sets.test.remaining, [40, 150, 10])
        first = np.random.default_rng(1).normal(size=24).round(4)
        assert_array_equal(sets.train.values[0], first)

    @pytest.mark.parametrize("name", ["train_FD001.txt", "test_FD001.txt", "RUL_FD001.txt"])
    def test_a_missing_file_is_named(self, cmapss_folder, name):
        (cmapss_folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} not found"):
            CMAPSS(cmapss_folder)

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"nowhere: no such folder or archive; expected one that holds train_FD002.txt"
        ):
            CMAPSS(tmp_path / "nowhere", "FD002")

    def test_another_kind_of_file_is_refused(self, cmapss_folder):
        with pytest.raises(ValueError, match=r"RUL_FD001.txt: neither a folder nor a zip or tar archive"):
            CMAPSS(cmapss_folder / "RUL_FD001.txt")

    @pytest.mark.parametrize("kind", ["xz", "gz", "zip"])
    def test_a_damaged_archive_is_named(self, cmapss_folder, tmp_path, kind, pack):
        path = pack(cmapss_folder, kind, tmp_path / f"set.{kind}")
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half])
        with pytest.raises(
            ValueError, match=rf"set\.{kind}: (damaged archive|neither a folder nor a zip or tar archive)"
        ):
            CMAPSS(path)
        if kind == "zip":  # which has a checksum for each file
            path.write_bytes(content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :])
            with pytest.raises(ValueError, match=r"set\.zip: damaged archive: Bad CRC-32"):
                CMAPSS(path)

    def test_unknown_subset_lists_the_known(self, cmapss_folder):
        with pytest.raises(ValueError, match="subset 'FD005' is unknown: choose from FD001, FD002, FD003, FD004"):
            CMAPSS(cmapss_folder, "FD005")

    def test_number_of_rul_rows_must_be_that_of_test_units(self, cmapss_folder):
        (cmapss_folder / "RUL_FD001.txt").write_text("40\n150\n")
        with pytest.raises(
            ValueError, match=r"RUL_FD001.txt has 2 rows and test_FD001.txt has 3 units: they must be equal"
        ):
            CMAPSS(cmapss_folder)

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("train_FD001.txt", "1 1 0.5 0.5\n1 2 0.5 0.5\n", "train_FD001.txt: 4 columns where C-MAPSS has 26"),
            ("train_FD001.txt", "", "train_FD001.txt: not a C-MAPSS text file"),
            ("test_FD001.txt", "1 2\n1 2 3 4\n", "test_FD001.txt: not a C-MAPSS text file"),
            (
                "test_FD001.txt",
                "1 5" + " 0" * 24 + "\n1 6" + " 0" * 9,
                "test_FD001.txt: unit 1, cycle 6, column 'sensor_7': nan",
            ),
            ("RUL_FD001.txt", "40\nlate\n10\n", "RUL_FD001.txt, row 2: not a finite number"),
            ("RUL_FD001.txt", "40 1\n150 1\n10 1\n", "RUL_FD001.txt: 2 columns where C-MAPSS has 1"),
        ],
    )
    def test_a_file_of_another_form_is_named(self, cmapss_folder, name, text, message):
        (cmapss_folder / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            CMAPSS(cmapss_folder)


@pytest.fixture(scope="module", params=SUBSETS)
def sets(request):
    return request.param, CMAPSS(Path(os.environ["PAPERCORE_DATA"]) / "eclstm", request.param)


@real_data
class TestRealCmapss:
    dropped: ClassVar = {
        "FD001": [1, 5, 10, 16, 18, 19],
        "FD002": [1, 5, 10, 18, 19],
        "FD003": [1, 5, 16, 18, 19],
        "FD004": [1, 5, 18, 19],
    }

    def test_numbers_of_units_are_nasas(self, sets):
        subset, data = sets
        units = {"FD001": (100, 100), "FD002": (260, 259), "FD003": (100, 100), "FD004": (249, 248)}
        assert (len(data.train), len(data.test)) == units[subset]

    def test_features_are_those_of_the_published_weights(self, sets):
        subset, data = sets
        gone = SETTINGS + [f"sensor_{i}" for i in self.dropped[subset]]
        kept = select_features(data.train)
        assert kept == [c for c in data.train.columns if c not in gone]
        assert len(kept) == {"FD001": 15, "FD002": 16, "FD003": 16, "FD004": 17}[subset]

    def test_numbers_of_segments_are_the_authors(self, sets):
        subset, data = sets
        segments = Segments(data.train, data.train.columns, 20, data.train.labels())
        assert len(segments) == COUNTS[subset]

    def test_short_test_units_are_padded_in_front_with_their_first_row(self, sets):
        subset, data = sets
        short = np.flatnonzero(data.test.lengths < 20)
        assert len(short) == (2 if subset == "FD004" else 0)
        segments = Segments(data.test, data.test.columns, 20, data.test.labels(), last_only=True)
        assert len(segments) == len(data.test)
        for unit in short:
            rows = segments[unit]["segments"]
            padding = 20 - data.test.lengths[unit]
            assert (rows[: padding + 1] == rows[0]).all()
            first, last = data.test.starts[unit], data.test.starts[unit + 1]
            assert_array_equal(rows[padding:], data.test.values[first:last].astype(np.float32))

    def test_labels_are_capped_for_training_and_known_for_testing(self, sets):
        _, data = sets
        labels = data.train.labels()
        assert labels.max() == 120
        assert_array_equal(labels[data.train.starts[1:] - 1], 0)
        assert_array_equal(data.test.labels(cap=None)[data.test.starts[1:] - 1], data.test.remaining)
