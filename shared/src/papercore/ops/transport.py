"""Entropic optimal transport by Sinkhorn's iterations: plans, costs, divergences, balanced assignments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from papercore.ops import _sinkhorn_triton as triton
from papercore.ops._sinkhorn import Iterate, transport_plan
from papercore.ops.pairwise import pairwise_lp

# exp(-C / eps) and its scalings stay within the dtype up to these C / eps.
_SAFE = {torch.float32: 60.0, torch.float64: 500.0}
_CONVERGED = 1e-4  # relative marginal error up to which an implicit gradient is trusted
_BALANCED = (torch.inf, torch.inf)


@dataclass(frozen=True)
class SinkhornResult:
    r"""What :func:`sinkhorn` found. The plan is :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)`.

    Attributes:
        linear_cost: (...), <P, C>: the "sharp" transport cost, without entropy.
        f, g: (..., n) and (..., m), potentials in the unit of the cost; 0 where masked.
        n_iters_run: iterations done.
        n_valid: (...), rows that are not masked.

    Example:
        >>> result = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), eps=1.0)
        >>> result.plan
        tensor([[0.3655, 0.1345],
                [0.1345, 0.3655]])
        >>> result.linear_cost, bool(result.converged)
        (tensor(0.2689), True)
    """

    linear_cost: Tensor
    f: Tensor
    g: Tensor
    n_iters_run: int
    cost: Tensor
    a: Tensor
    b: Tensor
    eps: float
    rho: tuple[float, float]
    grad: str
    tol: float | None

    @property
    def plan(self) -> Tensor:
        """(..., n, m), computed when asked for."""
        cost = self.cost if self.grad in ("unroll", "implicit") else self.cost.detach()
        return transport_plan(cost, self.a, self.b, self.f, self.g, self.eps)

    @property
    def value(self) -> Tensor:
        """(...), the entropic cost <P, C> + eps KL(P || a b'), without the constant mass terms of a generalized KL if balanced.

        If unbalanced, plus rho_a KL(P 1 || a) + rho_b KL(P' 1 || b), all of them generalized. At convergence and balanced it is
        <a, f> + <b, g>, and POT's ``ot.solve(..., reg_type="KL").value``. With ``grad="envelope"`` its gradient is P.
        """
        plan = self.plan
        rows, columns = plan.sum(-1), plan.sum(-2)
        value = (rows * self.f).sum(-1) + (columns * self.g).sum(-1)
        if self.rho != _BALANCED:
            value = value - self.eps * (rows.sum(-1) - self.a.sum(-1) * self.b.sum(-1))
            sides = zip(self.rho, (rows, columns), (self.a, self.b), strict=True)
            value = value + sum(rho * _relative_entropy(p, m) for rho, p, m in sides if rho != torch.inf)
        if self.grad == "envelope":
            value = value + (plan * (self.cost - self.cost.detach())).sum((-1, -2))
        return value

    @property
    def marginal_error(self) -> Tensor:
        """(...), the largest of |P 1 - a| and |P' 1 - b|, as a share of sum(a); meaningful if balanced."""
        return _marginal_error(self.plan.detach(), self.a, self.b)

    @property
    def converged(self) -> Tensor:
        """(...), bool: whether the marginal error is below ``tol`` (1e-4 if none was given)."""
        return self.marginal_error < (self.tol or _CONVERGED)

    @property
    def n_valid(self) -> Tensor:
        """(...), rows that take part."""
        return (self.a > 0).sum(-1)


def _marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    error = torch.maximum((plan.sum(-1) - a).abs().amax(-1), (plan.sum(-2) - b).abs().amax(-1))
    return error / a.sum(-1).clamp_min(torch.finfo(a.dtype).tiny)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    ratio = torch.where(p > 0, p / q.clamp_min(torch.finfo(q.dtype).tiny), 1.0)
    return (p * ratio.log() - p + q).sum(-1)


def sinkhorn(
    cost: Float[Tensor, "*batch n m"],
    a: Float[Tensor, "*#batch n"] | None = None,
    b: Float[Tensor, "*#batch m"] | None = None,
    *,
    eps: float = 0.1,
    n_iters: int = 20,
    tol: float | None = None,
    check_every: int = 10,
    eps_init: float | None = None,
    eps_decay: float = 0.5,
    rho: float | tuple[float, float] | None = None,
    row_mask: Bool[Tensor, "*#batch n"] | None = None,
    col_mask: Bool[Tensor, "*#batch m"] | None = None,
    mass: Literal["prob", "count"] = "prob",
    order: Literal["row_first", "col_first"] = "row_first",
    warm_start: tuple[Tensor, Tensor] | None = None,
    grad: Literal["unroll", "envelope", "implicit", "none"] = "unroll",
    backend: Literal["auto", "torch", "triton"] = "auto",
    cost_max: float | None = None,
    check: bool | None = None,
) -> SinkhornResult:
    r"""Transport plans of least cost with an entropic penalty, by alternating row and column normalisation.

    .. math:: \min_P \langle P, C\rangle + \varepsilon\, \mathrm{KL}(P \,\|\, a b^\top)
        \quad\text{with}\quad P 1 = a,\; P^\top 1 = b

    From the plain start P = exp(-C / eps), as POT and the paper of ``sinkd``; with unit marginals each iteration divides
    rows, then columns, by their sums. After finitely many iterations the side that comes last fits exactly, the other nearly.
    float16 and bfloat16 are computed in float32, outside autocast and without TF32. With fixed ``n_iters`` nothing waits for
    the device.

    Args:
        cost: any number of problems. a, b: marginals, >= 0, constants; 0 masks. None: equal, see ``mass``.
        eps: weight of the entropy, in the cost's unit. geomloss calls it blur^p, POT reg.
        n_iters: iterations; with ``tol`` at most. tol: stop at this relative marginal error, looked at every ``check_every``.
        eps_init, eps_decay: start at eps_init and multiply by eps_decay in each iteration down to eps; None: eps throughout.
        rho: relax the marginals: weight of their KL penalty, one for both or (rho_a, rho_b). None: balanced.
        row_mask, col_mask: True keeps. The cost of what is masked is not read. A problem masked as a whole costs 0.
        mass: default marginals are 1 / n ("prob") or 1 ("count", for which n must equal m unless unbalanced).
        order: which side is normalised first. warm_start: (f, g) of an earlier result.
        grad: "unroll": exact gradient of these iterations, in O(n_iters (n + m)) memory. "implicit": gradient of the
            converged solution (looks at the marginal error first, and unrolls if it is above 1e-4 or ``tol``). "envelope": only
            ``value`` has a gradient, the plan, exact at convergence. "none".
        backend: "triton" fuses the iterations on CUDA (float32, fixed iterations). "auto" takes it where it can.
        cost_max: an upper bound of abs(cost) known beforehand. If cost_max / eps is small, the iterations work on
            exp(-cost / eps) instead of in the log domain. On a CPU it is looked up if not given.
        check: look for NaN and unequal masses. None: on a CPU only, since looking waits for the device.

    Raises:
        ValueError: naming the argument, for what is out of range, does not fit, or is not finite.

    Example:
        >>> result = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), eps=0.1)
        >>> result.plan.round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    rho = rho if isinstance(rho, tuple) else (torch.inf if rho is None else rho,) * 2
    _check_options(eps, n_iters, tol, check_every, eps_init, eps_decay, rho, mass, order, grad, backend)
    plain = a is None and b is None and row_mask is None and col_mask is None
    if cost.dim() < 2 or cost.numel() == 0:
        raise ValueError(f"cost must be (..., n, m) with no side of 0, got {tuple(cost.shape)}")
    if plain and mass == "count" and rho == _BALANCED and cost.shape[-1] != cost.shape[-2]:
        raise ValueError(f'cost {tuple(cost.shape)}: mass="count" needs as many rows as columns, or rho')
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    a = _marginal(("a", a), ("row_mask", row_mask), cost, -2, mass)
    b = _marginal(("b", b), ("col_mask", col_mask), cost, -1, mass)
    solved_a, solved_b = a, b
    if not plain:  # what is masked as a whole is solved with marginals of its own, and costs nothing
        empty = (a.sum(-1, keepdim=True) == 0) | (b.sum(-1, keepdim=True) == 0)
        solved_a, solved_b = a.masked_fill(empty, 1 / a.shape[-1]), b.masked_fill(empty, 1 / b.shape[-1])
        a, b = a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)
        cost = cost.masked_fill((a == 0).unsqueeze(-1) | (b == 0).unsqueeze(-2), 0.0)
    on_cpu = cost.device.type == "cpu"
    if (on_cpu and not torch.compiler.is_compiling()) if check is None else check:
        largest = _check_numbers(cost, a, b, rho == _BALANCED)
        cost_max = largest if cost_max is None and on_cpu else cost_max

    turned = order == "col_first"
    problem = (cost.mT, solved_b, solved_a) if turned else (cost, solved_a, solved_b)
    levels = [eps if eps_init is None else max(eps, eps_init * eps_decay**t) for t in range(n_iters)]
    schedule = [(e, *(1.0 if r == torch.inf else r / (r + e) for r in (rho[::-1] if turned else rho))) for e in levels]
    if warm_start is None:  # so that b_j exp(g_j / eps) = 1
        start = -levels[0] * torch.where(problem[2] > 0, problem[2], 1.0).log()
    else:
        starts = [_fit("warm_start", t, cost, dim) for t, dim in zip(warm_start, (-2, -1), strict=True)]
        start = starts[0 if turned else 1]
    path = _pick_path(cost, eps, eps_init, tol, grad, backend, cost_max)
    differentiable = torch.is_grad_enabled() and grad in ("unroll", "implicit")
    with torch.autocast(cost.device.type, enabled=False), torch.set_grad_enabled(differentiable):
        linear, f, g, run = _solve(*problem, start, schedule, path, grad == "implicit", tol, check_every)
    f, g = (g, f) if turned else (f, g)
    if not plain:
        f, g = f.masked_fill(a == 0, 0.0), g.masked_fill(b == 0, 0.0)
    return SinkhornResult(linear, f, g, run, cost, a, b, eps, rho, grad, tol)


def _solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    start: Tensor,
    schedule: list[Any],
    path: str,
    implicit: bool,
    tol: float | None,
    check_every: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(linear cost, f, g, iterations done), rows first."""
    batch, eps, balanced = cost.shape[:-2], schedule[-1][0], schedule[-1][1:] == (1, 1)
    cost = cost.reshape(-1, *cost.shape[-2:]).contiguous()
    a, b, start = (t.reshape(-1, t.shape[-1]).contiguous() for t in (a, b, start))

    def iterate(steps: list[Any], g: Tensor, path: str = path, implicit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return Iterate.apply(cost, a, b, g, steps, path, implicit)

    def error(f: Tensor, g: Tensor) -> float:
        return float(_marginal_error(transport_plan(cost, a, b, f, g, eps), a, b).max())

    if tol is not None:
        with torch.no_grad():
            run, g = 0, start
            while run < len(schedule):
                steps = schedule[run : run + check_every]
                _, f, g = iterate(steps, g)
                run += len(steps)
                if steps[-1][0] == eps and error(f, g) < tol:
                    break
        schedule = schedule[:run]
    if implicit:
        with torch.no_grad():
            _, f, g = iterate(schedule, start)
            if balanced:
                implicit = error(f, g) < (tol or _CONVERGED)
            else:  # one more iteration moves no potential
                implicit = float((iterate(schedule[-1:], g, "log")[2] - g).abs().max()) < _CONVERGED * eps
    linear, f, g = iterate(schedule, start, implicit=implicit)
    return linear.view(batch), f.view(*batch, -1), g.view(*batch, -1), len(schedule)


def _pick_path(
    cost: Tensor, eps: float, eps_init: float | None, tol: float | None, grad: str, backend: str, cost_max: float | None
) -> str:
    fusible = cost.dtype == torch.float32 and eps_init is None and tol is None and grad != "implicit"
    if backend == "triton" or (backend == "auto" and cost.is_cuda and fusible and triton.available(cost)):
        if not fusible or not triton.available(cost):
            raise ValueError(
                'backend "triton" needs Triton, a float32 cost on CUDA, fixed iterations, no eps_init, no grad="implicit"; '
                f"got {cost.dtype} on {cost.device}: take backend='auto'"
            )
        return "triton"
    safe = eps_init is None and cost_max is not None and cost_max / eps < _SAFE[cost.dtype]
    return "scaling" if safe else "log"


def _fit(name: str, given: Tensor, cost: Tensor, dim: int) -> Tensor:
    shape = (*cost.shape[:-2], cost.shape[dim])
    try:
        return given.to(cost).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} {tuple(given.shape)} does not fit cost {tuple(cost.shape)}: expected {shape}"
        ) from None


def _marginal(
    given: tuple[str, Tensor | None], mask: tuple[str, Tensor | None], cost: Tensor, dim: int, mass: str
) -> Tensor:
    name, marginal = given
    if marginal is not None and marginal.requires_grad:
        raise ValueError(f"{name} is a constant here and has no gradient: pass {name}.detach()")
    kept = None if mask[1] is None else _fit(mask[0], mask[1], cost, dim)
    if marginal is not None:
        marginal = _fit(name, marginal, cost, dim)
        return marginal if kept is None else marginal * kept
    if kept is None:
        shape = (*cost.shape[:-2], cost.shape[dim])
        return cost.new_full(shape, 1.0 if mass == "count" else 1 / shape[-1])
    return kept if mass == "count" else kept / kept.sum(-1, keepdim=True).clamp_min(1)


def _check_options(
    eps: float,
    n_iters: int,
    tol: float | None,
    check_every: int,
    eps_init: float | None,
    eps_decay: float,
    rho: tuple[float, ...],
    mass: str,
    order: str,
    grad: str,
    backend: str,
) -> None:
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if n_iters < 1 or check_every < 1:
        raise ValueError(f"n_iters and check_every must be at least 1, got {n_iters} and {check_every}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive or None, got {tol}")
    if eps_init is not None and not (eps_init >= eps and 0 < eps_decay < 1):
        raise ValueError(f"eps_init must be at least eps and eps_decay in (0, 1), got {eps_init} and {eps_decay}")
    if eps_init is not None and eps_init * eps_decay ** (n_iters - 1) > eps:
        raise ValueError(
            f"n_iters {n_iters} is too few to come down to eps {eps} from eps_init {eps_init} by eps_decay {eps_decay}"
        )
    if not (len(rho) == 2 and all(r > 0 for r in rho)):
        raise ValueError(f"rho must be positive, or None for balanced, got {rho}")
    if tol is not None and rho != _BALANCED:
        raise ValueError("tol looks at the marginals, which rho relaxes: give n_iters alone")
    for name, value, known in (
        ("mass", mass, ("prob", "count")),
        ("order", order, ("row_first", "col_first")),
        ("grad", grad, ("unroll", "envelope", "implicit", "none")),
        ("backend", backend, ("auto", "torch", "triton")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _check_numbers(cost: Tensor, a: Tensor, b: Tensor, balanced: bool) -> float:
    """The largest abs(cost)."""
    largest = float(cost.detach().abs().amax())
    if not largest < torch.inf:
        bad = int((~torch.isfinite(cost)).sum())
        raise ValueError(f"cost {tuple(cost.shape)} has {bad} entries that are NaN or infinite: mask or mend them")
    sums = a.sum(-1), b.sum(-1)
    for name, marginal, total in zip("ab", (a, b), sums, strict=True):
        if not ((marginal >= 0).all() and (total < torch.inf).all()):
            raise ValueError(f"{name} {tuple(marginal.shape)} must be finite and not negative")
    gap = (sums[0] - sums[1]).abs()
    if balanced and (gap > 1e-4 * torch.maximum(*sums)).any():
        pair = ", ".join(f"{s.flatten()[int(gap.argmax())]:.6g}" for s in sums)
        raise ValueError(
            f"a and b must have the same sum, got {pair} for cost {tuple(cost.shape)}: normalise them, or give rho"
        )
    return largest


def sinkhorn_cost(
    x: Float[Tensor, "*batch n c"], y: Float[Tensor, "*batch m c"], *, p: int = 1, **options: Any
) -> SinkhornResult:
    """:func:`sinkhorn` between the rows of ``x`` and those of ``y`` at the cost :func:`pairwise_lp`.

    Args:
        x, y: points. p: 1 or 2. options: of :func:`sinkhorn`.

    Example:
        >>> points = torch.tensor([[0.0], [1.0]])
        >>> float(sinkhorn_cost(points, points + 1, eps=0.01).linear_cost)
        1.0
    """
    return sinkhorn(pairwise_lp(x, y, p), **options)


def sinkhorn_divergence(
    x: Float[Tensor, "*batch n c"], y: Float[Tensor, "*batch m c"], *, p: int = 1, sharp: bool = False, **options: Any
) -> Float[Tensor, "*batch"]:
    r"""The debiased cost, 0 for equal clouds: :math:`S(x, y) - \tfrac12 S(x, x) - \tfrac12 S(y, y)`.

    Args:
        x, y: points. p: 1 or 2. sharp: S is <P, C> instead of the entropic value of :class:`SinkhornResult`.
        options: of :func:`sinkhorn`; a and row_mask belong to x, b and col_mask to y.

    Example:
        >>> points = torch.tensor([[0.0], [1.0]])
        >>> float(sinkhorn_divergence(points, points))
        0.0
    """
    between = sinkhorn_cost(x, y, p=p, **options)

    def alone(points: Tensor, marginal: Tensor, rho: float) -> SinkhornResult:  # the marginal is 0 where masked
        own = {"a": marginal, "b": marginal, "rho": rho, "row_mask": None, "col_mask": None, "warm_start": None}
        return sinkhorn_cost(points, points, p=p, **{**options, **own})

    of_x, of_y = alone(x, between.a, between.rho[0]), alone(y, between.b, between.rho[1])
    if sharp:
        return between.linear_cost - (of_x.linear_cost + of_y.linear_cost) / 2
    gap = between.a.sum(-1) - between.b.sum(-1)  # 0 unless unbalanced
    return between.value - (of_x.value + of_y.value) / 2 + between.eps / 2 * gap.square()


@torch.no_grad()
def balanced_assignment(
    scores: Float[Tensor, "samples prototypes"], eps: float = 0.05, n_iters: int = 3
) -> Float[Tensor, "samples prototypes"]:
    """Soft assignments that use every prototype equally; each row sums to 1 (SwAV, Caron et al. 2020, algorithm 1).

    Args:
        scores: similarities, higher is closer. eps: entropy, in the scores' unit.
        n_iters: normalisations of prototypes, then samples.

    Example:
        >>> balanced_assignment(torch.tensor([[9.0, 0.0], [8.0, 0.0]]), eps=1.0, n_iters=50).round(decimals=2)
        tensor([[0.6200, 0.3800],
                [0.3800, 0.6200]])
    """
    samples = scores.shape[0]
    result = sinkhorn(scores.amax() - scores, eps=eps, n_iters=n_iters, order="col_first", grad="none")
    return result.plan * samples
