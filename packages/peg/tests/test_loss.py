"""The loss against golden values, a literal version, limits, and its promised errors."""

import json
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
from hypothesis import given, settings
from hypothesis import strategies as st
from peg.loss import HardnessSchedule, WeightSchedule, progressive_info_nce

GOLDEN = Path(__file__).parent / "golden"


def batch(b=6, k=3, d=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(b, d, generator=generator, dtype=dtype) for _ in range(2))
    n = torch.randn(b, k, d, generator=generator, dtype=dtype)
    return q, p, n


def literal(q, p, n, *, temperature=0.02, lam=0.0, difficulty="cosine", normalise="none", apply_to="all", keep=None):
    """The definition, row by row, with autograd through everything but the weights."""
    b, k = n.shape[:2]
    candidates = F.normalize(torch.cat([p, *n.unbind(1)]), dim=1)
    sims = F.normalize(q, dim=1) @ candidates.T
    losses = []
    for i in range(b):
        negatives = [j for j in range(b * (1 + k)) if j != i and (keep is None or keep[i, j])]
        own = {i + b * (1 + r) for r in range(k)}
        h = sims[i].detach() - (sims[i, i].detach() if difficulty == "margin" else 0.0)
        weights = {}
        for j in negatives:
            inside = apply_to == "all" or (j in own) == (apply_to == "hard")
            weights[j] = torch.exp(lam * h[j]) if inside else torch.ones_like(h[j])
        if normalise == "mean1" and negatives:
            mean = sum(weights.values()) / len(negatives)
            weights = {j: w / mean for j, w in weights.items()}
        total = torch.exp(sims[i, i] / temperature) + sum(
            w * torch.exp(sims[i, j] / temperature) for j, w in weights.items()
        )
        losses.append(-sims[i, i] / temperature + torch.log(total))
    return torch.stack(losses).mean()


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


class TestGolden:
    @pytest.mark.parametrize(("name", "options"), [
        ("infonce_b8_k5", {}), ("weighted_all_b8_k5_a5", {}), ("weighted_hard_b6_k3_a9", {"apply_to": "hard"}),
    ])  # fmt: skip
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
    def test_sentence_transformers(self, name, options, dtype, tolerance):
        golden = np.load(GOLDEN / f"{name}.npz")
        leaves = [torch.tensor(golden[key], dtype=dtype, requires_grad=True) for key in ("q", "pos", "neg")]
        loss = progressive_info_nce(
            *leaves, temperature=float(golden["temperature"]), hardness=float(golden["alpha"]), **options
        ).loss
        assert loss.item() == pytest.approx(float(golden["loss"]), rel=tolerance)
        for gradient, key in zip(gradients(loss, *leaves), ("grad_q", "grad_pos", "grad_neg"), strict=True):
            expected = torch.tensor(golden[key], dtype=dtype)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance * float(expected.abs().max()))

    def test_twenty_thousand_candidates(self):
        golden = json.loads((GOLDEN / "big_20000.json").read_text())[0]
        b, c, d = golden["B"], golden["C"], golden["D"]
        rng = np.random.RandomState(golden["seed"])
        q, p = rng.standard_normal((b, d)), rng.standard_normal((c, d))
        p[:b] += 0.3 * q
        q, p = (F.normalize(torch.tensor(x), dim=1) for x in (q, p))
        loss = progressive_info_nce(q, p[:b], p[b:], temperature=golden["temperature"], hardness=golden["alpha"]).loss
        assert loss.item() == pytest.approx(golden["loss"], rel=1e-9)


CASES = [
    {}, {"lam": 5.0}, {"lam": -3.0}, {"lam": 5.0, "difficulty": "margin"}, {"lam": 5.0, "normalise": "mean1"},
    {"lam": 5.0, "apply_to": "hard"}, {"lam": 5.0, "apply_to": "in_batch"},
    {"lam": 4.0, "apply_to": "hard", "normalise": "mean1"},
]  # fmt: skip


class TestDefinition:
    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("statistics", [False, True])
    def test_equals_the_literal_version(self, case, statistics):
        leaves = [x.requires_grad_() for x in batch()]
        options = dict(case)
        lam = options.pop("lam", 0.0)
        ours = progressive_info_nce(*leaves, temperature=0.1, hardness=lam, statistics=statistics, **options).loss
        theirs = literal(*leaves, temperature=0.1, **case)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
        for mine, expected in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)

    def test_gradcheck(self):
        leaves = tuple(x.requires_grad_() for x in batch(b=3, k=1, d=4))
        assert torch.autograd.gradcheck(lambda *x: progressive_info_nce(*x, temperature=0.5).loss, leaves)

    def test_no_hardness_is_plain_info_nce_bit_for_bit(self):
        q, p, n = batch(dtype=torch.float32)
        plain = progressive_info_nce(q, p, n).loss
        weighted = progressive_info_nce(q, p, n, hardness=0.0, difficulty="margin", apply_to="hard").loss
        assert torch.equal(plain, weighted)

    def test_constant_hardness_on_everything_is_a_temperature_of_the_negatives(self):
        """Trap 3: were the positive weighted, too, lambda would be a temperature and nothing else."""
        q, p, n = batch()
        weighted = progressive_info_nce(q, p, n, temperature=0.1, hardness=5.0).loss
        colder = progressive_info_nce(q, p, n, temperature=1 / (10 + 5)).loss
        assert abs(weighted.item() - colder.item()) > 1e-3

    def test_mean1_makes_cosine_and_margin_the_same(self):
        q, p, n = batch()
        losses = [
            progressive_info_nce(q, p, n, hardness=5.0, normalise="mean1", difficulty=h).loss
            for h in ("cosine", "margin")
        ]
        torch.testing.assert_close(*losses)

    def test_a_formula_of_ones_own(self):
        q, p, n = batch()
        own = progressive_info_nce(
            q, p, n, hardness=2.0, difficulty=lambda sim, sim_pos, lam: lam * (sim - sim_pos)
        ).loss
        torch.testing.assert_close(own, progressive_info_nce(q, p, n, hardness=2.0, difficulty="margin").loss)

    @given(st.integers(1, 5), st.integers(0, 3), st.floats(0.02, 1.0), st.floats(-5, 20), st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def test_any_size(self, b, k, temperature, lam, seed):
        q, p, n = batch(b, k, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = progressive_info_nce(q, p, n if k else None, temperature=temperature, hardness=lam).loss
        assert ours.item() == pytest.approx(
            literal(q, p, n, temperature=temperature, lam=lam).item(), rel=1e-9, abs=1e-9
        )

    def test_layouts(self):
        q, p, n = batch(4, 3)
        whole = progressive_info_nce(q, p, n).loss
        torch.testing.assert_close(progressive_info_nce(q, p, list(n.unbind(1))).loss, whole)
        torch.testing.assert_close(progressive_info_nce(q, p, torch.cat(n.unbind(1))).loss, whole)
        torch.testing.assert_close(progressive_info_nce(q, p, n.flatten(0, 1), layout="interleaved").loss, whole)
        assert not torch.isclose(progressive_info_nce(q, p, n.flatten(0, 1), apply_to="hard", hardness=9.0).loss,
                                 progressive_info_nce(q, p, n, apply_to="hard", hardness=9.0).loss)  # fmt: skip


class TestMasks:
    def test_missing_hard_negatives(self):
        """Trap 13: what fills a ragged row up must not matter."""
        q, p, n = batch()
        mask = torch.tensor(
            [[True] * 3, [True, False, False], [False] * 3, [True] * 3, [True, True, False], [True] * 3]
        )
        keep = torch.cat([torch.ones(6, 6, dtype=torch.bool), mask.T.flatten().expand(6, -1)], 1)
        expected = literal(q, p, n, temperature=0.1, keep=keep)
        for filler in (0.0, 5.0):
            filled = torch.where(mask[..., None], n, filler).requires_grad_()
            loss = progressive_info_nce(q, p, filled, temperature=0.1, mask=mask).loss
            torch.testing.assert_close(loss, expected)
            assert gradients(loss, filled)[0][~mask].eq(0).all()

    def test_pairs(self):
        q, p, n = batch()
        keep = torch.rand(6, 24, generator=torch.Generator().manual_seed(1)) > 0.4
        for case in ({"lam": 5.0}, {"lam": 5.0, "normalise": "mean1"}):
            options = {"normalise": case.get("normalise", "none")}
            ours = progressive_info_nce(q, p, n, temperature=0.1, hardness=5.0, mask=keep, **options).loss
            torch.testing.assert_close(ours, literal(q, p, n, temperature=0.1, keep=keep, **case))

    def test_known_positives_by_id_and_hash(self):
        """Trap 15, and false negatives: a candidate with a known id is no negative; the own positive stays."""
        q, p, n = batch(4, 1)
        ids = torch.tensor([[10, 1], [11, 2], [10, 3], [13, 4], [14, -1], [15, 2], [16, 6], [-1, -1]])
        known = torch.tensor([[10, -1, -1], [11, 2, 14], [10, -1, -1], [13, 16, 15]])
        keep = torch.ones(4, 8, dtype=torch.bool)
        for row, columns in ((0, [2]), (1, [4, 5]), (2, [0]), (3, [5, 6])):
            keep[row, columns] = False
        ours = progressive_info_nce(q, p, n, temperature=0.1, candidate_ids=ids, positive_ids=known).loss
        torch.testing.assert_close(ours, literal(q, p, n, temperature=0.1, keep=keep))

    @pytest.mark.parametrize(("strategy", "factor"), [("absolute", None), ("relative", 1.0)])
    @pytest.mark.parametrize("margin", [-0.2, 0.1])
    def test_more_similar_than_the_positive(self, strategy, factor, margin):
        """With a positive of negative cosine, too, a larger margin masks less (trap 9)."""
        q, p, n = batch(seed=3)
        sims = F.normalize(q, dim=1) @ F.normalize(torch.cat([p, *n.unbind(1)]), dim=1).T
        own = sims.diagonal()[:, None]
        assert own.min() < 0 < own.max()
        keep = sims <= own + margin * (own.abs() if factor else 1.0)
        ours = progressive_info_nce(
            q, p, n, temperature=0.1, hardness=5.0, false_negative_margin=margin, margin_strategy=strategy
        ).loss
        torch.testing.assert_close(ours, literal(q, p, n, temperature=0.1, lam=5.0, keep=keep))

    def test_sources(self):
        q, p, n = batch(4, 1)
        sources = torch.tensor([0, 1, 0, 2])
        keep = torch.ones(4, 8, dtype=torch.bool)  # source 0 sees all
        keep[1] = torch.tensor([False, True, False, False] * 2)  # 1 its own
        keep[3] = torch.tensor([False] * 7 + [True])  # 2 none but its hard negative
        ours = progressive_info_nce(q, p, n, temperature=0.1, sources=sources, in_batch=["all", "own", "none"]).loss
        torch.testing.assert_close(ours, literal(q, p, n, temperature=0.1, keep=keep))

    def test_nothing_left(self):
        """Traps 5 and 6: without negatives the loss and its gradient are 0, with and without weights."""
        leaves = [x.requires_grad_() for x in batch(3, 2)]
        for options in ({}, {"hardness": 5.0}, {"hardness": 5.0, "normalise": "mean1"}):
            out = progressive_info_nce(*leaves, mask=torch.zeros(3, 9, dtype=torch.bool), statistics=True, **options)
            assert out.loss.item() == 0
            assert all(g.eq(0).all() for g in gradients(out.loss, *leaves))
            assert out.masked.item() == 1
            assert out.effective_negatives.item() == 0

    def test_one_query_alone_warns(self):
        q, p, _ = batch(1)
        with pytest.warns(UserWarning, match="teaches nothing"):
            assert progressive_info_nce(q, p).loss.item() == 0


class TestNumbers:
    def test_cold_and_saturated(self):
        """Traps 1 and 2: logits of 100 and probabilities that underflow."""
        q = F.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
        out = progressive_info_nce(q, q.detach(), -q.detach()[:, None], temperature=0.01, hardness=5.0)
        (gradient,) = gradients(out.loss, q)
        assert math.isfinite(out.loss.item())
        assert gradient.isfinite().all()

    def test_zero_vectors(self):
        """Trap 14."""
        leaves = [torch.zeros_like(x).requires_grad_() for x in batch()]
        loss = progressive_info_nce(*leaves).loss
        assert loss.item() == pytest.approx(math.log(24))
        assert all(g.isfinite().all() and g.abs().max() < 1e3 for g in gradients(loss, *leaves))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        """Trap 16: cosines in bfloat16 would move logits by 0.2."""
        halves = [x.to(dtype) for x in batch(32, 2, 16, dtype=torch.float32)]
        exact = progressive_info_nce(*(x.double() for x in halves), temperature=0.02, hardness=5.0).loss
        for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
            with context:
                loss = progressive_info_nce(*halves, temperature=0.02, hardness=5.0).loss
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


class TestQueryWeights:
    def test_given(self):
        q, p, n = batch()
        weights = torch.tensor([0.0, 1, 2, 3, 0, 1], dtype=torch.float64)
        ours = progressive_info_nce(q, p, n, temperature=0.1, query_weights=weights).loss
        keep = torch.ones(6, 24, dtype=torch.bool)
        rows = []
        for i in range(6):
            only = torch.zeros(6, dtype=torch.float64)
            only[i] = 1
            rows.append(progressive_info_nce(q, p, n, temperature=0.1, query_weights=only, mask=keep).loss)
        torch.testing.assert_close(ours, (weights * torch.stack(rows)).sum() / weights.sum())

    def test_hard_queries_weigh_more_with_gamma(self):
        q, p, n = batch()
        p = q + 0.5 * p
        singly = torch.stack([
            progressive_info_nce(q, p, n, temperature=0.3, query_weights=torch.eye(6, dtype=torch.float64)[i]).loss
            for i in range(6)
        ])  # fmt: skip
        weights = (1 - torch.exp(-singly)) ** 2
        ours = progressive_info_nce(q, p, n, temperature=0.3, gamma=2.0).loss
        torch.testing.assert_close(ours, (weights * singly).sum() / weights.sum())


class TestFigures:
    def test_weights_and_effective_negatives(self):
        q, p, n = batch()
        keep = torch.rand(6, 24, generator=torch.Generator().manual_seed(1)) > 0.3
        out = progressive_info_nce(q, p, n, temperature=0.1, hardness=5.0, mask=keep, statistics=True)
        sims = F.normalize(q, dim=1) @ F.normalize(torch.cat([p, *n.unbind(1)]), dim=1).T
        negatives = keep.clone()
        negatives[torch.arange(6), torch.arange(6)] = False
        weights = torch.exp(5 * sims) * negatives
        torch.testing.assert_close(out.mean_weight, weights.sum() / negatives.sum())
        torch.testing.assert_close(out.effective_negatives, (weights.sum(1) ** 2 / (weights**2).sum(1)).mean())
        torch.testing.assert_close(out.masked, 1 - negatives.sum() / (6 * 23), check_dtype=False)

    def test_probability_of_the_positive(self):
        q, p, n = batch()
        sims = F.normalize(q, dim=1) @ F.normalize(torch.cat([p, *n.unbind(1)]), dim=1).T
        share = (sims / 0.1).softmax(1).diagonal().mean()
        out = progressive_info_nce(q, p, n, temperature=0.1)
        torch.testing.assert_close(out.positive_probability, share)
        assert out.mean_weight is None


class TestSchedule:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [("linear", [1, 2, 3, 3]), ("cosine", [1, 2, 3, 3]), ("step", [1, 3, 3, 3]), ("constant", [3, 3, 3, 3])],
    )
    def test_shapes(self, shape, expected):
        schedule = HardnessSchedule(1.0, 3.0, 0.8, shape)
        assert [schedule.lam(step, 10) for step in (0, 4, 8, 10)] == pytest.approx(expected)
        assert isinstance(schedule, WeightSchedule)

    def test_cosine_is_slow_at_both_ends(self):
        schedule = HardnessSchedule(0.0, 1.0, 1.0, "cosine")
        assert schedule.lam(1, 10) < 0.05
        assert schedule.lam(9, 10) > 0.95

    def test_steps_must_be_known(self):
        with pytest.raises(ValueError, match="linear hardness needs the number of training steps; got 0"):
            HardnessSchedule().lam(0, 0)
        assert HardnessSchedule(shape="constant").lam(0, 0) == 5.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shape": "quadratic"}, "shape must be one of linear, cosine, step, constant; got 'quadratic'"),
            ({"difficulty": "rank"}, "difficulty must be one of cosine, margin"),
            ({"ramp": 0.0}, "ramp is a share of training, above 0 to 1; got 0.0"),
            ({"ramp": 1.5}, "ramp"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            HardnessSchedule(**options)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
            ({"temperature": -1.0}, "temperature must be above 0"),
            ({"normalise": "sum"}, "normalise must be one of none, mean1"),
            ({"apply_to": "easy"}, "apply_to must be one of all, hard, in_batch"),
            ({"difficulty": "rank"}, "difficulty must be one of cosine, margin"),
            ({"layout": "rows"}, "layout must be one of column, interleaved"),
            ({"margin_strategy": "both"}, "margin_strategy must be one of absolute, relative"),
            ({"mask": torch.ones(6, 5, dtype=torch.bool)}, r"mask must be bool, \(6, 3\).*or \(6, 24\)"),
            ({"mask": torch.ones(6, 3)}, "mask must be bool"),
            ({"candidate_ids": torch.arange(23), "positive_ids": torch.zeros(6, 1).long()}, "candidate_ids .* 24 rows"),
            (
                {"candidate_ids": torch.rand(24), "positive_ids": torch.zeros(6, 1).long()},
                "candidate_ids must be integers",
            ),
            ({"candidate_ids": torch.arange(24), "positive_ids": torch.zeros(5, 1).long()}, "positive_ids .* 6 rows"),
            ({"in_batch": "own"}, "in_batch 'own' needs sources"),
            ({"sources": torch.zeros(6).long(), "in_batch": "some"}, "in_batch must be one of all, own, none"),
            ({"sources": torch.arange(6), "in_batch": ["all"]}, "one such word for each source from 0 to 5"),
            ({"sources": torch.zeros(5).long()}, "sources must be 6 integers"),
            ({"gather": True, "query_weights": torch.ones(6)}, "gather=True is for"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            progressive_info_nce(*batch(), **options)

    def test_shapes(self):
        q, p, n = batch()
        with pytest.raises(ValueError, match=r"positives \(5, 8\) do not fit queries \(6, 8\)"):
            progressive_info_nce(q, p[:5], n)
        with pytest.raises(ValueError, match=r"negatives 1 \(4, 8\) do not fit queries \(6, 8\)"):
            progressive_info_nce(q, p, [n[:, 0], n[:4, 1]])
        with pytest.raises(ValueError, match="7 flat negatives are not the same number for each of 6 queries"):
            progressive_info_nce(q, p, torch.randn(7, 8))
        with pytest.raises(ValueError, match=r"positives \(6, 7\)"):
            progressive_info_nce(q, p[:, :7], n)
        with pytest.raises(ValueError, match="at least one"):
            progressive_info_nce(q[:0], p[:0])

    def test_devices(self):
        q, p, n = batch()
        with pytest.raises(ValueError, match="positives are on meta, queries on cpu"):
            progressive_info_nce(q, p.to("meta"), n)

    def test_not_finite(self):
        q, p, n = batch()
        n[4, 1, 2] = math.nan
        with pytest.raises(ValueError, match="negatives 1 hold NaN or infinity, first in row 4"):
            progressive_info_nce(q, p, n, check_finite=True)


RANK = """
import sys

import torch
import torch.distributed as dist
from peg.loss import progressive_info_nce

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
results = []
for case in torch.load(f"{folder}/cases.pt"):
    mine = slice(4 * rank, 4 * rank + 4)
    weights = case["weights"].clone().requires_grad_()
    q, p, n = (rows[mine] @ weights for rows in case["inputs"])
    tensors = {name: tensor[rank] for name, tensor in case["tensors"].items()}
    out = progressive_info_nce(q, p, n, gather=True, statistics=True, **tensors, **case["options"])
    out.loss.backward()
    dist.all_reduce(weights.grad)
    results.append((out._replace(loss=out.loss.detach()), weights.grad / 2))  # as DistributedDataParallel averages
torch.save([(tuple(out), gradient) for out, gradient in results], f"{folder}/{rank}.pt")
dist.barrier()  # so that neither leaves while the other is talking
dist.destroy_process_group()
"""


def of_ranks(tensor, k=None):
    """Each rank's half of rows of queries; with ``k`` of candidates, whose columns are a rank's own."""
    if k is None:
        return torch.stack(tensor.chunk(2))
    columns = torch.stack(tensor.chunk(1 + k))  # (1 + k, b, ...)
    return torch.stack([half.flatten(0, 1) for half in columns.chunk(2, dim=1)])


def test_two_processes_give_what_one_gives_with_the_whole_batch(tmp_path):
    """Traps 7 and 8, with hard negatives of which some are missing, known positives across ranks, and sources."""
    generator = torch.Generator().manual_seed(0)
    b, k = 8, 3
    inputs, weights = batch(b, k), torch.randn(8, 5, generator=generator, dtype=torch.float64)
    tensors = {
        "mask": torch.rand(b, k, generator=generator) > 0.3,
        "candidate_ids": torch.arange(b * (1 + k)) % 23,
        "positive_ids": torch.randint(0, 23, (b, 2), generator=generator),
        "sources": torch.arange(b) % 3,
    }
    rules = {"in_batch": ["all", "own", "none"]}
    cases = [
        ({"hardness": 5.0, "apply_to": "hard"}, ["mask", "candidate_ids", "positive_ids"]),
        ({"hardness": 5.0, "apply_to": "hard", "normalise": "mean1", **rules}, list(tensors)),
        ({"hardness": 5.0, "difficulty": "margin", "apply_to": "in_batch"}, ["mask"]),
        ({"hardness": -3.0, "false_negative_margin": 0.1, **rules}, ["sources"]),
        ({}, []),
    ]
    torch.save(
        [
            {
                "inputs": inputs, "weights": weights, "options": {"temperature": 0.1, **options},
                "tensors": {name: of_ranks(tensors[name], k if name == "candidate_ids" else None) for name in names},
            }
            for options, names in cases
        ],
        tmp_path / "cases.pt",
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (options, names), *results in zip(cases, *ranks, strict=True):
        leaf = weights.clone().requires_grad_()
        whole = progressive_info_nce(
            *(rows @ leaf for rows in inputs), temperature=0.1, statistics=True, **options,
            **{name: tensors[name] for name in names},
        )  # fmt: skip
        whole.loss.backward()
        for number, figure in enumerate(whole):
            if number != 2:  # mean weights of ranks with other numbers of negatives
                torch.testing.assert_close(
                    sum(out[number] for out, _ in results) / 2, figure.detach(), rtol=0, atol=1e-9, check_dtype=False
                )
        for _, gradient in results:
            torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-9)
