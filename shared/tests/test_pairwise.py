import inspect

import pytest
import torch
from papercore.ops import pairwise_lp, peak_memory
from papercore.ops.pairwise import _Pairwise
from torch.testing import assert_close

KINDS = [(1, False), (2, False), (2, True)]
each_kind = pytest.mark.parametrize(("p", "squared"), KINDS, ids=["l1", "l2", "l2 squared"])


def clouds(*batch, n=5, m=4, c=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*batch, rows, c, generator=generator, dtype=dtype).requires_grad_() for rows in (n, m)]


def broadcast(x, y, p, squared):
    """With the tensor of all differences."""
    difference = x.unsqueeze(-2) - y.unsqueeze(-3)
    if p == 1:
        return difference.abs().sum(-1)
    return difference.square().sum(-1) if squared else difference.square().sum(-1).sqrt()


def chunked(x, y, p, squared):
    """What other devices than a CPU run."""
    distance = _Pairwise.apply(x, y, p)
    return distance.square() if squared else distance


each_way = pytest.mark.parametrize("way", [pairwise_lp, chunked])


def gradients(distance, *inputs):
    weights = torch.sin(1 + torch.arange(distance.numel(), dtype=distance.dtype)).view(distance.shape)
    return torch.autograd.grad((distance * weights).sum(), inputs)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("elements", [1, 2 * 2 * 3 * 4 * 3, 2**24], ids=["one row", "two rows", "all rows"])
@each_kind
@each_way
def test_distances_and_gradients(way, p, squared, elements, batch, monkeypatch):
    monkeypatch.setattr("papercore.ops.pairwise._ELEMENTS", elements)
    x, y = clouds(*batch)
    found, expected = way(x, y, p, squared), broadcast(x, y, p, squared)
    assert_close(found, expected, rtol=1e-13, atol=1e-15)
    for one, other in zip(gradients(found, x, y), gradients(expected, x, y), strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-13)


@each_kind
@each_way
def test_a_gradient_for_one_side_alone(way, p, squared):
    for x, y in (clouds(), clouds()[::-1]):
        (found,) = gradients(way(x, y.detach(), p, squared), x)
        (expected,) = gradients(broadcast(x, y, p, squared), x)
        assert_close(found, expected, rtol=1e-11, atol=1e-13)
        (found,) = gradients(way(y.detach(), x, p, squared), x)
        (expected,) = gradients(broadcast(y, x, p, squared), x)
        assert_close(found, expected, rtol=1e-11, atol=1e-13)


@each_kind
@each_way
def test_a_cloud_and_itself(way, p, squared):
    x, _ = clouds()
    distance = way(x, x, p, squared)
    assert not distance.diagonal().any()
    found = gradients(distance, x)[0]
    off = broadcast(x, x, p, squared) if p == 1 else broadcast(x, x, 2, True) + torch.eye(5)
    expected = off if p == 1 or squared else off.sqrt()
    assert_close(found, gradients(expected, x)[0], rtol=1e-11, atol=1e-13)


@each_way
def test_a_tie_has_no_slope_in_l1(way):
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    y = torch.tensor([[1.0, 5.0], [0.0, 2.0]], requires_grad=True)
    grads = torch.autograd.grad(way(x, y, 1, False).sum(), (x, y))
    assert grads[0].tolist() == [[1.0, -1.0]]
    assert grads[1].tolist() == [[0.0, 1.0], [-1.0, 0.0]]


@pytest.mark.parametrize("squared", [False, True])
@each_way
def test_a_distance_of_zero_has_no_slope_in_l2(way, squared):
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    y = torch.tensor([[1.0, 2.0], [1.0, 5.0]], requires_grad=True)
    grads = torch.autograd.grad(way(x, y, 2, squared).sum(), (x, y))
    assert grads[0].tolist() == [[0.0, -6.0 if squared else -1.0]]
    assert grads[1].tolist() == [[0.0, 0.0], [0.0, 6.0 if squared else 1.0]]


@pytest.mark.parametrize("p", [1, 2])
@each_way
def test_near_rows_far_from_the_origin(way, p):
    x = torch.full((30, 3), 1000.0)
    y = x + 0.0625 * torch.arange(1, 31).unsqueeze(1)
    assert_close(way(x, y, p, False), broadcast(x, y, p, False), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 3), (5, 1, 3), (5, 4, 1), (300, 4, 1)])
@each_way
def test_single_rows_and_columns(way, shape):
    n, m, c = shape
    x, y = clouds(n=n, m=m, c=c)
    assert_close(way(x, y, 1, False), broadcast(x, y, 1, False))
    assert_close(gradients(way(x, y, 1, False), x), gradients(broadcast(x, y, 1, False), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_kind
def test_half_is_computed_in_float32(p, squared, dtype):
    x, y = (t.detach().to(dtype).requires_grad_() for t in clouds())
    single = [t.detach().float().requires_grad_() for t in (x, y)]
    found, expected = pairwise_lp(x, y, p, squared), pairwise_lp(*single, p, squared)
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0)
    for one, other in zip(gradients(found, x, y), gradients(expected, *single), strict=True):
        assert one.dtype == dtype
        assert_close(one, other.to(dtype), rtol=0, atol=0)


def test_the_finer_dtype_wins():
    x, y = clouds()
    assert pairwise_lp(x.half(), y.float()).dtype == torch.float32
    assert_close(pairwise_lp(x.half(), y), pairwise_lp(x.half().double(), y), rtol=0, atol=0)


@each_kind
@each_way
def test_autocast_changes_nothing(way, p, squared):
    x, y = clouds(2, n=20, m=30, dtype=torch.float32)
    expected = way(x, y, p, squared)
    grads = gradients(expected, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(way(x, y, p, squared), expected, rtol=0, atol=0)
        assert_close(gradients(way(x, y, p, squared), x, y), grads, rtol=0, atol=0)


@pytest.mark.parametrize("p", [1, 2])
def test_memory_of_many_columns(p, monkeypatch):
    n, c = 32, 4000
    x, y = clouds(n=n, m=n, c=c, dtype=torch.float32)
    with peak_memory() as peak:
        pairwise_lp(x, y, p).sum().backward()
    differences = n * n * c * 4
    assert peak.bytes < differences / 6
    monkeypatch.setattr("papercore.ops.pairwise._ELEMENTS", 2 * n * c)
    with peak_memory() as peak:
        chunked(x, y, p, False).sum().backward()
    assert peak.bytes < differences / 2


@pytest.mark.parametrize("options", [{"p": 3}, {"p": 0}, {"squared": True}, {"p": 1.5}])
def test_another_norm(options):
    with pytest.raises(ValueError, match="pairwise_lp: p must be 1 or 2, and 2 if squared; got p "):
        inspect.unwrap(pairwise_lp)(*clouds(), **options)


@pytest.mark.parametrize("shapes", [((5, 3), (4, 2)), ((2, 5, 3), (3, 4, 3)), ((2, 5, 3), (4, 3))])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(
        ValueError, match=r"pairwise_lp: x \(.*3\) and y \(.*\) must differ in the number of rows alone"
    ):
        inspect.unwrap(pairwise_lp)(*map(torch.zeros, shapes))
