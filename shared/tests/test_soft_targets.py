"""Soft targets against golden values, PyTorch, limits, and their promised errors."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from papercore.ops import negatives_log_softmax, soft_cross_entropy, soft_kl, soften
from torch.testing import assert_close

GOLDEN = Path(__file__).parent / "golden" / "contrastive" / "core_contrastive.npz"
INF = float("inf")


def logits_and_target(n=4, m=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, n, m, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.softmax(other, 1).requires_grad_()


def gradient(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


class TestCrossEntropyAndKL:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    def test_golden(self, dtype, tolerance):
        with np.load(GOLDEN) as file:
            case = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
        logits = (case["logit_scale"] * case["image"] @ case["text"].T).to(dtype)
        target = case["dense_target"].to(dtype)
        for name, found in (
            ("soft_ce", lambda reduction: soft_cross_entropy(logits, target, reduction=reduction)),
            ("soft_kl", lambda reduction: soft_kl(logits, target, reduction=reduction)),
            ("soft_kl", lambda reduction: soft_kl(logits, log_target=target.log(), reduction=reduction)),
        ):
            assert_close(found("none"), case[f"{name}_rows"].to(dtype), rtol=tolerance, atol=tolerance)
            assert_close(found("mean"), case[f"{name}_mean"].to(dtype), rtol=tolerance, atol=0)
            assert_close(found("sum"), 33 * case[f"{name}_mean"].to(dtype), rtol=tolerance, atol=0)

    def test_they_are_torchs(self):
        logits, target = logits_and_target()
        ours, theirs = soft_cross_entropy(logits, target), F.cross_entropy(logits, target)
        assert_close(gradient(ours, logits, target), gradient(theirs, logits, target))
        log_q = torch.log_softmax(logits, 1)
        forward = F.kl_div(log_q, target, reduction="batchmean")  # it takes (log q, p)
        backward = F.kl_div(target.log(), log_q, reduction="batchmean", log_target=True)
        for found, expected in (
            (soft_kl(logits, target), forward),
            (soft_kl(logits, target, symmetric=True), (forward + backward) / 2),
        ):
            assert_close(found, expected)
            assert_close(
                gradient(found, logits, target), torch.autograd.grad(expected, (logits, target), retain_graph=True)
            )

    def test_gradcheck(self):
        logits, target = logits_and_target(3, 4)
        assert torch.autograd.gradcheck(lambda x, y: soft_kl(x, torch.softmax(y, 1), symmetric=True), (logits, target))
        assert torch.autograd.gradcheck(lambda x, y: soft_cross_entropy(x, torch.softmax(y, 1)), (logits, target))

    def test_floors(self):
        """Of the cross-entropy it is the target's entropy, of KL 0."""
        _, target = logits_and_target()
        entropy = -(target * target.log()).sum(1).mean()
        assert_close(soft_cross_entropy(target.log(), target), entropy)
        for symmetric in (False, True):
            assert soft_kl(target.log(), target, symmetric=symmetric).abs() < 1e-15

    def test_pairs_that_are_in_neither_distribution(self):
        logits, target = (x.detach() for x in logits_and_target())
        wide = torch.cat([logits, torch.full((4, 1), -INF)], 1).requires_grad_()
        padded = torch.cat([target, torch.zeros(4, 1)], 1).requires_grad_()
        for loss, expected in (
            (soft_cross_entropy(wide, padded), soft_cross_entropy(logits, target)),
            (soft_kl(wide, log_target=padded.detach().log()), soft_kl(logits, target)),
            (soft_kl(wide, log_target=padded.detach().log(), symmetric=True), soft_kl(logits, target, symmetric=True)),
        ):
            assert_close(loss, expected)
            assert torch.isfinite(gradient(loss, wide)[0]).all()
        assert torch.isfinite(gradient(soft_cross_entropy(wide, padded), padded)[0]).all()
        assert torch.isfinite(gradient(soft_kl(wide, padded), padded)[0]).all()

    def test_a_target_of_0_where_the_prediction_is_not(self):
        logits = torch.zeros(1, 3, requires_grad=True)
        target = torch.tensor([[0.5, 0.5, 0.0]])
        assert_close(soft_kl(logits, target), torch.tensor(1.5).log())
        assert torch.isfinite(gradient(soft_kl(logits, target), logits)[0]).all()
        assert soft_kl(logits, target, symmetric=True) == INF

    def test_targets_below_float32(self):
        logits = torch.zeros(1, 2, requires_grad=True)
        log_target = torch.log_softmax(torch.tensor([[0.0, -200.0]]), 1)
        loss = soft_kl(logits, log_target=log_target, symmetric=True)
        assert_close(loss, torch.tensor(50.0))
        assert torch.isfinite(gradient(loss, logits)[0]).all()

    def test_half_precision_is_computed_in_float32(self):
        logits = torch.tensor([[200.0, 1.0, 0.0]], dtype=torch.bfloat16)
        target = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.bfloat16)
        for loss in (soft_cross_entropy, soft_kl):
            assert loss(logits, target).dtype == torch.float32
            assert_close(loss(logits, target), loss(logits.float(), target.float()))

    def test_errors(self):
        logits, target = (x.detach() for x in logits_and_target())
        wrong = target.clone()
        wrong[2] *= 1.1
        with pytest.raises(ValueError, match=r"row 2 of target sums to 1.1: rows of targets must sum to 1"):
            soft_cross_entropy(logits, wrong)
        soft_cross_entropy(logits, target * 1.0005)
        wrong[2] = float("nan")
        with pytest.raises(ValueError, match="row 2 of target sums to nan"):
            soft_cross_entropy(logits, wrong)
        for call in (soft_cross_entropy, soft_kl):
            with pytest.raises(ValueError, match=r"logits \(4, 6\) and target \(4, 5\) differ in shape"):
                call(logits, target[:, :5])
            with pytest.raises(ValueError, match="reduction must be mean, sum or none, got 'batchmean'"):
                call(logits, target, reduction="batchmean")
        for given in ({}, {"target": target, "log_target": target.log()}):
            with pytest.raises(ValueError, match="either target or log_target"):
                soft_kl(logits, **given)


class TestNegatives:
    @pytest.mark.parametrize("positives", [None, torch.tensor([5, 0, 0, 3]), torch.rand(4, 6) > 0.5])
    def test_it_is_the_softmax_over_the_others(self, positives):
        logits, _ = logits_and_target()
        mask = positives if positives is not None and positives.dtype == torch.bool else torch.zeros(4, 6).bool()
        if positives is None or positives.dtype != torch.bool:
            mask[range(4), range(4) if positives is None else positives] = True
        found = negatives_log_softmax(logits, positives)
        for i in range(4):
            assert (found[i, mask[i]] == -INF).all()
            assert_close(found[i, ~mask[i]], torch.log_softmax(logits[i, ~mask[i]], 0))

    def test_a_positive_of_probability_1_leaves_its_negatives_theirs(self):
        """p / (1 - p_ii) would be 0 / 0."""
        logits = torch.tensor([[100.0, 2.0, 1.0], [0.0, 300.0, 0.0]], requires_grad=True)
        found = negatives_log_softmax(logits)
        assert_close(found[0, 1:], torch.log_softmax(torch.tensor([2.0, 1.0]), 0))
        assert torch.isfinite(gradient(found[0, 1] + found[1, 0], logits)[0]).all()

    def test_a_row_without_negatives(self):
        logits = torch.randn(2, 3, requires_grad=True)
        mask = torch.tensor([[True, True, True], [True, False, False]])
        found = negatives_log_softmax(logits, mask)
        assert (found[0] == -INF).all()
        total = found.exp().sum() + found.masked_fill(mask, 0.0).sum()
        assert torch.isfinite(gradient(total, logits)[0]).all()

    def test_half_precision(self):
        assert negatives_log_softmax(torch.randn(3, 3).bfloat16()).dtype == torch.float32


class TestSoften:
    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    def test_diagonal(self, beta):
        _, p = logits_and_target(4, 4)
        found = soften(p.log(), beta)
        assert_close(found.exp(), (1 - beta) * torch.eye(4, dtype=torch.float64) + beta * p)
        assert torch.isfinite(gradient(found.exp().diagonal().sum(), p)[0]).all()

    def test_several_positives_share_and_rows_have_betas_of_their_own(self):
        _, p = logits_and_target(3, 4)
        mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
        beta = torch.tensor([[0.3], [0.0], [0.8]], dtype=torch.float64)
        hard = mask / mask.sum(1, keepdim=True).double()
        assert_close(soften(p.log(), beta, mask).exp(), (1 - beta) * hard + beta * p)

    def test_renormalised_negatives_are_those_of_the_guide(self):
        logits, _ = logits_and_target(4, 4)
        softened = soften(torch.log_softmax(logits, 1), 0.3)
        assert_close(negatives_log_softmax(softened), negatives_log_softmax(logits), rtol=1e-13, atol=1e-13)

    def test_small_probabilities_keep_their_logarithms(self):
        found = soften(torch.tensor([[0.0, -200.0]]), 0.5)
        assert_close(found, torch.tensor([[0.0, -200.0 - math.log(2)]]))

    def test_errors(self):
        _, p = logits_and_target(4, 4)
        for beta in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="beta must be from 0 to 1"):
                soften(p.log(), beta)
        for positives in (torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, -1, 2]), torch.tensor([0, 1])):
            with pytest.raises(ValueError, match="must name a column of 0 to 3 for each of 4 rows"):
                soften(p.log(), 0.5, positives)
        with pytest.raises(ValueError, match="differ in shape"):
            negatives_log_softmax(p, torch.zeros(4, 3).bool())
        with pytest.raises(ValueError, match="must name a column"):
            soften(torch.zeros(4, 3), 0.5)  # the diagonal ends before the rows
