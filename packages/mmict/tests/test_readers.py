import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from mmict.readers import read_coco, read_easyvqa, read_emoji48, read_jsonl, read_samples, read_vqa
from mmict.texts import clean_caption
from PIL import Image

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png", "COCO_train2014_000000000009.jpg", "000000000010.jpg"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    return tmp_path


def read(folder, *rows, name="rows.jsonl", **options):
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_jsonl(folder / name, **options)


def shown(samples):
    """Names of each sample's images."""
    return [[Path(samples.images[row]).name for row in rows] for rows in samples.frames]


class TestOwnRows:
    def test_captions(self, folder):
        samples = read(
            folder,
            {"image": "a.png", "text": "A red: kite.", "id": 7, "group": "kites", "extra": 1},
            "",
            {"images": "b.png", "text": "two cats"},  # text where a list is expected
            {"frames": ["a.png", "c.png"], "text": "it moves", "question": None},
            {"image": "./a.png", "text": "a kite"},
            {"image": "c.png", "captions": ["a dog", "The dog!"], "id": "d"},
        )
        assert samples.texts == ["a red kite", "two cats", "it moves", "a kite", "a dog", "the dog"]
        assert samples.ids == ["7", "3", "4", "5", "d.1", "d.2"]
        assert shown(samples) == [["a.png"], ["b.png"], ["a.png", "c.png"], ["a.png"], ["c.png"], ["c.png"]]
        assert len(samples.images) == 3
        assert [Path(name).name for name in samples.groups] == ["kites", "b.png", "a.png", "a.png", "c.png", "c.png"]
        kites, dogs = ["a red kite", "a kite"], ["a dog", "the dog"]
        assert samples.references == [kites, ["two cats"], ["it moves"], kites, dogs, dogs]
        assert (samples.kind, samples.demos, samples.splits) == ("captions", None, None)
        assert samples.open(0).shape == (6, 8, 3)

    def test_questions(self, folder):
        samples = read(
            folder,
            {"image": "a.png", "question": "what?", "answer": " A dog. ", "split": "val"},
            {"image": "a.png", "question": "who?", "answers": ["me", "you", "you", ""], "demos": [1, "3"]},
            {"image": "b.png", "text": "left? | yes | no", "split": "test", "demos": "1"},
        )
        assert samples.questions == ["what?", "who?", "left?"]
        assert samples.texts == ["A dog.", "you", "yes | no"]
        assert samples.references == [["A dog."], ["me", "you", "you", ""], ["yes | no"]]
        assert samples.demos == [(), ("1", "3"), ("1",)]
        assert samples.splits == ["validation", "train", "test"]

    def test_a_json_list_and_image_root(self, folder, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("rows")
        (elsewhere / "rows.json").write_text(json.dumps([{"image": "a.png", "text": "one"}]))
        assert read_jsonl(elsewhere / "rows.json", image_root=folder).texts == ["one"]
        assert read_samples(elsewhere / "rows.json", image_root=folder).ids == ["1"]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"image": "a.png", "text": ' ."!" '}, "an empty caption: nothing is left of"),
            ({"image": "a.png", "text": "what?|"}, "there is no answer in 'what?|'"),
            ({"image": "a.png", "question": "what?"}, "no answer to 'what?'"),
            ({"image": "a.png", "question": "what?", "answers": []}, "no answer to 'what?'"),
            ({"image": "a.png", "question": "what?", "answer": " "}, "no answer to 'what?'"),
            ({"image": "a.png", "question": " ", "answer": "a"}, "an empty question"),
            ({"image": "a.png", "question": "what?", "answer": ["a"]}, "answer must be text, got ['a']"),
            ({"image": "a.png", "text": ["a"]}, "text must be text, got ['a']"),
            ({"image": "a.png", "captions": []}, "captions is empty"),
            ({"images": [], "text": "a"}, "images is empty; a sample needs at least 1 picture"),
            ({"images": [3], "text": "a"}, "images must be text, got 3"),
            ({"image": "none.png", "text": "a"}, "none.png; paths start at the file's folder, or at image_root"),
            ({"img": "a.png", "txt": "a"}, "no images, image or frames; it has img, txt"),
            (
                {"image": "a.png", "title": "a"},
                "no text, captions, question, messages or conversations; it has image, title",
            ),
            (
                {"image": "a.png", "text": "a", "split": "dev"},
                "split must be one of train, val, valid, validation, test, got",
            ),
            ("[1, 2]", "expected an object, got [1, 2]"),
            ("{broken", "Expecting property name"),
        ],
    )
    def test_errors_name_the_row(self, folder, row, message):
        good = {"image": "b.png", "text": "good"}
        with pytest.raises(ValueError, match=r"rows\.jsonl: row 2: ") as error:
            read(folder, good, row)
        assert message in str(error.value)
        with pytest.warns(UserWarning, match="left out 2 rows; the first: row 1: ") as told:
            assert read(folder, row, good, row, on_bad="skip").texts == ["good"]
        assert len(told) == 1

    def test_other_errors(self, folder):
        with pytest.raises(ValueError, match="'x' is there more than once"):
            read(folder, *[{"image": "a.png", "text": "a", "id": "x"}] * 2)
        with pytest.raises(ValueError, match="no rows that can be used"):
            read(folder, "")
        with pytest.raises(ValueError, match="expected a list of rows, got dict"):
            read(folder, {"image": "a.png"}, name="rows.json")
        with pytest.raises(ValueError, match="no JSON"):
            read(folder, "[{", name="rows.json")
        with pytest.raises(ValueError, match="on_bad must be error or skip, got 'warn'"):
            read(folder, {"image": "a.png", "text": "a"}, on_bad="warn")
        (folder / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
        with pytest.raises(ValueError, match="not text in UTF-8"):
            read_jsonl(folder / "latin.jsonl")


def messages(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


class TestConversations:
    def test_messages(self, folder):
        samples = read(
            folder,
            {"images": ["a.png"], "messages": messages("<image>\nwhat is  it?", "a kite")},
            {
                "images": ["a.png", "b.png", "c.png"],
                "messages": [
                    {"role": "system", "content": "be brief"},
                    *messages("<image> what?", "a kite", "why?", "wind", "<image><image> and then?", "it falls"),
                ],
            },
            {"images": "b.png", "messages": messages("without a mark?", "yes")},
            {
                "images": ["c.png"],
                "messages": messages(
                    [{"type": "image"}, {"type": "text", "text": "typed?"}], [{"type": "text", "text": "so"}]
                ),
            },
            {"images": ["c.png"], "messages": messages("<image>", "A dog: brown.")},
        )
        assert samples.questions == ["what is it?", "what?", "why?", "and then?", "without a mark?", "typed?", ""]
        assert samples.texts == ["a kite", "a kite", "wind", "it falls", "yes", "so", "a dog brown"]
        assert shown(samples) == [["a.png"], ["a.png"], ["a.png"], ["b.png", "c.png"], ["b.png"], ["c.png"], ["c.png"]]
        assert samples.ids == ["1", "2.1", "2.2", "2.3", "3", "4", "5"]

    def test_llava(self, folder):
        turns = [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "a kite"}]
        samples = read(folder, *[{"id": "same", "image": "a.png", "conversations": turns}] * 2)
        assert (samples.questions, samples.texts, samples.ids) == (["what?"] * 2, ["a kite"] * 2, ["1", "2"])
        turns[0]["value"] = "what?"
        with pytest.raises(ValueError, match="row 1: 0 <image> in the messages, but 1 images"):
            read(folder, {"image": "a.png", "conversations": turns})

    @pytest.mark.parametrize(
        ("turns", "message"),
        [
            (messages("<image><image> what?", "a"), "2 <image> in the messages, but 1 images"),
            (messages("<image> what?"), "ends with an answer"),
            (messages("<image> what?", "a", "why?"), "ends with an answer"),
            ([{"role": "assistant", "content": "a"}], "questions and answers in turn"),
            ([], "questions and answers in turn"),
            (messages("what?", "<image>"), "an answer has <image>"),
            (messages("what?", "a", "<image> why?", "b"), "a question comes before the first image"),
            (messages("<image> what?", " "), "no answer to 'what?'"),
            (messages("<image>", "..."), "an empty caption"),
            (messages(3, "a"), "content must be text, got None"),
            (messages([{"type": "video"}], "a"), "content must be text, got {'type': 'video'}"),
            ([{"role": "tool", "content": "a"}], "role must be one of system, user, human, assistant, gpt; got 'tool'"),
            ([{"from": "human", "value": "a"}], "no role; it has from, value"),
            ("what?", "expected a list of messages, got 'what?'"),
        ],
    )
    def test_errors_name_the_row(self, folder, turns, message):
        with pytest.raises(ValueError, match=r"rows\.jsonl: row 1: ") as error:
            read(folder, {"images": ["a.png"], "messages": turns})
        assert message in str(error.value)


class TestCoco:
    def write(self, folder, **changes):
        data = {
            "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
            "annotations": [
                {"id": 11, "image_id": 1, "caption": "A kite."},
                {"id": 12, "image_id": 2, "caption": "a dog"},
                {"id": 13, "image_id": 1, "caption": "Red kite"},
            ],
        } | changes
        (folder / "captions.json").write_text(json.dumps(data))
        return folder / "captions.json"

    def test_read(self, folder):
        samples = read_samples(self.write(folder))
        assert (samples.texts, samples.ids) == (["a kite", "a dog", "red kite"], ["11", "12", "13"])
        assert shown(samples) == [["a.png"], ["b.png"], ["a.png"]]
        assert samples.references == [["a kite", "red kite"], ["a dog"], ["a kite", "red kite"]]
        assert samples.groups[0] == samples.groups[2] != samples.groups[1]

    def test_errors(self, folder):
        path = self.write(folder, annotations=[{"image_id": 1, "caption": "a"}, {"image_id": 5, "caption": "a"}])
        with pytest.raises(ValueError, match=r"captions\.json: annotation 2: image_id 5 is not among the images"):
            read_coco(path)
        with pytest.warns(UserWarning, match="left out 1 annotations"):
            assert read_coco(path, on_bad="skip").texts == ["a"]
        with pytest.raises(ValueError, match="no list annotations of objects; it has images, annotations"):
            read_coco(self.write(folder, annotations=None))


class TestVQA:
    def write(self, folder, **changes):
        answers = [{"answer": word, "answer_id": i} for i, word in enumerate(["red"] * 4 + ["blue"] * 6)]
        questions = [
            {"image_id": 9, "question": "colour?", "question_id": 9001},
            {"image_id": 10, "question": "how many?", "question_id": 10001},
        ]
        annotations = [
            {"question_id": 10001, "answers": changes.get("answers", [{"answer": "2"}])},
            {"question_id": 9001, "answers": answers},
        ]
        (folder / "questions.json").write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
        (folder / "annotations.json").write_text(json.dumps({"annotations": annotations[: changes.get("count", 2)]}))
        return folder / "questions.json", folder / "annotations.json"

    def test_read(self, folder):
        samples = read_samples(*self.write(folder))
        assert (samples.questions, samples.texts) == (["colour?", "how many?"], ["blue", "2"])
        assert samples.references == [["red"] * 4 + ["blue"] * 6, ["2"]]
        assert shown(samples) == [["COCO_train2014_000000000009.jpg"], ["000000000010.jpg"]]
        assert samples.ids == ["9001", "10001"]

    def test_errors(self, folder):
        with pytest.raises(ValueError, match="question 1: question_id 9001 has no annotation in "):
            read_vqa(*self.write(folder, count=1))
        with pytest.raises(ValueError, match="question 2: no answer; it has word"):
            read_vqa(*self.write(folder, answers=[{"word": "2"}]))
        with pytest.raises(ValueError, match="no list images of objects; it has data_subtype, questions"):
            read_samples(self.write(folder)[0])


class TestReal:
    def test_the_variable_is_needed(self, monkeypatch):
        monkeypatch.delenv("PAPERCORE_DATA", raising=False)
        for read in (read_emoji48, read_easyvqa):
            with pytest.raises(ValueError, match="set PAPERCORE_DATA"):
                read()

    @REAL
    def test_emoji48(self):
        parts = read_emoji48()
        counts = {"train": 6138, "val_seen": 209, "val_new": 344, "test_seen": 796, "test_new": 597}
        assert {name: len(part) for name, part in parts.items()} == counts
        assert all(len(part.images) == len(part) for part in parts.values())
        train = parts["train"]
        assert train.open(5).shape == (48, 48, 3)
        assert train.texts[0] == "copyright"
        assert all(text == clean_caption(text) != "" for text in train.texts)
        assert any(text == "woman firefighter dark skin tone" for part in parts.values() for text in part.texts)
        known = set(train.groups)
        assert not known & set(parts["test_new"].groups)
        assert set(parts["test_seen"].groups) <= known

    @REAL
    def test_easyvqa(self):
        parts = read_easyvqa()
        assert {name: (len(part), len(part.images)) for name, part in parts.items()} == {
            "train": (38575, 4000),
            "test": (9673, 1000),
        }
        train = parts["train"]
        assert (train.questions[0], train.texts[0], train.references[0]) == (
            "what is the blue shape?",
            "rectangle",
            ["rectangle"],
        )
        assert train.open(0).shape == (64, 64, 3)
        assert not set(train.groups) & set(parts["test"].groups)  # picture 0 of both parts is not one picture
        assert len(set(train.groups)) == 4000

    @REAL
    def test_photographs(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            photos = read_samples(Path(os.environ["PAPERCORE_DATA"]) / "mmict" / "coco_photos" / "captions.json")
        assert (len(photos), len(photos.images), len(photos.references[0])) == (255, 51, 5)
        assert photos.texts[1] == "patio furniture is set up near the water"
        assert min(photos.open(0).shape[:2]) == 160
        assert set(photos.splits) == {"train", "validation"}
        assert np.unique(photos.groups).size == 51
