import random

import numpy as np
import pytest
import torch
from papercore.ops import autocast_dtype, full_precision, peak_memory, pick_device, seed_everything


def test_cuda_is_preferred_then_mps_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device() == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, torch.float32),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_a_cpu_autocasts_only_where_it_multiplies_bfloat16_in_hardware(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert autocast_dtype("cpu") == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_falls_back_to_float16(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert autocast_dtype(torch.device("cuda")) == expected


class TestPeakMemory:
    def test_counts_what_is_alive_at_the_worst_moment(self):
        with peak_memory() as peak:
            a = torch.ones(1000)  # 4,000 bytes
            del a
            b = torch.ones(3000)
            c = torch.ones(2000)
            del b
        assert 20_000 <= peak.bytes < 21_000
        assert c.sum() == 2000

    def test_does_not_count_what_was_there_before(self):
        before = torch.ones(100_000)
        with peak_memory() as peak:
            before.add_(1)
        assert peak.bytes < 1000

    def test_freeing_older_memory_does_not_hide_new(self):
        old = torch.ones(5000)
        with peak_memory() as peak:
            new = torch.ones(1000)
            del old
            newer = torch.ones(1000)
        assert peak.bytes >= 4000
        assert len(new) == len(newer)


def test_seeding_repeats_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(5)
    first = draw()
    assert draw() != first
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert draw() != first
    seed_everything(2**40)  # numpy takes 32 bits only


class TestFullPrecision:
    @pytest.fixture(autouse=True)
    def _restored(self):
        yield
        torch.set_float32_matmul_precision("highest")

    engines = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)

    def precisions(self):
        return [engine.fp32_precision for engine in self.engines]

    @pytest.mark.parametrize("setting", ["highest", "high", "medium"])
    def test_overrules_the_overall_setting_and_puts_it_back(self, setting):
        torch.set_float32_matmul_precision(setting)
        before = self.precisions()
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not {"tf32", "bf16"}.intersection(self.precisions())
            with full_precision():
                pass
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == setting
        assert self.precisions() == before

    @pytest.mark.parametrize("engine", [0, 1], ids=["cuda", "mkldnn"])
    def test_overrules_what_is_set_for_one_engine(self, engine):
        torch.set_float32_matmul_precision("highest")
        self.engines[engine].fp32_precision = "tf32"
        with full_precision():
            assert self.precisions() == ["ieee", "ieee"]
        assert self.precisions()[engine] == "tf32"
        assert self.precisions()[1 - engine] == "ieee"

    def test_puts_it_back_after_an_error(self):
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
