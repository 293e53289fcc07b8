import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from papercore.ops import sinkhorn_divergence
from sinkd import SinKDLoss, SinKDOutput
from sinkd.divergences import DIVERGENCES, generalized_jsd, kl, sample_l1, sample_sinkhorn
from torch.testing import assert_close

GOLDEN = sorted((Path(__file__).parent / "golden").glob("loss_*.npz"))
INF = math.inf
GLUE = {
    "cola": (0.9, 1.0, False),
    "mnli": (0.8, 3.0, True),
    "mrpc": (1.0, 4.0, True),
    "qnli": (0.8, 3.0, False),
    "qqp": (1.0, 4.0, True),
    "rte": (0.9, 3.5, False),
    "sst2": (0.9, 2.0, False),
}


def batch(rows=16, classes=3, dtype=torch.float64, spread=2.0, seed=0):
    """(student_logits, teacher_logits, labels), the student's with gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), generator=generator)


def only_sinkhorn(**options):
    """The Sinkhorn term alone, with weight 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SinKDLoss(**{"alpha": 0.0, "ce_weight": 0.0, "beta": 1.0, **options})


def gradient(criterion, student, *args):
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(criterion(leaf, *args).loss, leaf)[0]


def naive_sinkhorn(student, teacher, tau=2.0, eps=0.1, n_iters=20):
    """The sum as the equations say it, by autograd through every iteration."""
    p, q = (student / tau).softmax(-1), (teacher / tau).softmax(-1)
    cost = (p.unsqueeze(1) - q.unsqueeze(0)).abs().sum(-1)
    plan = torch.exp(-cost / eps)
    for _ in range(n_iters):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
class TestGolden:
    @pytest.fixture
    def values(self, path):
        return {name: torch.from_numpy(value) for name, value in np.load(path).items()}

    def released(self, values, **options):
        numbers = {name: float(values[name]) for name in ("alpha", "beta", "kd_temperature", "tau", "eps")}
        return SinKDLoss(**numbers, n_iters=int(values["n_iters"]), reduction="sum", scale=0.001, kd="xent", **options)

    def test_every_term_and_the_total(self, values):
        student = values["student_logits"].requires_grad_()
        out = self.released(values)(student, values["teacher_logits"], values["labels"])
        for name, part in (("total", out.loss), ("kd_xent", out.kd), ("ce", out.ce), ("sinkhorn_sum", out.sinkhorn)):
            assert_close(part.detach(), values[name], rtol=1e-10, atol=0)
        out.loss.backward()
        assert_close(student.grad, values["grad_total"], rtol=0, atol=1e-12)

    def test_the_sinkhorn_term(self, values):
        args = values["student_logits"], values["teacher_logits"]
        official = only_sinkhorn(reduction="sum", scale=0.001)
        assert_close(official(*args).loss, values["sinkhorn_official"], rtol=1e-10, atol=0)
        assert_close(gradient(official, *args), values["grad_sinkhorn_official"], rtol=0, atol=1e-12)
        assert_close(only_sinkhorn()(*args).loss, values["sinkhorn_mean"], rtol=1e-10, atol=0)
        assert_close(only_sinkhorn(n_iters=5000)(*args).loss, values["converged_mean_cost"], rtol=1e-6, atol=0)
        few, many = (only_sinkhorn(eps=eps, n_iters=5000)(*args).loss for eps in (0.02, 0.1))
        assert values["emd_mean_cost"] - 1e-9 < few < many  # entropy costs

    def test_float32(self, values):
        args = values["student_logits"].float(), values["teacher_logits"].float()
        out = self.released(values)(*args, values["labels"])
        for name, part in (("total", out.loss), ("kd_xent", out.kd), ("ce", out.ce), ("sinkhorn_sum", out.sinkhorn)):
            assert part.dtype == torch.float32
            assert_close(part.double(), values[name], rtol=2e-6, atol=0)
        official = only_sinkhorn(reduction="sum", scale=0.001)(*args)
        assert_close(official.loss.double(), values["sinkhorn_official_fp32"], rtol=2e-6, atol=0)

    def test_rows_left_out_by_a_mask_change_nothing(self, values):
        """The golden rows with others between them that are labelled -100."""
        rows = len(values["labels"])
        where = torch.arange(rows) * 2 + 1
        student, teacher = (
            torch.full((2 * rows, z.shape[1]), math.nan, dtype=z.dtype).index_copy(0, where, z)
            for z in (values["student_logits"], values["teacher_logits"])
        )
        labels = torch.full((2 * rows,), -100).index_copy(0, where, values["labels"])
        student.requires_grad_()
        out = self.released(values)(student, teacher, labels)
        out.loss.backward()
        assert_close(out.loss.detach(), values["total"], rtol=1e-10, atol=0)
        assert_close(student.grad[where], values["grad_total"], rtol=0, atol=1e-12)
        assert not student.grad[where - 1].any()


class TestPaper:
    @pytest.mark.parametrize("task", GLUE)
    def test_glue(self, task):
        student, teacher, labels = batch()
        alpha, temperature, anneal = GLUE[task]
        criterion = SinKDLoss.paper(task)
        soft = -((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1).mean()
        expected = alpha * soft + (1 - alpha) * F.cross_entropy(student, labels)
        expected = expected + 0.8 * 0.001 * naive_sinkhorn(student, teacher)
        assert_close(criterion(student, teacher, labels).loss, expected)
        assert criterion.anneal == anneal
        assert criterion.kd_temperature_at(3, 4) == (1.0 if anneal else temperature)

    def test_t0(self):
        student, teacher, labels = batch(4, 7)
        soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
        expected = F.cross_entropy(student, labels) + 0.1 * soft + 0.0008 * naive_sinkhorn(student, teacher)
        assert_close(SinKDLoss.paper("t0")(student, teacher, labels).loss, expected)

    def test_names_are_read_as_people_write_them(self):
        assert SinKDLoss.paper("SST-2").kd_temperature == 2.0

    def test_options_change_some(self):
        criterion = SinKDLoss.paper("rte", kd="js", eps=0.5)
        assert (criterion.kd, criterion.eps, criterion.alpha, criterion.scale) == ("js", 0.5, 0.9, 0.001)

    def test_another_task_is_refused_with_the_names(self):
        with pytest.raises(ValueError, match="'stsb': choose from cola, mnli, mrpc, qnli, qqp, rte, sst2, t0"):
            SinKDLoss.paper("stsb")


class TestAnnealing:
    def test_is_linear_down_to_1(self):
        criterion = SinKDLoss(kd_temperature=4.0, anneal=True)
        assert [criterion.kd_temperature_at(epoch, 4) for epoch in range(4)] == [4.0, 3.0, 2.0, 1.0]

    def test_a_single_epoch_keeps_the_temperature(self):
        assert SinKDLoss(kd_temperature=4.0, anneal=True).kd_temperature_at(0, 1) == 4.0

    def test_forward_takes_the_temperature_of_the_moment(self):
        args = batch()
        now = SinKDLoss(kd_temperature=4.0)(*args, kd_temperature=1.5)
        assert_close(tuple(now), tuple(SinKDLoss(kd_temperature=1.5)(*args)))
        assert now.kd != SinKDLoss(kd_temperature=4.0)(*args).kd


class TestWeights:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("ce_weight", [None, 0.7])
    def test_the_total_is_the_weighted_parts(self, reduction, ce_weight):
        criterion = SinKDLoss(0.3, 0.6, scale=0.5, reduction=reduction, ce_weight=ce_weight)
        out = criterion(*batch())
        assert isinstance(out, SinKDOutput)
        expected = 0.3 * out.kd + (0.7 if ce_weight is None else ce_weight) * out.ce + 0.6 * 0.5 * out.sinkhorn
        assert_close(out.loss.detach(), expected)
        assert out.loss.requires_grad
        assert not any(part.requires_grad for part in out[1:])

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_any_divergence_distils(self, name):
        student, teacher, labels = batch()
        out = SinKDLoss(kd=name, kd_temperature=3.0)(student, teacher, labels)
        assert_close(out.kd, DIVERGENCES[name](student, teacher, 3.0).detach())

    def test_a_function_distils(self):
        student, teacher, labels = batch()
        skewed = lambda *args: generalized_jsd(*args, beta=0.1)  # noqa: E731
        assert_close(
            SinKDLoss(kd=skewed)(student, teacher, labels).kd, generalized_jsd(student, teacher, 2.0, beta=0.1).detach()
        )

    def test_temperature_squared_only_on_demand(self):
        student, teacher, labels = batch()
        plain = SinKDLoss(kd_temperature=3.0)(student, teacher, labels).kd
        assert_close(plain, kl(student, teacher, 3.0).detach())
        assert_close(SinKDLoss(kd_temperature=3.0, scale_by_T2=True)(student, teacher, labels).kd, 9 * plain)

    def test_kl_and_the_papers_cross_entropy_differ_by_a_constant(self):
        args = batch()
        kl_, xent = (SinKDLoss(kd=kd) for kd in ("kl", "xent"))
        assert_close(gradient(kl_, *args), gradient(xent, *args))
        assert xent(*args).kd > kl_(*args).kd

    def test_terms_of_weight_0_are_not_computed(self):
        student, teacher, labels = batch()
        student = student.detach().masked_fill(F.one_hot(labels, 3).bool(), -INF)  # cross-entropy would be infinite
        out = SinKDLoss(alpha=1.0, beta=0.0, kd="tvd")(student, teacher, labels)
        assert (out.ce, out.sinkhorn) == (0, 0)
        assert out.loss.isfinite()
        assert SinKDLoss(kd="none")(*batch()).kd == 0

    def test_without_labels_there_is_no_cross_entropy(self):
        student, teacher, labels = batch()
        out, with_labels = SinKDLoss()(student, teacher), SinKDLoss()(student, teacher, labels)
        assert out.ce == 0
        assert_close((out.kd, out.sinkhorn), (with_labels.kd, with_labels.sinkhorn))

    def test_the_teacher_gets_no_gradient(self):
        student, teacher, labels = batch()
        teacher.requires_grad_()
        for debias in (False, True):
            SinKDLoss(debias=debias)(student, teacher, labels).loss.backward()
        assert teacher.grad is None

    def test_says_its_settings(self):
        assert "beta=0.8, scale=0.001, kd='xent', kd_temperature=3.5, tau=2.0" in repr(SinKDLoss.paper("rte"))


class TestConsequences:
    """Section 3.2 of the method: what the batch-wise term sees and does not."""

    def test_permuting_the_students_rows_leaves_the_term(self):
        student, teacher, _ = batch()
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        criterion = only_sinkhorn(n_iters=500)
        assert_close(criterion(student[order], teacher).loss, criterion(student, teacher).loss, rtol=1e-12, atol=0)

    def test_swapping_all_labels_of_a_balanced_batch_costs_nothing(self):
        teacher = torch.tensor([[3.0, -3.0], [-3.0, 3.0]]).repeat(8, 1)
        criterion = only_sinkhorn()
        assert_close(criterion(-teacher, teacher).loss, criterion(teacher, teacher).loss)
        assert SinKDLoss()(-teacher, teacher).loss > SinKDLoss()(teacher, teacher).loss + 0.5

    @pytest.mark.parametrize("alone", [{"alpha": 1.0, "kd": "none"}, {"alpha": 0.0, "ce_weight": 0.0}], ids=str)
    def test_alone_it_warns_once(self, alone):
        with pytest.warns(UserWarning, match="alone does not tell samples apart") as caught:
            criterion = SinKDLoss(**alone)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            criterion(*batch())

    def test_with_another_term_it_does_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for fine in ({"kd": "none"}, {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 1.0, "kd": "none", "beta": 0.0}):
                SinKDLoss(**fine)
            SinKDLoss(alpha=0.0, ce_weight=0.0, sinkhorn="sample")  # which does tell samples apart

    @pytest.mark.parametrize(("debias", "biased"), [(False, True), (True, False)])
    def test_entropic_bias_pulls_equal_clouds_together(self, debias, biased):
        student, _, _ = batch(classes=2)
        teacher = student.detach()
        loss = only_sinkhorn(debias=debias)(student, teacher).loss
        assert (loss > 0.03) == biased
        wide = only_sinkhorn(debias=debias, eps=1.0, n_iters=1000)  # more of it
        step = teacher - 5 * gradient(wide, student, teacher)
        before, after = (z.softmax(-1).var(0).sum() for z in (teacher, step))
        assert (after < 0.999 * before) == biased

    def test_debias_is_the_sinkhorn_divergence(self):
        student, teacher, _ = batch()
        p, q = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
        criterion = only_sinkhorn(debias=True)
        expected = sinkhorn_divergence(p, q, eps=0.1, n_iters=20)  # marginals 1 / n: the mean
        assert_close(criterion(student, teacher).loss, expected)
        assert criterion(student, teacher).loss > 0.1
        converged = only_sinkhorn(debias=True, n_iters=3000)
        assert abs(converged(student, student.detach()).loss) < 1e-12
        assert gradient(converged, student, student.detach()).abs().max() < 1e-8

    def test_sum_grows_with_the_batch_and_mean_does_not(self):
        student, teacher, labels = batch()
        twice = [torch.cat([z, z]) for z in (student, teacher)]
        for reduction, factor in (("sum", 2.0), ("mean", 1.0)):
            criterion = only_sinkhorn(reduction=reduction, n_iters=500)
            assert_close(criterion(*twice).loss, factor * criterion(student, teacher).loss)
        released = SinKDLoss.paper("rte")
        converted = SinKDLoss.paper("rte", reduction="mean", scale=0.001 * 16)  # beta 0.8 of a mean: 0.0128
        assert_close(released(student, teacher, labels).loss, converted(student, teacher, labels).loss)

    @pytest.mark.parametrize("size", [10.0, 100.0])
    def test_saturated_outputs_leave_no_gradient(self, size):
        teacher = torch.tensor([[size, -size], [-size, size]], dtype=torch.float64)[[0, 0, 0, 0]]
        ours = gradient(only_sinkhorn(), -teacher, teacher).norm()
        other = gradient(SinKDLoss(alpha=1.0, beta=0.0, kd_temperature=1.0), -teacher, teacher).norm()
        assert ours < 1e-3 * other

    def test_one_row_is_its_l1_distance(self):
        student, teacher, labels = batch(rows=1)
        for reduction in ("sum", "mean"):
            out = SinKDLoss(reduction=reduction)(student, teacher, labels)
            assert_close(out.sinkhorn, sample_l1(student, teacher, 2.0).detach())

    def test_two_classes_are_points_on_a_line(self):
        student, teacher, _ = batch(classes=2)
        p, q = ((z / 2).softmax(-1)[:, 0] for z in (student, teacher))
        exact = 2 * (p.sort().values - q.sort().values).abs().mean()  # transport on a line joins what is sorted
        assert_close(only_sinkhorn(eps=1e-3, n_iters=3000)(student, teacher).loss, exact, rtol=2e-2, atol=0)

    def test_cost_of_the_euclidean_norm(self):
        student, teacher, _ = batch(rows=1, classes=5)
        expected = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).norm()
        assert_close(only_sinkhorn(cost_p=2)(student, teacher).loss, expected)

    def test_released_weights_make_it_a_few_percent(self):
        for seed in range(5):
            args = batch(rows=16, classes=2, seed=seed)
            assert 0.003 < SinKDLoss.paper("rte").gradient_ratio(*args) < 0.1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_ratio_is_of_the_two_norms(reduction):
    student, teacher, labels = batch()
    options = {"alpha": 0.6, "reduction": reduction}
    ours = gradient(only_sinkhorn(beta=0.3, reduction=reduction), student, teacher)
    others = gradient(SinKDLoss(beta=0.0, alpha=0.6), student, teacher, labels)
    criterion = SinKDLoss(beta=0.3, **options)
    assert criterion.gradient_ratio(student, teacher, labels) == pytest.approx(float(ours.norm() / others.norm()))
    with torch.no_grad():
        half = criterion.gradient_ratio(student.half(), teacher.half(), labels)
    assert half == pytest.approx(float(ours.norm() / others.norm()), rel=0.01)
    assert student.grad is None
    assert only_sinkhorn().gradient_ratio(student, teacher) == INF


@pytest.mark.parametrize("options", [
    {}, {"debias": True}, {"cost_p": 2}, {"sinkhorn": "sample"}, {"reduction": "sum", "kd": "js"},
    {"mode": "regression"}, {"eps": 0.01, "n_iters": 3},
], ids=str)  # fmt: skip
def test_gradients_are_exact(options):
    student, teacher, labels = batch(rows=5)
    if "mode" in options:
        student, teacher, labels = student[:, :1].detach(), teacher[:, :1], labels.double()
    mask = torch.tensor([True, True, False, True, True])
    criterion = SinKDLoss(alpha=0.5, **options)
    for keep in (None, mask):
        function = lambda z: criterion(z, teacher, labels, keep).loss  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, (student.detach().requires_grad_(),))


class TestSampleWise:
    def test_is_the_mean_over_samples(self):
        student, teacher, labels = batch()
        out = SinKDLoss(sinkhorn="sample", eps=0.2, n_iters=9)(student, teacher, labels)
        assert_close(out.sinkhorn, sample_sinkhorn(student, teacher, 2.0, eps=0.2, n_iters=9).detach())

    def test_sum_is_the_batch_times_that(self):
        student, teacher, labels = batch()
        labels[:6] = -100
        mean, total = (
            SinKDLoss(sinkhorn="sample", reduction=r)(student, teacher, labels).sinkhorn for r in ("mean", "sum")
        )
        assert_close(total, 10 * mean)

    def test_sees_which_sample_is_which(self):
        teacher = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
        criterion = only_sinkhorn(sinkhorn="sample")
        assert criterion(-teacher, teacher).loss > criterion(teacher, teacher).loss + 0.5


class TestRegression:
    def test_equals_its_formulas(self):
        student, teacher, _ = batch(classes=1)
        labels = torch.linspace(0, 5, 16, dtype=torch.float64)
        out = SinKDLoss(0.7, 0.4, kd_temperature=3.0, mode="regression")(student, teacher, labels)
        assert_close(out.kd, F.mse_loss(student / 3, teacher / 3).detach())
        assert_close(out.ce, F.mse_loss(student[:, 0], labels).detach())
        cost = (student - teacher.T).abs() / 2
        plan = torch.exp(-cost / 0.1)
        for _ in range(20):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        assert_close(out.sinkhorn, (plan * cost).sum().detach() / 16, rtol=1e-8, atol=0)
        assert_close(out.loss.detach(), 0.7 * out.kd + 0.3 * out.ce + 0.4 * out.sinkhorn)

    def test_distant_scores_stay_finite(self):
        student, teacher = torch.tensor([[1e4], [0.0]], requires_grad=True), torch.tensor([[-1e4], [5.0]])
        SinKDLoss(mode="regression")(student, teacher, torch.tensor([1.0, 2.0])).loss.backward()
        assert student.grad.isfinite().all()

    def test_a_mask_leaves_rows_out_and_labels_do_not(self):
        student, teacher, _ = batch(classes=1)
        labels, mask = torch.linspace(0, 5, 16), torch.arange(16) < 10
        criterion = SinKDLoss(mode="regression")
        expected = criterion(student[:10], teacher[:10], labels[:10])
        assert_close(tuple(criterion(student, teacher, labels, mask)), tuple(expected))
        labels[3] = -100.0
        assert criterion(student, teacher, labels).ce > 100

    def test_bad_numbers_are_named(self):
        criterion, scores = SinKDLoss(mode="regression"), torch.zeros(4, 1)
        bad = torch.tensor([0.0, math.nan, -INF, 1.0])
        with pytest.raises(ValueError, match="teacher_logits: 2 of 4 rows hold NaN or infinite numbers"):
            criterion(scores, bad.unsqueeze(1), torch.zeros(4))
        with pytest.raises(ValueError, match="labels must be finite: 2 are not, such as nan"):
            criterion(scores, scores, bad)
        with pytest.raises(ValueError, match=r"labels \(3,\) do not fit logits \(4, 1\): one number an output"):
            criterion(scores, scores, torch.zeros(3))

    def test_one_class_is_refused_without_it(self):
        with pytest.raises(ValueError, match=r'1 class have a softmax of 1 .* mode="regression"'):
            SinKDLoss()(torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))


class TestIgnoredRows:
    @pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"debias": True}, {"sinkhorn": "sample"}], ids=str)
    @pytest.mark.parametrize("check", [None, False])
    def test_leave_every_term(self, options, check):
        student, teacher, labels = batch()
        labels[[1, 4, 15]] = -100
        kept = labels != -100
        criterion = SinKDLoss(**options, check=check)
        expected = criterion(student[kept], teacher[kept], labels[kept])
        dirty = student.detach().masked_fill(~kept.unsqueeze(1), math.nan).requires_grad_()
        out = criterion(dirty, teacher, labels)
        assert_close(tuple(out), tuple(expected))
        out.loss.backward()
        assert_close(dirty.grad[kept], gradient(criterion, student[kept], teacher[kept], labels[kept]))
        assert not dirty.grad[~kept].any()

    def test_another_index(self):
        student, teacher, labels = batch()
        out = SinKDLoss(ignore_index=2)(student, teacher, labels)
        kept = labels != 2
        assert_close(tuple(out), tuple(SinKDLoss()(student[kept], teacher[kept], labels[kept])))

    @pytest.mark.parametrize("mode", ["classification", "regression"])
    def test_all_of_them_are_a_loss_of_0_with_one_warning(self, mode):
        student = torch.tensor([[math.nan, INF], [-INF, 0.0]], requires_grad=True)
        labels = torch.tensor([-100, -100])
        args = (student, torch.zeros(2, 2), labels)
        if mode == "regression":
            args = (student, torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool))
        criterion = SinKDLoss(mode=mode)
        with pytest.warns(UserWarning, match=r"no row to learn from .*: the loss is 0"):
            out = criterion(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            criterion(*args)
        assert tuple(out) == (0, 0, 0, 0)
        out.loss.backward()
        assert not student.grad.any()

    def test_all_of_them_without_checks_are_0_too(self):
        student, teacher, labels = batch()
        out = SinKDLoss(check=False)(student, teacher, labels.fill_(-100))
        out.loss.backward()
        assert tuple(out) == (0, 0, 0, 0)
        assert not student.grad.any()

    def test_an_empty_batch_is_0(self):
        student = torch.zeros(0, 3, requires_grad=True)
        with pytest.warns(UserWarning, match="no row to learn from"):
            out = SinKDLoss()(student, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
        out.loss.backward()
        assert out.loss == 0


class TestChecks:
    @pytest.mark.parametrize("which", ["student", "teacher"])
    @pytest.mark.parametrize("value", [math.nan, INF])
    def test_bad_logits_say_whose_and_how_many(self, which, value):
        logits = {"student": torch.zeros(5, 3), "teacher": torch.zeros(5, 3)}
        logits[which][1, 0] = logits[which][3, 2] = value
        labels = torch.tensor([0, 1, 2, 0, 1])
        with pytest.raises(ValueError, match=rf"{which}_logits: 2 of 5 rows hold NaN or \+inf"):
            SinKDLoss()(logits["student"], logits["teacher"], labels)
        labels[[1, 3]] = -100
        assert SinKDLoss()(logits["student"], logits["teacher"], labels).loss.isfinite()

    def test_a_row_with_every_class_masked_is_bad(self):
        with pytest.raises(ValueError, match=r"student_logits: 1 of 2 rows hold .* -inf alone"):
            SinKDLoss()(torch.tensor([[-INF, -INF], [0.0, 0.0]]), torch.zeros(2, 2))

    def test_check_can_be_left_out(self):
        assert SinKDLoss(check=False)(torch.full((2, 2), math.nan), torch.zeros(2, 2)).loss.isnan()

    @pytest.mark.parametrize("label", [3, -1])
    def test_labels_out_of_range(self, label):
        labels = torch.tensor([0, label, 2, -100])
        with pytest.raises(
            ValueError, match=f"labels must be in 0 to 2, or ignore_index -100: 1 are not, such as {label}"
        ):
            SinKDLoss()(torch.zeros(4, 3), torch.zeros(4, 3), labels)

    def test_shapes(self):
        criterion, zeros = SinKDLoss(), torch.zeros(4, 3)
        labels = torch.zeros(4, dtype=torch.long)
        with pytest.raises(ValueError, match="student has 3 classes, teacher 2"):
            criterion(zeros, torch.zeros(4, 2), labels)
        with pytest.raises(ValueError, match=r"student_logits \(4, 3\) and teacher_logits \(5, 3\) differ in rows"):
            criterion(zeros, torch.zeros(5, 3), labels)
        with pytest.raises(ValueError, match=r"labels \(3,\) do not fit logits \(4, 3\): one class a row"):
            criterion(zeros, zeros, labels[:3])
        with pytest.raises(ValueError, match=r'labels are torch.float32: .* set mode="regression"'):
            criterion(zeros, zeros, labels.float())
        with pytest.raises(ValueError, match=r"mask \(3,\) does not fit logits \(4, 3\)"):
            criterion(zeros, zeros, labels, torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"logits \(3,\): expected \(rows, classes\) or \(clouds, rows, classes\)"):
            criterion(zeros[0], zeros[0])
        with pytest.raises(ValueError, match=r"logits \(2, 4, 3\): expected \(rows, classes\); select_token_logits"):
            SinKDLoss(gather=True)(zeros.expand(2, 4, 3), zeros.expand(2, 4, 3))

    def test_truncation_needs_leave(self):
        student, teacher, labels = batch()
        wide = torch.cat([teacher, torch.full((16, 2), 9.0, dtype=torch.float64)], 1)
        with pytest.warns(UserWarning, match="student has 3 classes, teacher 5: cut to the first 3"):
            out = SinKDLoss(allow_vocab_truncation=True)(student, wide, labels)
        assert_close(tuple(out), tuple(SinKDLoss()(student, teacher, labels)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reduction": "none"}, "reduction must be one of mean, sum; got 'none'"),
            ({"kd": "rkl"}, "kd must be one of none, kl, xent, reverse_kl, .*; got 'rkl'"),
            ({"sinkhorn": "token"}, "sinkhorn must be one of batch, sample; got 'token'"),
            ({"mode": "ranking"}, "mode must be one of classification, regression"),
            ({"cost_p": 3}, "cost_p must be one of 1, 2; got 3"),
            ({"tau": 0.0}, "tau must be positive, got 0.0"),
            ({"kd_temperature": -1.0}, "kd_temperature must be positive"),
            ({"eps": 0.0}, "eps must be positive"),
            ({"n_iters": 0}, "n_iters must be positive, got 0"),
            ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5: for other weights give ce_weight"),
            ({"alpha": -0.5, "ce_weight": 1.0}, "alpha must not be negative"),
            ({"beta": -1.0}, "beta must not be negative, got -1.0"),
            ({"ce_weight": math.nan}, "ce_weight must not be negative, got nan"),
            ({"sinkhorn": "sample", "debias": True}, "leave out debias"),
            ({"sinkhorn": "sample", "mode": "regression"}, "leave out debias"),
        ],
    )
    def test_bad_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            SinKDLoss(**options)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [1.0, 1e4])
    @pytest.mark.parametrize(
        "options", [{}, {"debias": True}, {"sinkhorn": "sample"}, {"kd": "js"}, {"cost_p": 2}], ids=str
    )
    def test_autocast_and_half_precision_stay_finite(self, dtype, size, options):
        student, teacher, labels = batch(dtype=dtype, spread=size)
        with torch.autocast("cpu", dtype):
            out = SinKDLoss(**options)(student, teacher, labels)
        out.loss.backward()
        assert {part.dtype for part in out} == {torch.float32}
        assert all(part.isfinite() for part in out)
        assert student.grad.dtype == dtype
        assert student.grad.isfinite().all()
        exact = SinKDLoss(**options)(student.float(), teacher.float(), labels)
        assert_close(tuple(out), tuple(exact), rtol=0, atol=0)  # float32 throughout

    def test_the_wider_of_two_dtypes(self):
        student, teacher, labels = batch(dtype=torch.float32)
        assert SinKDLoss()(student, teacher.double(), labels).loss.dtype == torch.float64

    def test_a_masked_class_is_as_if_it_were_not_there(self):
        student, teacher, labels = batch()
        masked = [torch.cat([z.detach(), torch.full((16, 1), -INF, dtype=z.dtype)], 1) for z in (student, teacher)]
        masked[0].requires_grad_()
        out = SinKDLoss()(*masked, labels)
        assert_close(tuple(out), tuple(SinKDLoss()(student, teacher, labels)))
        out.loss.backward()
        assert_close(masked[0].grad[:, :3], gradient(SinKDLoss(), student, teacher, labels))
        assert not masked[0].grad[:, 3].any()

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_class_masked_in_one_model_gives_no_nan(self, which):
        student, teacher, _ = batch()
        logits = [student.detach(), teacher]
        logits[which] = logits[which].index_fill(1, torch.tensor([2]), -INF)
        logits[0].requires_grad_()
        out = SinKDLoss()(*logits)
        out.loss.backward()
        assert out.sinkhorn.isfinite()
        assert out.kd == INF if which == 0 else out.kd.isfinite()
        assert logits[0].grad.isfinite().all()


# In processes of their own: the shape checks that pytest adds to every function do not compile.
COMPILE = """
import torch
from sinkd import SinKDLoss
from torch.testing import assert_close

torch.manual_seed(0)
student, teacher, labels = torch.randn(16, 3, requires_grad=True), torch.randn(16, 3), torch.randint(3, (16,))
labels[3] = -100
for options in ({}, {"sinkhorn": "sample"}, {"debias": True, "kd": "js", "reduction": "sum"}):
    criterion = SinKDLoss(**options, n_iters=2, check=False)
    out = torch.compile(criterion, fullgraph=True, backend="eager")(student, teacher, labels)
    expected = criterion(student, teacher, labels)
    assert_close(tuple(out), tuple(expected))
    assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (out.loss, expected.loss)))
"""

# One rank's share of the batch; the gradient of the weights averaged as DistributedDataParallel does.
RANK = """
import sys
import torch
import torch.distributed as dist
from sinkd import SinKDLoss

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
results = []
for case in torch.load(f"{folder}/cases.pt"):
    inputs, weights, *rest = case["tensors"]
    rows = slice(8 * rank, 8 * rank + 8)
    weights.requires_grad_()
    out = SinKDLoss(**case["options"], gather=True)(inputs[rows] @ weights, *(t[rows] for t in rest))
    out.loss.backward()
    dist.all_reduce(weights.grad)
    results.append([*(part.detach() for part in out), weights.grad / 2])
    weights.grad = None
torch.save(results, f"{folder}/{rank}.pt")
dist.barrier()  # so that neither leaves while the other is talking
dist.destroy_process_group()
"""


def start(script, *args):
    command = [sys.executable, "-W", "error:::sinkd", "-c", script, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def succeed(*processes):
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors


def test_compiles_to_one_graph():
    succeed(start(COMPILE))


def test_two_processes_give_what_one_gives_with_the_whole_batch(tmp_path):
    _, teacher, labels = batch()
    labels[:5] = -100  # more on one rank than on the other
    inputs, weights = torch.randn(16, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    cases = [
        {"options": {}, "tensors": [inputs, weights, teacher, labels]},
        {"options": {"reduction": "sum", "debias": True}, "tensors": [inputs, weights, teacher]},
        {"options": {"mode": "regression"}, "tensors": [inputs, weights, teacher, torch.randn(16, 3)]},
    ]
    torch.save(cases, tmp_path / "cases.pt")
    succeed(*(start(RANK, str(tmp_path), str(rank)) for rank in range(2)))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, *results in zip(cases, *ranks, strict=True):
        leaf = weights.clone().requires_grad_()
        whole = SinKDLoss(**case["options"])(inputs @ leaf, *case["tensors"][2:])
        whole.loss.backward()
        for *parts, grad in results:
            assert_close(parts, [part.detach() for part in whole], rtol=1e-12, atol=0)
            assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-14)


def test_gather_in_one_process_changes_nothing():
    args = batch()
    assert_close(tuple(SinKDLoss(gather=True)(*args)), tuple(SinKDLoss()(*args)), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options", [{}, {"debias": True}, {"sinkhorn": "sample"}, {"reduction": "sum", "cost_p": 2}], ids=str
)
def test_a_gpu_gives_what_the_cpu_gives_without_waiting(options):
    student, teacher, labels = batch(32, 5, dtype=torch.float32)
    labels[3] = -100
    criterion = SinKDLoss(**options)
    on_gpu = student.detach().cuda().requires_grad_()
    args = (on_gpu, teacher.cuda(), labels.cuda())
    criterion(*args)  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = criterion(*args)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close([part.cpu() for part in out], list(criterion(student, teacher, labels)), rtol=1e-4, atol=1e-5)
    assert_close(on_gpu.grad.cpu(), gradient(criterion, student, teacher, labels), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="teacher_logits: 32 of 32 rows"):
        SinKDLoss(check=True)(on_gpu, torch.full_like(on_gpu, math.nan), labels.cuda())
