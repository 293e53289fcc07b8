import json

import mmict.describe
import numpy as np
import pytest
from mmict.describe import read_demonstrations
from papercore.lab.cli import App
from PIL import Image

app = App("mmict", "test")
app.command("caption", "mmict.describe:caption", "test")
app.command("answer", "mmict.describe:answer", "test")


class StandIn:
    """Instead of a model: it says what it sees and knows."""

    def __init__(self):
        self.calls = []

    def encode_demonstrations(self, examples):
        return examples

    def generate(self, images, questions, *, demonstrations, **options):
        self.calls.append((len(images), options))
        seen = [len(of) if isinstance(of, list) else int(np.asarray(of)[0, 0, 0]) for of in images]
        shown = [example.text for example in demonstrations or []]
        return [f"{of} {question} {shown}" for of, question in zip(seen, questions, strict=True)]


@pytest.fixture
def model(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(mmict.describe, "load_model", lambda folder: stand_in)
    return stand_in


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def demos(images):
    rows = [{"image": "1.png", "text": "A dog."}, {"image": "2.png", "question": "what?", "answer": "cat"}]
    path = images / "demos.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(capsys, verb, *arguments):
    code = app([verb, *map(str, arguments), "--model", "m"])
    return code, capsys.readouterr()


def test_captions_in_batches(model, images, tmp_path, capsys):
    flags = ["--batch_size", 2, "--num_beams", 3, "--max_new_tokens", 9, "--min_length", 4]
    code, printed = run(capsys, "caption", images, *flags, "--json", tmp_path / "new" / "c.json")
    assert code == 0
    options = {"num_beams": 3, "max_new_tokens": 9, "min_length": 4}
    assert model.calls == [(2, options), (1, options)]
    rows = json.loads((tmp_path / "new" / "c.json").read_text())
    assert rows == [{"image": str(images / f"{i}.png"), "text": f"{i}  []"} for i in (1, 2, 3)]
    assert "3 of 3 images" in printed.out
    assert "c.json" in printed.out


def test_answers_after_demonstrations_on_the_terminal(model, images, demos, capsys):
    code, printed = run(capsys, "answer", images / "3.png", "--question", "how many?", "--demos", demos, "--json", "-")
    assert code == 0
    said = "3 how many? ['a dog', 'cat']"
    assert json.loads(printed.out) == [{"image": str(images / "3.png"), "question": "how many?", "answer": said}]
    printed = run(capsys, "answer", images / "3.png", "--question", "how many?")[1]
    assert "how many?" in printed.out.splitlines()[1]


def test_frames_of_one_video(model, images, capsys):
    order = [images / "2.png", images / "1.png"]
    code, printed = run(capsys, "caption", *order, "--frames", "true", "--json", "-")
    assert code == 0
    assert json.loads(printed.out) == [{"frames": list(map(str, order)), "text": "2  []"}]


@pytest.mark.parametrize("frames", ["true", "false"])
def test_what_cannot_be_read_is_told_and_the_others_are_described(model, images, frames, capsys):
    (images / "empty.png").touch()
    (images / "cut.png").write_bytes((images / "1.png").read_bytes()[:40])
    code, printed = run(capsys, "caption", images, "--json", "-", "--frames", frames)
    assert code == 0
    assert len(json.loads(printed.out)) == (1 if frames == "true" else 3)
    lines = printed.err.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("cut.png", "empty.png"), strict=True):
        assert line.startswith("mmict: ")
        assert name in line
    code, printed = run(capsys, "caption", images / "cut.png", images / "empty.png", "--frames", frames)
    assert code == 2
    assert printed.err.endswith("mmict: none of the 2 files could be read\n")


def test_demonstrations_of_a_file(demos):
    first, second = read_demonstrations(demos)
    assert (first.text, first.question, second.text, second.question) == ("a dog", "", "cat", "what?")
    assert [str(path) for path in second.images] == [str(demos.parent / "2.png")]
    demos.write_text("\n".join([json.dumps({"image": "1.png", "text": "a"})] * 9))
    with pytest.raises(ValueError, match=r"demos\.jsonl: 9 demonstrations, but at most 8"):
        read_demonstrations(demos)


def test_wrong_input_is_told_in_a_line(model, images, capsys):
    for verb, flags, message in (
        ("caption", [images / "absent.png"], "absent.png: no image there"),
        ("caption", [images, "--batch_size", 0], "batch_size must be at least 1, got 0"),
        ("caption", [images, "--min_length", -1], "min_length must be at least 0, got -1"),
        ("answer", [images], "--question"),
        ("answer", [images, "--question", " "], "the question is empty"),
    ):
        code, printed = run(capsys, verb, *flags)
        assert code == 2
        (line,) = printed.err.splitlines()
        assert message in line


def test_a_folder_without_a_model_is_told(images, tmp_path, capsys):
    assert app(["caption", str(images), "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
