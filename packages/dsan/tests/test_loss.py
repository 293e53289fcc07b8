from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from dsan import CTCCharset, DoubleSupervisionLoss
from dsan.loss import attention_loss, attention_targets, ctc_loss

GOLDEN = np.load(Path(__file__).parent / "golden/double_ctc.npz")
TARGETS = CTCCharset().encode([str(word) for word in GOLDEN["words"]])


def logits(name, grad=False):
    return torch.tensor(GOLDEN[f"logits_{name}"], requires_grad=grad)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_golden_totals(weight):
    output = DoubleSupervisionLoss(weight)(logits("ctx"), logits("enh"), *TARGETS)
    assert float(output.loss) == pytest.approx(float(GOLDEN[f"total_lambda_{weight}"]), abs=1e-4)
    assert float(output.context) == pytest.approx(GOLDEN["nll_ctx"].mean(), abs=1e-4)
    assert float(output.enhancement) == pytest.approx(GOLDEN["nll_enh"].mean() if weight else 0.0, abs=1e-4)


def test_golden_gradient():
    context = logits("ctx", grad=True)
    DoubleSupervisionLoss(0.0)(context, None, *TARGETS).loss.backward()
    np.testing.assert_allclose(context.grad, GOLDEN["grad_mean_nll_ctx"], atol=1e-4)


def collapsed(path):
    merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
    return tuple(c for c in merged if c)


@pytest.mark.parametrize("word", [(), (1,), (1, 1), (2, 1, 2), (1, 2, 2)])
def test_ctc_is_the_sum_over_all_paths(word):
    scores = torch.randn(1, 5, 3, dtype=torch.float64)
    p = scores.softmax(2)[0]
    total = sum(
        np.prod([float(p[t, c]) for t, c in enumerate(path)])
        for path in product(range(3), repeat=5)
        if collapsed(path) == word
    )
    each, feasible = ctc_loss(scores, torch.tensor(word, dtype=torch.int64), torch.tensor([len(word)]))
    assert feasible.all()
    assert float(each) == pytest.approx(-np.log(total), abs=1e-5)


def test_gradient_of_both():
    loss = DoubleSupervisionLoss(0.7, enhancement="attn")
    context = torch.randn(2, 6, 4, requires_grad=True)
    enhancement = torch.randn(2, 4, 5, requires_grad=True)
    targets, lengths = torch.tensor([1, 2, 3]), torch.tensor([1, 2])
    loss(context, enhancement, targets, lengths).loss.backward()
    step = 1e-3
    for tensor in (context, enhancement):
        moved = tensor.detach().clone()
        moved[1, 2, 3] += step
        pair = (moved, enhancement) if tensor is context else (context, moved)
        difference = loss(*pair, targets, lengths).loss - loss(context, enhancement, targets, lengths).loss
        assert float(difference.detach()) / step == pytest.approx(float(tensor.grad[1, 2, 3]), abs=5e-3)


def test_torch_mean_divides_by_lengths():
    expected = (GOLDEN["nll_ctx"] / TARGETS[1].numpy()).mean()
    loss = DoubleSupervisionLoss(0.0, ctc_reduction="torch_mean")
    assert float(loss(logits("ctx"), None, *TARGETS).loss) == pytest.approx(expected, abs=1e-4)


def test_too_few_frames_are_named():
    scores = torch.randn(2, 4, 37, requires_grad=True)
    targets, lengths = CTCCharset().encode(["ab", "abba"])  # abba needs 5 frames
    with pytest.raises(ValueError, match="word 1 of the batch needs 5 frames for its 4 characters and has 4"):
        DoubleSupervisionLoss()(scores, None, targets, lengths)
    output = DoubleSupervisionLoss(on_infeasible="skip")(scores, None, targets, lengths)
    assert output.infeasible == 1
    alone = DoubleSupervisionLoss()(scores[:1], None, *CTCCharset().encode(["ab"]))
    torch.testing.assert_close(output.loss, alone.loss)  # the mean is over words that count
    output.loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert not scores.grad[1].any()


def test_frames_that_do_not_count_change_nothing():
    scores = torch.randn(1, 9, 37)
    targets = CTCCharset().encode(["abc"])
    short = DoubleSupervisionLoss()(scores[:, :5], None, *targets).loss
    torch.testing.assert_close(
        DoubleSupervisionLoss()(scores, None, *targets, input_lengths=torch.tensor([5])).loss, short
    )


def test_ctc_is_float32_under_autocast():
    scores = torch.randn(2, 9, 37)
    targets = CTCCharset().encode(["abc", "d"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = DoubleSupervisionLoss()(scores.bfloat16(), None, *targets).loss
    torch.testing.assert_close(loss, DoubleSupervisionLoss()(scores.bfloat16().float(), None, *targets).loss)
    assert loss.dtype == torch.float32


def test_attention_targets_and_loss():
    targets, lengths = torch.tensor([1, 2, 36]), torch.tensor([2, 1])
    assert attention_targets(targets, lengths, 4).tolist() == [[2, 3, 1, 0], [37, 1, 0, 0]]
    scores = torch.randn(2, 4, 38)
    p = scores.log_softmax(2)
    expected = -(p[0, 0, 2] + p[0, 1, 3] + p[0, 2, 1] + p[1, 0, 37] + p[1, 1, 1]) / 5
    torch.testing.assert_close(attention_loss(scores, targets, lengths), expected)
    with pytest.raises(ValueError, match="word 0 of the batch has 2 characters; the attention decoder has room for 1"):
        attention_targets(targets, lengths, 2)


def test_frame_loss_is_of_columns():
    scores = torch.randn(1, 3, 37)
    loss = DoubleSupervisionLoss(2.0, enhancement="frame")
    targets = CTCCharset().encode(["a"])
    output = loss(scores, scores, *targets, columns=torch.tensor([[0, 11, 0]]))
    expected = -scores.log_softmax(2)[0, range(3), [0, 11, 0]].mean()
    torch.testing.assert_close(output.enhancement, expected)
    assert loss(scores, scores, *targets, columns=torch.full((1, 3), -100)).enhancement == 0
    with pytest.raises(ValueError, match="needs the classes of columns"):
        loss(scores, scores, *targets)


@pytest.mark.parametrize(
    "options",
    [{"weight": -1.0}, {"context": "frame"}, {"enhancement": "x"}, {"ctc_reduction": "sum"}, {"on_infeasible": "x"}],
)
def test_wrong_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DoubleSupervisionLoss(**options)
