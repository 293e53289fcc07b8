"""The recurrence over a flat state with backpropagation through time by hand: it keeps six numbers for each state element and
step, and sums each weight's gradient in one product over all steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class HardSigmoid(torch.autograd.Function):
    """clip(0.2 x + 0.5, 0, 1), which remembers its output only; contiguous whatever the strides of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.hardsigmoid(torch.mul(x, 1.2, out=x.new_empty(x.shape)), inplace=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return BACKWARD["hard_sigmoid"](gradient, y)


def hard_sigmoid(x: Tensor) -> Tensor:
    """Keras 2's ``clip(0.2 x + 0.5, 0, 1)``; torch's own has the slope 1/6.

    >>> hard_sigmoid(torch.tensor([-3.0, 0.0, 1.0]))
    tensor([0.0000, 0.5000, 0.7000])
    """
    return HardSigmoid.apply(x) if torch.is_grad_enabled() else F.hardsigmoid(1.2 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "hard_sigmoid": hard_sigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


# The gradient of an activation's input, from that of its output and the output.
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda gradient, y: gradient,
    "hard_sigmoid": lambda gradient, y: torch.ops.aten.hardtanh_backward(gradient, y, 0, 1).mul_(0.2),
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "tanh": torch.ops.aten.tanh_backward,
    "relu": lambda gradient, y: torch.ops.aten.threshold_backward(gradient, y, 0),
}


def update(gates: Tensor, remembered: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(h, c) from the summed gates (axis 1: four blocks) and the convolved cell state (None: zero)."""
    gate = ACTIVATIONS[activation]
    i, f, g, o = gates.chunk(4, 1)
    c = gate(i) * torch.tanh(g)
    if remembered is not None:
        c = torch.addcmul(c, gate(f), remembered)
    return gate(o) * torch.tanh(c), c


class DenseRecurrence(torch.autograd.Function):
    """Every h_t, and the last c, of a state that is one flat vector.

    Args:
        u: (steps, batch, 4 D), the input's share of the gates. Overwritten: it must belong to the caller alone.
        recurrent: (D, 4 D). cell: (D, D), or None for no cell convolution.
        h0, c0: (batch, D), or both None for zeros.
        activation: of the gates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Float[Tensor, "steps batch gates"],
        recurrent: Tensor,
        cell: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        steps, batch, width = u.shape
        gate, size = ACTIVATIONS[activation], width // 4
        cs, hs = u.new_empty(steps, batch, size), u.new_empty(steps, batch, size)
        h, c = h0, c0
        for t in range(steps):
            total = u[t] if h is None else torch.addmm(u[t], h, recurrent, out=u[t])
            i, f, g, o = total.chunk(4, 1)
            i.copy_(gate(i)), f.copy_(gate(f)), torch.tanh(g, out=g), o.copy_(gate(o))
            torch.mul(i, g, out=cs[t])
            if c is not None:
                cs[t].addcmul_(f, c if cell is None else c @ cell)
            c, h = cs[t], hs[t]
            torch.mul(o, torch.tanh(c), out=h)
        ctx.save_for_backward(u, cs, hs, recurrent, cell, h0, c0)
        ctx.activation = activation
        return hs, cs[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h_gradients: Tensor, c_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gates, cs, hs, recurrent, cell, h0, c0 = ctx.saved_tensors
        back, tanh_back = BACKWARD[ctx.activation], BACKWARD["tanh"]
        # Gradients of u, and of the cell state that the forget gate lets through.
        into_u, into_kept = torch.empty_like(gates), torch.empty_like(cs)
        into_h: Tensor | None = None
        for t in reversed(range(len(gates))):
            i, f, g, o = gates[t].chunk(4, 1)
            before = cs[t - 1] if t else c0
            into_h = h_gradients[t] if into_h is None else h_gradients[t] + into_h
            squashed = torch.tanh(cs[t])
            c_gradient = c_gradient + tanh_back(into_h * o, squashed)
            torch.mul(c_gradient, f, out=into_kept[t])
            into_i, into_f, into_g, into_o = into_u[t].chunk(4, 1)
            into_i.copy_(back(c_gradient * g, i))
            into_g.copy_(tanh_back(c_gradient * i, g))
            into_o.copy_(back(into_h * squashed, o))
            if before is None:
                into_f.zero_()
            else:
                into_f.copy_(back(c_gradient * (before if cell is None else before @ cell), f))
                into_h = into_u[t] @ recurrent.T
                c_gradient = into_kept[t] if cell is None else into_kept[t] @ cell.T
        first = 1 if h0 is None else 0
        before_h, before_c = (s[:-1] if s0 is None else torch.cat([s0[None], s[:-1]]) for s, s0 in ((hs, h0), (cs, c0)))
        return (
            into_u,
            before_h.flatten(0, 1).T @ into_u[first:].flatten(0, 1),
            None if cell is None else before_c.flatten(0, 1).T @ into_kept[first:].flatten(0, 1),
            None if h0 is None else into_h,
            None if c0 is None else c_gradient,
            None,
        )
