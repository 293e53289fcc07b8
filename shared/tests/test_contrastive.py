"""Run as a script, this file is one of two processes: ``python test_contrastive.py RANK FILE``."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from papercore.ops import gather_features, info_nce, peak_memory
from torch.testing import assert_close

GOLDEN = Path(__file__).parent / "golden" / "contrastive"


def literal(queries, keys, scale=1.0, target=None, mask=None, log_weights=None, own=None, weights=None):
    """The loss from the whole matrix; ``target`` (n, m), or the keys' numbers, or None for the diagonal."""
    n, m = len(queries), len(keys)
    logits = scale * queries @ keys.T
    target = torch.arange(n) if target is None and own is None else target
    one_hot = target is not None and target.dim() == 1
    share = F.one_hot(target, m).bool() if one_hot else target
    change = torch.zeros(n, m, dtype=logits.dtype) if log_weights is None else log_weights
    change = change if mask is None else change.masked_fill(~mask, -torch.inf)
    logits = logits + (change.masked_fill(share, 0.0) if one_hot else change)
    if own is not None:
        logits, target = torch.cat([scale * (queries * own).sum(1, keepdim=True), logits], 1), torch.zeros(n).long()
    elif not one_hot:
        share = share / share.sum(1, keepdim=True) if share.dtype == torch.bool else share
        gold = torch.where(share > 0, share * logits, 0.0).sum(1)
        return (torch.logsumexp(logits, 1) - gold).mean()
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def rows(*sizes, dim=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=random, dtype=torch.float64).requires_grad_() for n in sizes]


def unit(x):
    return F.normalize(x, dim=-1)


def read(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {k: torch.from_numpy(file[k]) if file[k].ndim else file[k][()] for k in file.files}


def same_gradients(ours, theirs, *leaves, **tolerance):
    assert_close(ours, theirs, **tolerance)
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert_close(mine, other, **tolerance)


class TestGolden:
    @pytest.mark.parametrize("name", ["infonce_b8_k5", "weighted_all_b8_k5_a5", "weighted_hard_b6_k3_a9"])
    def test_hard_negatives_weighted_by_their_similarity(self, name):
        """sentence-transformers' loss over all positives and negatives of the batch; weights exp(alpha cos), constants."""
        g = read(name)
        n, k = g["neg"].shape[:2]
        leaves = [g[key].requires_grad_() for key in ("q", "pos", "neg")]
        keys = torch.cat([unit(leaves[1]), unit(leaves[2]).transpose(0, 1).reshape(n * k, -1)])
        own = torch.cat([torch.zeros(n, n), torch.eye(n).repeat(1, k)], 1).bool()  # each query's own hard negatives
        where = {"None": 0.0, "all_negatives": 1.0, "hard_negatives": own.double()}[str(g["mode"])]

        def log_weights(logits, part):
            on = where[part] if isinstance(where, torch.Tensor) else where
            return g["alpha"] * g["temperature"] * logits * on

        weights = None if g["alpha"] == 0 else log_weights
        loss = info_nce(unit(leaves[0]), keys, 1 / g["temperature"], log_weights=weights, block_rows=3)
        assert float(loss.detach()) == pytest.approx(float(g["loss"]), rel=1e-9)
        grads = torch.autograd.grad(loss, leaves)
        for grad, key in zip(grads, ("grad_q", "grad_pos", "grad_neg"), strict=True):
            assert_close(grad, g[key], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
    def test_twenty_thousand_candidates(self, dtype, tolerance):
        (g,) = json.loads((GOLDEN / "big_20000.json").read_text())
        random = np.random.RandomState(g["seed"])
        q = random.standard_normal((g["B"], g["D"]))
        p = random.standard_normal((g["C"], g["D"]))
        p[: g["B"]] += 0.3 * q
        q, p = (unit(torch.from_numpy(x)).to(dtype).requires_grad_() for x in (q, p))
        loss = info_nce(q, p, 1 / g["temperature"], log_weights=lambda s, _: g["alpha"] * g["temperature"] * s)
        assert float(loss.detach()) == pytest.approx(g["loss"], rel=tolerance)
        grad_q, grad_p = torch.autograd.grad(loss, (q, p))
        assert float(grad_q.norm()) == pytest.approx(g["grad_q_norm"], rel=tolerance)
        assert float(grad_p.norm()) == pytest.approx(g["grad_c_norm"], rel=tolerance)

    def test_clip(self):
        g = read("core_contrastive")
        image, text = g["image"].requires_grad_(), g["text"].requires_grad_()
        scale = torch.tensor(g["logit_scale"], requires_grad=True)
        loss = info_nce(image, text, scale, symmetric=True, block_rows=10)
        assert float(loss.detach()) == pytest.approx(float(g["infonce"]), rel=1e-10)
        grads = torch.autograd.grad(loss, (image, text, scale))
        for grad, key in zip(grads, ("infonce_grad_image", "infonce_grad_text", "infonce_grad_scale"), strict=True):
            assert_close(grad, torch.as_tensor(g[key]), rtol=1e-9, atol=1e-12)

    def test_dense_targets(self):
        g = read("core_contrastive")
        loss = info_nce(g["image"], g["text"], float(g["logit_scale"]), positives=g["dense_target"])
        assert float(loss) == pytest.approx(float(g["soft_ce_mean"]), rel=1e-10)


class TestReference:
    @pytest.mark.parametrize("block_rows", [None, 1, 4])
    @pytest.mark.parametrize("case", ["diagonal", "numbers", "several", "soft", "mask", "weights", "rows", "own"])
    def test_equals_the_whole_matrix(self, case, block_rows):
        q, k, own = rows(7, 11, 7)
        random = torch.Generator().manual_seed(1)
        matrix = torch.rand(7, 11, generator=random, dtype=torch.float64)
        scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        ours, theirs, leaves = {
            "diagonal": ({}, {}, (q, k)),
            "numbers": ({"positives": (i := torch.arange(7).flip(0))}, {"target": i}, (q, k)),
            "several": ({"positives": (b := matrix > 0.5)}, {"target": b}, (q, k)),
            "soft": ({"positives": (t := matrix.softmax(1))}, {"target": t}, (q, k)),
            "mask": ({"mask": (m := matrix > 0.3)}, {"mask": m}, (q, k)),
            "weights": ({"log_weights": matrix}, {"log_weights": matrix}, (q, k)),
            "rows": ({"row_weights": (w := matrix[:, 0])}, {"weights": w}, (q, k)),
            "own": ({"own_positives": own, "mask": m}, {"own": own, "mask": m}, (q, k, own)),
        }[case]
        same_gradients(
            info_nce(q, k, scale, block_rows=block_rows, **ours), literal(q, k, scale, **theirs), *leaves, scale
        )

    def test_functions_of_rows_are_matrices(self):
        q, k = rows(7, 11)
        several, mask, weights = (
            torch.rand(7, 11) > 0.3,
            torch.rand(7, 11) > 0.3,
            torch.rand(7, 11, dtype=torch.float64),
        )
        several |= ~several.any(1, keepdim=True)
        mask |= several
        whole = info_nce(q, k, positives=several, mask=mask, log_weights=weights)
        by_rows = info_nce(
            q, k, positives=lambda part: several[part], mask=lambda part: mask[part],
            log_weights=lambda _, part: weights[part], block_rows=2,
        )  # fmt: skip
        same_gradients(by_rows, whole, q, k)

    def test_weights_added_in_place(self):
        q, k = rows(7, 11)
        weights = torch.rand(7, 11, dtype=torch.float64)

        def add(block, part):
            block += weights[part]

        same_gradients(info_nce(q, k, log_weights=add, block_rows=2), info_nce(q, k, log_weights=weights), q, k)

    def test_row_losses_are_those_of_each_row_alone(self):
        q, k = rows(7, 11)
        losses, weights = torch.empty(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
        loss = info_nce(q, k, 2.0, row_weights=weights, row_losses=losses, block_rows=2)
        alone = [literal(q[i : i + 1], k, 2.0, torch.tensor([i])) for i in range(7)]
        torch.testing.assert_close(losses, torch.stack(alone).detach())
        torch.testing.assert_close(loss, (weights * losses).sum() / weights.sum())
        assert not losses.requires_grad

    def test_symmetric_is_the_mean_of_both_directions(self):
        q, k = rows(6, 6)
        several = torch.eye(6, dtype=torch.bool).logical_or(torch.rand(6, 6) > 0.7)
        both = info_nce(q, k, 2.0, positives=several, symmetric=True)
        apart = literal(q, k, 2.0, several) + literal(k, q, 2.0, several.T)
        same_gradients(both, apart / 2, q, k)

    def test_sum(self):
        q, k = rows(4, 9)
        same_gradients(info_nce(q, k, reduction="sum"), 4 * literal(q, k), q, k)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_is_computed_in_float32(self, dtype):
        q, k = (unit(x).detach().to(dtype).requires_grad_() for x in rows(8, 20, dim=32))
        with torch.autocast("cpu", torch.bfloat16):
            loss = info_nce(q, k, 100.0)
        assert loss.dtype == torch.float32
        assert_close(loss, literal(q.float(), k.float(), 100.0))
        assert torch.autograd.grad(loss, q)[0].dtype == dtype

    def test_gradcheck(self):
        q, k = rows(3, 4)
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *x: info_nce(*x, block_rows=2), (q, k, scale))

    def test_keys_without_gradient_get_none(self):
        q, k = rows(3, 4)
        loss = info_nce(q, k.detach())
        loss.backward()
        assert k.grad is None
        assert_close(q.grad, torch.autograd.grad(literal(q, k.detach()), q)[0])


class TestEdges:
    def test_logits_that_exp_would_not_bear(self):
        q, k = (unit(x).float() for x in rows(6, 9))
        q = q.detach().requires_grad_()
        loss = info_nce(q, k.detach(), 1e4)
        assert_close(loss, literal(q, k.detach(), 1e4))
        assert torch.autograd.grad(loss, q)[0].isfinite().all()

    @pytest.mark.parametrize("masked", [False, True])
    def test_no_negatives_no_loss(self, masked):
        q, k = rows(1, 3 if masked else 1)
        loss = info_nce(q, k, mask=torch.zeros(1, 3, dtype=torch.bool) if masked else None)
        assert loss == 0
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (q, k)))

    def test_a_row_without_positives_teaches_nothing(self):
        q, k = rows(3, 4)
        several = torch.tensor([[True, False, True, False], [False] * 4, [False, True, False, False]])
        loss = info_nce(q, k, positives=several)
        grad = torch.autograd.grad(loss, q)[0]
        assert (grad[1] == 0).all()
        assert_close(loss, literal(q[[0, 2]], k, target=several[[0, 2]]) * 2 / 3)

    def test_a_row_without_positives_may_be_masked_whole(self):
        q, k = rows(2, 3)
        keep = torch.tensor([[True, True, True], [False, False, False]])
        loss = info_nce(q, k, positives=torch.eye(2, 3).bool() & keep, mask=keep)
        assert (torch.autograd.grad(loss, q)[0][1] == 0).all()
        assert_close(loss, literal(q[:1], k) / 2)

    def test_tiny_probabilities_are_zero_not_denormal(self):
        q = torch.eye(4).requires_grad_()
        grads = torch.autograd.grad(info_nce(q, torch.eye(4), 100.0), q)[0]  # exp(-100) is denormal
        assert (grads == 0).all()

    def test_memory_is_that_of_a_block(self):
        q, k = (x.detach().float().requires_grad_() for x in rows(1000, 2000, dim=8))
        with peak_memory("cpu") as ours:
            info_nce(q, k, block_rows=50).backward()
        with peak_memory("cpu") as whole:
            F.cross_entropy(q @ k.T, torch.arange(1000)).backward()
        assert ours.bytes < 0.2 * whole.bytes

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"logit_scale": 0.0}, "logit_scale is 1 / temperature and must be positive, got 0.0"),
            ({"reduction": "none"}, "reduction must be mean or sum, got 'none'"),
            ({"positives": torch.zeros(3, dtype=torch.long)}, r"positives \(3,\) does not fit 4 queries and 6 keys"),
            ({"positives": lambda part: torch.zeros(1, 6)}, "positives of rows 0 to 4 are"),
            ({"mask": torch.ones(6, 4, dtype=torch.bool)}, r"mask \(6, 4\) does not fit"),
            ({"row_weights": torch.ones(6)}, r"row_weights \(6,\) do not fit"),
            ({"row_losses": torch.ones(6)}, r"row_losses \(6,\) do not fit"),
            ({"own_positives": torch.ones(6, 5)}, r"own_positives \(6, 5\) must be as queries"),
            ({"own_positives": torch.ones(4, 5), "positives": torch.arange(4)}, "both say what a query belongs to"),
            ({"symmetric": True}, "symmetric=True needs as many keys as queries; got 4 and 6"),
            ({"gather": True, "reduction": "sum"}, 'gather=True is for reduction="mean"'),
            ({"gather": True, "detached": True}, "detached loses the gradient"),
        ],
    )
    def test_wrong_options_are_named(self, options, message):
        q, k = rows(4, 6)
        k = k.detach() if options.pop("detached", False) else k
        with pytest.raises(ValueError, match=message):
            info_nce(q, k, **options)

    def test_symmetric_takes_bool_matrices_alone(self):
        q, k = rows(4, 4)
        with pytest.raises(ValueError, match="takes bool positives"):
            info_nce(q, k, symmetric=True, positives=torch.eye(4))
        with pytest.raises(ValueError, match="none with gather=True"):
            info_nce(q, k, symmetric=True, gather=True, mask=torch.ones(4, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="two losses for each row"):
            info_nce(q, k, symmetric=True, row_losses=torch.empty(4))
        with pytest.raises(ValueError, match="as whole matrices"):
            info_nce(q, k, symmetric=True, mask=lambda part: torch.ones(4, 4, dtype=torch.bool)[part])

    def test_too_few_keys_and_other_shapes(self):
        q, k = rows(6, 4)
        with pytest.raises(ValueError, match="key i must belong to query i"):
            info_nce(q, k)
        with pytest.raises(ValueError, match=r"must be \(n, d\) and \(m, d\)"):
            info_nce(q, k[:, :3])


def of_a_rank(rank):
    """With gather, the average over ranks of loss and gradients is that of one process with everything."""
    q, p, negatives = rows(6, 6, 6)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    own = slice(3 * rank, 3 * rank + 3)
    for symmetric in (False, True):
        whole = info_nce(q, p, scale, symmetric=symmetric)
        part = info_nce(q[own], p[own], scale, symmetric=symmetric, gather=True)
        averaged(part, whole, q, p, scale)
    # Hard negatives: each column of keys is gathered for itself, so that all positives come first.
    (all_p, all_n), offset = gather_features(p[own], negatives[own])
    part = info_nce(q[own], torch.cat([all_p, all_n]), scale, positives=torch.arange(3) + offset)
    averaged(part, info_nce(q, torch.cat([p, negatives]), scale), q, p, negatives, scale)


def averaged(part, whole, *leaves):
    for ours, theirs in zip(torch.autograd.grad(part, leaves), torch.autograd.grad(whole, leaves), strict=True):
        dist.all_reduce(ours)
        assert_close(ours / 2, theirs)
    loss = part.detach().clone()
    dist.all_reduce(loss)
    assert_close(loss / 2, whole.detach())


def test_two_processes(tmp_path):
    command = [sys.executable, "-P", __file__]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for run in runs:
        error = run.communicate(timeout=120)[1]
        assert run.returncode == 0, error


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
    of_a_rank(int(sys.argv[1]))
    dist.barrier()  # so that neither leaves while the other is talking
    dist.destroy_process_group()
