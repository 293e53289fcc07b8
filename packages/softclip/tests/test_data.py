import io
import json
import os
import tarfile

import pytest
from PIL import Image
from softclip.data import DataOptions, load_pairs

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="needs PAPERCORE_DATA")


def load(data, **options):
    return load_pairs(DataOptions(str(data), **options))


def shard(path, names, group=None):
    with tarfile.open(path, "w") as archive:
        for name in names:
            image = io.BytesIO()
            Image.new("L", (4, 4)).save(image, "PNG")
            values = json.dumps({"root": name if group is None else group(name), "kind": name[0]})
            for suffix, content in (("png", image.getvalue()), ("txt", name.encode()), ("json", values.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """Ten groups of six pairs; four others to test on."""
    names = [f"a{i}" for i in range(60)]
    shard(tmp_path / "train-0.tar", names[:30], lambda name: int(name[1:]) % 10)
    shard(tmp_path / "train-1.tar", names[30:], lambda name: int(name[1:]) % 10)
    shard(tmp_path / "test-0.tar", ["b0", "b1", "c0", "a0"])
    return tmp_path


def test_the_parts_of_a_folder(folder):
    splits = load(folder, label_field="json:kind")
    assert (len(splits.train), splits.test.captions) == (60, ["b0", "b1", "c0", "a0"])
    assert (splits.test.labels, splits.test.classes, splits.train.classes) == (
        [1, 1, 2, 0],
        ("a", "b", "c"),
        ("a", "b", "c"),
    )
    assert load(folder / "train-{0..1}.tar").test is None


def test_given_test_data(folder):
    splits = load(folder / "train-0.tar", test=str(folder / "test-0.tar"))
    assert (len(splits.train), len(splits.test)) == (30, 4)
    assert len(load(folder / "train-0.tar", test=str(folder)).test) == 4
    Image.new("L", (4, 4)).save(folder / "x.png")
    (folder / "x.csv").write_text("image,text\nx.png,one\nx.png,two\n")
    columns = {"csv_img_key": "image", "csv_caption_key": "text", "csv_separator": ","}
    splits = load(folder / "x.csv", test=str(folder / "test-0.tar"), **columns)
    assert (splits.train.captions, len(splits.test)) == (["one", "two"], 4)


def test_fewer_pairs_are_a_part_of_more(folder):
    some, more = (load(folder, max_train=n, max_test=2) for n in (10, 20))
    assert len(some.test) == 2
    assert (len(some.train), len(more.train)) == (10, 20)
    assert set(some.train.captions) < set(more.train.captions)


def test_validation_holds_out_whole_groups(folder):
    splits = load(folder, group_field="json:root", validation=0.3)
    assert (len(splits.train), len(splits.test)) == (42, 18)
    assert not set(splits.train.groups) & set(splits.test.groups)
    assert splits.test.captions == load(folder, group_field="json:root", validation=0.3, max_train=5).test.captions


def test_validation_without_groups_holds_out_images(tmp_path):
    rows = []
    for i in range(10):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
        rows += [f"{i}.png\tone of {i}", f"{i}.png\tanother of {i}"]
    (tmp_path / "x.csv").write_text("\n".join(["filepath\ttitle", *rows]))
    splits = load(tmp_path / "x.csv", validation=0.2)
    assert (len(splits.train), len(splits.test)) == (16, 4)
    assert not set(map(str, splits.train.names)) & set(map(str, splits.test.names))


def test_sample():
    splits = load("sample", max_train=50, max_test=20)
    assert (len(splits.train), len(splits.test)) == (50, 20)
    assert set(splits.train.captions) != set(splits.test.captions)
    assert None not in (splits.train.tags, splits.train.groups, splits.train.labels, splits.train.boxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "sample", "tags_field": "json:tags"}, "sample brings its own tags.*leave out --tags_field"),
        ({"data": "sample", "test": "x.tar"}, "leave out --test"),
        ({"data": "sample", "max_train": 1}, "max_train must be at least 2, got 1"),
        ({"data": "sample", "max_test": 0}, "max_test must be at least 1, got 0"),
        ({"data": "sample", "validation": 1.0}, r"validation is a share, 0 <= validation < 1; got 1.0"),
        ({"data": "train-0.tar", "validation": 0.01}, "a share of 0.01 of 30 groups holds out none; raise validation"),
        ({"data": "test-0.tar", "validation": 0.9}, "training needs at least 2 pairs, but there are 0"),
        ({"data": "train-0.tar", "label_field": "json:nothing"}, "there are png, txt, json, json:root, json:kind"),
        ({"data": "x.txt"}, "x.txt: not a kind of data that can be read; expected sample, emoji, WebDataset"),
        ({"data": "emoji"}, r"data emoji reads the shards in \$PAPERCORE_DATA/softclip: set PAPERCORE_DATA"),
    ],
)
def test_wrong_options_end_in_one_line(folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PAPERCORE_DATA", raising=False)
    (folder / "x.txt").touch()
    with pytest.raises(ValueError, match=message) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["emojy", "none.tar", "none.csv", "none-{0..1}.tar"])
def test_missing_data(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{data[:4]}"):
        load(data)


@REAL
def test_emoji():
    splits = load("emoji")
    assert (len(splits.train), len(splits.test)) == (2388, 638)
    assert len(splits.train.classes) == 95
    assert sum(not tags for part in (splits.train, splits.test) for tags in part.tags) == 60
    assert not set(splits.train.groups) & set(splits.test.groups)
    assert splits.train.captions[0] == "backhand index pointing down: light skin tone"
    assert splits.test.image(0).size == (64, 64)
    assert load("emoji", label_field="json:group", max_train=2).train.classes[0] == "Activities"
