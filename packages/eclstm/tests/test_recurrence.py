import pytest
import torch
import torch.nn.functional as F
from eclstm._recurrence import ACTIVATIONS, DenseRecurrence, hard_sigmoid, update
from torch.testing import assert_close


def test_hard_sigmoid_has_the_slope_of_keras():
    """Trap: torch's own has 1/6, so it differs by 0.05 where it matters."""
    x = torch.tensor([-2.6, -2.5, -1.0, 0.0, 1.0, 2.5, 2.6])
    expected = torch.tensor([0.0, 0.0, 0.3, 0.5, 0.7, 1.0, 1.0])
    assert_close(hard_sigmoid(x), expected)
    with torch.no_grad():
        assert_close(hard_sigmoid(x), expected)
    assert (expected - F.hardsigmoid(x)).abs().max() > 0.05


def test_hard_sigmoid_has_exact_gradients_whatever_the_strides():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hard_sigmoid, x)
    assert torch.autograd.gradcheck(lambda x: hard_sigmoid(x.transpose(0, 2)[1:]), x)


def test_update_is_the_equations():
    i, f, g, o, remembered = torch.randn(5, 2, 3)
    h, c = update(torch.cat([i, f, g, o], 1), remembered, "sigmoid")
    expected = f.sigmoid() * remembered + i.sigmoid() * g.tanh()
    assert_close(c, expected)
    assert_close(h, o.sigmoid() * expected.tanh())
    h, c = update(torch.cat([i, f, g, o], 1), None, "sigmoid")
    assert_close(c, i.sigmoid() * g.tanh())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("convolved", [False, True], ids=["plain cell", "convolved cell"])
class TestDenseRecurrence:
    @pytest.fixture
    def inputs(self, state, convolved):
        torch.manual_seed(0)
        shapes = [
            (3, 2, 12),
            (3, 12),
            (3, 3) if convolved else None,
            (2, 3) if state else None,
            (2, 3) if state else None,
        ]
        return [None if s is None else torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def test_runs_the_equations(self, inputs, activation):
        u, recurrent, cell, h, c = inputs
        outputs = []
        for u_t in u:
            remembered = c if c is None or cell is None else c @ cell
            h, c = update(u_t if h is None else u_t + h @ recurrent, remembered, activation)
            outputs.append(h)
        hs, last = DenseRecurrence.apply(u.clone(), *inputs[1:], activation)
        assert_close(hs, torch.stack(outputs))
        assert_close(last, c)

    def test_gradients_are_exact(self, inputs, activation):
        def run(u, *rest):
            return DenseRecurrence.apply(u.clone(), *rest, activation)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradcheck(lambda *x: run(*x)[0][-1], inputs, fast_mode=True)  # the last output alone
        assert torch.autograd.gradcheck(lambda *x: run(*x)[1], inputs, fast_mode=True)  # the cell state alone
