import json

import numpy as np
import pytest
from dsan.read import SearchOptions, load_model
from matplotlib.image import imread
from papercore.lab.cli import App
from papercore.lab.images import find_images
from PIL import Image
from tiny_dsan import tiny_dsan

app = App("dsan", "test")
app.command("read", "dsan.read:read", "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_dsan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Six crops of noise in a folder and one below it, two of them of one name, and a text."""
    folder = tmp_path_factory.mktemp("crops")
    (folder / "below").mkdir()
    random = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b.jpg", "c.PNG", "d.webp", "below/a.png", "below/e.bmp"]):
        Image.fromarray(random.integers(0, 256, (20 + i, 60, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(capsys, *arguments):
    code = app(["read", *map(str, arguments)])
    return code, capsys.readouterr()


class TestLoadModel:
    def test_is_ready_to_read(self, model):
        assert not load_model(model).training

    def test_what_is_no_model(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no config\.json; expected a folder that `dsan train` wrote"):
            load_model(tmp_path)
        config = json.loads((model / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": 5}))
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
            load_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=r"not a model of dsan.*size mismatch"):
            load_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"cut")
        with pytest.raises(ValueError, match="not a model of dsan"):
            load_model(tmp_path)


class TestVerb:
    @pytest.mark.parametrize("decode", ["ctx", "enh", "fuse"])
    def test_json_on_the_terminal(self, model, crops, capsys, decode):
        code, printed = run(capsys, crops, "--model", model, "--decode", decode, "--json", "-", "--batch_size", 2)
        assert code == 0
        rows = json.loads(printed.out)
        expected = load_model(model).read(find_images([str(crops)]), decode=decode)
        assert [row["text"] for row in rows] == [reading.text for reading in expected]
        assert rows[0]["image"] == str(crops / "a.png")
        assert "".join(character for character, _ in rows[0]["characters"]) == rows[0]["text"]
        assert [row["confidence"] for row in rows] == pytest.approx([reading.confidence for reading in expected])
        assert [row["branch"] for row in rows] == [reading.branch for reading in expected]

    def test_a_table_and_a_file(self, model, crops, tmp_path, capsys):
        code, printed = run(capsys, crops / "a.png", "--model", model, "--json", tmp_path / "new" / "r.json")
        assert code == 0
        (row,) = json.loads((tmp_path / "new" / "r.json").read_text())
        assert "1 of 1 images" in printed.out
        assert row["text"] in printed.out

    def test_what_cannot_be_read_is_told_and_the_others_are_read(self, model, crops, tmp_path, capsys):
        (tmp_path / "empty.png").touch()
        (tmp_path / "cut.png").write_bytes((crops / "a.png").read_bytes()[:200])
        code, printed = run(capsys, tmp_path, crops / "notes.txt", crops / "a.png", "--model", model, "--json", "-")
        assert code == 0
        (row,) = json.loads(printed.out)
        assert row["image"] == str(crops / "a.png")
        lines = printed.err.splitlines()
        assert len(lines) == 3
        for line, name in zip(lines, ("cut.png", "empty.png", "notes.txt"), strict=True):
            assert line.startswith("dsan: ")
            assert name in line
        code, printed = run(capsys, tmp_path, "--model", model)
        assert code == 2
        assert printed.err.endswith("dsan: none of the 2 files could be read\n")

    def test_lexicon_and_beam(self, model, crops, tmp_path, capsys):
        (tmp_path / "words.txt").write_text("Zebra\nparking\n\n", encoding="utf-8")
        network, paths = load_model(model), find_images([str(crops)])
        for flags, options in (
            (["--lexicon", tmp_path / "words.txt"], {"search": "lexicon", "lexicon": ["zebra", "parking"]}),
            (
                ["--lexicon", tmp_path / "words.txt", "--lexicon_mode", "edit"],
                {"search": "lexicon", "lexicon": ["zebra", "parking"], "lexicon_mode": "edit"},
            ),
            (["--search", "beam", "--beam_width", 3], {"search": "beam", "beam_width": 3}),
        ):
            _, printed = run(capsys, crops, "--model", model, "--json", "-", *flags)
            assert [row["text"] for row in json.loads(printed.out)] == [r.text for r in network.read(paths, **options)]

    def test_overlays(self, model, crops, tmp_path, capsys):
        code, _ = run(capsys, f"{crops}/**/a.png", "--model", model, "--overlay", tmp_path / "new")
        assert code == 0
        files = sorted(tmp_path.glob("new/*"))
        assert [file.name for file in files] == ["1-a.png", "2-a.png"]
        assert imread(files[0]).std() > 0.02

    def test_overlays_of_turned_crops_without_attention(self, tmp_path, capsys):
        tiny_dsan(attention=False, keep_ratio=True, rotate_tall=True).save_pretrained(tmp_path / "model")
        Image.effect_noise((30, 90), 50).save(tmp_path / "tall.png")
        flags = ["--model", tmp_path / "model", "--overlay", tmp_path / "new"]
        assert run(capsys, tmp_path / "tall.png", *flags)[0] == 0
        height, width, _ = imread(tmp_path / "new" / "1-tall.png").shape
        assert width > height

    def test_wrong_options_are_told_in_a_line(self, model, crops, tmp_path, capsys):
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        for flags, message in (
            (["--search", "bean"], "search 'bean' is unknown"),
            (["--decode", "both"], "got 'both'"),
            (["--batch_size", 0], "batch_size must be at least 1, got 0"),
            (["--lexicon", tmp_path / "latin.txt"], "latin.txt: not UTF-8 text"),
            (["--lexicon", tmp_path / "absent.txt"], "No such file or directory"),
        ):
            code, printed = run(capsys, crops, "--model", model, *flags)
            assert code == 2
            (line,) = printed.err.splitlines()
            assert message in line


def test_keywords_have_what_the_search_takes():
    assert SearchOptions().keywords() == {"search": "greedy", "batch_size": 64}
    assert SearchOptions(search="beam").keywords() == {"search": "beam", "batch_size": 64, "beam_width": 10}
