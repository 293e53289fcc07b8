import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.ops import sinkhorn
from sinkd.divergences import (
    DIVERGENCES,
    cross_entropy,
    generalized_jsd,
    js,
    kl,
    reverse_kl,
    same_classes,
    sample_l1,
    sample_sinkhorn,
    tvd,
)
from torch.testing import assert_close

INF = math.inf


@st.composite
def logits(draw, spread=8.0):
    """(student, teacher) in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (2, draw(st.integers(1, 5)), draw(st.integers(2, 7)))
    return tuple(draw(st.floats(0.1, spread)) * torch.randn(shape, generator=generator, dtype=torch.float64))


def probabilities(student, teacher, tau=1.0):
    return [(z / tau).exp() / (z / tau).exp().sum(-1, keepdim=True) for z in (student, teacher)]


def naive_kl(p, q):
    return (p * (p / q).log()).sum(-1).mean()


def naive_jsd(p, q, beta=0.5):
    m = beta * q + (1 - beta) * p
    return beta * naive_kl(q, m) + (1 - beta) * naive_kl(p, m)


NAIVE = {
    "kl": lambda p, q: naive_kl(q, p),
    "xent": lambda p, q: -(q * p.log()).sum(-1).mean(),
    "reverse_kl": naive_kl,
    "js": naive_jsd,
    "generalized_jsd": naive_jsd,
    "tvd": lambda p, q: (p - q).abs().sum(-1).mean() / 2,
    "sample_l1": lambda p, q: (p - q).abs().sum(-1).mean(),
}
every = pytest.mark.parametrize("name", DIVERGENCES)


@pytest.mark.parametrize("name", NAIVE)
@given(pair=logits(), tau=st.floats(0.5, 4.0))
@settings(max_examples=25, deadline=None)
def test_equals_its_formula(name, pair, tau):
    assert_close(DIVERGENCES[name](*pair, tau), NAIVE[name](*probabilities(*pair, tau)), rtol=1e-9, atol=1e-12)


@given(pair=logits(), beta=st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_generalized_jsd_equals_its_formula(pair, beta):
    assert_close(generalized_jsd(*pair, beta=beta), naive_jsd(*probabilities(*pair), beta=beta), rtol=1e-9, atol=1e-12)


@given(pair=logits())
@settings(max_examples=40, deadline=None)
def test_none_is_negative_and_equal_distributions_are_at_0(pair):
    student, teacher = pair
    shifted = student + torch.arange(len(student)).unsqueeze(1)  # another logit, the same softmax
    for name in DIVERGENCES.keys() - {"xent", "sample_sinkhorn"}:
        assert DIVERGENCES[name](student, teacher) >= -1e-14
        assert abs(DIVERGENCES[name](student, shifted)) < 1e-14


@given(pair=logits(), beta=st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_symmetries_and_bounds(pair, beta):
    student, teacher = pair
    for name in ("js", "tvd", "sample_l1"):
        assert_close(DIVERGENCES[name](student, teacher), DIVERGENCES[name](teacher, student))
    assert_close(kl(student, teacher), reverse_kl(teacher, student))
    assert_close(generalized_jsd(student, teacher, beta=beta), generalized_jsd(teacher, student, beta=1 - beta))
    assert tvd(student, teacher) <= 1
    assert js(student, teacher) <= math.log(2) * tvd(student, teacher) + 1e-14  # Lin 1991
    if len(student) == 1:
        assert 2 * tvd(student, teacher) ** 2 <= kl(student, teacher) + 1e-14  # Pinsker


@given(pair=logits(spread=2.0))
@settings(max_examples=25, deadline=None)
def test_generalized_jsd_goes_to_kl_and_to_reverse_kl(pair):
    tiny = 1e-6
    assert_close(generalized_jsd(*pair, beta=tiny) / tiny, kl(*pair), rtol=1e-2, atol=1e-8)
    assert_close(generalized_jsd(*pair, beta=1 - tiny) / tiny, reverse_kl(*pair), rtol=1e-2, atol=1e-8)
    assert generalized_jsd(*pair, beta=0.0) == kl(*pair)
    assert generalized_jsd(*pair, beta=1.0) == reverse_kl(*pair)


@given(pair=logits())
@settings(max_examples=25, deadline=None)
def test_cross_entropy_is_kl_plus_the_teachers_entropy_with_the_same_gradient(pair):
    student, teacher = pair
    student.requires_grad_()
    entropy = torch.distributions.Categorical(logits=teacher / 3).entropy().mean()
    assert_close(cross_entropy(student, teacher, 3.0), kl(student, teacher, 3.0) + entropy)
    gradients = [torch.autograd.grad(f(student, teacher, 3.0), student)[0] for f in (cross_entropy, kl)]
    assert_close(*gradients, rtol=1e-9, atol=1e-12)


class TestSampleSinkhorn:
    def pair(self, rows=4, classes=6):
        return torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2

    @pytest.mark.parametrize("eps", [0.02, 0.1, 1.0, 20.0])
    @pytest.mark.parametrize("n_iters", [1, 7])
    def test_is_transport_between_classes_at_cost_1(self, eps, n_iters):
        p, q = probabilities(*self.pair(), tau=2.0)
        cost = (1 - torch.eye(6, dtype=torch.float64)).expand(4, 6, 6)
        result = sinkhorn(cost, p, q, eps=eps, n_iters=n_iters)
        assert_close(
            sample_sinkhorn(*self.pair(), 2.0, eps=eps, n_iters=n_iters),
            result.linear_cost.mean(),
            rtol=1e-9,
            atol=1e-12,
        )

    def test_goes_to_the_total_variation_as_eps_goes_to_0(self):
        student, teacher = self.pair()
        errors = [
            abs(sample_sinkhorn(student, teacher, eps=eps, n_iters=2000) - tvd(student, teacher))
            for eps in (0.5, 0.2, 0.05)
        ]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-6

    def test_has_an_entropic_bias(self):
        student, _ = self.pair()
        assert sample_sinkhorn(student, student, eps=0.5) > 0.05

    @pytest.mark.parametrize("options", [{"eps": 0.0}, {"n_iters": 0}])
    def test_bad_options_are_named(self, options):
        with pytest.raises(ValueError, match="eps must be positive and n_iters at least 1"):
            sample_sinkhorn(*self.pair(), **options)


@every
def test_gradients_are_exact(name):
    student, teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    function = lambda s, t: DIVERGENCES[name](s, t, 1.5, mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, (student.requires_grad_(), teacher.requires_grad_()))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    student.requires_grad_()
    result = DIVERGENCES[name](student, teacher, 2.0)
    result.backward()
    assert result.dtype == torch.float32
    assert result == DIVERGENCES[name](student.float(), teacher.float(), 2.0)
    assert student.grad.dtype == dtype


@every
def test_huge_logits_stay_finite(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [1e4, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, 0.0]], requires_grad=True)
    value = DIVERGENCES[name](student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert teacher.grad.isfinite().all()


@every
def test_a_class_masked_in_both_models_is_as_if_it_were_not_there(name):
    few = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masked = torch.cat([few, torch.full((2, 3, 1), -INF, dtype=torch.float64)], -1)
    (student, teacher), (s, t) = ([z.clone().requires_grad_() for z in pair] for pair in (masked, few))
    value, expected = DIVERGENCES[name](student, teacher, 2.0), DIVERGENCES[name](s, t, 2.0)
    assert_close(value, expected)
    value.backward(), expected.backward()
    for ours, reference in ((student.grad, s.grad), (teacher.grad, t.grad)):
        assert_close(ours[:, :4], reference)
        assert not ours[:, 4].any()


@every
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_class_masked_in_one_model_gives_no_nan(name, side):
    whole = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    part = torch.tensor([[0.1, 0.4, -INF]], dtype=torch.float64)
    student, teacher = (part, whole) if side == "student" else (whole, part)
    student.requires_grad_()
    value = DIVERGENCES[name](student, teacher)
    value.backward()
    infinite = {"student": {"kl", "xent"}, "teacher": {"reverse_kl"}}[side]
    if name in infinite:
        assert value == INF
    else:
        assert value.isfinite()
        assert student.grad.isfinite().all()
        near = [z.detach().clamp_min(-200.0) for z in (student, teacher)]
        assert_close(value.detach(), DIVERGENCES[name](*near))


@every
def test_masked_rows_are_not_read(name):
    student, teacher = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    dirty = student.masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_()
    value = DIVERGENCES[name](dirty, teacher, 2.0, mask)
    value.backward()
    assert_close(value, DIVERGENCES[name](student[mask], teacher[mask], 2.0))
    assert dirty.grad[mask].isfinite().all()
    assert not dirty.grad[~mask].any()
    assert DIVERGENCES[name](dirty, teacher, 2.0, torch.zeros_like(mask)) == 0


@every
def test_mismatches_are_named(name):
    function = DIVERGENCES[name]
    with pytest.raises(ValueError, match=r"student has 3 classes, teacher 2: .* allow_vocab_truncation=True"):
        function(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"student_logits \(4, 3\) and teacher_logits \(5, 3\) differ in rows"):
        function(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"tau must be positive, got 0.0"):
        function(torch.zeros(4, 3), torch.zeros(4, 3), 0.0)
    with pytest.raises(ValueError, match=r"logits \(0, 3\) have no rows"):
        function(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"mask \(3,\) does not fit logits \(4, 3\)"):
        function(torch.zeros(4, 3), torch.zeros(4, 3), 1.0, torch.ones(3, dtype=torch.bool))


def test_beta_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 1.5"):
        generalized_jsd(torch.zeros(1, 2), torch.zeros(1, 2), beta=1.5)


def test_released_js_was_negative_ours_is_not():
    """The released code hands probabilities to ``kl_div`` where it expects their logarithms."""
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.8]])
    released = sum(torch.nn.functional.kl_div(x, (p + q) / 2, reduction="batchmean") for x in (p, q)) / 2
    assert released < 0 < js(p.log(), q.log())


def test_truncation_says_what_it_cuts():
    with pytest.warns(UserWarning, match="student has 3 classes, teacher 5: cut to the first 3"):
        student, teacher = same_classes(torch.zeros(2, 3), torch.ones(2, 5), allow_truncation=True)
    assert student.shape == teacher.shape == (2, 3)
    assert sample_l1(student, teacher) == 0
