import logging

import numpy as np
import pytest
import torch
from PIL import Image
from softclip.readers import Pairs
from softclip.roi import (
    GRID,
    Detector,
    GridCrops,
    Precomputed,
    RoiTags,
    Thumbnails,
    collect,
    provider_for,
)
from softclip.sample import render_scenes
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign


def pairs(count=3, **values):
    images = [Image.new("RGB", (8, 6), (i * 20, 0, 0)) for i in range(count)]
    return Pairs(images.__getitem__, [f"image {i}" for i in range(count)], ["x"] * count, **values)


class TestThumbnails:
    def test_the_grid(self):
        """Ten boxes: all, then the halves, row by row."""
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, 32:] = (255, 0, 51)
        roi, tags = Thumbnails()(Image.fromarray(pixels), 0)
        assert (roi.shape, roi.dtype, tags) == ((10, 196), torch.float32, None)
        assert torch.equal(roi[:, 192:], GRID)
        crops = roi[:, :192].view(10, 3, 8, 8)
        assert torch.allclose(crops[1, ..., :7], torch.tensor(-1.0))  # upper left; the last column sees what is beyond
        assert torch.allclose(crops[3, ..., 1:], torch.tensor([1.0, -1.0, -0.6]).view(3, 1, 1), atol=0.02)
        assert (crops[0, 0].mean(0)[:3] < -0.9).all()
        assert (crops[0, 0].mean(0)[5:] > 0.9).all()
        assert GRID[9].tolist() == [0.5, 0.5, 1.0, 1.0]

    def test_boxes_of_the_data(self):
        scenes = render_scenes(20)
        roi, mask, tags = collect(provider_for("thumbnails", scenes), scenes)
        assert (roi.shape, tags) == ((20, 4, 196), None)
        assert mask.sum(1).tolist() == [len(boxes) for boxes in scenes.boxes]
        assert torch.equal(roi[mask][:, 192:], torch.cat(scenes.boxes))
        square = next(i for i, names in enumerate(scenes.tags) if names[0] == "purple square")
        middle = roi[square, 0, :192].view(3, 8, 8)[:, 3:5, 3:5].mean((1, 2))
        assert torch.allclose(middle, torch.tensor([135, 55, 165]) / 127.5 - 1, atol=0.15)


class TestGridCrops:
    class Means(nn.Module):
        """The mean of the three channels, and what the images are like."""

        pretrained_cfg = {"input_size": (3, 5, 7), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5)}  # noqa: RUF012

        def forward(self, images):
            assert images.shape == (10, 3, 5, 7)
            assert not torch.is_grad_enabled()
            return images.mean((2, 3))

    def test_crops_are_normalised_for_the_network(self):
        roi, tags = GridCrops(self.Means())(Image.new("RGB", (9, 9), (255, 0, 0)), 0)
        assert torch.allclose(roi, torch.cat([torch.tensor([[2.0, -1.0, -1.0]]).expand(10, 3), GRID], 1))
        assert tags is None

    def test_a_model_of_timm(self):
        timm = pytest.importorskip("timm")
        provider = GridCrops(timm.create_model("test_vit", num_classes=0, img_size=64).train())
        roi, _ = provider(Image.new("RGB", (20, 30), "red"), 0)
        assert roi.shape == (10, provider.model.num_features + 4)
        assert not provider.model.training
        assert not any(parameter.requires_grad for parameter in provider.model.parameters())

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="grid:no_such_net: timm cannot make this model"):
            provider_for("grid:no_such_net", pairs())


class TestDetector:
    @pytest.fixture(scope="class")
    def rcnn(self):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 8, 1), nn.ReLU())
        backbone.out_channels = 6
        head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 9, 5), nn.ReLU())
        predictor = nn.Module()
        predictor.scores, predictor.boxes = nn.Linear(5, 4), nn.Linear(5, 16)
        predictor.forward = lambda x: (predictor.scores(x), predictor.boxes(x))
        return FasterRCNN(
            backbone,
            min_size=64,
            max_size=128,
            rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
            box_head=head,
            box_predictor=predictor,
            box_score_thresh=0.0,
        )

    def test_most_confident_objects(self, rcnn):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
        roi, tags = Detector(rcnn, ("nothing", "cat", "dog", "cow"), most=6)(image, 0)
        expected = rcnn.eval()([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255])[0]
        assert (roi.shape, roi.requires_grad) == ((6, 5 + 4), False)
        shares = expected["boxes"][:6] / torch.tensor([60.0, 40.0, 60.0, 40.0])
        torch.testing.assert_close(roi[:, 5:], shares, atol=1e-4, rtol=0)
        assert tags == [("nothing", "cat", "dog", "cow")[i] for i in expected["labels"][:6]]
        assert roi[:, :5].std() > 0
        assert Detector(rcnn, most=2)(image, 0).tags is None

    def test_an_image_without_objects(self, rcnn, monkeypatch):
        monkeypatch.setattr(rcnn.roi_heads, "score_thresh", 2.0)
        roi, tags = Detector(rcnn, ("nothing", "cat", "dog", "cow"))(Image.new("RGB", (64, 64)), 0)
        assert (roi.shape, tags) == ((0, 9), [])

    def test_what_is_no_detector(self):
        with pytest.raises(ValueError, match="needs a box head, as Faster R-CNN has; Linear has none"):
            Detector(nn.Linear(1, 1))
        for name in ("resnet18", "ssd300_vgg16"):
            with pytest.raises(ValueError, match=rf"detector:{name}: expected one of .*fasterrcnn_resnet50_fpn"):
                provider_for(f"detector:{name}", pairs())


class TestProviderFor:
    def test_none(self):
        assert provider_for("none", pairs()) is None

    def test_field(self):
        given = pairs(roi=[np.ones((1, 2)), np.zeros((2, 2)), np.zeros((0, 0))].__getitem__)
        roi, mask, _ = collect(provider_for("field", given), given)
        assert roi.tolist() == [[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
        assert mask.tolist() == [[True, False], [True, True], [False, False]]
        with pytest.raises(ValueError, match="no regions of their own; name where they are by roi_field"):
            provider_for("field", pairs())

    @pytest.mark.parametrize("spec", ["", "grid", "grid:", "detector", "thumbnail", "field:x"])
    def test_unknown(self, spec):
        with pytest.raises(
            ValueError, match=r"expected none, thumbnails, grid:TIMM_NAME, detector:TORCHVISION_NAME or"
        ):
            provider_for(spec, pairs())


class TestCollect:
    def test_tags(self):
        found = [RoiTags(torch.ones(1, 2), ["cat"]), RoiTags(torch.ones(2, 2), None), RoiTags(torch.ones(1, 2), [])]
        assert collect(lambda image, index: found[index], pairs())[2] == [["cat"], [], []]

    def test_the_provider_sees_the_images(self):
        roi, mask, _ = collect(lambda image, i: RoiTags(torch.tensor([[*image.getpixel((0, 0)), i]])), pairs())
        assert roi[:, 0].tolist() == [[0, 0, 0, 0], [20, 0, 0, 1], [40, 0, 0, 2]]
        assert mask.all()

    def test_images_without_regions_are_counted(self, caplog):
        arrays = [np.zeros((0, 2)), np.ones((1, 2)), np.zeros((0, 0))]
        with caplog.at_level(logging.WARNING):
            collect(Precomputed(arrays), pairs())
        assert [r.message for r in caplog.records] == ["2 of 3 images have no region; their targets stay one-hot"]

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ([np.ones((1, 2)), np.ones((2, 2)), np.ones((1, 3))], "image 2: regions of width 3, but those before have 2"),
            ([np.ones((1, 2)), np.ones(2), np.ones((1, 2))], r"image 1: regions must be an array \(k, f\), got \(2,\)"),
            ([np.ones((1, 2)), np.full((1, 2), np.nan), np.ones((1, 2))], "image 1: a region has a value that is NaN"),
            ([np.ones((0, 2))] * 3, "none of the images has a region"),
        ],
    )  # fmt: skip
    def test_wrong_regions_are_named(self, arrays, message):
        with pytest.raises(ValueError, match=message):
            collect(Precomputed(arrays), pairs())
