from pathlib import Path

import pytest
import torch
from iqa_distill.weights import load_weights, read_weights
from safetensors.torch import save_file
from torch import nn


@pytest.mark.parametrize("content", [lambda w: w, lambda w: {"model": w, "epoch": 3}, lambda w: {"state_dict": w}])
def test_reads_state_dicts(content, tmp_path):
    torch.save(content({"module._orig_mod.backbone.a": torch.ones(2), "b.module": torch.zeros(1)}), tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    assert list(read) == ["a", "b.module"]
    assert torch.equal(read["a"], torch.ones(2))


def test_reads_safetensors(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert list(read_weights(tmp_path / "w.safetensors")) == ["a"]


class Payload:
    def __reduce__(self):
        return Path.mkdir, (Path("never"),)


def test_runs_nothing(tmp_path):
    torch.save({"model": Payload()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"not read, as it holds [\w.]+, and such objects may run code"):
        read_weights(tmp_path / "w.pt")


def test_refuses_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path)
    (tmp_path / "w.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged, or not a file of weights"):
        read_weights(tmp_path / "w.pt")
    torch.save({"epoch": 3}, tmp_path / "e.pt")
    with pytest.raises(ValueError, match="no tensors"):
        read_weights(tmp_path / "e.pt")


def test_loads_all_or_refuses():
    source, network = (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    nn.init.ones_(source[1].running_mean)
    weights = source.state_dict()
    counter = weights.pop("1.num_batches_tracked")
    assert load_weights(network, {**weights, "head": counter}, "f") == ["head"]
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items() if name in weights)
    with pytest.raises(ValueError, match=r"f: 0\.bias is \(3,\), the network's \(2,\)"):
        load_weights(network, {**weights, "0.bias": torch.zeros(3)}, "f")
    del weights["1.running_mean"]
    with pytest.raises(ValueError, match=r"f: 1 of the network's 7 weights are missing: 1\.running_mean"):
        load_weights(network, weights, "f")
