import logging
from functools import partial
from pickle import dumps, loads

import numpy as np
import pytest
import torch
from disco.images import Images, Undecoded, decoded
from disco.readers import read
from papercore.lab.training import whole_batch
from PIL import Image
from torch.utils.data import DataLoader


def fill(folder, count, corrupt=()):
    """Pictures 000.png, 001.png, ..., each of a shade and size of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i:03}.png"
        Image.new("RGB", (10 + i % 3, 12), (i % 256, 0, 0)).save(path)
        if i in corrupt:
            path.write_bytes(path.read_bytes()[:40])
    return str(folder)


def pictures(folder, count, corrupt=()):
    part, _ = read(fill(folder, count, corrupt))
    part.labels, part.classes = list(range(count)), tuple(map(str, range(count)))
    return part


def lazily(part, side=8):
    return Images(Undecoded(part, side), part.label_tensor, part.classes)


@pytest.mark.parametrize("make", [partial(decoded, side=8), lazily], ids=["eager", "lazy"])
class TestBoth:
    def test_batches(self, tmp_path, make):
        images = make(pictures(tmp_path, 12))
        batch = images.__getitems__([7, 0, 7])
        assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
            "images": (torch.uint8, (3, 3, 8, 8)),
            "index": (torch.int64, (3,)),
            "labels": (torch.int64, (3,)),
        }
        assert batch["index"].tolist() == batch["labels"].tolist() == [7, 0, 7]
        assert (batch["images"][:, 0] == torch.tensor([7, 0, 7]).view(3, 1, 1)).all()
        assert (len(images), images.side, images.labels.tolist()) == (12, 8, list(range(12)))
        assert images[5]["images"].shape == (3, 8, 8)
        assert images[5]["labels"] == 5

    def test_unlabelled(self, tmp_path, make):
        images = make(read(fill(tmp_path, 3))[0])
        assert (images.labels, images.classes, set(images[0])) == (None, (), {"images", "index"})
        assert images.select([1]).labels is None

    def test_select_counts_anew(self, tmp_path, make):
        images = make(pictures(tmp_path, 12))
        chosen = images.select([9, 2, 5]).select(torch.tensor([2, 0]))
        assert (len(chosen), chosen.labels.tolist(), chosen.classes) == (2, [5, 9], images.classes)
        batch = chosen.__getitems__([1, 0])
        assert (batch["index"].tolist(), batch["labels"].tolist()) == ([1, 0], [9, 5])
        assert batch["images"][:, 0, 0, 0].tolist() == [9, 5]

    def test_beyond_the_end(self, tmp_path, make):
        with pytest.raises(IndexError):
            make(pictures(tmp_path, 3)).__getitems__([3])

    def test_too_many_corrupt_images(self, tmp_path, make):
        part = pictures(tmp_path, 150, corrupt=(3, 4))
        with pytest.raises(
            ValueError, match=r"more than 1% of the images are corrupt: 2 of 150 .*the first .*003.png: "
        ) as e:
            make(part).__getitems__([3, 4])
        assert "\n" not in str(e.value)


def test_eager_and_lazy_images_are_equal(tmp_path):
    part = pictures(tmp_path, 20)
    eager, lazy = decoded(part, 8), lazily(part)
    assert eager.pixels.shape == (20, 3, 8, 8)
    assert lazy.pixels is None
    for name, values in eager.__getitems__(range(20)).items():
        torch.testing.assert_close(lazy.__getitems__(range(20))[name], values, rtol=0, atol=0)


def test_corrupt_images_are_left_out_with_one_warning(tmp_path, caplog):
    part = pictures(tmp_path, 200, corrupt=(150, 30))
    with caplog.at_level(logging.WARNING):
        images = decoded(part, 8)
    kept = [i for i in range(200) if i not in (30, 150)]
    assert images.labels.tolist() == kept
    assert images.pixels[:, 0, 0, 0].tolist() == kept
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"2 of 200 images cannot be read, the first {tmp_path}/030.png: ")


def test_corrupt_images_are_replaced_by_the_next_one_when_lazy(tmp_path, caplog):
    images = lazily(pictures(tmp_path, 200, corrupt=(199, 30)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = images.__getitems__([29, 30, 199])
            assert batch["index"].tolist() == batch["labels"].tolist() == [29, 31, 0]
            assert batch["images"][:, 0, 0, 0].tolist() == [29, 31, 0]
    assert len(caplog.messages) == 1
    assert "030.png" in caplog.messages[0]


def test_bombs_are_corrupt_images(tmp_path, monkeypatch):
    part = pictures(tmp_path, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"3 of 3 images cannot be read, the first .*000.png: .*decompression bomb"):
        decoded(part, 8)


def test_workers_decode(tmp_path):
    images = lazily(pictures(tmp_path, 10))
    batches = list(DataLoader(images, batch_size=4, num_workers=2, collate_fn=whole_batch))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))
    assert torch.cat([batch["images"] for batch in batches])[:, 0, 0, 0].tolist() == list(range(10))


def test_images_can_be_pickled(tmp_path):
    images = loads(dumps(lazily(pictures(tmp_path, 4)).select([3, 1])))
    assert images.__getitems__([0, 1])["images"][:, 0, 0, 0].tolist() == [3, 1]


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 9, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8),
     torch.zeros(2, 8, 8, 3, dtype=torch.uint8)],
)  # fmt: skip
def test_images_of_another_shape_are_refused(images):
    with pytest.raises(ValueError, match=r"images must be uint8 \(images, 3, side, side\), not torch"):
        Images(images)


def test_labels_must_be_as_many_as_images():
    with pytest.raises(ValueError, match=r"2 images, but labels of shape \(3,\)"):
        Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(3))


def test_arrays_that_are_no_pictures_are_corrupt(tmp_path):
    part, _ = read("sample")
    part.open = partial(np.take, np.zeros(3))
    with pytest.raises(ValueError, match="more than 1% of the images are corrupt: 1437 of 1437 images"):
        decoded(part, 8)
