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


@dataclass(frozen=True)
class SinkhornResult:
    r"""What :func:`sinkhorn` found. The plan is :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)`.

    Attributes:
        linear_cost: (...), <P, C>: the "sharp" transport cost, without entropy.
        f, g: (..., n) and (..., m), potentials in the unit of the cost; 0 where masked.
        n_iters_run: iterations done.
        n_valid: (...), rows that are not masked.
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
        return transport_plan(self.cost, self.a, self.b, self.f, self.g, self.eps)

    @property
    def value(self) -> Tensor:
        """(...), the entropic cost <P, C> + eps KL(P || a b'), without the constant mass terms of a generalized KL if balanced.

        If unbalanced, plus rho_a KL(P 1 || a) + rho_b KL(P' 1 || b), all of them generalized. At convergence and balanced it is
        <a, f> + <b, g>, and POT's ``ot.solve(..., reg_type="KL").value``. With ``grad="envelope"`` its gradient is P.
        """
        plan = self.plan
        value = (plan.sum(-1) * self.f).sum(-1) + (plan.sum(-2) * self.g).sum(-1)
        if self.rho != (torch.inf, torch.inf):
            mass = plan.sum((-1, -2)) - self.a.sum(-1) * self.b.sum(-1)
            sides = zip(self.rho, (plan.sum(-1), plan.sum(-2)), (self.a, self.b), strict=True)
            value = (
                value - self.eps * mass + sum(rho * _relative_entropy(p, m) for rho, p, m in sides if rho != torch.inf)
            )
        if self.grad == "envelope":
            value = value.detach() + (plan.detach() * (self.cost - self.cost.detach())).sum((-1, -2))
        return value

    @property
    def marginal_error(self) -> Tensor:
        """(...), max |P 1 - a| / sum(a); meaningful if balanced. Columns fit exactly after each iteration."""
        with torch.no_grad():
            error = (self.plan.sum(-1) - self.a).abs().amax(-1)
            other = (self.plan.sum(-2) - self.b).abs().amax(-1)
            return torch.maximum(error, other) / self.a.sum(-1).clamp_min(torch.finfo(self.a.dtype).tiny)

    @property
    def converged(self) -> Tensor:
        """(...), bool: whether the marginal error is below ``tol`` (1e-4 if none was given)."""
        return self.marginal_error < (self.tol or _CONVERGED)

    @property
    def n_valid(self) -> Tensor:
        """(...), rows that take part."""
        return (self.a > 0).sum(-1)


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
    if not isinstance(rho, tuple):
        rho = (torch.inf, torch.inf) if rho is None else (rho, rho)
    _check_options(eps, n_iters, tol, check_every, eps_init, eps_decay, rho, mass, order, grad, backend)
    if cost.shape[-1] == 0 or cost.shape[-2] == 0:
        raise ValueError(f"cost {tuple(cost.shape)} has no rows or no columns")
    if order == "col_first":
        turned = sinkhorn(
            cost.mT, b, a, eps=eps, n_iters=n_iters, tol=tol, check_every=check_every, eps_init=eps_init, eps_decay=eps_decay,
            rho=rho[::-1], row_mask=col_mask, col_mask=row_mask, mass=mass, warm_start=warm_start and warm_start[::-1],
            grad=grad, backend=backend, cost_max=cost_max, check=check,
        )  # fmt: skip
        same = {"linear_cost", "n_iters_run", "eps", "grad", "tol"}
        return SinkhornResult(
            f=turned.g, g=turned.f, cost=turned.cost.mT, a=turned.b, b=turned.a, rho=rho,
            **{name: getattr(turned, name) for name in same},
        )  # fmt: skip
    check = (cost.device.type == "cpu" and not torch.compiler.is_compiling()) if check is None else check
    cost = cost.float() if cost.dtype in (torch.float16, torch.bfloat16) else cost
    balanced = rho == (torch.inf, torch.inf)
    plain = a is None and b is None and row_mask is None and col_mask is None
    if plain and mass == "count" and balanced and cost.shape[-1] != cost.shape[-2]:
        raise ValueError(f'cost {tuple(cost.shape)}: mass="count" needs as many rows as columns, or rho')
    a = _marginal("a", a, cost, -2, row_mask, mass)
    b = _marginal("b", b, cost, -1, col_mask, mass)
    if row_mask is not None:
        cost = cost.masked_fill(~row_mask.unsqueeze(-1), 0.0)
    if col_mask is not None:
        cost = cost.masked_fill(~col_mask.unsqueeze(-2), 0.0)
    if check:
        largest = float(cost.detach().abs().amax())
        if not largest < torch.inf:
            bad = int((~torch.isfinite(cost)).sum())
            raise ValueError(f"cost {tuple(cost.shape)} has {bad} entries that are NaN or infinite: mask or mend them")
        cost_max = largest if cost_max is None and cost.device.type == "cpu" else cost_max
        if not plain:
            _check_marginals(cost, a, b, balanced)
    with torch.autocast(cost.device.type, enabled=False):
        return _solve(
            cost, a, b, eps, n_iters, tol, check_every, eps_init, eps_decay, rho, warm_start, grad, backend,
            cost_max, plain,
        )  # fmt: skip


def _solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    n_iters: int,
    tol: float | None,
    check_every: int,
    eps_init: float | None,
    eps_decay: float,
    rho: tuple[float, float],
    warm_start: tuple[Tensor, Tensor] | None,
    grad: str,
    backend: str,
    cost_max: float | None,
    plain: bool,
) -> SinkhornResult:
    batch = cost.shape[:-2]
    flat = cost.reshape(-1, *cost.shape[-2:]).contiguous()
    flat_a, flat_b = a.reshape(-1, a.shape[-1]).contiguous(), b.reshape(-1, b.shape[-1]).contiguous()
    if not plain:  # what is masked as a whole gets a problem of its own, and counts for nothing below
        empty = (flat_a.sum(1, keepdim=True) == 0) | (flat_b.sum(1, keepdim=True) == 0)
        flat_a, flat_b = flat_a.masked_fill(empty, 1.0), flat_b.masked_fill(empty, 1.0)
    levels = [eps if eps_init is None else max(eps, eps_init * eps_decay**t) for t in range(n_iters)]
    schedule = [(level, *(1.0 if r == torch.inf else r / (r + level) for r in rho)) for level in levels]
    if warm_start is not None:
        start = warm_start[1].to(flat).expand(b.shape).reshape(flat_b.shape)
    else:  # so that b_j exp(g_j / eps) = 1
        start = -levels[0] * torch.where(flat_b > 0, flat_b, 1.0).log()
    path = _pick_path(flat, eps, eps_init, tol, grad, backend, cost_max)

    def iterate(schedule: list[Any], start: Tensor, implicit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        if grad in ("none", "envelope"):
            with torch.no_grad():
                return Iterate.apply(flat, flat_a, flat_b, start, schedule, path, False)
        return Iterate.apply(flat, flat_a, flat_b, start, schedule, path, implicit)

    def result(solution: tuple[Tensor, Tensor, Tensor], run: int) -> SinkhornResult:
        linear, f, g = solution
        if not plain:
            linear, f, g = linear.masked_fill(empty[:, 0], 0.0), f.masked_fill(empty, 0.0), g.masked_fill(empty, 0.0)
        return SinkhornResult(
            linear.view(batch), f.view(*batch, -1), g.view(*batch, -1), run, cost, a, b, eps, rho, grad, tol
        )

    if tol is not None:
        run = 0
        with torch.no_grad():
            potential = start
            while run < n_iters:
                part = schedule[run : run + check_every]
                linear, f, potential = Iterate.apply(flat, flat_a, flat_b, potential, part, path, False)
                run += len(part)
                if bool(result((linear, f, potential), run).marginal_error.max() < tol):
                    break
        schedule = schedule[:run]
    if grad == "implicit":
        with torch.no_grad():
            found = result(Iterate.apply(flat, flat_a, flat_b, start, schedule, path, False), len(schedule))
            settled = bool(found.converged.all()) if rho == (torch.inf, torch.inf) else _settled(found, schedule[-1])
        return result(iterate(schedule, start, implicit=settled), len(schedule))
    return result(iterate(schedule, start), len(schedule))


def _settled(result: SinkhornResult, last: Any) -> bool:
    """Whether one more iteration of an unbalanced problem moves no potential."""
    cost, a, b = (t.reshape(-1, *t.shape[result.linear_cost.dim() :]) for t in (result.cost, result.a, result.b))
    g = result.g.reshape(b.shape)
    after = Iterate.apply(cost, a, b, g, [last], "log", False)[2]
    return bool((after - g).abs().max() < _CONVERGED * result.eps)


def _pick_path(
    cost: Tensor,
    eps: float,
    eps_init: float | None,
    tol: float | None,
    grad: str,
    backend: str,
    cost_max: float | None,
) -> str:
    fusible = cost.dtype == torch.float32 and eps_init is None and tol is None and grad != "implicit"
    if backend == "triton" or (backend == "auto" and cost.is_cuda and fusible and triton.available(cost)):
        if not fusible or not triton.available(cost):
            raise ValueError(
                'backend "triton" needs Triton, a float32 cost on CUDA, fixed iterations, no eps_init, no grad="implicit"; '
                f"got {cost.dtype} on {cost.device}: take backend='auto'"
            )
        return "triton"
    if eps_init is not None:
        return "log"
    return "scaling" if cost_max is not None and cost_max / eps < _SAFE[cost.dtype] else "log"


def _marginal(name: str, given: Tensor | None, cost: Tensor, dim: int, mask: Tensor | None, mass: str) -> Tensor:
    shape = (*cost.shape[:-2], cost.shape[dim])
    if given is not None:
        if given.requires_grad:
            raise ValueError(f"{name} is a constant here and has no gradient: pass {name}.detach()")
        try:
            marginal = given.to(cost).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name} {tuple(given.shape)} does not fit cost {tuple(cost.shape)}: expected {shape}"
            ) from None
        return marginal if mask is None else marginal * mask
    if mask is None:
        return cost.new_ones(shape) if mass == "count" else cost.new_full(shape, 1 / shape[-1])
    try:
        kept = mask.to(cost).expand(shape)
    except RuntimeError:
        side = "row_mask" if name == "a" else "col_mask"
        raise ValueError(
            f"{side} {tuple(mask.shape)} does not fit cost {tuple(cost.shape)}: expected {shape}"
        ) from None
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
    if not all(r > 0 for r in rho):
        raise ValueError(f"rho must be positive, or None for balanced, got {rho}")
    if tol is not None and rho != (torch.inf, torch.inf):
        raise ValueError("tol looks at the marginals, which rho relaxes: give n_iters alone")
    for name, value, known in (
        ("mass", mass, ("prob", "count")),
        ("order", order, ("row_first", "col_first")),
        ("grad", grad, ("unroll", "envelope", "implicit", "none")),
        ("backend", backend, ("auto", "torch", "triton")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _check_marginals(cost: Tensor, a: Tensor, b: Tensor, balanced: bool) -> None:
    if (a < 0).any() or (b < 0).any():
        raise ValueError("a and b must not be negative")
    sums = a.sum(-1), b.sum(-1)
    if balanced and ((sums[0] - sums[1]).abs() > 1e-4 * torch.maximum(*sums)).any():
        worst = int((sums[0] - sums[1]).abs().argmax())
        pair = ", ".join(f"{s.flatten()[worst]:.6g}" for s in sums)
        raise ValueError(
            f"a and b must have the same sum, got {pair} for cost {tuple(cost.shape)}: normalise them, or give rho"
        )


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
    of_x = {"a": options.get("a"), "b": options.get("a")}
    of_y = {"a": options.get("b"), "b": options.get("b")}
    of_x |= {"row_mask": options.get("row_mask"), "col_mask": options.get("row_mask")}
    of_y |= {"row_mask": options.get("col_mask"), "col_mask": options.get("col_mask")}
    pairs: tuple[tuple[Tensor, Tensor, dict[str, Any]], ...] = ((x, y, {}), (x, x, of_x), (y, y, of_y))
    results = [sinkhorn_cost(s, t, p=p, **{**options, **own}) for s, t, own in pairs]
    between, of_x_alone, of_y_alone = (r.linear_cost if sharp else r.value for r in results)
    return between - (of_x_alone + of_y_alone) / 2


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
