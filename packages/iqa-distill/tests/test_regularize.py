import pytest
import torch
import torch.nn.functional as F
from iqa_distill.bias import BiasOutput
from iqa_distill.regularize import InductiveBiasRegularization

CHANNELS = {"conv": (3, 4, 5), "inv": (2, 4, 6)}


def batch():
    """Teachers' outputs and two scores of the student, all of which could get a gradient."""
    torch.manual_seed(0)
    teachers = {
        kind: BiasOutput(
            torch.randn(8, requires_grad=True), tuple(torch.randn(8, c, 4, 4, requires_grad=True) for c in channels)
        )
        for kind, channels in CHANNELS.items()
    }
    return teachers, torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)


def test_equals_the_equation():
    teachers, conv, inv = batch()
    regularize = InductiveBiasRegularization(CHANNELS, hidden=7)
    loss, parts = regularize(teachers, conv, inv)
    bridge, student = 0, 0
    for kind, scores in (("conv", conv), ("inv", inv)):
        layer = regularize.bridges[kind]
        adapted = [
            F.conv2d(x, a.weight[..., None, None], a.bias).mean((2, 3))
            for a, x in zip(layer.adapters, teachers[kind].maps, strict=True)
        ]
        bridged = layer.head(torch.relu((adapted[0] + adapted[1]) + adapted[2]))[:, 0]
        bridge += (teachers[kind].score - bridged).abs().mean()
        student += (scores - bridged).abs().mean()
    torch.testing.assert_close(loss, bridge + student)
    torch.testing.assert_close(parts["bridge"], bridge.detach())
    torch.testing.assert_close(parts["student"], student.detach())


def head_gradients(reverse):
    """Of the biases of the bridges' last layers: sums of signs of what pulls the bridge."""
    teachers, conv, inv = batch()
    regularize = InductiveBiasRegularization(CHANNELS, reverse=reverse)
    loss, _ = regularize(teachers, conv, inv)
    loss.backward()
    given = [x.grad for output in teachers.values() for x in (output.score, *output.maps)]
    assert given == [None] * 8, "a teacher got a gradient"
    for kind, scores in (("conv", conv), ("inv", inv)):
        bridged = regularize.bridges[kind](teachers[kind].maps).detach()
        torch.testing.assert_close(scores.grad, torch.sign(scores.detach() - bridged) / 8)
        pull = torch.sign(bridged - teachers[kind].score)
        if reverse:
            pull = pull + torch.sign(bridged - scores)
        yield regularize.bridges[kind].head.bias.grad, pull.mean().detach()[None]


@pytest.mark.parametrize("reverse", [True, False])
def test_where_gradients_go(reverse):
    """To the student in any case; to the bridge from its teacher, and from the student too if ``reverse``."""
    for gradient, expected in head_gradients(reverse):
        torch.testing.assert_close(gradient, expected)


def test_direct_logits():
    teachers, conv, inv = batch()
    regularize = InductiveBiasRegularization(CHANNELS, bridge=False)
    loss, parts = regularize(teachers, conv, inv)
    loss.backward()
    assert not list(regularize.parameters())
    torch.testing.assert_close(loss, F.l1_loss(conv, teachers["conv"].score) + F.l1_loss(inv, teachers["inv"].score))
    torch.testing.assert_close(conv.grad, torch.sign(conv.detach() - teachers["conv"].score.detach()) / 8)
    assert teachers["conv"].score.grad is None
    assert parts["bridge"] == 0


def test_one_teacher_alone():
    teachers, conv, inv = batch()
    loss, _ = InductiveBiasRegularization({"inv": CHANNELS["inv"]})(teachers, conv, inv)
    loss.backward()
    assert conv.grad is None
    assert inv.grad.abs().sum() > 0


def test_bridge_learns_what_student_and_teacher_agree_on():
    teachers, conv, inv = batch()
    regularize = InductiveBiasRegularization(CHANNELS)
    optimizer = torch.optim.AdamW([*regularize.parameters(), conv, inv], 3e-2)
    losses = []
    for _ in range(80):
        loss, _ = regularize(teachers, conv, inv)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_why_not_kl():
    """A softmax over one score is 1, whatever the score: its KL divergence is 0 and teaches nothing."""
    student = torch.randn(8, 1, requires_grad=True)
    divergence = F.kl_div(F.log_softmax(student, 1), F.softmax(torch.randn(8, 1), 1), reduction="batchmean")
    divergence.backward()
    assert divergence == 0
    assert not student.grad.any()


@pytest.mark.parametrize("channels", [{}, {"cnn": (1, 2, 3)}])
def test_refuses(channels):
    with pytest.raises(ValueError, match="by kind"):
        InductiveBiasRegularization(channels)
