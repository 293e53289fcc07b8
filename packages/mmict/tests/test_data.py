import json
import os

import numpy as np
import pytest
from mmict.data import DataOptions, load_samples
from PIL import Image

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")


@pytest.fixture
def write(tmp_path):
    """Rows of 20 pictures with two captions each, or others, to a file."""
    for i in range(20):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    usual = [{"image": f"{i}.png", "text": f"caption {j} of {i}", "id": f"{i}-{j}"} for i in range(20) for j in "ab"]

    def write(change=lambda row: row, rows=usual, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(change(dict(row))) for row in rows))
        return str(tmp_path / name)

    return write


def test_sample(monkeypatch):
    monkeypatch.setattr("mmict.data.SAMPLE", 400)
    captions, asked = load_samples(DataOptions()), load_samples(DataOptions("sample-vqa", max_train=50))
    assert (captions.train.kind, asked.train.kind) == ("captions", "questions")
    assert list(captions.tests) == ["test"]
    assert len(captions.train) + len(captions.tests["test"]) == 400
    assert not set(captions.train.groups) & set(captions.tests["test"].groups)
    assert len(asked.train) == len(asked.train.images) == 50


class TestSplits:
    def test_test_share_is_of_groups(self, write):
        path = write()
        splits = load_samples(DataOptions(path, test_share=0.2))
        train, test = splits.train, splits.tests["test"]
        assert (len(train), len(test)) == (32, 8)
        assert not set(train.groups) & set(test.groups)
        assert len(test.images) == 4
        assert all(
            f" of {test.open(rows[0])[0, 0, 0]}" in text for rows, text in zip(test.frames, test.texts, strict=True)
        )
        assert load_samples(DataOptions(path, test_share=0.2)).tests["test"].ids == test.ids
        assert load_samples(DataOptions(path, test_share=0.2, split_seed=1)).tests["test"].ids != test.ids
        assert load_samples(DataOptions(path, test_share=0)).tests == {}

    def test_validation_takes_the_place_of_the_test(self, write):
        path = write()
        whole, splits = load_samples(DataOptions(path)), load_samples(DataOptions(path, validation=0.2))
        assert list(splits.tests) == ["validation"]
        held = set(splits.tests["validation"].ids)
        assert held | set(splits.train.ids) == set(whole.train.ids)  # no test sample is in either
        assert not set(splits.train.groups) & set(splits.tests["validation"].groups)

    def test_the_data_s_own_split(self, write):
        number = lambda row: int(row["image"][:-4])  # noqa: E731
        path = write(lambda row: row | {"split": ("train", "val", "test")[max(0, number(row) - 17)]})
        splits = load_samples(DataOptions(path))
        assert (len(splits.train), {name: len(part) for name, part in splits.tests.items()}) == (36, {"test": 2})
        splits = load_samples(DataOptions(path, validation=0.3))
        assert (len(splits.train), {name: len(part) for name, part in splits.tests.items()}) == (36, {"validation": 2})
        path = write(lambda row: row | {"split": "val" if number(row) == 4 else "train"})
        splits = load_samples(DataOptions(path))  # nothing else to judge on
        assert (len(splits.train), {name: len(part) for name, part in splits.tests.items()}) == (38, {"validation": 2})
        with pytest.raises(ValueError, match="no row has the split train"):
            load_samples(DataOptions(write(lambda row: row | {"split": "test"})))

    def test_a_file_to_judge_on(self, write):
        rows = [{"image": "3.png", "text": "another"}]
        splits = load_samples(DataOptions(write(), test=write(rows=rows, name="test.jsonl")))
        assert (len(splits.train), splits.tests["test"].texts) == (40, ["another"])

    def test_too_few_groups(self, write):
        with pytest.raises(ValueError, match=r"1 group.s. cannot be parted; with a share of 0.1 nothing is left"):
            load_samples(DataOptions(write(lambda row: row | {"group": "one"})))

    def test_fewer_are_a_part_of_more(self, write):
        path = write()
        most, more, few = (load_samples(DataOptions(path, max_train=n, max_test=n)) for n in (100, 20, 3))
        assert (len(few.train), len(few.train.images), len(few.tests["test"])) == (3, len(set(few.train.groups)), 3)
        assert set(few.train.ids) < set(more.train.ids) < set(most.train.ids)
        assert few.tests["test"].ids != more.tests["test"].ids

    def test_bad_rows_are_skipped_if_asked(self, write):
        path = write(lambda row: row | {"text": "." if row["id"] == "4-a" else row["text"]})
        with pytest.raises(ValueError, match="row 9: an empty caption"):
            load_samples(DataOptions(path))
        with pytest.warns(UserWarning, match="left out 1 rows"):
            assert len(load_samples(DataOptions(path, test_share=0, on_bad="skip")).train) == 39


def test_frames_are_spread_evenly(write):
    rows = [{"frames": [f"{i}.png" for i in range(count)], "text": "a video"} for count in (20, 3)]
    train = load_samples(DataOptions(write(rows=rows), test_share=0, frames=4)).train
    shades = [[int(train.open(row)[0, 0, 0]) for row in each] for each in train.frames]
    assert shades == [[2, 7, 12, 17], [0, 1, 2]]
    assert len(train.images) == 6  # the others are gone
    assert [len(each) for each in load_samples(DataOptions(write(rows=rows), test_share=0)).train.frames] == [8, 3]


def test_fixed_demonstrations_must_be_trained_on(write):
    def change(demo):
        return lambda row: row | {"split": "test" if row["image"] == "0.png" else "train", "demos": [demo(row)]}

    def other(row):
        return "1-a" if row["image"] != "1.png" else "2-a"

    assert load_samples(DataOptions(write(change(other)))).tests["test"].demos == [("1-a",)] * 2
    with pytest.raises(ValueError, match="sample '1-a': its demonstration '0-a' is not among the training samples"):
        load_samples(DataOptions(write(change(lambda row: "0-a" if row["id"] == "1-a" else other(row)))))
    with pytest.raises(ValueError, match="sample '3-b': its demonstration '3-a' is of the same group"):
        load_samples(DataOptions(write(change(lambda row: "3-a" if row["id"] == "3-b" else other(row)))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 1.0}, "test_share is a share, 0 <= test_share < 1; got 1.0"),
        ({"validation": -0.1}, "validation is a share"),
        ({"max_train": 0}, "max_train must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"split_seed": -1}, "split_seed must be at least 0, got -1"),
        ({"on_bad": "warn"}, "on_bad must be error or skip, got 'warn'"),
        ({"test_annotations": "a.json"}, "give --test too"),
        ({"test": "a.jsonl"}, "data sample brings its own: leave out --test"),
        ({"data": "emoji48", "image_root": "a"}, "data emoji48 brings its own: leave out --image_root"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


@REAL
def test_emoji48():
    splits = load_samples(DataOptions("emoji48"))
    assert (len(splits.train), {name: len(part) for name, part in splits.tests.items()}) == (
        6138,
        {"test_seen": 796, "test_new": 597},
    )
    tuning = load_samples(DataOptions("emoji48", validation=0.1, max_test=50))
    assert (len(tuning.train), {name: len(part) for name, part in tuning.tests.items()}) == (
        6138,
        {"val_seen": 50, "val_new": 50},
    )


@REAL
def test_easyvqa():
    splits = load_samples(DataOptions("easyvqa", validation=0.1, max_train=500))
    assert (len(splits.train), list(splits.tests)) == (500, ["validation"])
    assert len(np.unique(splits.tests["validation"].groups)) == 400
