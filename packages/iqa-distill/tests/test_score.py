import csv
import json

import numpy as np
import pytest
from iqa_distill.scoring import score_images
from matplotlib.image import imread
from papercore.lab.cli import App
from PIL import Image
from tiny_rkiqt import tiny_rkiqt

app = App("iqa-distill", "test")
app.command("score", "iqa_distill.score:score", "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_rkiqt().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b,c.png", "d.bmp"]):
        Image.fromarray(random.integers(0, 256, (40 + i, 60, 3), np.uint8)).save(folder / name)
    return folder


def run(capsys, *arguments):
    code = app(["score", *map(str, arguments)])
    return code, capsys.readouterr()


def test_table_csv_and_json(model, images, tmp_path, capsys):
    code, printed = run(
        capsys, images, "--model", model, "--csv", tmp_path / "new" / "s.csv", "--json", tmp_path / "s.json"
    )
    assert code == 0
    paths = [images / name for name in ("a.png", "b,c.png", "d.bmp")]
    expected = score_images(tiny_rkiqt(), paths)
    assert "3 of 3 images; training scores were 0 to 100, higher is better" in printed.out
    assert f"{expected[0]:.4g}" in printed.out
    rows = list(csv.reader((tmp_path / "new" / "s.csv").read_text().splitlines()))
    assert rows[0] == ["image", "score"]
    assert [row[0] for row in rows[1:]] == [str(path) for path in paths]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(expected, abs=1e-3)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["score_range"] == [0, 100]
    assert record["lower_better"] is False
    assert [row["score"] for row in record["scores"]] == pytest.approx(expected, abs=1e-3)


def test_json_on_the_terminal_in_unit_range_with_other_crops(model, images, capsys):
    flags = ["--normalize", "true", "--crops", 5, "--max_crops_per_batch", 2, "--json", "-"]
    code, printed = run(capsys, images / "a.png", "--model", model, *flags)
    assert code == 0
    record = json.loads(printed.out)
    expected = score_images(tiny_rkiqt(crops=5), [images / "a.png"], normalize=True)
    assert [row["score"] for row in record["scores"]] == pytest.approx(expected, abs=1e-5)
    assert record["score_range"] == [0, 1]


def test_what_cannot_be_read_is_told_and_the_others_are_scored(model, images, tmp_path, capsys):
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (60, 20)).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((images / "a.png").read_bytes()[:200])
    code, printed = run(capsys, tmp_path, images / "a.png", "--model", model, "--json", "-")
    assert code == 0
    assert [row["image"] for row in json.loads(printed.out)["scores"]] == [str(images / "a.png")]
    lines = printed.err.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("cut.png", "empty.png", "small.png"), strict=True):
        assert line.startswith("iqa-distill: ")
        assert name in line
    code, printed = run(capsys, tmp_path, "--model", model)
    assert code == 2
    assert printed.err.endswith("iqa-distill: none of the 3 files could be read\n")


def test_a_picture_in_the_order_given(model, images, tmp_path, capsys):
    order = [images / "d.bmp", images / "a.png"]
    code, printed = run(capsys, *order, "--model", model, "--plot", tmp_path / "new" / "falling.png")
    assert code == 0
    assert "falling.png" in printed.out
    assert imread(tmp_path / "new" / "falling.png").std() > 0.02


def test_wrong_input_is_told_in_a_line(model, images, capsys):
    for flags, message in (
        ([images, "--model", images], "no config.json there; expected a folder that `iqa-distill train` wrote"),
        ([images / "absent.png", "--model", model], "absent.png: no image there"),
        ([images, "--model", model, "--crops", 0], "crops at least 1"),
    ):
        code, printed = run(capsys, *flags)
        assert code == 2
        (line,) = printed.err.splitlines()
        assert message in line
