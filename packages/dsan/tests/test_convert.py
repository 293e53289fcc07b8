import io
import json
import zipfile

import lmdb
import numpy as np
import pytest
from dsan.convert import ConvertOptions, convert, write_boxes, write_crops
from dsan.readers import read_crops
from PIL import Image


def encoded(shade, kind="PNG"):
    file = io.BytesIO()
    Image.new("L", (9, 7), shade).save(file, kind)
    return file.getvalue()


ITEMS = [("a/1.png", encoded(1), "Café"), ("a/2", encoded(2, "JPEG"), ""), ("3", b"damaged", 'x"y, z')]
TARGETS = [("lmdb", "new/x"), ("folder", "x"), ("json", "x"), ("zip", "x.zip")]


class TestWriting:
    @pytest.mark.parametrize(("to", "name"), TARGETS)
    def test_what_is_written_can_be_read(self, tmp_path, to, name):
        names = write_crops(tmp_path / name, to, iter(ITEMS))
        crops = read_crops(tmp_path / name)
        expected = [f"image-{i:09d}" for i in (1, 2, 3)] if to == "lmdb" else ["a/1.png", "a/2.jpg", "3"]
        assert names == crops.names == expected
        assert crops.labels == [label for _, _, label in ITEMS]
        assert [crops.content(i) for i in range(3)] == [content for _, content, _ in ITEMS]
        assert [path.name for path in tmp_path.iterdir()] == [name.split("/")[0]]  # nothing temporary

    def test_layouts(self, tmp_path):
        """As the programs they come from have them."""
        for to, name in TARGETS:
            write_crops(tmp_path / to / name, to, ITEMS)
        with (
            lmdb.open(str(tmp_path / "lmdb/new/x"), readonly=True, lock=False) as environment,
            environment.begin() as records,
        ):
            assert dict(records.cursor())[b"num-samples"] == b"3"
            assert records.get(b"label-000000001").decode() == "Café"
        assert (tmp_path / "folder/x/gt.txt").read_text(encoding="utf-8") == 'a/1.png\tCafé\na/2.jpg\t\n3\tx"y, z\n'
        labels = json.loads((tmp_path / "json/x/labels.json").read_text(encoding="utf-8"))
        assert labels == {"a/1.png": "Café", "a/2.jpg": "", "3": 'x"y, z'}
        assert (tmp_path / "json/x/images/a/1.png").is_file()
        assert zipfile.ZipFile(tmp_path / "zip/x.zip").namelist() == ["a/1.png", "a/2.jpg", "3", "gt.txt"]

    def test_a_map_grows(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dsan.convert.FIRST_MAP", 2**16)
        monkeypatch.setattr("dsan.convert.RECORDS", 7)
        content = [np.random.default_rng(i).bytes(9000) for i in range(60)]
        write_crops(tmp_path / "x", "lmdb", ((str(i), content[i], str(i)) for i in range(60)))
        crops = read_crops(tmp_path / "x")
        assert crops.labels == [str(i) for i in range(60)]
        assert [crops.content(i) for i in range(60)] == content

    @pytest.mark.parametrize("to", ["lmdb", "folder", "json", "zip"])
    def test_a_target_in_use_is_left_alone(self, tmp_path, to):
        target = tmp_path / ("x.zip" if to == "zip" else "x")
        write_crops(target, to, ITEMS)
        with pytest.raises(ValueError, match="is there already, and not empty; give another target"):
            write_crops(target, to, ITEMS[:1])
        assert len(read_crops(target)) == 3
        (tmp_path / "empty").mkdir()
        if to != "zip":
            assert len(write_crops(tmp_path / "empty", to, ITEMS)) == 3

    @pytest.mark.parametrize(
        ("to", "items", "message"),
        [
            ("tar", ITEMS, "to must be one of lmdb, folder, json, zip; got 'tar'"),
            ("zip", ITEMS, r"x: the name of a zip, and of nothing else, ends in .zip"),
            ("folder", [], "there are no crops to write"),
            ("folder", [*ITEMS, ITEMS[0]], "a/1.png: this name is there twice"),
            ("json", [("labels.json", b"", "a")], "labels.json: this name is there twice"),
            ("folder", [("../1.png", b"", "a")], "a relative path within the target"),
            ("json", [("/1.png", b"", "a")], "a relative path within the target"),
            ("folder", [("C:\\1.png", b"", "a")], "a relative path within the target"),
            ("folder", [("1\t.png", b"", "a")], "cannot hold a tab or line end"),
            ("folder", [("1.png", b"", "a\nb")], r"nor a line end in a label \('a\\nb'\)"),
        ],
    )
    def test_wrong_input_leaves_nothing(self, tmp_path, to, items, message):
        with pytest.raises(ValueError, match=message):
            write_crops(tmp_path / "x", to, items)
        assert not list(tmp_path.iterdir())


class TestVerb:
    def test_there_and_back(self, tmp_path, capsys):
        write_crops(tmp_path / "0.zip", "zip", ITEMS)
        source = tmp_path / "0.zip"
        for i, to in enumerate(("lmdb", "json", "folder", "zip"), 1):
            target = tmp_path / (f"{i}.zip" if to == "zip" else str(i))
            assert convert(ConvertOptions(str(source), str(target), to)) == target
            assert f"{target}: 3 crops ({to}) from {source}" in capsys.readouterr().out.replace("\n", "")
            source = target
        before, after = read_crops(tmp_path / "0.zip"), read_crops(source)
        assert after.labels == before.labels
        assert [after.content(i) for i in range(3)] == [before.content(i) for i in range(3)]

    @pytest.mark.parametrize("to", ["lmdb", "folder"])
    def test_boxes_go_along(self, tmp_path, to):
        boxes = [np.array([[1, 2, 3, 4]] * 4), np.zeros((0, 4)), np.zeros((6, 4))]
        names = write_crops(tmp_path / "x.zip", "zip", ITEMS)
        path = write_boxes(tmp_path / "x.zip", names, [label for _, _, label in ITEMS], boxes)
        assert path == tmp_path / "x_chars.jsonl.gz"
        convert(ConvertOptions(str(tmp_path / "x.zip"), str(tmp_path / "y"), to))
        for found, expected in zip(read_crops(tmp_path / "y").boxes, boxes, strict=True):
            np.testing.assert_array_equal(found, expected)
