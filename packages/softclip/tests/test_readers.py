import io
import json
import os
import tarfile
from pickle import dumps, loads

import numpy as np
import pytest
from PIL import Image
from softclip.readers import Fields, Pairs, find_shards, read_csv, read_shards, to_pairs


def png(shade, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (4, 3), shade).save(file, "PNG")
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def sample(key, shade, caption="a thing", **values):
    return {f"{key}.png": png(shade), f"{key}.txt": caption.encode(), f"{key}.json": json.dumps(values).encode()}


def shades(pairs):
    return [pairs.image(i).getpixel((0, 0))[0] for i in range(len(pairs))]


def read(paths, **fields):
    return to_pairs([read_shards(paths, Fields(**fields))], Fields(**fields))[0]


class TestPairs:
    @pytest.fixture
    def pairs(self, tmp_path):
        path = tar(tmp_path / "x.tar", {**sample("a", 10), **sample("b", 20), **sample("c", 30)})
        pairs = read([path])
        pairs.tags, pairs.labels, pairs.groups, pairs.classes = [["x"], [], ["z"]], [1, 0, 1], [0, 0, 1], ("p", "q")
        pairs.roi = [np.zeros(1), np.ones(1), np.full(1, 2)].__getitem__
        return pairs

    def test_select(self, pairs):
        some = loads(dumps(pairs.select([2, 0, 1]).select([1, 0])))
        assert (shades(some), some.tags, some.labels, some.groups) == ([10, 30], [["x"], ["z"]], [1, 1], [0, 1])
        assert (some.classes, some.boxes, some.roi(1)) == (("p", "q"), None, 2)

    def test_images_are_upright_rgb_on_white(self):
        turned = Image.new("RGB", (4, 3))
        turned.getexif()[0x112] = 6
        file = io.BytesIO()
        turned.save(file, "JPEG", exif=turned.getexif())
        palette = Image.new("P", (4, 3))
        palette.info["transparency"] = 0
        pictures = [
            Image.open(file),
            Image.new("RGBA", (4, 3), (0, 0, 0, 0)),
            Image.new("LA", (4, 3), (0, 127)),
            palette,
            Image.fromarray(np.full((3, 4), 40000, np.uint16)),
        ]
        pairs = Pairs(pictures.copy().__getitem__, list("abcde"), ["x"] * 5)
        images = [pairs.image(i) for i in range(5)]
        assert {image.mode for image in images} == {"RGB"}
        assert images[0].size == (3, 4)
        assert [image.getpixel((0, 0))[0] for image in images[1:]] == [255, 128, 255, 156]

    @pytest.mark.parametrize("content", [b"no image", png(3)[:-30], b""])
    def test_what_cannot_be_decoded_is_named(self, tmp_path, content):
        pairs = read([tar(tmp_path / "x.tar", {**sample("a", 1), **sample("b", 1), "b.png": content})])
        assert pairs.image(0).size == (4, 3)
        with pytest.raises(ValueError, match=r"x.tar: b.png: the image cannot be decoded: "):
            pairs.image(1)


class TestShards:
    def test_samples_of_several(self, tmp_path):
        first = {
            **sample("deep/a.b", 10),
            **sample("other/a", 20),
            ".hidden.png": b"",
            "__meta__.txt": b"",
            "dir/x": b"",
        }
        first = {name.replace("a.b.", "a."): content for name, content in first.items()}
        second = {"b.JPEG": png(30), "b.txt": "é\n".encode(), "b.seg.png": b"?", "b.jpg": png(40)}
        pairs = loads(dumps(read([tar(tmp_path / "x.tar", first), tar(tmp_path / "y.tar", second)])))
        assert (shades(pairs), pairs.captions) == ([10, 20, 40], ["a thing", "a thing", "é"])
        assert (pairs.tags, pairs.groups, pairs.labels, pairs.roi) == (None,) * 4
        assert str(pairs.names[2]) == f"{tmp_path / 'y.tar'}: b.jpg"

    def test_fields(self, tmp_path):
        members = {**sample("a", 1, tags=["x y", " z "], root=7, kind="cat"), **sample("b", 1, root=8, kind="ant")}
        members |= {**sample("c", 1, root=7, kind="cat", tags=None), "a.cls": b"3", "b.cls": b"1\n", "c.cls": b"3"}
        members |= {"a.tags.txt": b"p; q ;", "b.tags.txt": b'["r;s"]', "c.roi.npy": npy(np.ones((2, 3)))}
        path = tar(tmp_path / "x.tar", members)
        pairs = read([path], tags="json:tags", group="json:root", label="json:kind", roi="roi.npy")
        assert (pairs.tags, pairs.groups) == ([["x y", "z"], [], []], [0, 1, 0])
        assert (pairs.labels, pairs.classes) == ([1, 0, 1], ("ant", "cat"))
        assert [pairs.roi(i).shape for i in range(3)] == [(0, 0), (0, 0), (2, 3)]
        pairs = read([path], tags="tags.txt", label="cls")
        assert (pairs.tags, pairs.labels, pairs.classes) == ([["p", "q"], ["r;s"], []], [1, 0, 1], ("1", "3"))

    def test_parts_are_numbered_alike(self, tmp_path):
        fields = Fields(group="json:root", label="json:kind")
        members = [
            {**sample("a", 1, root="r", kind="k")},
            {**sample("b", 1, root="s", kind="j"), **sample("c", 1, root="r", kind="k")},
        ]
        parts = [read_shards([tar(tmp_path / f"{i}.tar", part)], fields) for i, part in enumerate(members)]
        train, test = to_pairs(parts, fields)
        assert (train.groups, test.groups, train.labels, test.labels) == ([0], [1, 0], [1], [0, 1])
        assert train.classes == test.classes == ("j", "k")

    @pytest.mark.parametrize(
        ("members", "fields", "message"),
        [
            ({"a.png": b"", "a.json": b"{}"}, {}, r"x.tar: sample a: no txt, or an empty one; there are png, json"),
            (sample("d/a", 1, " "), {}, r"x.tar: sample d/a: no txt, or an empty one"),
            ({"a.txt": b"x", "a.gif": b""}, {}, r"sample a: no image \(jpg, png, jpeg, webp\); it has txt, gif"),
            ({"x": b""}, {}, r"x.tar: no samples in this archive"),
            ({**sample("a", 1), "a.txt": b"\xff"}, {}, r"x.tar: a.txt: not text in UTF-8"),
            ({**sample("a", 1), "a.PNG": b""}, {}, r"x.tar: a.PNG is there twice"),
            ({**sample("a", 1), "a.json": b"{"}, {"tags": "json:tags"}, r"x.tar: a.json: not JSON"),
            ({**sample("a", 1), "a.json": b"[1]"}, {"tags": "json:tags"}, r"a.json: expected an object with keys, got \[1\]"),
            (sample("a", 1, tags=["x", 1]), {"tags": "json:tags"}, r"sample a: json:tags: tags must be a list .* got \['x', 1\]"),
            (sample("a", 1, tags={"x": 1}), {"tags": "json:tags"}, r"sample a: json:tags: tags must be a list of strings"),
            ({**sample("a", 1), "a.tags.txt": b"[1"}, {"tags": "tags.txt"}, r"sample a: tags.txt: not a JSON list"),
            (sample("a", 1, tag=["x"]), {"tags": "json:tags"}, r"no sample has json:tags; .* png, txt, json, json:tag"),
            (sample("a", 1), {"roi": "roi.npy"}, r"no sample has roi.npy; the first has png, txt, json"),
            ({**sample("a", 1, k="x"), **sample("b", 1, m=1)}, {"label": "json:k"}, r"sample b: no json:k.*there are .*json:m"),
            (sample("a", 1, k=0.5), {"group": "json:k"}, r"sample a: json:k must be text or a whole number, got 0.5"),
            (sample("a", 1, k=True), {"group": "json:k"}, r"sample a: json:k must be text or a whole number, got True"),
        ],
    )  # fmt: skip
    def test_wrong_samples_end_in_one_line(self, tmp_path, members, fields, message):
        with pytest.raises(ValueError, match=message) as caught:
            read([tar(tmp_path / "x.tar", members)], **fields)
        assert "\n" not in str(caught.value)

    def test_damaged_archives(self, tmp_path):
        path = tmp_path / "x.tar"
        tar(path, {**sample("a", 1), "a.bin": os.urandom(5000), **sample("b", 1)})
        whole = path.read_bytes()
        header = whole.index(b"b.png")
        damaged = [
            whole[:3000],  # within a file
            whole[: header + 100],  # within a header
            whole[:header] + b"?" * 512 + whole[header + 512 :],
            b"no archive",
            b"",
        ]
        for content in damaged:
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"x.tar: a damaged archive, or not an uncompressed .tar: "):
                read([str(path)])
        with pytest.raises(ValueError, match=r"y.tar: a damaged archive, or not an uncompressed .tar: "):
            read([tar(tmp_path / "y.tar", sample("a", 1), "w:gz")])

    @pytest.mark.parametrize("content", [b"text", npy(np.ones(3))[:-8], dumps(np.ones(3)), b"\x93NUMPY"])
    def test_arrays_that_are_none(self, tmp_path, content):
        pairs = read([tar(tmp_path / "x.tar", {**sample("a", 1), "a.roi.npy": content})], roi="roi.npy")
        with pytest.raises(ValueError, match=r"x.tar: a.roi.npy: not an array"):
            pairs.roi(0)


class TestFindShards:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        for name in ("train-08", "train-09", "train-10", "test-0"):
            tar(tmp_path / f"{name}.tar", {})
        (tmp_path / "sizes.json").write_text("{}")
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        ("data", "train", "test"),
        [
            (".", ["train-08.tar", "train-09.tar", "train-10.tar"], ["test-0.tar"]),
            ("t*-0*.tar", ["train-08.tar", "train-09.tar"], ["test-0.tar"]),
            ("train-{09..10}.tar", ["train-09.tar", "train-10.tar"], []),
            ("train-{0..0}{8..9}.tar", ["train-08.tar", "train-09.tar"], []),
            ("test-0.tar", ["test-0.tar"], []),
        ],
    )
    def test_found(self, folder, data, train, test):
        assert find_shards(data) == (train, test)

    @pytest.mark.parametrize("data", ["train-{09..11}.tar", "train-*1.tar", "none.tar", "empty"])
    def test_missing(self, folder, tmp_path, data):
        (tmp_path / "empty").mkdir()
        with pytest.raises(
            FileNotFoundError, match=r"train-11.tar: no such|\*1.tar: no such|none.tar: no such|no .tar files"
        ):
            find_shards(data)


class TestCsv:
    def table(self, tmp_path, text):
        (tmp_path / "images").mkdir(exist_ok=True)
        for shade in (10, 20):
            (tmp_path / "images" / f"{shade}.png").write_bytes(png(shade))
            (tmp_path / "images" / f"{shade}.npy").write_bytes(npy(np.full((1, 2), shade)))
        (tmp_path / "x.csv").write_text(text, encoding="utf-8")
        return str(tmp_path / "x.csv")

    def read(self, path, separator="\t", image="filepath", caption="title", **fields):
        fields = Fields(**fields)
        return to_pairs([read_csv(path, fields, image=image, caption=caption, separator=separator)], fields)[0]

    def test_as_open_clip_writes_it(self, tmp_path):
        path = self.table(
            tmp_path, "\ufefffilepath\ttitle\nimages/10.png\ta cat\nimages/20.png\té, 2\nimages/10.png\tone\n"
        )
        for separator in ("\t", r"\t"):
            pairs = self.read(path, separator)
            assert (shades(pairs), pairs.captions) == ([10, 20, 10], ["a cat", "é, 2", "one"])
        assert pairs.names[0] == pairs.names[2] != pairs.names[1]

    def test_paths_from_the_working_folder_and_absolute_ones(self, tmp_path, monkeypatch):
        self.table(tmp_path, "")
        (tmp_path / "deep").mkdir()
        monkeypatch.chdir(tmp_path)
        for prefix in ("images/", f"{tmp_path}/images/"):
            (tmp_path / "deep" / "y.csv").write_text(f"filepath\ttitle\n{prefix}20.png\tx\n")
            assert shades(self.read(str(tmp_path / "deep" / "y.csv"))) == [20]

    def test_fields_and_quotes(self, tmp_path):
        text = 'f,t,tags,g,roi\nimages/10.png,"one, ""a""\n b",x; y,1,images/10.npy\nimages/20.png,c,"[""p"", ""q;r""]",2,\n'
        pairs = self.read(self.table(tmp_path, text), ",", "f", "t", tags="tags", group="g", label="t", roi="roi")
        assert pairs.captions == ['one, "a"\n b', "c"]
        assert (pairs.tags, pairs.groups, pairs.labels) == ([["x", "y"], ["p", "q;r"]], [0, 1], [1, 0])
        assert pairs.roi(0).tolist() == [[10, 10]]
        assert pairs.roi(1).shape == (0, 0)

    @pytest.mark.parametrize(
        ("text", "fields", "message"),
        [
            ("filepath,title\na,b\n", {}, r"x.csv: no column 'filepath'; parted by '\\t', it has filepath,title"),
            ("filepath\ttitle\na\tb\n", {"tags": "tag"}, r"no column 'tag'; parted by '\\t', it has filepath, title"),
            ("filepath\ttitle\nimages/10.png\tb\nimages/10.png\n", {}, r"x.csv: line 3: no title, or an empty one"),
            ("filepath\ttitle\n\tb\n", {}, r"x.csv: line 2: no filepath"),
            ("filepath\ttitle\nimages/10.png\tb\tc\n", {}, r"x.csv: line 2: more cells than columns"),
            ("filepath\ttitle\nimages/10.png\t[1]\n", {"tags": "title"}, r"line 2: title: tags must be a list of strings"),
            ("filepath\ttitle\tk\nimages/10.png\ta\t\n", {"group": "k"}, r"line 2: no k, or an empty one; there are filepath"),
            ("filepath\ttitle\n", {}, r"x.csv: no rows"),
            ("", {}, r"x.csv: no column 'filepath'"),
        ],
    )  # fmt: skip
    def test_wrong_rows_end_in_one_line(self, tmp_path, text, fields, message):
        with pytest.raises(ValueError, match=message) as caught:
            self.read(self.table(tmp_path, text), **fields)
        assert "\n" not in str(caught.value)

    def test_wrong_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none.csv"):
            self.read(str(tmp_path / "none.csv"))
        with pytest.raises(FileNotFoundError, match=r"x.csv: image images/9.png is neither in the table's folder nor"):
            self.read(self.table(tmp_path, "filepath\ttitle\nimages/9.png\tb\n"))
        with pytest.raises(ValueError, match=r"csv_separator is one character, got '::'"):
            self.read(self.table(tmp_path, ""), "::")
        (tmp_path / "x.csv").write_bytes(b"filepath\ttitle\n\xff\tb\n")
        with pytest.raises(ValueError, match=r"x.csv: not a table in UTF-8"):
            self.read(str(tmp_path / "x.csv"))
