import inspect
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.ops import (
    balanced_assignment,
    pairwise_lp,
    peak_memory,
    sinkhorn,
    sinkhorn_cost,
    sinkhorn_divergence,
)
from torch.testing import assert_close

GOLDEN = {
    name: torch.from_numpy(array)
    for name, array in np.load(Path(__file__).parent / "golden" / "core_6x9_eps0.1.npz").items()
}
# A float64 cost on a CPU takes the scaling path, unless its bound is not looked up.
PATHS = {"scaling": {}, "log": {"check": False}}
each_path = pytest.mark.parametrize("path", [pytest.param(options, id=name) for name, options in PATHS.items()])
ROWS = torch.tensor([True, False, True, True, True])
COLUMNS = torch.tensor([True, True, False, True])
INF = math.inf


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_cost(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)


def random_marginal(*shape, seed=0):
    weights = 0.2 + random_cost(*shape, seed=seed)
    return weights / weights.sum(-1, keepdim=True)


def eager(cost, a, b, eps, n_iters):
    """The plan, rows rescaled to their sums, then columns, again and again."""
    plan = torch.exp(-cost / eps)
    for _ in range(n_iters):
        plan = plan * (a / plan.sum(-1)).unsqueeze(-1)
        plan = plan * (b / plan.sum(-2)).unsqueeze(-2)
    return plan


def literal(cost, a, b, levels, rho_a=INF, rho_b=INF):
    """The potentials by log-sum-exp, level after level; autograd keeps every step."""
    g = -levels[0] * b.log()
    for eps in levels:
        k_a, k_b = (1.0 if rho == INF else rho / (rho + eps) for rho in (rho_a, rho_b))
        f = -k_a * eps * torch.logsumexp(b.log().unsqueeze(-2) + (g.unsqueeze(-2) - cost) / eps, -1)
        g = -k_b * eps * torch.logsumexp(a.log().unsqueeze(-1) + (f.unsqueeze(-1) - cost) / eps, -2)
    return f, g


def plan_of(cost, a, b, f, g, eps):
    return a.unsqueeze(-1) * b.unsqueeze(-2) * torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps)


def generalized_kl(p, q):
    return torch.special.xlogy(p, p / q).sum() - p.sum() + q.sum()


def weighted(*outputs):
    """A number that weighs every entry of the outputs differently."""
    return sum((torch.sin(1.0 + torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) * t).sum() for t in outputs)


def outputs(result):
    return result.linear_cost, result.value, result.plan, result.f, result.g


def gradient(function, cost):
    cost = cost.detach().clone().requires_grad_()
    return torch.autograd.grad(function(cost), cost)[0]


class TestGolden:
    @pytest.mark.parametrize("n_iters", [1, 5, 20])
    @each_path
    def test_plan_after_some_iterations(self, n_iters, path):
        result = sinkhorn(GOLDEN["cost"], GOLDEN["a"], GOLDEN["b"], eps=0.1, n_iters=n_iters, **path)
        assert_close(result.plan, GOLDEN[f"plan_iters{n_iters}"], rtol=1e-11, atol=1e-14)

    @each_path
    def test_converged(self, path):
        x = GOLDEN["x"].clone().requires_grad_()
        cost = pairwise_lp(x, GOLDEN["y"])
        result = sinkhorn(cost, GOLDEN["a"], GOLDEN["b"], n_iters=5000, grad="envelope", **path)
        assert_close(cost, GOLDEN["cost"], rtol=1e-14, atol=0)
        assert_close(result.plan, GOLDEN["plan"], rtol=1e-9, atol=1e-13)
        assert_close(result.linear_cost, GOLDEN["linear_cost"], rtol=1e-11, atol=0)
        assert_close(result.value, GOLDEN["value_kl"], rtol=1e-12, atol=0)
        assert_close(result.value, GOLDEN["pot_solve_value"], rtol=1e-12, atol=0)
        assert_close(result.value, GOLDEN["geomloss_value"], rtol=1e-3, atol=0)
        assert_close(result.f.unsqueeze(1) + result.g, GOLDEN["f_plus_g"], rtol=1e-10, atol=1e-12)
        assert_close(
            (GOLDEN["a"] * result.f).sum() + (GOLDEN["b"] * result.g).sum(), GOLDEN["value_kl"], rtol=1e-12, atol=0
        )
        assert result.linear_cost > GOLDEN["emd"]
        (grad,) = torch.autograd.grad(result.value, x)
        assert_close(grad, GOLDEN["envelope_grad_x"], rtol=1e-9, atol=1e-12)

    def test_divergence(self):
        found = sinkhorn_divergence(GOLDEN["x"], GOLDEN["y"], a=GOLDEN["a"], b=GOLDEN["b"], n_iters=5000)
        assert_close(found, GOLDEN["sinkhorn_divergence"], rtol=2e-8, atol=0)  # a cloud to itself converges slowly
        assert_close(found, GOLDEN["geomloss_divergence"], rtol=1e-3, atol=0)

    @each_path
    def test_unbalanced(self, path):
        a, b, rho = GOLDEN["unb_a"], GOLDEN["unb_b"], float(GOLDEN["unb_rho"])
        result = sinkhorn(GOLDEN["cost"], a, b, rho=rho, n_iters=2000, **path)
        assert_close(result.plan, GOLDEN["unb_plan"], rtol=1e-10, atol=1e-14)
        assert_close(result.linear_cost, GOLDEN["unb_linear"], rtol=1e-11, atol=0)


class TestAgainstTheSlowLoop:
    @pytest.mark.parametrize(
        "shape", [(5, 5), (6, 9), (1, 4, 7), (3, 7, 4), (2, 3, 4, 5), (1, 1), (1, 6), (6, 1), (130, 90)]
    )
    @each_path
    def test_plan_and_gradient(self, shape, path):
        cost = random_cost(*shape)
        a, b = random_marginal(*shape[:-1], seed=1), random_marginal(*shape[:-2], shape[-1], seed=2)

        def slow(cost):
            plan = eager(cost, a, b, 0.1, 7)
            return weighted(plan, (plan * cost).sum((-1, -2)))

        def fast(cost):
            result = sinkhorn(cost, a, b, eps=0.1, n_iters=7, **path)
            return weighted(result.plan, result.linear_cost)

        assert_close(sinkhorn(cost, a, b, n_iters=7, **path).plan, eager(cost, a, b, 0.1, 7), rtol=1e-12, atol=1e-13)
        assert_close(fast(cost), slow(cost), rtol=1e-12, atol=1e-13)
        assert_close(gradient(fast, cost), gradient(slow, cost), rtol=1e-10, atol=1e-12)

    @each_path
    def test_unit_marginals_of_the_paper(self, path):
        cost, ones = random_cost(8, 8), torch.ones(8, dtype=torch.float64)
        result = sinkhorn(cost, mass="count", **path)
        plan = eager(cost, ones, ones, 0.1, 20)
        assert_close(result.plan, plan, rtol=0, atol=1e-13)
        assert_close(result.linear_cost, (plan * cost).sum(), rtol=1e-13, atol=0)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"rho": (0.3, 0.3)},
            {"rho": (0.3, INF)},
            {"rho": (INF, 2.0)},
            {"rho": (0.05, 4.0), "levels": [0.8, 0.4, 0.2, 0.1, 0.1, 0.1]},
            {"levels": [0.8, 0.4, 0.2, 0.1, 0.1, 0.1]},
        ],
        ids=str,
    )
    @each_path
    def test_potentials_and_their_gradient(self, options, path):
        cost, a, b = random_cost(6, 9), random_marginal(6, seed=1), random_marginal(9, seed=2)
        rho, levels = options.get("rho", (INF, INF)), options.get("levels", [0.1] * 6)
        annealing = {"eps_init": 0.8, "eps_decay": 0.5} if "levels" in options else {}

        def slow(cost):
            f, g = literal(cost, a, b, levels, *rho)
            plan = plan_of(cost, a, b, f, g, 0.1)
            return f, g, plan, (plan * cost).sum()

        def fast(cost):
            r = sinkhorn(cost, a, b, eps=0.1, n_iters=6, rho=rho if "rho" in options else None, **annealing, **path)
            return r.f, r.g, r.plan, r.linear_cost

        for found, expected in zip(fast(cost), slow(cost), strict=True):
            assert_close(found, expected, rtol=1e-12, atol=1e-13)
        found, expected = (gradient(lambda c, way=way: weighted(*way(c)), cost) for way in (fast, slow))
        assert_close(found, expected, rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize("size", [(95, 97), (97, 96)], ids=["numpy", "torch"])
    def test_both_sides_of_the_threshold(self, size):
        cost = random_cost(*size)
        a, b = (torch.full((n,), 1 / n, dtype=torch.float64) for n in size)

        def slow(cost):
            return (eager(cost, a, b, 0.1, 4) * cost).sum()

        def fast(cost):
            return sinkhorn(cost, n_iters=4).linear_cost

        assert_close(fast(cost), slow(cost), rtol=1e-13, atol=0)
        assert_close(gradient(fast, cost), gradient(slow, cost), rtol=1e-10, atol=1e-15)

    @pytest.mark.parametrize("rho", [None, 0.5])
    def test_numpy_and_torch_count_alike(self, rho, monkeypatch):
        cost = random_cost(12, 10)

        def solve(cost):
            return weighted(*outputs(sinkhorn(cost, rho=rho)))

        small = solve(cost), gradient(solve, cost)
        monkeypatch.setattr("papercore.ops._sinkhorn._SMALL", 0)
        for found, expected in zip((solve(cost), gradient(solve, cost)), small, strict=True):
            assert_close(found, expected, rtol=1e-12, atol=1e-13)

    def test_broadcast_marginals(self):
        cost, a, b = random_cost(2, 3, 4, 5), random_marginal(4), random_marginal(2, 1, 5)
        result = sinkhorn(cost, a, b, rho=(1.0, INF))
        assert result.f.shape == (2, 3, 4)
        assert result.plan.shape == cost.shape
        for i in range(2):
            for j in range(3):
                alone = sinkhorn(cost[i, j], a, b[i, 0], rho=(1.0, INF))
                assert_close(result.plan[i, j], alone.plan, rtol=1e-12, atol=1e-15)
                assert_close(result.value[i, j], alone.value, rtol=1e-12, atol=1e-15)

    def test_columns_first_is_rows_first_turned_over(self):
        cost, a, b = random_cost(2, 4, 6), random_marginal(4), random_marginal(6, seed=1)
        keep = torch.tensor([True, True, False, True])
        options = {"rho": (0.4, 3.0), "n_iters": 3, "eps_init": 0.4}
        result = sinkhorn(cost, a, b, row_mask=keep, order="col_first", **options)
        turned = sinkhorn(cost.mT, b, a, col_mask=keep, **{**options, "rho": (3.0, 0.4)})
        found = result.f, result.g, result.plan, result.linear_cost, result.value, result.a
        expected = turned.g, turned.f, turned.plan.mT, turned.linear_cost, turned.value, turned.b
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rtol=1e-13, atol=1e-15)

    def test_the_side_that_comes_last_fits(self):
        cost = random_cost(4, 6)
        assert_close(sinkhorn(cost, n_iters=2).plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64))
        last = sinkhorn(cost, n_iters=2, order="col_first").plan.sum(1)
        assert_close(last, torch.full((4,), 1 / 4, dtype=torch.float64))


VARIANTS = {
    "balanced": {},
    "marginals": {"a": random_marginal(5), "b": random_marginal(4)},
    "counted": {"mass": "count", "rho": 1.0},
    "masked": {"row_mask": ROWS, "col_mask": COLUMNS},
    "unbalanced": {"rho": 0.4},
    "rows relaxed": {"rho": (0.4, INF)},
    "columns relaxed, masked": {"rho": (INF, 0.4), "row_mask": ROWS},
    "annealed": {"eps_init": 1.0, "eps_decay": 0.4},
    "columns first": {"order": "col_first", "b": random_marginal(4)},
    "columns first, masked": {"order": "col_first", "col_mask": COLUMNS, "rho": (0.4, 2.0)},
    "continued": {"warm_start": (torch.zeros(5), torch.linspace(-0.2, 0.3, 4, dtype=torch.float64))},
}
each_variant = pytest.mark.parametrize(
    "variant", [pytest.param(options, id=name) for name, options in VARIANTS.items()]
)


class TestGradients:
    @each_variant
    @each_path
    def test_unrolled(self, variant, path):
        cost = random_cost(5, 4).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda c: weighted(*outputs(sinkhorn(c, eps=0.3, n_iters=4, **variant, **path))), (cost,), fast_mode=True
        )

    @each_path
    def test_unrolled_in_a_batch_with_masks(self, path):
        cost = random_cost(3, 3, 3).requires_grad_()
        keep = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])

        def solve(c):
            return weighted(*outputs(sinkhorn(c, eps=0.3, n_iters=3, row_mask=keep, col_mask=keep.flip(-1), **path)))

        assert torch.autograd.gradcheck(solve, (cost,), fast_mode=True)

    @pytest.mark.parametrize(
        "variant", [{}, {"row_mask": ROWS, "col_mask": COLUMNS}, {"rho": 0.7}, {"rho": (INF, 0.7)}]
    )
    @each_path
    def test_implicit_is_the_limit_of_unrolled(self, variant, path):
        cost = random_cost(2, 5, 4)
        if variant.get("row_mask") is not None:  # the second problem as a whole
            variant = {
                "row_mask": torch.stack([ROWS, ROWS & False]),
                "col_mask": torch.stack([COLUMNS, COLUMNS & False]),
            }

        def solve(mode):
            def function(cost):
                result = sinkhorn(cost, grad=mode, eps=0.3, n_iters=400, **variant, **path)
                potentials = () if "rho" not in variant else (result.f, result.g)  # else known up to a constant
                return weighted(result.linear_cost, result.value, result.plan, *potentials)

            return function

        expected = gradient(solve("unroll"), cost)
        assert expected.abs().max() > 0.01
        assert_close(gradient(solve("implicit"), cost), expected, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("rho", [None, 0.7])
    def test_implicit_unrolls_what_has_not_converged(self, rho):
        cost = random_cost(5, 4)
        results = [
            gradient(lambda c, m=m: sinkhorn(c, grad=m, n_iters=2, rho=rho).linear_cost, cost) for m in MODES[:2]
        ]
        assert_close(*results, rtol=0, atol=0)
        converged = gradient(lambda c: sinkhorn(c, grad="implicit", n_iters=3000, rho=rho).linear_cost, cost)
        assert not torch.allclose(results[0], converged, rtol=1e-3)

    def test_implicit_keeps_no_iterations(self):
        def kept(n_iters):
            return saved_bytes(lambda c: sinkhorn(c, grad="implicit", n_iters=n_iters), random_cost(8, 8))

        assert kept(2000) == kept(1000) < saved_bytes(lambda c: sinkhorn(c, n_iters=1000), random_cost(8, 8))

    @pytest.mark.parametrize("rho", [None, 0.7])
    @pytest.mark.parametrize("n_iters", [3, 400])
    def test_envelope_is_the_plan_and_for_the_value_alone(self, rho, n_iters):
        cost = random_cost(2, 5, 4).requires_grad_()
        result = sinkhorn(cost, eps=0.3, grad="envelope", n_iters=n_iters, rho=rho)
        assert not any(t.requires_grad for t in (result.linear_cost, result.plan, result.f, result.g))
        (grad,) = torch.autograd.grad(result.value.sum(), cost)
        assert_close(grad, result.plan, rtol=0, atol=0)
        unrolled = sinkhorn(cost, eps=0.3, n_iters=n_iters, rho=rho)
        assert_close(result.value, unrolled.value, rtol=1e-14, atol=0)
        exact = torch.autograd.grad(unrolled.value.sum(), cost)[0]
        assert torch.allclose(grad, exact, rtol=1e-8, atol=1e-12) == (n_iters == 400)

    def test_none_has_no_gradient(self):
        result = sinkhorn(random_cost(5, 4).requires_grad_(), grad="none")
        assert not any(t.requires_grad for t in outputs(result))

    @pytest.mark.parametrize("enabled", [True, False])
    @pytest.mark.parametrize("mode", ["unroll", "envelope", "implicit", "none"])
    def test_the_callers_grad_mode_is_obeyed_and_left_alone(self, mode, enabled):
        with torch.set_grad_enabled(enabled):
            result = sinkhorn(random_cost(5, 4).requires_grad_(), grad=mode, tol=1e-3, n_iters=30)
            assert torch.is_grad_enabled() is enabled
            assert result.linear_cost.requires_grad is (enabled and mode in MODES[:2])
            assert result.value.requires_grad is (enabled and mode != "none")


MODES = ["unroll", "implicit"]
COMPILE = """
import torch
from papercore.ops import sinkhorn

def solve(cost):
    keep = torch.tensor([True, False, True, True])
    results = (
        sinkhorn(cost, n_iters=2, row_mask=keep, rho=1.0),
        sinkhorn(cost[0], n_iters=2, cost_max=1.0, order="col_first"),
    )
    return sum(result.linear_cost.sum() + result.value.sum() for result in results)

cost = torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True)
found, expected = torch.compile(solve, fullgraph=True, backend="aot_eager")(cost), solve(cost)
torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
grads = [torch.autograd.grad(value, cost)[0] for value in (found, expected)]
torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
"""


def saved_bytes(solve, cost):
    """What autograd keeps of ``solve``, every storage once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = solve(cost.requires_grad_())
    del result
    return sum(storages.values())


class TestMemory:
    @each_path
    def test_an_iteration_keeps_its_potentials_only(self, path):
        kept = [
            saved_bytes(lambda c, n=n: sinkhorn(c, n_iters=n, **path).linear_cost, random_cost(2, 100, 90))
            for n in (10, 110)
        ]
        assert kept[1] - kept[0] == 100 * 2 * (100 + 90) * 8
        assert kept[0] < 3 * 2 * 100 * 90 * 8

    @each_path
    def test_peak(self, path):
        cost = random_cost(300, 300, dtype=torch.float32).requires_grad_()
        with peak_memory() as peak:
            sinkhorn(cost, n_iters=100, **path).linear_cost.backward()
        assert peak.bytes < 8 * 300 * 300 * 4  # the loop would keep 200 plans


class TestMasks:
    @pytest.mark.parametrize("mass", ["prob", "count"])
    @pytest.mark.parametrize("rho", [None, 0.5])
    @each_path
    def test_as_if_it_were_not_there(self, mass, rho, path):
        cost = random_cost(5, 5)
        columns = torch.tensor([True, True, False, True, True])

        def solve(cost, **options):
            return sinkhorn(cost, mass=mass, rho=rho, **options, **path)

        result = solve(cost, row_mask=ROWS, col_mask=columns)
        small = solve(cost[ROWS][:, columns])
        kept = ROWS.unsqueeze(1) & columns
        assert_close(result.plan[kept], small.plan.flatten(), rtol=1e-12, atol=1e-15)
        assert not result.plan[~kept].any()
        assert_close(result.f[ROWS], small.f, rtol=1e-12, atol=1e-14)
        assert_close(result.g[columns], small.g, rtol=1e-12, atol=1e-14)
        assert not result.f[~ROWS].any()
        assert not result.g[~columns].any()
        assert_close(result.linear_cost, small.linear_cost, rtol=1e-12, atol=0)
        assert_close(result.value, small.value, rtol=1e-12, atol=1e-14)
        assert_close(result.marginal_error, small.marginal_error, rtol=1e-6, atol=1e-12)
        assert result.n_valid == 4

    @pytest.mark.parametrize("hole", [float("nan"), INF, 1e30])
    @each_path
    def test_what_is_masked_is_not_read(self, hole, path):
        cost = random_cost(3, 5, 4)
        rows, columns = ROWS.expand(3, 5).clone(), COLUMNS.expand(3, 4).clone()
        rows[1], columns[1] = False, False
        holes = ~(rows.unsqueeze(2) & columns.unsqueeze(1))

        def solve(cost):
            return weighted(*outputs(sinkhorn(cost, row_mask=rows, col_mask=columns, **path)))

        with_holes = cost.masked_fill(holes, hole)
        assert_close(solve(with_holes), solve(cost), rtol=0, atol=0)
        grad = gradient(solve, with_holes)
        assert not grad[holes].any()
        assert_close(grad, gradient(solve, cost), rtol=0, atol=0)

    @pytest.mark.parametrize("eps", [0.1, 0.001])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_in_the_log_domain_at_small_eps(self, eps, dtype):
        cost = 1 + random_cost(5, 4, dtype=dtype)
        result = sinkhorn(cost, eps=eps, row_mask=ROWS, col_mask=COLUMNS)
        assert_close(result.plan.sum(0), COLUMNS.to(dtype) / 3, rtol=1e-3, atol=0)
        assert torch.isfinite(gradient(lambda c: sinkhorn(c, eps=eps, row_mask=ROWS).value, cost)).all()

    @pytest.mark.parametrize("sides", ["rows", "columns", "both"])
    @pytest.mark.parametrize(
        "options", [{}, {"rho": 1.0}, {"grad": "implicit"}, {"tol": 1e-6, "n_iters": 2000}], ids=str
    )
    @each_path
    def test_a_whole_problem_costs_nothing(self, sides, options, path):
        rows, columns = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
        if sides != "columns":
            rows[1] = False
        if sides != "rows":
            columns[1] = False
        cost = random_cost(2, 5, 4).requires_grad_()
        result = sinkhorn(cost, row_mask=rows, col_mask=columns, **options, **path)
        alone = sinkhorn(cost[0], **options, **path)
        for found, expected in zip(outputs(result), outputs(alone), strict=True):
            assert_close(found[0], expected, rtol=1e-9, atol=1e-12)
            assert not found[1].any()
        assert result.marginal_error[1] == 0
        assert bool(result.converged[1])
        assert result.n_valid.tolist() == [5, 0]
        assert result.n_iters_run == alone.n_iters_run
        (grad,) = torch.autograd.grad(weighted(*outputs(result)), cost)
        assert torch.isfinite(grad).all()
        assert grad[0].any()
        assert not grad[1].any()

    def test_marginals_of_zero_mask_too(self):
        cost = random_cost(5, 4)
        a = ROWS / ROWS.sum()
        masked = sinkhorn(cost, row_mask=ROWS)
        for found, expected in zip(outputs(sinkhorn(cost, a.double())), outputs(masked), strict=True):
            assert_close(found, expected, rtol=1e-6, atol=1e-9)  # a is float32
        grad = gradient(lambda c: sinkhorn(c, torch.zeros(5), torch.zeros(4), n_iters=2000).linear_cost, cost)
        assert not grad.any()

    def test_a_mask_takes_its_share_of_a_marginal_away(self):
        result = sinkhorn(random_cost(5, 4), a=torch.ones(5), b=torch.ones(4), row_mask=ROWS)
        assert result.a.tolist() == [1, 0, 1, 1, 1]


class TestStopping:
    def test_at_the_tolerance(self):
        cost, a, b = random_cost(3, 8, 6), random_marginal(8), random_marginal(6, seed=1)
        result = sinkhorn(cost, a, b, tol=1e-6, n_iters=5000, check_every=7)
        assert 7 < result.n_iters_run < 5000
        assert result.n_iters_run % 7 == 0
        assert (result.marginal_error < 1e-6).all()
        assert result.converged.all()
        earlier = sinkhorn(cost, a, b, n_iters=result.n_iters_run - 7)
        assert earlier.marginal_error.max() > 1e-6
        assert earlier.converged.all()  # to 1e-4, if no tolerance is given
        same = sinkhorn(cost, a, b, n_iters=result.n_iters_run)
        assert_close(result.plan, same.plan, rtol=0, atol=0)

    def test_its_gradient_is_that_of_the_iterations_done(self):
        cost = random_cost(8, 6)
        n_iters = sinkhorn(cost, tol=1e-3, n_iters=100, check_every=2).n_iters_run
        found = gradient(lambda c: sinkhorn(c, tol=1e-3, n_iters=100, check_every=2).linear_cost, cost)
        assert_close(found, gradient(lambda c: sinkhorn(c, n_iters=n_iters).linear_cost, cost), rtol=0, atol=0)

    def test_at_n_iters_at_the_latest(self):
        result = sinkhorn(random_cost(8, 6), eps=0.01, tol=1e-12, n_iters=13, check_every=5)
        assert result.n_iters_run == 13
        assert not result.converged

    def test_marginal_error(self):
        cost, a, b = random_cost(2, 5, 4), 3 * random_marginal(5), 3 * random_marginal(4)
        for order in ("row_first", "col_first"):
            result = sinkhorn(cost, a, b, n_iters=1, order=order)
            off = (result.plan.sum(-1) - a).abs().amax(-1), (result.plan.sum(-2) - b).abs().amax(-1)
            assert_close(result.marginal_error, torch.maximum(*off) / 3)
            assert (result.marginal_error > 1e-3).all()

    def test_not_before_eps_has_come_down(self):
        flat = torch.zeros(4, 4)  # solved at any eps
        result = sinkhorn(flat, eps=0.1, eps_init=1.6, tol=1e-3, check_every=1)
        assert result.n_iters_run == 5

    def test_annealing_ends_where_none_does(self):
        cost = random_cost(6, 6)
        result = sinkhorn(cost, eps=0.05, eps_init=2.0, eps_decay=0.7, n_iters=1000)
        assert_close(result.plan, sinkhorn(cost, eps=0.05, n_iters=1000).plan, rtol=1e-9, atol=1e-13)

    @each_variant
    @each_path
    def test_ten_and_ten_iterations_are_twenty(self, variant, path):
        cost = random_cost(5, 4)
        options = {
            name: value for name, value in variant.items() if name not in ("warm_start", "eps_init", "eps_decay")
        }
        first = sinkhorn(cost, n_iters=10, **options, **path)
        second = sinkhorn(cost, n_iters=10, warm_start=(first.f, first.g), **options, **path)
        for found, expected in zip(outputs(second), outputs(sinkhorn(cost, **options, **path)), strict=True):
            assert_close(found, expected, rtol=1e-12, atol=1e-14)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @each_path
    def test_half_is_computed_in_float32(self, dtype, path):
        cost = random_cost(5, 4).to(dtype).requires_grad_()
        result = sinkhorn(cost, row_mask=ROWS, **path)
        single = cost.detach().float().requires_grad_()
        expected = sinkhorn(single, row_mask=ROWS, **path)
        for found, other in zip(outputs(result), outputs(expected), strict=True):
            assert found.dtype == torch.float32
            assert_close(found, other, rtol=0, atol=0)
        grads = [torch.autograd.grad(r.linear_cost, c)[0] for r, c in ((result, cost), (expected, single))]
        assert grads[0].dtype == dtype
        assert_close(grads[0], grads[1].to(dtype), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_others_keep_theirs(self, dtype):
        result = sinkhorn(random_cost(5, 4, dtype=dtype), a=random_marginal(5), b=random_marginal(4).float())
        assert {t.dtype for t in outputs(result)} == {dtype}

    @pytest.mark.parametrize("mode", MODES)
    @each_path
    def test_autocast_changes_nothing(self, mode, path):
        cost = random_cost(2, 16, 12, dtype=torch.float32)

        def solve(cost):
            return weighted(*outputs(sinkhorn(cost, grad=mode, rho=1.0, n_iters=50, **path)))

        expected = solve(cost), gradient(solve, cost)
        with torch.autocast("cpu", torch.bfloat16):
            found = solve(cost), gradient(solve, cost)
        assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("scale", "dtype", "tolerance"),
        [
            (1.0, torch.float32, 1e-3),
            (1e3, torch.float32, 0.1),
            (1.0, torch.float64, 1e-12),
            (1e6, torch.float64, 1e-6),
        ],
    )
    def test_a_cost_far_above_eps(self, scale, dtype, tolerance):
        cost = random_cost(2, 6, 5)
        for mode in ("unroll", "implicit"):

            def solve(cost, eps, mode=mode):
                return sinkhorn(cost, eps=eps, grad=mode).linear_cost.sum()

            large = (scale * cost).to(dtype)
            assert all(torch.isfinite(t).all() for t in outputs(sinkhorn(large, eps=0.001, grad=mode)))
            assert_close(solve(large, 0.001).double() / scale, solve(cost, 0.001 / scale), rtol=tolerance, atol=0)
            assert torch.isfinite(gradient(lambda c, solve=solve: solve(c, 0.001), large)).all()

    @pytest.mark.parametrize("ratio", [0.999, 1.001], ids=["scaling", "log"])
    @pytest.mark.parametrize("shape", [(20, 30), (3, 16, 16)])
    def test_float32_at_the_largest_cost_of_the_scaling_path(self, ratio, shape):
        cost = random_cost(*shape) ** 4
        cost *= 60 * ratio / cost.amax()

        def solve(cost):
            return sinkhorn(cost, eps=1.0, n_iters=100).linear_cost.sum()

        assert_close(solve(cost.float()).double(), solve(cost), rtol=1e-5, atol=0)
        assert_close(gradient(solve, cost.float()).double(), gradient(solve, cost), rtol=1e-3, atol=1e-5)

    def test_disjoint_one_hot_rows(self):
        p, q = torch.eye(2)[[0, 0, 0]].requires_grad_(), torch.eye(2)[[1, 1, 1]]
        result = sinkhorn_cost(p, q, eps=0.015, mass="count", cost_max=2.0)
        assert_close(result.plan, torch.full((3, 3), 1 / 3))
        assert_close(result.linear_cost, torch.tensor(6.0), rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(result.linear_cost, p)
        assert_close(grad, torch.tensor([1.0, -1.0]).expand(3, 2))

    def test_partly_disjoint_one_hot_rows(self):
        result = sinkhorn_cost(torch.eye(3)[[0, 1, 1]], torch.eye(3)[[1, 2, 2]], eps=0.015, mass="count", n_iters=200)
        assert_close(result.linear_cost, torch.tensor(4.0), rtol=1e-3, atol=0)


class TestSmallest:
    @each_path
    def test_a_point_against_itself(self, path):
        cost = torch.zeros(1, 1, requires_grad=True)
        result = sinkhorn(cost, **path)
        for found, expected in zip(outputs(result), (0.0, 0.0, [[1.0]], [0.0], [0.0]), strict=True):
            assert found.tolist() == expected
        assert torch.autograd.grad(result.linear_cost, cost)[0].tolist() == [[1.0]]

    @each_path
    def test_identical_points(self, path):
        a, b = random_marginal(5), random_marginal(4)
        result = sinkhorn_cost(torch.ones(5, 3).double(), torch.ones(4, 3).double(), a=a, b=b, **path)
        assert_close(result.plan, torch.outer(a, b))
        assert result.linear_cost == 0
        assert abs(result.value) < 1e-15

    @each_path
    def test_one_row_or_one_column(self, path):
        for shape, marginal in (((1, 4), random_marginal(4)), ((4, 1), random_marginal(4))):
            cost, one = random_cost(*shape), torch.ones(1)
            sides = (one, marginal) if shape[0] == 1 else (marginal, one)
            result = sinkhorn(cost, *sides, **path)
            assert_close(result.plan.flatten(), marginal, rtol=1e-14, atol=0)
            grad = gradient(lambda c, s=sides: sinkhorn(c, *s, **path).linear_cost, cost)
            assert_close(grad.flatten(), marginal, rtol=1e-13, atol=1e-15)


class TestWithoutWaiting:
    @pytest.mark.parametrize("mode", ["unroll", "envelope"])
    def test_fixed_iterations_ask_the_device_for_nothing(self, mode, monkeypatch):
        def fail(*_, **__):
            raise AssertionError("waits for the device")

        cost, keep = random_cost(2, 5, 4).requires_grad_(), ROWS.expand(2, 5)
        for name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "nonzero", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, fail)
        for options in ({"cost_max": 1.0}, {}, {"rho": 1.0}, {"eps_init": 1.0}, {"order": "col_first"}):
            result = sinkhorn(cost, row_mask=keep, grad=mode, check=False, **options)
            assert result.converged.shape == (2,)
            result.value.sum().backward()

    def test_compiles_whole(self):  # in a process without the suite's check of shapes, which does not
        assert subprocess.run([sys.executable, "-c", COMPILE], check=False).returncode == 0

    def test_matmul_precision_is_left_alone(self):
        torch.set_float32_matmul_precision("medium")
        try:
            sinkhorn(random_cost(2, 5, 4).requires_grad_()).value.sum().backward()
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")


class TestValue:
    @pytest.mark.parametrize("rho", [(0.4, 0.4), (0.4, INF), (INF, 3.0)])
    def test_unbalanced_it_is_the_objective(self, rho):
        cost, a, b = random_cost(5, 4), 2 * random_marginal(5), 3 * random_marginal(4)
        result = sinkhorn(cost, a, b, rho=rho, eps=0.2, n_iters=5)
        plan = result.plan
        objective = (plan * cost).sum() + 0.2 * generalized_kl(plan, torch.outer(a, b))
        for weight, sums, marginal in zip(rho, (plan.sum(1), plan.sum(0)), (a, b), strict=True):
            if weight < INF:
                objective = objective + weight * generalized_kl(sums, marginal)
        assert_close(result.value, objective, rtol=1e-13, atol=0)

    def test_unbalanced_it_is_least_at_the_solution(self):
        cost, a, b = random_cost(5, 4), 2 * random_marginal(5), 3 * random_marginal(4)
        values = [float(sinkhorn(cost, a, b, rho=0.7, n_iters=n).value) for n in (1, 3, 10, 1000)]
        assert values == sorted(values, reverse=True)

    @pytest.mark.parametrize("n_iters", [2, 500])
    def test_balanced_it_is_cost_and_entropy(self, n_iters):
        cost, a, b = random_cost(5, 4), random_marginal(5), random_marginal(4)
        result = sinkhorn(cost, a, b, eps=0.2, n_iters=n_iters)
        entropy = torch.special.xlogy(result.plan, result.plan / torch.outer(a, b)).sum()
        assert_close(result.value, result.linear_cost + 0.2 * entropy, rtol=1e-13, atol=0)

    def test_a_large_rho_is_a_balanced_problem(self):
        cost = random_cost(5, 4)
        assert_close(sinkhorn(cost, rho=1e8).plan, sinkhorn(cost).plan, rtol=1e-6, atol=0)
        assert_close(sinkhorn(cost, rho=1e30).plan, sinkhorn(cost).plan, rtol=1e-12, atol=0)


class TestErrors:
    """Behind the check of shapes that the suite switches on."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eps": 0.0}, r"eps must be positive, got 0.0"),
            ({"eps": float("nan")}, r"eps must be positive, got nan"),
            ({"n_iters": 0}, r"n_iters and check_every must be at least 1, got 0 and 10"),
            ({"check_every": 0}, r"n_iters and check_every must be at least 1, got 20 and 0"),
            ({"tol": 0.0}, r"tol must be positive or None, got 0.0"),
            ({"eps_init": 0.01}, r"eps_init must be at least eps and eps_decay in \(0, 1\), got 0.01 and 0.5"),
            ({"eps_init": 1.0, "eps_decay": 1.0}, r"eps_decay in \(0, 1\), got 1.0 and 1.0"),
            ({"eps_init": 1.6, "n_iters": 4}, r"n_iters 4 is too few .* eps 0.1 from eps_init 1.6 by eps_decay 0.5"),
            ({"rho": 0.0}, r"rho must be positive, or None for balanced, got \(0.0, 0.0\)"),
            ({"rho": (1.0, -1.0)}, r"rho must be positive, or None for balanced, got \(1.0, -1.0\)"),
            ({"rho": 1.0, "tol": 1e-3}, r"tol looks at the marginals, which rho relaxes"),
            ({"mass": "sum"}, r"mass must be one of prob, count; got 'sum'"),
            ({"order": "rows"}, r"order must be one of row_first, col_first; got 'rows'"),
            ({"grad": "exact"}, r"grad must be one of unroll, envelope, implicit, none; got 'exact'"),
            ({"backend": "cuda"}, r"backend must be one of auto, torch, triton; got 'cuda'"),
            ({"mass": "count"}, r'cost \(3, 4\): mass="count" needs as many rows as columns, or rho'),
            ({"a": torch.ones(4)}, r"a \(4,\) does not fit cost \(3, 4\): expected \(3,\)"),
            ({"b": torch.ones(2, 4)}, r"b \(2, 4\) does not fit cost \(3, 4\): expected \(4,\)"),
            ({"row_mask": torch.ones(4) > 0}, r"row_mask \(4,\) does not fit cost \(3, 4\): expected \(3,\)"),
            ({"a": torch.ones(3), "row_mask": torch.ones(4) > 0}, r"row_mask \(4,\) does not fit cost"),
            ({"col_mask": torch.ones(3) > 0}, r"col_mask \(3,\) does not fit cost \(3, 4\): expected \(4,\)"),
            ({"warm_start": (torch.ones(3), torch.ones(3))}, r"warm_start \(3,\) does not fit cost \(3, 4\)"),
            ({"a": torch.ones(3, requires_grad=True)}, r"a is a constant here and has no gradient: pass a.detach\(\)"),
            ({"a": torch.ones(3)}, r"a and b must have the same sum, got 3, 1 for cost \(3, 4\): normalise them"),
            ({"a": torch.tensor([1.0, 1.0, -1.0])}, r"a \(3,\) must be finite and not negative"),
            ({"b": torch.tensor([0.5, 0.5, 0.0, float("nan")])}, r"b \(4,\) must be finite and not negative"),
            ({"b": torch.tensor([0.5, 0.5, 0.0, INF]), "rho": 1.0}, r"b \(4,\) must be finite and not negative"),
        ],
    )
    @pytest.mark.parametrize("order", ["row_first", "col_first"])
    def test_name_the_argument(self, options, message, order):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(sinkhorn)(torch.rand(3, 4), **{"order": order, **options})

    def test_unequal_counts_of_a_batch(self):
        rows = torch.tensor([[True, True], [True, False]])
        with pytest.raises(ValueError, match=r"a and b must have the same sum, got 1, 2 for cost \(2, 2, 2\)"):
            sinkhorn(torch.rand(2, 2, 2), row_mask=rows, mass="count")

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 3), (3,)])
    def test_empty(self, shape):
        with pytest.raises(ValueError, match=r"cost must be \(..., n, m\) with no side of 0, got \("):
            inspect.unwrap(sinkhorn)(torch.rand(shape))

    @pytest.mark.parametrize("hole", [float("nan"), INF, -INF])
    def test_holes(self, hole):
        cost = torch.rand(2, 3, 4)
        cost[1, 0, :2] = hole
        with pytest.raises(ValueError, match=r"cost \(2, 3, 4\) has 2 entries that are NaN or infinite"):
            sinkhorn(cost)
        assert not torch.isfinite(sinkhorn(cost, check=False).linear_cost[1])

    @pytest.mark.parametrize("options", [{"tol": 1e-3}, {"eps_init": 1.0}, {"grad": "implicit"}], ids=str)
    def test_triton_for_what_it_cannot_do(self, options):
        with pytest.raises(ValueError, match='backend "triton" needs Triton, a float32 cost on CUDA, fixed iterations'):
            sinkhorn(torch.rand(3, 4), backend="triton", **options)


class TestDivergence:
    x, y = random_cost(7, 3), random_cost(5, 3, seed=1)

    @pytest.mark.parametrize("sharp", [True, False])
    @pytest.mark.parametrize("p", [1, 2])
    def test_is_nothing_between_equal_clouds(self, sharp, p):
        assert sinkhorn_divergence(self.x, self.x, p=p, sharp=sharp, n_iters=3) == 0
        options = {"a": random_marginal(7), "b": random_marginal(7), "rho": (0.5, 0.5)}
        assert sinkhorn_divergence(self.x, self.x, p=p, sharp=sharp, **options) == 0

    @pytest.mark.parametrize(
        "options", [{}, {"sharp": True}, {"p": 2}, {"rho": 0.3}, {"rho": 0.3, "mass": "count"}], ids=str
    )
    def test_is_symmetric_and_not_negative(self, options):
        for shift in (0.0, 0.01, 1.0):
            found = sinkhorn_divergence(self.x, self.y + shift, n_iters=500, **options)
            assert_close(
                sinkhorn_divergence(self.y + shift, self.x, n_iters=500, **options), found, rtol=1e-9, atol=1e-11
            )
            assert found > 0

    def test_between_one_place_and_twice_its_mass(self):
        point, double = torch.zeros(1, 2).double(), torch.zeros(2, 2).double()
        found = sinkhorn_divergence(point, double, mass="count", rho=0.5, n_iters=500)
        assert_close(
            found, torch.tensor(brute_divergence(1.0, 2.0, 0.1, 0.5), dtype=torch.float64), rtol=1e-9, atol=1e-12
        )
        assert found > 0

    def test_subtracts_both_own_costs(self):
        a, b = random_marginal(7), random_marginal(5)
        between = sinkhorn_cost(self.x, self.y, a=a, b=b, n_iters=5, p=2)
        own = (
            sinkhorn_cost(self.x, self.x, a=a, b=a, n_iters=5, p=2),
            sinkhorn_cost(self.y, self.y, a=b, b=b, n_iters=5, p=2),
        )
        for sharp, name in ((True, "linear_cost"), (False, "value")):
            found = sinkhorn_divergence(self.x, self.y, a=a, b=b, n_iters=5, p=2, sharp=sharp)
            expected = getattr(between, name) - sum(getattr(r, name) for r in own) / 2
            assert_close(found, expected, rtol=1e-13, atol=1e-15)

    @pytest.mark.parametrize("mass", ["prob", "count"])
    def test_masked(self, mass):
        rows = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0] * 7], dtype=torch.bool)
        columns = torch.tensor([[1, 1, 1, 1, 1], [0] * 5], dtype=torch.bool)
        x, y = self.x.expand(2, 7, 3).clone(), self.y.expand(2, 5, 3)
        found = sinkhorn_divergence(x, y, row_mask=rows, col_mask=columns, mass=mass)
        assert_close(found[0], sinkhorn_divergence(self.x[rows[0]], self.y, mass=mass), rtol=1e-11, atol=1e-13)
        assert found[1] == 0

    def test_gradient(self):
        x = self.x[:4].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: sinkhorn_divergence(x, self.y, n_iters=4, p=2), (x,), fast_mode=True)

    def test_a_warm_start_is_of_the_cost_between(self):
        first = sinkhorn_cost(self.x, self.y)
        found = sinkhorn_divergence(self.x, self.y, n_iters=1, warm_start=(first.f, first.g), sharp=True)
        own = [sinkhorn_cost(t, t, n_iters=1).linear_cost for t in (self.x, self.y)]
        between = sinkhorn_cost(self.x, self.y, n_iters=21).linear_cost
        assert_close(found, between - sum(own) / 2, rtol=1e-12, atol=1e-13)


def brute_divergence(mass_x, mass_y, eps, rho):
    """Of two Diracs at one place: a plan is a number, and the objective is searched for its least value."""

    def least(a, b):
        t = torch.linspace(0.2, 5, 200_001, dtype=torch.float64)
        return float(
            sum(
                weight * (torch.xlogy(t, t / mass) - t + mass) for weight, mass in ((eps, a * b), (rho, a), (rho, b))
            ).min()
        )

    own = least(mass_x, mass_x) + least(mass_y, mass_y)
    return least(mass_x, mass_y) - own / 2 + eps / 2 * (mass_x - mass_y) ** 2


def swav(scores, eps, n_iters):
    """Algorithm 1 of the paper, a row at a time."""
    q = torch.exp(scores / eps).T
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(n_iters):
        for k in range(prototypes):
            q[k] = q[k] / q[k].sum() / prototypes
        for i in range(samples):
            q[:, i] = q[:, i] / q[:, i].sum() / samples
    return (q * samples).T


class TestBalancedAssignment:
    @pytest.mark.parametrize("shape", [(12, 4), (4, 4), (3, 8), (1, 5)])
    def test_swav(self, shape):
        scores = 2 * random_cost(*shape) - 1
        assert_close(balanced_assignment(scores, eps=0.05, n_iters=3), swav(scores, 0.05, 3), rtol=1e-11, atol=1e-15)

    def test_uses_prototypes_equally(self):
        scores = random_cost(40, 5) + torch.arange(5)
        q = balanced_assignment(scores, eps=0.5, n_iters=200)
        assert_close(q.sum(1), torch.ones(40).double())
        assert_close(q.sum(0), torch.full((5,), 8.0).double(), rtol=1e-6, atol=0)

    def test_large_scores_in_half_precision(self):
        q = balanced_assignment((100 * random_cost(6, 3)).half().requires_grad_(), eps=0.01)
        assert q.dtype == torch.float32
        assert not q.requires_grad
        assert_close(q.sum(1), torch.ones(6), rtol=1e-3, atol=0)


SIZES = st.integers(1, 7)
CLOUDS = st.tuples(SIZES, SIZES, st.integers(0, 2**31), st.sampled_from([0.03, 0.1, 1.0]), st.booleans())


class TestProperties:
    @given(CLOUDS)
    @settings(max_examples=25, deadline=None)
    def test_marginals_and_bounds(self, drawn):
        n, m, seed, eps, log = drawn
        cost, a, b = random_cost(n, m, seed=seed), random_marginal(n, seed=seed + 1), random_marginal(m, seed=seed + 2)
        result = sinkhorn(cost, a, b, eps=eps, n_iters=40, check=not log)
        assert_close(result.plan.sum(0), b, rtol=1e-10, atol=0)
        assert_close(result.plan.sum(1), a, rtol=0, atol=0.05)
        assert (result.plan >= 0).all()
        assert (b * cost.amin(0)).sum() - 1e-12 <= result.linear_cost <= (b * cost.amax(0)).sum() + 1e-12

    @given(CLOUDS)
    @settings(max_examples=25, deadline=None)
    def test_rows_and_columns_may_change_places(self, drawn):
        n, m, seed, eps, log = drawn
        cost, a, b = random_cost(n, m, seed=seed), random_marginal(n, seed=seed + 1), random_marginal(m, seed=seed + 2)
        rows, columns = torch.randperm(n, generator=generator(seed)), torch.randperm(m, generator=generator(seed))
        result = sinkhorn(cost, a, b, eps=eps, check=not log)
        moved = sinkhorn(cost[rows][:, columns], a[rows], b[columns], eps=eps, check=not log)
        assert_close(moved.plan, result.plan[rows][:, columns], rtol=1e-9, atol=1e-13)
        assert_close(moved.linear_cost, result.linear_cost, rtol=1e-10, atol=1e-13)

    @given(CLOUDS, st.floats(-3, 3))
    @settings(max_examples=20, deadline=None)
    def test_a_constant_more_of_cost_moves_nothing(self, drawn, constant):
        n, m, seed, eps, _ = drawn
        cost = random_cost(n, m, seed=seed)
        result, more = sinkhorn(cost, eps=eps), sinkhorn(cost + constant, eps=eps)
        assert_close(more.plan, result.plan, rtol=1e-9, atol=1e-13)
        assert_close(more.linear_cost, result.linear_cost + constant, rtol=1e-9, atol=1e-12)
