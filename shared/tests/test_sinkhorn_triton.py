"""The kernels, compiled where there is CUDA; elsewhere the first test runs this file again in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from papercore.ops import _sinkhorn_triton as kernels

# The interpreter's log2 of a masked marginal.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cpu" if kernels.INTERPRETED else "cuda"


def on_kernels(test):
    return test if kernels.INTERPRETED else pytest.mark.gpu(CUDA(test))


@pytest.mark.skipif(kernels.INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def reference(cost, a, b, g0, eps, n_iters, k_a, k_b):
    """(linear cost, every f, every g) in float64, as the equations stand."""
    f, g, cost = [], [g0], torch.where((a > 0).unsqueeze(2) & (b > 0).unsqueeze(1), cost, 0.0)
    for _ in range(n_iters):
        x = -k_a * eps * torch.logsumexp(b.log().unsqueeze(1) + (g[-1].unsqueeze(1) - cost) / eps, 2)
        f.append(torch.where(a > 0, x, 0.0))
        x = -k_b * eps * torch.logsumexp(a.log().unsqueeze(2) + (f[-1].unsqueeze(2) - cost) / eps, 1)
        g.append(torch.where(b > 0, x, 0.0))
    plan = a.unsqueeze(2) * b.unsqueeze(1) * ((f[-1].unsqueeze(2) + g[-1].unsqueeze(1) - cost) / eps).exp()
    return (plan * cost).sum((1, 2)), torch.stack(f), torch.stack(g)


def problems(batch, n, m, size=1.0, masked=0, seed=0):
    """Costs up to ``size``, marginals that differ, the last ``masked`` rows and columns of each masked, and a start."""
    random = torch.Generator().manual_seed(seed)
    cost = size * torch.rand(batch, n, m, generator=random, dtype=torch.float64)
    marginals = []
    for length in (n, m):
        weights = 0.2 + torch.rand(batch, length, generator=random, dtype=torch.float64)
        weights[:, length - masked :] = 0
        marginals.append(weights / weights.sum(1, keepdim=True))
    a, b = marginals
    g0 = torch.where(b > 0, size * torch.rand(b.shape, generator=random, dtype=torch.float64), 0.0)
    return cost, a, b, g0


def compare(cost, a, b, g0, eps=0.1, n_iters=2, k_a=1.0, k_b=1.0, rtol=2e-5):
    """Both passes against the reference's own autograd, upstream gradients on the linear cost and both last potentials."""
    cost.requires_grad_()
    settings = eps, n_iters, k_a, k_b
    linear, f, g = reference(cost, a, b, g0, *settings)
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=random, dtype=t.dtype) for t in (linear, f[-1], g[-1])]
    (expected,) = torch.autograd.grad((linear, f[-1], g[-1]), cost, upstream)

    given = [t.detach().float().to(DEVICE) for t in (cost, a, b, g0)]
    found = kernels.sinkhorn_forward(*given, *settings)
    gradient = kernels.sinkhorn_backward(*given[:3], *found[1:], *settings, *(u.float().to(DEVICE) for u in upstream))
    for ours, theirs in zip((*found, gradient), (linear, f, g, expected), strict=True):
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().item() + 1e-30
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=0, atol=rtol * scale)


@pytest.fixture(params=["fused", "streamed"])
def regime(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(kernels, "FUSED", 0)


@on_kernels
@pytest.mark.usefixtures("regime")
class TestAgainstAutograd:
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 17, 2)])
    def test_shapes(self, shape):
        compare(*problems(*shape))

    @pytest.mark.parametrize("n_iters", [1, 4])
    def test_iterations(self, n_iters):
        compare(*problems(1, 4, 7), n_iters=n_iters)

    @pytest.mark.parametrize(("k_a", "k_b"), [(0.9, 1.0), (0.8, 0.6)])
    def test_unbalanced(self, k_a, k_b):
        compare(*problems(1, 4, 7), k_a=k_a, k_b=k_b)

    def test_masks_whatever_the_cost_there(self):
        cost, a, b, g0 = problems(1, 4, 6, masked=2)
        cost[:, -2:], cost[:, :, -2:] = -3e38, 3e38  # overflow once divided by eps
        compare(cost, a, b, g0, k_a=0.8)

    def test_different_masks_in_a_batch(self):
        cost, a, b, g0 = problems(2, 4, 5)
        a[0, 1], b[1, 0], g0[1, 0] = 0, 0, 0
        compare(cost, a, b, g0)

    @pytest.mark.parametrize("masked_sides", [(True, True), (True, False), (False, True)])
    def test_nothing_kept(self, masked_sides):
        cost, a, b, g0 = problems(2, 4, 5)
        if masked_sides[0]:
            a[1] = 0
        if masked_sides[1]:
            b[1], g0[1] = 0, 0
        given = [t.float().to(DEVICE) for t in (cost, a, b, g0)]
        linear, f, g = kernels.sinkhorn_forward(*given, 0.1, 2, 1.0, 1.0)
        ones = [torch.ones_like(t) for t in (linear, f[-1], g[-1])]
        gradient = kernels.sinkhorn_backward(*given[:3], f, g, 0.1, 2, 1.0, 1.0, *ones)
        assert linear[1] == 0
        for values in (f[:, 1], g[1:, 1], gradient[1]):
            assert (values == 0).all()
        alone = kernels.sinkhorn_forward(*(t[:1].contiguous() for t in given), 0.1, 2, 1.0, 1.0)
        torch.testing.assert_close((linear[:1], f[:, :1], g[:, :1]), alone, rtol=0, atol=0)
        assert gradient[0].isfinite().all()
        assert gradient[0].abs().sum() > 0

    def test_costs_far_above_eps(self):
        """exp(-C / eps) is 0 in float32 throughout."""
        cost, a, b, g0 = problems(1, 4, 6, size=50.0)
        compare(cost + 50, a, b, g0, rtol=5e-3)


@on_kernels
def test_several_tiles():
    """Rows, columns and the gradient's tiles of the streamed kernels do not divide the cost, and a mask ends within a tile."""
    cost, a, b, g0 = problems(1, 67, 263, masked=2)
    assert kernels._fused(67, 263) is None
    compare(cost, a, b, g0, n_iters=1, k_b=0.9)


@on_kernels
def test_registers_hold_a_short_and_wide_cost():
    assert kernels._fused(3, 300) == {"rows": 4, "columns": 512, "num_warps": 4}
    compare(*problems(1, 3, 300), n_iters=2)


def test_availability():
    assert kernels.available(torch.ones(1)) == kernels.INTERPRETED


@pytest.mark.gpu
@CUDA
def test_a_cuda_graph_replays_both_passes():
    given = [t.float().cuda() for t in problems(2, 40, 300)]

    def both():
        linear, f, g = kernels.sinkhorn_forward(*given, 0.1, 5, 1.0, 1.0)
        ones = [torch.ones_like(t) for t in (linear, f[-1], g[-1])]
        return linear, kernels.sinkhorn_backward(*given[:3], f, g, 0.1, 5, 1.0, 1.0, *ones)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    given[0].mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, both())
