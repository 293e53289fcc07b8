import gzip
import io
import json
import multiprocessing
import os
import zipfile
from multiprocessing.pool import ThreadPool
from pickle import dumps, loads

import lmdb
import numpy as np
import pytest
from dsan.charset import CTCCharset
from dsan.images import Size
from dsan.readers import NO_CHARACTER, TOO_LONG, Crops, audit, boxes_of, join, read_crops, sidecar
from PIL import Image

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")


def png(shade, size=(12, 8)):
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, "PNG")
    return file.getvalue()


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def database(path, pairs, **records):
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for i, (content, label) in enumerate(pairs, 1):
            transaction.put(f"image-{i:09d}".encode(), content)
            transaction.put(f"label-{i:09d}".encode(), label.encode())
        transaction.put(b"num-samples", records.get("number", str(len(pairs))).encode())
    return path


def shades(crops):
    return [crops.open(i).getpixel((0, 0)) for i in range(len(crops))]


FILES = {"b/1.png": png(10), "2.png": png(20), "gt.txt": "b/1.png\tCafé\r\n\n2.png\ta\tb \n"}


class TestTables:
    def test_folder(self, tmp_path):
        crops = read_crops(folder(tmp_path, FILES))
        assert (crops.names, crops.labels, shades(crops)) == (["b/1.png", "2.png"], ["Café", "a\tb "], [10, 20])
        assert (crops.boxes, len(crops), crops.size(1)) == (None, 2, (12, 8))
        assert read_crops(str(tmp_path / "gt.txt")) == crops

    def test_images_may_be_in_a_folder_of_theirs(self, tmp_path):
        files = {"images/x/1.png": png(1), "2.png": png(2), "labels.json": '{"x/1.png": "one", "2.png": ""}'}
        crops = read_crops(folder(tmp_path, files))
        assert (crops.names, crops.labels, shades(crops)) == (["x/1.png", "2.png"], ["one", ""], [1, 2])

    def test_icdar_lines(self, tmp_path):
        lines = '\ufeffword_1.png, "Tired, \\"and\\" so"\nword_2.png, ""\n'
        crops = read_crops(
            folder(tmp_path, {"word_1.png": png(1), "word_2.png": png(2), "list.txt": lines}) / "list.txt"
        )
        assert (crops.names, crops.labels) == (["word_1.png", "word_2.png"], ['Tired, "and" so', ""])

    @pytest.mark.parametrize("base", ["", "set/", "set/words/"])
    def test_zip(self, tmp_path, base):
        path = zipped(tmp_path / "x.zip", {base + name: content for name, content in FILES.items()})
        crops = read_crops(path)
        assert (crops.names, crops.labels, shades(crops)) == (["b/1.png", "2.png"], ["Café", "a\tb "], [10, 20])
        files = {"labels.json": '{"1.png": "x"}', "images/1.png": png(3)}
        assert shades(read_crops(zipped(tmp_path / "y.zip", files))) == [3]

    def test_a_zip_that_is_written_anew(self, tmp_path):
        for shade in (1, 2):
            assert shades(
                read_crops(zipped(tmp_path / "x.zip", {"gt.txt": "1.png\ta" * shade, "1.png": png(shade)}))
            ) == [shade]

    def test_zipped_names_that_lead_out_write_nothing(self, tmp_path):
        (tmp_path / "in").mkdir()
        path = zipped(tmp_path / "in" / "x.zip", {"gt.txt": "../../1.png\tx", "../../1.png": png(5)})
        before = sorted(tmp_path.rglob("*"))
        assert shades(read_crops(path)) == [5]
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("gt.txt", "", "gt.txt: empty"),
            ("gt.txt", "1.png a", r"gt.txt: line 1: expected name<TAB>label, got '1.png a'"),
            ("gt.txt", "1.png\ta\n\ta", r"line 2: expected name<TAB>label, got '\\ta'"),
            ("gt.txt", "1.png\ta\n\n2.png\tb", r"line 3: no image '2.png' in"),
            ("gt.txt", "1.png\ta\n1.png\tb", r"line 2: '1.png' is there twice, first in .*gt.txt: line 1"),
            ("gt.txt", b"1.png\t\xff", r"gt.txt: not UTF-8"),
            ("labels.json", "", "labels.json: empty"),
            ("labels.json", "{", "labels.json: not JSON"),
            ("labels.json", '["1.png"]', "expected an object of names and labels"),
            ("labels.json", '{"1.png": 3}', r"the label of '1.png' must be text, got 3"),
            ("labels.json", '{"1.png": "a", "1.png": "b"}', r"entry 2: '1.png' is there twice, first in .*entry 1"),
            ("labels.json", '{"1.png": "a", "2.png": "b"}', r"entry 2: no image '2.png'"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, name, content, message):
        files = {"1.png": png(1), name: content}
        for path in (folder(tmp_path / "x", files), zipped(tmp_path / "x.zip", files)):
            with pytest.raises(ValueError, match=message) as raised:
                read_crops(path)
            assert str(path) in str(raised.value)
            assert "\n" not in str(raised.value)

    def test_no_data(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file or folder; expected an LMDB folder"):
            read_crops(tmp_path / "none")
        with pytest.raises(ValueError, match=r"has no gt.txt, labels.json or data.mdb"):
            read_crops(tmp_path)
        for name, message in (("x.zip", "a damaged or encrypted zip"), ("x.csv", "not a kind of data")):
            (tmp_path / name).write_bytes(b"PK nothing")
            with pytest.raises(ValueError, match=message):
                read_crops(tmp_path / name)
        with pytest.raises(ValueError, match=r"expected one gt.txt or labels.json in the zip, found none"):
            read_crops(zipped(tmp_path / "y.zip", {"1.png": png(1)}))

    def test_damage_is_told_where_it_is_met(self, tmp_path):
        """Empty and damaged files of section 8: the rest can be read, and the error names file and member."""
        files = {"gt.txt": "0.png\ta\n1.png\tb\n2.png\tc", "0.png": b"", "1.png": png(1)[:-20], "2.png": png(2)}
        for path in (folder(tmp_path / "x", files), zipped(tmp_path / "x.zip", files)):
            crops = read_crops(path)
            with pytest.raises(ValueError, match=r"0.png: the file is empty"):
                crops.open(0)
            with pytest.raises(ValueError, match=r"x.*1.png: .*truncated"):
                crops.open(1)
            assert (crops.open(2).size, crops.size(0)) == ((12, 8), None)

    def test_a_damaged_member(self, tmp_path):
        path = zipped(tmp_path / "x.zip", {"gt.txt": "1.png\ta", "1.png": png(1)})
        content = path.read_bytes()
        path.write_bytes(content.replace(b"IDAT", b"IDAX"))
        with pytest.raises(ValueError, match=r"x.zip: 1.png: Bad CRC-32"):
            read_crops(path).open(0)


class TestLMDB:
    def test_one(self, tmp_path):
        crops = read_crops(database(tmp_path / "x", [(png(1), "Ab"), (png(2), "ü"), (b"", "")]))
        assert (crops.names, crops.labels) == ([f"image-{i:09d}" for i in (1, 2, 3)], ["Ab", "ü", ""])
        assert shades(crops.select([1, 0])) == [2, 1]
        with pytest.raises(ValueError, match=r"x: image-000000003: the file is empty"):
            crops.open(2)

    def test_nested_ones_are_joined(self, tmp_path):
        for name, shade in (("ST", 3), ("MJ/train", 1), ("MJ/valid", 2)):
            database(tmp_path / name, [(png(shade), name)])
        crops = read_crops(tmp_path)
        assert crops.names == [f"{name}/image-000000001" for name in ("MJ/train", "MJ/valid", "ST")]
        assert (crops.labels, shades(crops)) == (["MJ/train", "MJ/valid", "ST"], [1, 2, 3])

    @pytest.mark.parametrize(
        ("number", "message"),
        [("2", "num-samples is 2, but there is no label-000000002"), ("x", "without num-samples")],
    )
    def test_wrong_ones(self, tmp_path, number, message):
        with pytest.raises(ValueError, match=message):
            read_crops(database(tmp_path / "x", [(png(1), "a")], number=number))

    def test_damaged(self, tmp_path):
        with pytest.raises(ValueError, match="x: a damaged LMDB"):
            read_crops(folder(tmp_path / "x", {"data.mdb": b"nothing" * 2000}))


def _child(crops, queue):
    queue.put(shades(crops))


@pytest.mark.parametrize("kind", ["lmdb", "zip"])
def test_processes_and_threads(tmp_path, kind):
    """A file that is open already when a process forks; a copy that was pickled; many threads."""
    shade = list(range(40))
    if kind == "lmdb":
        crops = read_crops(database(tmp_path / "x", [(png(i), "a") for i in shade]))
    else:
        lines = "".join(f"{i}.png\ta\n" for i in shade)
        crops = read_crops(zipped(tmp_path / "x.zip", {"gt.txt": lines} | {f"{i}.png": png(i) for i in shade}))
    assert shades(crops) == shade
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child, args=(crops, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert shades(crops) == shade
    assert [queue.get(timeout=20) for _ in children] == [shade, shade]
    for child in children:
        child.join()
    with ThreadPool(4) as pool:
        assert pool.map(lambda i: crops.open(i).getpixel((0, 0)), shade * 5) == shade * 5
    assert shades(loads(dumps(crops))) == shade


class TestBoxes:
    def rows(self, path, rows):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def test_sidecar(self, tmp_path):
        path = zipped(tmp_path / "x.zip", {"gt.txt": "a/1.webp\tab\n2.webp\tc", "a/1.webp": png(1), "2.webp": png(2)})
        self.rows(
            tmp_path / "x_chars.jsonl.gz",
            [
                {"name": "a/1.png", "boxes": [[1, 2, 3, 4], [5, 6, 7, 8.5]]},
                {"name": "other.png", "boxes": [[1, 2, 3, 4]]},
            ],
        )
        crops = read_crops(path)
        assert [box.tolist() for box in crops.boxes] == [[[1, 2, 3, 4], [5, 6, 7, 8.5]], []]
        assert crops.select([1]).boxes[0].shape == (0, 4)
        both = join([crops, Crops(["n"], ["l"], crops.files[:1])])
        assert [len(box) for box in both.boxes] == [2, 0, 0]
        assert sidecar(tmp_path / "x") == sidecar(path)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"name": "1.png", "boxes": [[1, 2, 3, 4]]}, "line 1: 1 boxes, but the label of 1.png is 'ab'"),
            ({"name": "1.png", "boxes": [[1, 2, 3]]}, "line 1: expected an object with name and boxes"),
            ({"boxes": []}, "line 1: expected an object with name and boxes"),
        ],
    )
    def test_wrong_ones(self, tmp_path, row, message):
        path = folder(tmp_path / "x", {"gt.txt": "1.png\tab", "1.png": png(1)})
        self.rows(tmp_path / "x_chars.jsonl.gz", [row])
        with pytest.raises(ValueError, match=message):
            read_crops(path)

    def test_a_damaged_file(self, tmp_path):
        path = folder(tmp_path, {"x/gt.txt": "1.png\tab", "x/1.png": png(1), "x_chars.jsonl.gz": "no gzip"}) / "x"
        with pytest.raises(ValueError, match=r"x_chars.jsonl.gz: a damaged file of boxes"):
            read_crops(path)

    def test_follow_the_characters_that_are_left(self):
        boxes = np.arange(16, dtype=np.float32).reshape(4, 4)
        kept = boxes_of(CTCCharset(), "A-b!", "ab", boxes)
        np.testing.assert_array_equal(kept, boxes[[0, 2]])
        np.testing.assert_array_equal(boxes_of(CTCCharset(), "ﬁxe", "fixe", boxes[:3]), boxes[[0, 0, 1, 2]])
        assert boxes_of(CTCCharset(), "A-b", "ab", boxes).shape == (0, 4)


class TestAudit:
    def crops(self, *labels, sizes=None):
        self.opened = []
        content = [png(1, size) for size in sizes or [(12, 8)] * len(labels)]

        opened = self.opened

        class File(int):
            def read(self):
                opened.append(int(self))
                return content[self]

        return Crops([f"{i}.png" for i in range(len(labels))], list(labels), [File(i) for i in range(len(labels))])

    def test_what_is_dropped_and_changed_is_told(self):
        crops, report = audit(self.crops("Ab", "", "€-", "ok", "X-1", "CD"), CTCCharset(), 25, data="words")
        assert (crops.names, crops.labels) == (["0.png", "3.png", "4.png", "5.png"], ["ab", "ok", "x1", "cd"])
        assert (report.read, report.kept, report.dropped) == (6, 4, {NO_CHARACTER: ["1.png", "2.png"]})
        assert report.lines() == [
            "words: 6 crops, 4 kept",
            "  2 dropped: no character of the label is in the charset (1.png, '')",
            "  2 labels lower-cased ('Ab' is now 'ab')",
            "  1 labels lost or changed characters ('X-1' is now 'x1')",
        ]

    def test_labels_too_long_for_ctc(self):
        """22 letters and 4 repeats do not fit 25 frames; bookkeeper (10 + 3) fits 13."""
        long = "aabbccddefghijklmnopqr"
        crops = self.crops("bookkeeper", long)
        message = rf"words: crop 1 \(1.png\) has label '{long}', which needs T >= 26 frames, but its image makes T = 25"
        with pytest.raises(ValueError, match=message):
            audit(crops, CTCCharset(), 25, data="words")
        kept, report = audit(crops, CTCCharset(), 25, on_infeasible="skip")
        assert (kept.labels, report.dropped) == (["bookkeeper"], {TOO_LONG: ["1.png"]})
        assert f"1 dropped: too long for the frames (1.png, '{long}': needs 26, has 25)" in report.lines()[1]
        assert audit(crops, CTCCharset(), 26)[0].labels == audit(crops, CTCCharset())[0].labels == ["bookkeeper", long]
        with pytest.raises(ValueError, match=r"needs T >= 13 frames, but its image makes T = 12"):
            audit(self.crops("bookkeeper"), CTCCharset(), 12)

    def test_frames_follow_the_width_of_the_fitted_crop(self):
        crops = self.crops("abcdefgh", "abcdefgh", sizes=[(64, 64), (32, 32 * 9)])
        size = Size(keep_ratio=True)
        with pytest.raises(ValueError, match=r"crop 1 \(1.png\).* needs T >= 8 frames, but its image makes T = 4"):
            audit(crops, CTCCharset(), lambda width: width // 4, size)
        turned = Size(keep_ratio=True, rotate_tall=True)
        assert len(audit(crops, CTCCharset(), lambda width: width // 4, turned)[0]) == 2
        self.opened.clear()
        assert len(audit(crops, CTCCharset(), lambda width: width // 4)[0]) == 2
        assert not self.opened  # all are stretched to one width

    def test_nothing_left(self):
        with pytest.raises(ValueError, match=r"words: 1 crops, 0 kept; .*nothing is left; check the charset '01'"):
            audit(self.crops("abc"), CTCCharset("01"), data="words")
        with pytest.raises(ValueError, match="on_infeasible must be raise or skip, got 'drop'"):
            audit(self.crops("abc"), CTCCharset(), on_infeasible="drop")


@REAL
def test_iiit5k():
    """Facts of the specification's section 6."""
    data = os.path.join(os.environ["PAPERCORE_DATA"], "dsan")
    train, test = (read_crops(f"{data}/iiit5k_{part}.zip") for part in ("train", "test"))
    assert (len(train), len(test)) == (2000, 3000)
    assert all(
        len(box) == len(label) for crops in (train, test) for box, label in zip(crops.boxes, crops.labels, strict=True)
    )
    kept, report = audit(test, CTCCharset(), 25)
    assert (len(kept), report.dropped, list(report.changed)) == (3000, {}, ["lower-cased"])
    assert sum(len(label) <= 2 for label in kept.labels) == 434
    assert test.open(0).mode in ("L", "RGB")
