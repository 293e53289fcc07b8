"""Batches must do what open_clip's loop asks of tensors, and keep tokens, masks and bytes what they are."""

import torch
from softclip.batch import ImageRoiBatch, TextTagBatch


def images(dtype=torch.float32):
    return ImageRoiBatch(torch.zeros(4, 3, 8, 8).to(dtype), torch.randn(4, 2, 5), torch.ones(4, 2).bool())


def texts():
    return TextTagBatch(torch.zeros(4, 6).long(), torch.ones(4, 6).long(), torch.ones(4).bool(), torch.arange(4))


def test_they_count_as_their_first_tensor():
    assert len(images()) == 4
    assert images().shape == (4, 3, 8, 8)
    assert texts().shape[0] == len(texts()) == 4
    assert texts().device == torch.device("cpu")


def test_a_dtype_is_for_fractions():
    """open_clip: images.to(device=..., dtype=..., non_blocking=True); texts.to(device=..., non_blocking=True)."""
    moved = images().to(device=torch.device("cpu"), dtype=torch.bfloat16, non_blocking=True)
    assert moved.images.dtype == moved.roi.dtype == torch.bfloat16
    assert moved.roi_mask.dtype == torch.bool
    moved = texts().to(device="cpu", dtype=torch.bfloat16, non_blocking=True)
    assert moved.texts.dtype == moved.tags.dtype == moved.group_ids.dtype == torch.int64
    assert images(torch.uint8).to("cpu", torch.bfloat16).images.dtype == torch.uint8
    assert TextTagBatch(torch.zeros(2, 3).long(), torch.rand(2, 7)).to("cpu", torch.float16).tags.dtype == torch.float16
    assert images().to(dtype=torch.float64).images.dtype == torch.float64


def test_the_device_is_moved_to():
    moved = texts().to("meta")
    assert {x.device.type for x in (moved.texts, moved.tags, moved.tag_mask, moved.group_ids)} == {"meta"}


def test_what_is_missing_stays_missing():
    for batch in (ImageRoiBatch(torch.zeros(2, 3, 4, 4)), TextTagBatch(torch.zeros(2, 6).long())):
        for same in (batch.to("cpu", torch.float16), batch[:1]):
            assert type(same) is type(batch)
            assert list(vars(same).values())[1:] == [None] * (len(vars(batch)) - 1)


def test_rows():
    batch = texts()
    part = batch[torch.tensor([3, 1])]
    assert part.group_ids.tolist() == [3, 1]
    assert part.shape == part.tags.shape == (2, 6)
    assert len(images()[1:]) == len(images()[1:].roi) == 3
