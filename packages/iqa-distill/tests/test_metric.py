import json
import socket

import numpy as np
import pytest
import torch
from iqa_distill.metric import QualityMetric, load_metric, load_model
from iqa_distill.scoring import score_images
from PIL import Image
from tiny_rkiqt import tiny_rkiqt

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
IMAGES = torch.from_numpy(np.stack([PICTURE, PICTURE // 2])).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mine"
    tiny_rkiqt(resize=(36, 48)).save_pretrained(folder)
    return folder


class TestLoading:
    def test_the_same_scores_without_a_network(self, folder, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("the network was asked")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        expected = score_images(tiny_rkiqt(resize=(36, 48)), [PICTURE])
        for path in (folder, str(folder), folder / "model.safetensors"):
            metric = load_metric(path, device="cpu")
            assert metric(IMAGES[:1]).numpy() == pytest.approx(expected, abs=0.3)
            assert score_images(metric.model, [PICTURE]) == pytest.approx(expected)
            assert not metric.model.training
            assert metric.name == "mine"

    def test_what_is_no_model(self, folder, tmp_path):
        accepted = (
            r"expected a folder that `iqa-distill train` wrote, with config\.json and model\.safetensors, or that"
        )
        for absent in (tmp_path, tmp_path / "none" / "model.safetensors", tmp_path / "weights.pth"):
            with pytest.raises(FileNotFoundError, match=accepted):
                load_model(absent)
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"queries": 3}))
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
            load_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=r"not a model of iqa-distill.*size mismatch"):
            load_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"cut")
        with pytest.raises(ValueError, match="not a model of iqa-distill"):
            load_model(tmp_path)


class TestCallForms:
    def test_tensors_and_files(self, tmp_path):
        Image.fromarray(PICTURE).save(tmp_path / "a.png")
        metric = QualityMetric(tiny_rkiqt())
        scores = metric(IMAGES)
        assert scores.shape == (2,)
        assert not scores.requires_grad
        for form in (
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            [tmp_path / "a.png"],
            IMAGES[0],
            (255 * IMAGES[0]).round().byte(),
        ):
            assert metric(form).numpy() == pytest.approx(scores[:1].numpy(), abs=1e-3)

    def test_what_pyiqa_tells_about_a_metric(self):
        metric = QualityMetric(tiny_rkiqt())
        assert metric.lower_better is False
        assert metric.score_range == (0.0, 100.0)

    def test_a_gradient_if_the_images_require_one(self):
        metric = QualityMetric(tiny_rkiqt())
        images = IMAGES.clone().requires_grad_()
        scores = metric(images)
        assert scores.detach().numpy() == pytest.approx(metric(IMAGES).numpy(), abs=1e-3)
        scores.sum().backward()
        assert images.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in metric.parameters())
        with torch.no_grad():
            assert not metric(images).requires_grad

    def test_as_loss_falls_where_the_score_rises(self):
        model = tiny_rkiqt()
        loss, metric = QualityMetric(model, as_loss=True), QualityMetric(model)
        assert loss(IMAGES).item() == pytest.approx(-metric(IMAGES).mean().item() / 100, abs=1e-5)
        images = IMAGES.clone().requires_grad_()
        loss(images).backward()
        better = (images - 1e-2 * images.grad / images.grad.norm()).detach().clamp(0, 1)
        assert metric(better).mean() > metric(IMAGES).mean()
        with pytest.raises(ValueError, match="files have no gradient"):
            loss("a.png")

    def test_what_it_refuses(self):
        metric = QualityMetric(tiny_rkiqt())
        with pytest.raises(ValueError, match="divide them by 255"):
            metric(255 * IMAGES)
        with pytest.raises(TypeError):
            metric(IMAGES, IMAGES)  # no reference to give
