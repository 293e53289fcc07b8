"""The kernels, compiled where there is CUDA; elsewhere the first test runs this file again in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from papercore.ops import _pairwise_triton as kernels
from papercore.ops._sinkhorn_triton import INTERPRETED

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_kernels(test):
    return test if INTERPRETED else pytest.mark.gpu(CUDA(test))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def compare(x, y):
    differences = x.unsqueeze(2) - y.unsqueeze(1)
    torch.testing.assert_close(
        kernels.pairwise_l1_forward(x.float().to(DEVICE), y.float().to(DEVICE)).cpu().double(),
        differences.abs().sum(3),
        rtol=1e-5,
        atol=1e-5,
    )
    grad = torch.randn(differences.shape[:3], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = kernels.pairwise_l1_backward(*(t.float().to(DEVICE) for t in (grad, x, y)))
    signs = grad.unsqueeze(3) * differences.sign()
    for ours, theirs in zip(found, (signs.sum(2), -signs.sum(1)), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


def points(batch, n, m, channels, levels=None):
    """Two clouds; with ``levels``, of so few values that many coordinates tie. Exact in float32."""
    random = torch.Generator().manual_seed(0)
    if levels is None:
        clouds = [torch.randn(batch, rows, channels, generator=random) for rows in (n, m)]
    else:
        clouds = [torch.randint(levels, (batch, rows, channels), generator=random) for rows in (n, m)]
    return [cloud.double() for cloud in clouds]


@on_kernels
class TestAgainstDifferences:
    @pytest.mark.parametrize("channels", [1, 2, 5, 77])
    def test_channels(self, channels):
        compare(*points(2, 6, 9, channels))

    @pytest.mark.parametrize(("n", "m"), [(1, 1), (16, 3), (1, 20), (18, 33)])
    def test_rows(self, n, m):
        compare(*points(2, n, m, 4))

    @pytest.mark.parametrize("channels", [3, 40])
    def test_ties_have_no_sign(self, channels):
        x, y = points(2, 7, 5, channels, levels=3)
        assert (x.unsqueeze(2) == y.unsqueeze(1)).any()
        compare(x, y)
        compare(x, x.clone())

    def test_channels_divided_among_programs(self):
        """603 channels are two shares of one tile, neither a multiple of the unrolled steps, and three tiles of the gradient."""
        compare(*points(1, 3, 4, 603))

    def test_more_columns_than_a_tile_holds(self):
        compare(*points(1, 2, 300, 2))


def test_availability():
    assert kernels.available(torch.ones(1)) == INTERPRETED
