import json

import pytest
import torch
from mmict.checkpoints import read_tensors
from safetensors.torch import save_file

TENSORS = {"a.x": torch.ones(2), "a.y": torch.zeros(3), "b.x": torch.full((1,), 5.0)}


def test_reads_by_prefix_from_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = read_tensors(str(tmp_path), "a.", "b.y")
    assert set(found) == {"a.x", "a.y"}
    assert torch.equal(found["a.x"], torch.ones(2))


def test_of_several_files_opens_those_it_needs(tmp_path):
    save_file({"b.x": TENSORS["b.x"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a.x": "one.safetensors", "b.x": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_tensors(str(tmp_path), "b.")["b.x"].item() == 5


def test_without_safetensors_there_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        read_tensors(str(tmp_path), "a.")
