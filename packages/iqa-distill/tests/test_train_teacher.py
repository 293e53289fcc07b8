"""The verb teacher."""

import json

import numpy as np
import pytest
from iqa_distill import train_teacher as module
from iqa_distill.cli import app
from iqa_distill.data import DataOptions, hashes, load_ratings
from iqa_distill.metrics import srcc
from iqa_distill.teacher import NARTeacher
from iqa_distill.train_teacher import GATE, TeacherOptions, load_teacher
from iqa_distill.trainer import IQAConfig
from matplotlib.image import imread
from PIL import Image
from tiny_sample import references, stand_in

QUICK = ["--crop_size", "32", "--crops", "2", "--max_steps", "3", "--per_device_train_batch_size", "8", "--dim", "8"]


@pytest.fixture(scope="module", autouse=True)
def sample():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert app(["teacher", *QUICK, "--pieces", "6", "--output_dir", str(folder)]) == 0
    return folder


def test_leaves_a_teacher_and_what_is_known_of_it(taught):
    network, _ = load_teacher(taught)
    assert isinstance(network, NARTeacher)
    assert not network.training
    assert (network.preprocessing.crop_size, network.dim, network.depth) == (32, 8, 2)
    assert network.kinds.out_features == 2
    assert network.scale.std == pytest.approx(1, abs=0.3)  # labels of the pool are standardised
    assert imread(taught / "training.png").std() > 0.02


def test_it_is_judged_on_pieces_of_images_it_has_not_seen(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        module, "train_teacher", lambda rated, held, pool, *_: seen.update(r=rated, h=held, p=pool) or 0.5
    )
    data = DataOptions(crop_size=32, crops=2)
    pool = load_ratings(data).pool
    options = TeacherOptions(pieces=6)
    assert module.teach_by_gmsd(pool, data, options, IQAConfig(output_dir=str(tmp_path / "run"))) == 0.5
    assert len(seen["r"]) == 6 * (len(pool) - 1)
    assert len(seen["h"]) == 6
    assert not set(seen["r"].references) & set(seen["h"].references)
    assert set(seen["p"].ids) == set(seen["r"].references)
    assert seen["r"].pixels.shapes.tolist()[0] == [64, 64]


def test_what_it_saw_is_recorded_and_its_quality_is_of_the_images_held_out(tmp_path):
    data, config = DataOptions(crop_size=32, crops=2, validation=0.2), IQAConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, disable_tqdm=True, report_to="none"
    )  # fmt: skip
    splits = load_ratings(data)
    found = module.teacher(data, TeacherOptions(labels="human", dim=8, depth=1), config)
    record = json.loads((tmp_path / "run" / "teacher.json").read_text())
    assert record["held_out_srcc"] == found
    assert record["ids"] == [*splits.train.ids, *hashes(splits.pool.pixels)]
    network, _ = load_teacher(tmp_path / "run", splits.test.ids)
    assert found == pytest.approx(srcc(module.judge(network, splits.validation, splits.pool), splits.validation.scores))
    with pytest.raises(ValueError, match=f"1 of {len(splits.test) + 1} test images were trained on by a teacher"):
        load_teacher(tmp_path / "run", [*splits.test.ids, splits.train.ids[2]])


@pytest.mark.parametrize(("found", "weak"), [(GATE, False), (GATE - 0.01, True), (float("nan"), True)])
def test_the_gate(taught, tmp_path, found, weak):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((taught / name).read_bytes())
    (tmp_path / "teacher.json").write_text(json.dumps({"held_out_srcc": found, "ids": []}))
    warning = load_teacher(tmp_path)[1]
    assert (warning is not None) == weak
    assert not weak or "train it longer" in warning


def test_kinds_need_not_be_learnt(tmp_path):
    assert app(["teacher", *QUICK, "--kind_weight", "0", "--pieces", "6", "--output_dir", str(tmp_path / "run")]) == 0
    assert load_teacher(tmp_path / "run")[0].kinds is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "gmsd2"], "labels must be gmsd or human"),
        (["--nar_backbone", "vgg"], "backbone must be one of tiny"),
        (["--nar_weights", "no.pth"], "no.pth: no such file"),
        (["--references", "{two}"], "a teacher needs at least 3 pristine images, one of them to judge it by; got 2"),
    ],
)
def test_wrong_input_is_one_line(words, message, tmp_path, capsys):
    two = tmp_path / "two"
    two.mkdir()
    for name, image in list(references().items())[:2]:
        Image.fromarray(np.asarray(image)).save(two / f"{name}.png")
    words = [word.format(two=two) for word in words]
    assert app(["teacher", *QUICK, *words, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("iqa-distill: ")]
    assert message in line
