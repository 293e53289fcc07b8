from pathlib import Path

import numpy as np
import pytest
import torch
from iqa_distill.distill import MaskedQualityDistillation, as_map

GOLDEN = Path(__file__).parent / "golden" / "mcd_spatial.npz"


def tokens(maps):
    return maps.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}


@pytest.mark.parametrize(("reduction", "expected"), [("mgd", "loss_sum_over_N"), ("mean", "loss_mean")])
def test_golden_case(golden, reduction, expected):
    mcd = MaskedQualityDistillation(12, [8], normalize=False, reduction=reduction)
    names = {"align.0.": "align", "generators.0.0.": "g0", "generators.0.2.": "g2"}
    ends = {"weight": "w", "bias": "b"}
    mcd.load_state_dict({f"{a}{end}": golden[f"{b}_{ends[end]}"] for a, b in names.items() for end in ends})
    student = golden["student"].clone().requires_grad_()
    loss = mcd(tokens(student), [tokens(golden["teacher"])], keep=golden["mask"])
    torch.testing.assert_close(loss, golden[expected].float(), rtol=1e-4, atol=1e-5)
    loss.backward()
    scale = golden[expected] / golden["loss_sum_over_N"]
    torch.testing.assert_close(student.grad, golden["grad_student"] * scale.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mask", "shape"), [("spatial", (64, 1, 6, 6)), ("channel", (64, 48, 1, 1))])
def test_the_mask_hides_its_share_anew_for_each_image(mask, shape):
    mcd, like = MaskedQualityDistillation(4, [48], ratio=0.7, mask=mask), torch.zeros(64, 48, 6, 6)
    keep = mcd.draw(like, torch.Generator().manual_seed(0))
    assert keep.shape == shape
    assert set(keep.unique().tolist()) == {0, 1}
    assert keep.mean() == pytest.approx(0.3, abs=0.07)
    assert len(keep.flatten(1).unique(dim=0)) > 50
    assert torch.equal(keep, mcd.draw(like, torch.Generator().manual_seed(0)))
    assert not torch.equal(keep, mcd.draw(like, torch.Generator().manual_seed(1)))


def test_at_least_one_place_is_kept_and_a_ratio_of_0_keeps_all():
    like = torch.zeros(500, 1, 1, 2)
    assert (MaskedQualityDistillation(4, [8], ratio=0.99).draw(like).sum((1, 2, 3)) == 1).sum() > 450
    assert MaskedQualityDistillation(4, [8], ratio=0.0).draw(like).all()


def test_hidden_places_are_not_seen_and_have_to_be_generated():
    torch.manual_seed(0)
    mcd, teacher = MaskedQualityDistillation(4, [8]), torch.randn(2, 49, 8)
    student = torch.randn(2, 49, 4, requires_grad=True)
    keep = torch.ones(2, 1, 7, 7)
    keep[:, :, 3, 3] = 0
    mcd(student, [teacher], keep=keep).backward()
    seen = as_map(student.grad).abs().sum(1)
    assert (seen == 0).nonzero()[:, 1:].tolist() == [[3, 3]] * 2
    changed = teacher.clone()
    changed[:, 3 * 7 + 3] += torch.randn(8)
    assert mcd(student, [changed], keep=keep) != mcd(student, [teacher], keep=keep)


def test_the_teachers_scale_does_not_matter():
    mcd, student, teacher = MaskedQualityDistillation(4, [8]), torch.randn(2, 9, 4), torch.randn(2, 9, 8)
    keep = torch.ones(2, 1, 3, 3)
    torch.testing.assert_close(
        mcd(student, [teacher], keep=keep), mcd(student, [50 * teacher + 3], keep=keep), rtol=1e-3, atol=1e-4
    )


def test_gradient_goes_to_the_student_alone():
    mcd = MaskedQualityDistillation(4, [8, 6])
    student, teacher = (
        torch.randn(2, 9, 4, requires_grad=True),
        [torch.randn(2, 9, c, requires_grad=True) for c in (8, 6)],
    )
    mcd(student, teacher).backward()
    assert student.grad.any()
    assert all(t.grad is None for t in teacher)
    assert all(p.grad is not None for p in mcd.parameters())


def test_layers_have_equal_weight_and_may_have_features_of_their_own():
    torch.manual_seed(0)
    mcd = MaskedQualityDistillation(4, [8, 6])
    own, teacher, keep = torch.randn(2, 2, 9, 4), [torch.randn(2, 9, 8), torch.randn(2, 9, 6)], torch.ones(2, 1, 3, 3)
    losses = []
    for layer, c in enumerate((8, 6)):
        one = MaskedQualityDistillation(4, [c])
        one.align[0], one.generators[0] = mcd.align[layer], mcd.generators[layer]
        losses.append(one(own[layer], [teacher[layer]], keep=keep))
    torch.testing.assert_close(mcd(list(own), teacher, keep=keep), torch.stack(losses).mean())


def test_channels_are_masked_for_layers_of_any_width():
    assert MaskedQualityDistillation(4, [8, 6], mask="channel")(
        torch.randn(2, 9, 4), [torch.randn(2, 9, 8), torch.randn(2, 9, 6)]
    ).isfinite()


def test_direct_distillation_has_neither_mask_nor_generator():
    drd = MaskedQualityDistillation(4, [8], generate=False, normalize=False)
    assert {name.split(".")[0] for name in drd.state_dict()} == {"align"}
    student, teacher = torch.randn(2, 9, 4), torch.randn(2, 9, 8)
    expected = (tokens(drd.align[0](as_map(student))) - teacher).square().mean()
    for _ in range(2):
        torch.testing.assert_close(drd(student, [teacher]), expected)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"ratio": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, r"in \[0, 1\)"),
        ({"mask": "random"}, "mask is one of spatial"),
        ({"reduction": "sum"}, "reduction one of mean"),
        ({"teacher_dims": []}, "at least one teacher layer"),
    ],
)
def test_errors_of_the_options(how, message):
    with pytest.raises(ValueError, match=message):
        MaskedQualityDistillation(4, **{"teacher_dims": [8], **how})


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 9, 4), [(2, 9, 8)] * 2, "expected 1 layers; got 2 of the student, 2 of the teacher"),
        ((2, 8, 4), [(2, 9, 8)], "8 tokens are no square grid"),
        ((2, 16, 4), [(2, 9, 8)], "they must be equal"),
    ],
)
def test_errors_of_the_features(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        MaskedQualityDistillation(4, [8])(torch.zeros(student), [torch.zeros(shape) for shape in teacher])
