from pickle import dumps, loads

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from softclip.dataset import PairDataset, square
from softclip.readers import Pairs
from softclip.sample import render_scenes
from torch.utils.data import DataLoader


def tokenizer(texts):
    return torch.tensor([[len(text), *text.ljust(3).encode()[:3]] for text in texts])


def whole(batch):
    return batch


@pytest.fixture(scope="module")
def scenes():
    return render_scenes(40)


@pytest.fixture
def dataset(scenes):
    tags = [[] if i == 3 else names for i, names in enumerate(scenes.tags)]
    roi = (torch.arange(40 * 2 * 3.0).view(40, 2, 3), torch.arange(80).view(40, 2) % 3 > 0)
    return PairDataset(scenes, tokenizer, 32, roi=roi, tags=tags, group_positives=True)


def test_batches(dataset, scenes):
    images, texts = dataset.__getitems__([3, 39, 3])
    assert (len(dataset), images.images.dtype, images.images.shape) == (40, torch.uint8, (3, 3, 32, 32))
    assert torch.equal(images.images[1], square(scenes.image(39), 32))
    assert torch.equal(images.roi, dataset.roi[[3, 39, 3]])
    assert torch.equal(images.roi_mask, dataset.roi_mask[[3, 39, 3]])
    assert torch.equal(texts.texts, tokenizer([scenes.captions[i] for i in (3, 39, 3)]))
    assert torch.equal(texts.tags[1:2], tokenizer([", ".join(scenes.tags[39])]))
    assert texts.tag_mask.tolist() == [False, True, False]
    assert texts.group_ids.tolist() == [scenes.groups[i] for i in (3, 39, 3)]


def test_one_pair(dataset):
    images, texts = dataset[5]
    assert (images.images.shape, images.roi.shape, texts.texts.shape) == ((3, 32, 32), (2, 3), (4,))
    assert torch.equal(images.images, dataset.images[5])


def test_what_is_not_given_is_not_there(scenes):
    images, texts = PairDataset(scenes, tokenizer, 16).__getitems__([0])
    assert (images.roi, images.roi_mask, texts.tags, texts.tag_mask, texts.group_ids) == (None,) * 5


def test_frozen_tag_features(scenes):
    features = torch.eye(40) * (torch.arange(40) != 2)
    _, texts = PairDataset(scenes, tokenizer, 16, tags=features).__getitems__([1, 2])
    assert torch.equal(texts.tags, features[[1, 2]])
    assert texts.tag_mask.tolist() == [True, False]


def test_in_memory_or_not_the_images_are_the_same(scenes, dataset, monkeypatch):
    monkeypatch.setattr("softclip.dataset.MOST_IN_MEMORY", 40 * 3 * 32**2)
    lazy = PairDataset(scenes, tokenizer, 32)
    assert (lazy.images, dataset.images.shape) == (None, (40, 3, 32, 32))
    assert PairDataset(scenes, tokenizer, 31).images is not None
    assert PairDataset(scenes, tokenizer, 32, in_memory=True).images is not None
    rows = list(range(0, 40, 3))
    assert torch.equal(lazy.__getitems__(rows)[0].images, dataset.__getitems__(rows)[0].images)


def test_workers_give_whole_batches(dataset):
    again = loads(dumps(dataset))
    sizes = [len(images) for images, _ in DataLoader(again, 16, collate_fn=whole, num_workers=1)]
    assert sizes == [16, 16, 8]


@pytest.mark.parametrize("size", [(50, 30), (31, 77), (32, 32), (20, 20)])
def test_images_are_prepared_as_open_clip_does(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    theirs = image_transform_v2(PreprocessCfg(size=32, mean=(0.0,) * 3, std=(1.0,) * 3), is_train=False)
    torch.testing.assert_close(square(image, 32) / 255, theirs(image), atol=1e-6, rtol=0)


def test_preprocess_of_open_clip(scenes):
    preprocess = image_transform_v2(PreprocessCfg(size=24), is_train=True)
    dataset = PairDataset(scenes, open_clip.get_tokenizer("RN50"), 0, preprocess=preprocess)
    images, texts = dataset.__getitems__([0, 1])
    assert (dataset.images, images.images.dtype, images.images.shape) == (None, torch.float32, (2, 3, 24, 24))
    assert texts.texts.shape == (2, 77)
    assert not torch.equal(dataset.__getitems__([0])[0].images[0], images.images[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"roi": (torch.ones(3, 1, 1), torch.ones(3, 1) > 0)}, "40 pairs, but roi of 3"),
        ({"roi": (torch.ones(40, 1, 1), torch.ones(3, 1) > 0)}, "40 pairs, but roi's mask of 3"),
        ({"tags": [["x"]]}, "40 pairs, but tags of 1"),
    ],
)
def test_wrong_arguments(scenes, arguments, message):
    with pytest.raises(ValueError, match=message):
        PairDataset(scenes, tokenizer, 16, **arguments)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_broken_image_is_named(tmp_path, in_memory):
    (tmp_path / "x.png").write_bytes(b"no image")
    pairs = Pairs(lambda i: Image.open(tmp_path / "x.png"), ["x.png"] * 2, ["a", "b"])
    with pytest.raises(ValueError, match=r"x.png: the image cannot be decoded"):
        PairDataset(pairs, tokenizer, 16, in_memory=in_memory).__getitems__([0])
