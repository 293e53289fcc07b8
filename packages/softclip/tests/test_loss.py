"""The loss against golden values, a literal version, open_clip, limits, and its promised errors."""

import math
import warnings

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from papercore.ops import peak_memory
from papercore.ops._streaming import streamed
from softclip import SoftClipLoss, frozen_teacher_soft_clip_loss, softclip_loss
from softclip._rows import SoftRows
from tiny_clip import MODES, NUMBERS, OF_RANKS, dense, features, golden, literal, run_rank
from torch.testing import assert_close

PATHS = [{"chunk_size": None}, {"chunk_size": 1}, {"chunk_size": 4}, {"detach_targets": False}]


def scale_of(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def gradients(loss, *leaves):
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, found, strict=True)]


def same(ours, theirs, *leaves, rtol=1e-9, atol=1e-12):
    assert_close(ours, theirs, rtol=rtol, atol=atol)
    for mine, other in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        assert_close(mine, other, rtol=rtol, atol=atol)


def case_of(name, dtype=torch.float64):
    case = golden(name)
    inputs = [case[key].to(dtype).requires_grad_() for key in ("image", "text", "roi", "tag")]
    options = {key: case[key] for key in ("beta", "lam", "target_scale")}
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return case, inputs, scale_of(case["logit_scale"], exact), options


class TestGolden:
    @pytest.mark.parametrize("name", ["softclip_small", "softclip_33"])
    @pytest.mark.parametrize("divergence", ["kl", "symmetric_kl", "ce"])
    @pytest.mark.parametrize("path", PATHS, ids=str)
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
    )
    def test_values_and_gradients(self, name, divergence, path, dtype, tolerance):
        case, (v, t, r, g), s, options = case_of(name, dtype)
        # The golden gradients have constant targets; without detachment the guides take theirs, and these remain.
        output = softclip_loss(v, t, s, r, g, divergence=divergence, **options, **path)
        assert output.loss.dtype == s.dtype
        for value, key in ((output.loss, "L_total"), (output.soft, "L_soft"), (output.relation, "L_re")):
            assert float(value.detach()) == pytest.approx(case[f"{divergence}/{key}"], rel=tolerance)
        with_clip = softclip_loss(v, t, s, r, g, clip_weight=1.0, **path).clip
        assert float(with_clip) == pytest.approx(case["L_clip"], rel=tolerance)
        if divergence != "ce":
            for grad, key in zip(gradients(output.loss, v, t, s), ("image", "text", "logit_scale"), strict=True):
                expected = torch.as_tensor(case[f"{divergence}/grad_{key}"], dtype=torch.float64)
                assert_close(grad.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))

    @pytest.mark.parametrize("name", ["softclip_small", "softclip_33"])
    def test_each_direction(self, name):
        case, (v, t, r, g), s, options = case_of(name)
        groups = (torch.arange(len(v)),) * 2

        def of(kind, rows, columns, guide):
            rule = SoftRows(
                lambda part: (options["target_scale"] * guide[part] @ guide.T).detach(), groups, None,
                options["beta"], options["lam"], 0.0, kind,
            )  # fmt: skip
            streamed(rows, columns, s, rule, rows.new_ones(len(rows)), None, 4)
            return torch.stack([rule.soft, rule.relation]) / len(rows)

        for name, rows, columns, guide in (("v2t", v, t, r), ("t2v", t, v, g)):
            found = {kind: of(kind, rows, columns, guide) for kind in ("kl", "symmetric_kl", "ce")}
            found["rkl"] = 2 * found["symmetric_kl"] - found["kl"]
            for kind, (soft, relation) in found.items():
                assert float(soft) == pytest.approx(case[f"{kind}/soft_{name}"], rel=1e-10)
                assert float(relation) == pytest.approx(case[f"{kind}/re_{name}"], rel=1e-10)

    @pytest.mark.parametrize("chunk_size", [None, 5])
    def test_clip_and_label_smoothing(self, chunk_size):
        case = golden("core_contrastive")
        v, t, s = case["image"].requires_grad_(), case["text"].requires_grad_(), scale_of(case["logit_scale"])
        loss = softclip_loss(v, t, s, beta=0.0, lam=0.0, chunk_size=chunk_size).loss
        assert loss.item() == pytest.approx(case["infonce"], rel=1e-10)
        for grad, key in zip(gradients(loss, v, t, s), ("image", "text", "scale"), strict=True):
            assert_close(
                grad, torch.as_tensor(case[f"infonce_grad_{key}"], dtype=torch.float64), rtol=1e-10, atol=1e-12
            )
        rule = SoftRows(
            lambda part: torch.zeros_like(case["dense_target"])[part],
            (torch.arange(33),) * 2,
            None,
            0.1,
            0.0,
            0.0,
            "ce",
        )
        streamed(v, t, s, rule, v.new_ones(33), None, chunk_size)
        assert float(rule.soft / 33) == pytest.approx(case["ls_image_to_text_0p1"], rel=1e-10)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    def test_frozen_teacher(self, dtype, tolerance):
        case = golden("frozen_teacher")
        preds, teacher = case["preds"].to(dtype).requires_grad_(), case["targs"].to(dtype).requires_grad_()
        loss = frozen_teacher_soft_clip_loss(preds, teacher, case["temp"])
        assert loss.item() == pytest.approx(case["loss"], rel=tolerance)
        assert_close(gradients(loss, preds)[0], case["grad_preds"].to(dtype), rtol=tolerance, atol=tolerance)


FOUND = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
TAGGED = torch.tensor([1, 0, 1, 1, 1, 0, 1]).bool()
GROUPS = torch.tensor([0, 1, 2, 0, 1, 0, 3])
EVERY = {"roi_valid": FOUND, "tag_valid": TAGGED, "group_ids": GROUPS}
BY_FEATURES = [
    {}, {"beta": 0.0}, {"beta": 1.0}, {"lam": 0.0}, {"target_scale": 2.0}, {"guidance": "roi_only"}, {"guidance": "self"},
    {"clip_weight": 0.7, "roi_tag_weight": 0.4}, {"roi_valid": FOUND, "tag_valid": TAGGED}, {"group_ids": GROUPS},
    {"guidance": "roi_only", **EVERY}, {**EVERY, "clip_weight": 0.5, "beta": 1.0}, {"group_ids": torch.zeros(7).long()},
]  # fmt: skip
BY_RULE = [
    {"guidance": "label_smoothing", "beta": 0.1}, {"guidance": "torch_label_smoothing", "beta": 0.1},
    {"guidance": "label_smoothing", "group_ids": GROUPS}, {"guidance": "torch_label_smoothing", "group_ids": GROUPS},
    {"guidance": "label_smoothing", "group_ids": torch.zeros(7).long()}, {"guidance": "targets", "lam": 0.5},
    {"guidance": "targets", "group_ids": GROUPS},
]  # fmt: skip


class TestDefinition:
    def check(self, case, divergence, path):
        v, t, r, g = features()
        s = scale_of(6.0)
        options = {**case, "divergence": divergence}
        if case.get("guidance") == "targets":
            options["targets"] = tuple(torch.softmax(3 * (x @ x.T).detach(), 1) for x in features(seed=1)[:2])
        ours = softclip_loss(v, t, s, r, g, **options, **path)
        detach = path.get("detach_targets", True)
        loss, terms = literal(v, t, s, r, g, **options, detach_targets=detach)
        same(ours.loss, loss, v, t, s, r, g)
        for name, value in (("soft", ours.soft), ("relation", ours.relation), ("entropy", ours.target_entropy)):
            assert float(value) == pytest.approx(float(terms[name].detach()), rel=1e-9, abs=1e-9), name
        if "clip_weight" in case:
            assert float(ours.clip) == pytest.approx(float(terms["clip"].detach()), rel=1e-9)

    @pytest.mark.parametrize("divergence", ["symmetric_kl", "kl", "ce"])
    @pytest.mark.parametrize("case", BY_FEATURES, ids=str)
    def test_guided_by_features(self, case, divergence):
        for path in ({"chunk_size": 3}, {"detach_targets": False}):
            self.check(case, divergence, path)

    @pytest.mark.parametrize("divergence", ["symmetric_kl", "kl", "ce"])
    @pytest.mark.parametrize("case", BY_RULE, ids=str)
    def test_guided_by_a_rule(self, case, divergence):
        self.check(case, divergence, {"chunk_size": 3})

    @pytest.mark.parametrize("divergence", ["symmetric_kl", "kl", "ce"])
    def test_gradcheck(self, divergence):
        v, t, r, g = features(3, 2)
        s, options = scale_of(4.0), {"divergence": divergence, "clip_weight": 0.5, "roi_tag_weight": 0.5}

        def constant(v, t, s):
            return softclip_loss(v, t, s, r.detach(), g.detach(), target_scale=3.0, chunk_size=3, **options).loss

        def through(*x):
            return softclip_loss(*x, detach_targets=False, **options).loss

        assert torch.autograd.gradcheck(constant, (v, t, s))
        assert torch.autograd.gradcheck(through, (v, t, s, r, g))

    def test_second_derivatives_are_refused(self):
        v, t, r, g = features()
        with pytest.raises(RuntimeError, match="no second derivative: leave out create_graph"):
            torch.autograd.grad(softclip_loss(v, t, 6.0, r, g).loss, v, create_graph=True)

    def test_targets_are_constants_unless_asked(self):
        v, t, r, g = features()
        assert not any(x.any() for x in gradients(softclip_loss(v, t, 6.0, r, g).loss, r, g))
        assert all(x.any() for x in gradients(softclip_loss(v, t, 6.0, r, g, detach_targets=False).loss, r, g))

    @pytest.mark.parametrize("beta", [0.05, 0.9])
    def test_renormalised_negatives_of_the_soft_target_are_those_of_the_guide(self, beta):
        """Beta drops out of the relation term."""
        v, t, r, g = features()
        softened = []
        for x in (r, g):
            target = (1 - beta) * torch.eye(7) + beta * torch.softmax(6 * x @ x.T, 1)
            target = target.detach().fill_diagonal_(1e-300)  # any mass of the positive is left out
            softened.append(target / target.sum(1, keepdim=True))
        given = softclip_loss(v, t, 6.0, guidance="targets", targets=tuple(softened), beta=0.5).relation
        assert_close(softclip_loss(v, t, 6.0, r, g, beta=beta).relation, given, rtol=1e-12, atol=0)

    def test_a_relation_to_a_target_without_negatives_is_0(self):
        v, t, _, _ = features()
        eye = (torch.eye(7, dtype=torch.float64),) * 2
        ours = softclip_loss(v, t, 6.0, guidance="targets", targets=eye, divergence="kl")
        same(ours.loss, ClipLoss()(v, t, 6.0), v, t)
        assert ours.relation == 0


class TestPeers:
    @pytest.mark.parametrize("path", PATHS, ids=str)
    @pytest.mark.parametrize("divergence", ["symmetric_kl", "kl", "ce"])
    def test_without_beta_and_lam_it_is_open_clips(self, path, divergence):
        v, t, r, g = features()
        s = scale_of(20.0)
        loss = softclip_loss(v, t, s, r, g, beta=0.0, lam=0.0, divergence=divergence, **path).loss
        same(loss, ClipLoss()(v, t, s), v, t, s)
        only_clip = softclip_loss(v, t, s, r, g, beta=0.0, lam=0.0, clip_weight=1.0, **path)
        same(only_clip.loss, 2 * ClipLoss()(v, t, s), v, t, s)

    def test_torchs_label_smoothing(self):
        v, t, _, _ = features()
        s, a, n = scale_of(6.0), 0.1, 7

        def smoothed(share):
            logits, own = s * v @ t.T, torch.arange(n)
            return sum(F.cross_entropy(x, own, label_smoothing=share) for x in (logits, logits.T)) / 2

        options = {"beta": a, "lam": 0.0, "divergence": "ce"}
        same(softclip_loss(v, t, s, guidance="torch_label_smoothing", **options).loss, smoothed(a), v, t, s)
        # Shared by n - 1 negatives, it is PyTorch's with a share that is larger by n / (n - 1).
        same(softclip_loss(v, t, s, guidance="label_smoothing", **options).loss, smoothed(a * n / (n - 1)), v, t, s)

    def test_torchs_kl_div(self):
        """F.kl_div takes (log q, p), and means over rows by batchmean alone."""
        v, t, r, g = features()
        p_r, p_g = (torch.softmax(6 * x @ x.T, 1).detach() for x in (r, g))
        expected = sum(
            F.kl_div((6 * a @ b.T).log_softmax(1), p, reduction="batchmean") for a, b, p in ((v, t, p_r), (t, v, p_g))
        )
        ours = softclip_loss(v, t, 6.0, r, g, beta=1.0, lam=0.0, divergence="kl").loss
        same(ours, expected / 2, v, t)

    def test_texts_have_the_tags_rows_and_not_the_regions_columns(self):
        """Section 8: a row-softmax of a symmetric matrix is not symmetric."""
        v, t, r, g = features()
        p_r, p_g = (torch.softmax(6 * x @ x.T, 1).detach() for x in (r, g))
        options = {"guidance": "targets", "divergence": "kl"}
        loss = softclip_loss(v, t, 6.0, r, g, divergence="kl").loss
        assert_close(softclip_loss(v, t, 6.0, targets=(p_r, p_g), **options).loss, loss)
        turned = p_r.T / p_r.T.sum(1, keepdim=True)
        assert abs(softclip_loss(v, t, 6.0, targets=(p_r, turned), **options).loss - loss) > 1e-3

    @pytest.mark.parametrize("detach", [False, True])
    def test_frozen_teacher_detaches_if_asked(self, detach):
        p, q, _, _ = features()
        logits, target = p @ q.T / 0.1, torch.softmax(q @ q.T / 0.1, 1)
        target = target.detach() if detach else target
        expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        same(frozen_teacher_soft_clip_loss(p, q, 0.1, detach_target=detach), expected, p, q)

    def test_frozen_teacher_refuses(self):
        p, q, _, _ = features()
        with pytest.raises(ValueError, match=r"preds \(7, 5\) and targets \(6, 5\)"):
            frozen_teacher_soft_clip_loss(p, q[:6])
        with pytest.raises(ValueError, match="n of at least 2"):
            frozen_teacher_soft_clip_loss(p[:1], q[:1])
        with pytest.raises(ValueError, match="temp must be positive, got 0"):
            frozen_teacher_soft_clip_loss(p, q, 0.0)


def test_memory_is_that_of_a_chunk():
    """Section 9: at most 0.3 of whole matrices with autograd, at 4096 pairs."""
    given = features(4096, 16, dtype=torch.float32)
    v, t, r, g = given[0], given[1], given[2].detach(), given[3].detach()
    s = scale_of(20.0, torch.float32)
    with peak_memory() as whole:
        expected = dense(v, t, s, r, g, 0.3, 0.5, 10.0)
        theirs = gradients(expected, v, t, s)
    with peak_memory() as ours:
        loss = softclip_loss(v, t, s, r, g, lam=0.5, target_scale=10.0).loss
        mine = gradients(loss, v, t, s)
    assert ours.bytes < 0.3 * whole.bytes
    assert_close(loss, expected, rtol=1e-5, atol=0)
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


class TestTraps:
    @pytest.mark.parametrize("path", [{}, {"detach_targets": False}], ids=str)
    @pytest.mark.parametrize("divergence", ["symmetric_kl", "kl", "ce"])
    def test_scale_100_on_identical_features(self, path, divergence):
        """p_ii rounds to 1, so that p / (1 - p_ii) would be 0 / 0; e^-100 is no float32."""
        v, _t, _r, _g = features(8, 16, dtype=torch.float32)
        given = [v.detach().requires_grad_() for _ in range(4)]
        output = softclip_loss(*given[:2], 100.0, *given[2:], divergence=divergence, **path)
        assert all(torch.isfinite(x).all() for x in (output.loss, *gradients(output.loss, *given)))
        double = softclip_loss(*(x.double() for x in given[:2]), 100.0, *(x.double() for x in given[2:]),
                               divergence=divergence, **path)  # fmt: skip
        assert_close(output.relation.double(), double.relation, rtol=1e-3, atol=1e-5)
        if divergence == "symmetric_kl":
            assert output.relation < 1e-5

    @pytest.mark.parametrize("path", [{}, {"detach_targets": False}], ids=str)
    def test_targets_far_below_float32_still_have_logarithms(self, path):
        """Symmetric KL of a target e^-200: about 200 nats where the prediction is uniform, not infinite."""
        line = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(2, 1)
        flat = torch.tensor([[0.0, 1.0]]).expand(4, 2).clone().requires_grad_()
        output = softclip_loss(flat, flat, 1.0, line, line, target_scale=100.0, **path)
        expected, _ = literal(flat.double(), flat.double(), 1.0, line.double(), line.double(), target_scale=100.0)
        assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
        assert torch.isfinite(gradients(output.loss, flat)[0]).all()

    @pytest.mark.parametrize("path", [{}, {"detach_targets": False}], ids=str)
    def test_zero_rows_and_duplicate_rows(self, path):
        v, t, r, g = features(dtype=torch.float32)
        with torch.no_grad():
            v[1], t[2], r[3], g[4] = v[0], t[0], r[0], g[0]
            r[5], g[6] = 0.0, 0.0
        with pytest.warns(UserWarning, match="rows of (roi|tag) features have lengths 0 to 1, not 1: normalise them"):
            loss = softclip_loss(v, t, 50.0, r, g, **path).loss
        assert all(torch.isfinite(x).all() for x in (loss, *gradients(loss, v, t, r, g)))
        expected, _ = literal(*(x.double() for x in (v, t)), 50.0, *(x.double() for x in (r, g)))
        assert_close(loss.double(), expected, rtol=1e-5, atol=0)

    def test_regions_that_are_not_there_may_be_zero_without_a_warning(self):
        v, t, r, g = features()
        with torch.no_grad():
            r[~FOUND] = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            softclip_loss(v, t, 6.0, r, g, roi_valid=FOUND)

    def test_autocast_and_bfloat16_are_computed_in_float32(self):
        half = [x.detach().bfloat16() for x in features(16, 32)]
        plain = softclip_loss(*half[:2], 100.0, *half[2:]).loss
        with torch.autocast("cpu", torch.bfloat16):
            inside = softclip_loss(*half[:2], 100.0, *half[2:]).loss
            dense_inside = softclip_loss(*half[:2], 100.0, *half[2:], detach_targets=False).loss
        assert plain.dtype == inside.dtype == torch.float32
        assert torch.equal(plain, inside)
        exact = softclip_loss(*(x.double() for x in half[:2]), 100.0, *(x.double() for x in half[2:])).loss
        assert_close(plain.double(), exact, rtol=1e-5, atol=0)
        assert_close(dense_inside.double(), exact, rtol=1e-5, atol=0)

    def test_a_growing_scale_hardens_targets_unless_theirs_is_fixed(self):
        v, t, r, g = features()
        entropy = [softclip_loss(v, t, s, r, g).target_entropy for s in (5.0, 100.0)]
        assert entropy[1] < entropy[0] - 0.1
        assert entropy[1] < 0.1
        fixed = [softclip_loss(v, t, s, r, g, target_scale=5.0).target_entropy for s in (5.0, 100.0)]
        assert fixed == [entropy[0]] * 2

    def test_a_tensor_scale_gets_the_gradient_of_predictions_alone(self):
        v, t, r, g = features()
        s = scale_of(6.0)
        by_s = gradients(softclip_loss(v, t, s, r, g).loss, s)
        assert_close(by_s, gradients(softclip_loss(v, t, s, r, g, target_scale=6.0).loss, s))

    def test_two_pairs_have_one_negative_each(self):
        v, t, r, g = features(2)
        with pytest.warns(UserWarning, match="with 2 pairs each has one negative"):
            output = softclip_loss(v, t, 6.0, r, g)
        assert output.relation == 0
        assert all(torch.isfinite(x).all() for x in gradients(output.loss, v, t))

    def test_a_scale_below_1_may_be_a_logarithm(self):
        v, t, r, g = features()
        with pytest.warns(UserWarning, match="logit_scale is 0.5, below 1: is it still a logarithm"):
            softclip_loss(v, t, 0.5, r, g)

    def test_rows_that_nobody_normalised(self):
        v, t, r, g = features()
        with pytest.warns(UserWarning, match="rows of text features have lengths 3 to 3, not 1: normalise them"):
            softclip_loss(v, 3 * t, 6.0, r, g)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize(("which", "name"), enumerate(["image", "text", "roi", "tag"]))
    def test_not_finite(self, bad, which, name):
        given = [x.detach() for x in features()]
        given[which][4, 2] = bad
        with pytest.raises(ValueError, match=f"{name} features hold NaN or infinite numbers"):
            softclip_loss(*given[:2], 6.0, *given[2:])

    def test_not_finite_where_nothing_was_found(self):
        v, t, r, g = (x.detach() for x in features())
        r[2] = math.nan
        with pytest.raises(ValueError, match="roi features hold NaN"):
            softclip_loss(v, t, 6.0, r, g, roi_valid=FOUND)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"beta": -0.1}, "beta is a share, 0 to 1; got -0.1"),
            ({"beta": 1.1}, "beta is a share"),
            ({"beta": math.nan}, "beta is a share"),
            ({"lam": -1.0}, "lam must be >= 0, got -1.0"),
            ({"lam": math.inf}, "lam must be >= 0"),
            ({"clip_weight": -1.0}, "clip_weight must be >= 0"),
            ({"roi_tag_weight": math.nan}, "roi_tag_weight must be >= 0"),
            ({"divergence": "js"}, "divergence must be one of symmetric_kl, kl, ce; got 'js'"),
            ({"guidance": "both"}, "guidance must be one of roi_tag, .*; got 'both'"),
            ({"guidance": "label_smoothing", "beta": 1.0}, "leaves nothing to the positive"),
            ({"guidance": "targets"}, "go together"),
            ({"targets": (torch.eye(7), torch.eye(7))}, "go together"),
            ({"guidance": "label_smoothing", "detach_targets": False}, "for one process and guidance by features"),
            ({"gather": True, "detach_targets": False}, "for one process and guidance by features"),
            ({"group_ids": torch.arange(6)}, r"group_ids \(6,\) must have one number for each of 7 pairs"),
            ({"roi_valid": torch.ones(6).bool()}, r"roi_valid \(6,\)"),
            ({"tag_valid": torch.ones(8).bool()}, r"tag_valid \(8,\)"),
        ],
    )
    def test_options(self, options, message):
        v, t, r, g = features()
        with pytest.raises(ValueError, match=message):
            softclip_loss(v, t, 6.0, r, g, **options)

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
    def test_scale(self, scale):
        v, t, r, g = features()
        with pytest.raises(ValueError, match=r"logit_scale must be positive and finite, got .*after exponentiation"):
            softclip_loss(v, t, scale, r, g)

    def test_shapes(self):
        v, t, r, g = features()
        for one, other in ((v, t[:6]), (v, t[:, :4])):
            with pytest.raises(ValueError, match=r"image \(7, 5\) and text \(., .\) features must have the same shape"):
                softclip_loss(one, other, 6.0, r, g)
        with pytest.raises(ValueError, match=r"roi features \(6, 5\) must have a row for each of 7 pairs"):
            softclip_loss(v, t, 6.0, r[:6], g)
        with pytest.raises(ValueError, match="tag features"):
            softclip_loss(v, t, 6.0, r, g[:6])
        softclip_loss(v, t, 6.0, F.normalize(r[:, :2], dim=1), g)  # guides have widths of their own
        for n in (0, 1):
            with pytest.raises(ValueError, match=f"need at least 2 pairs, got {n}: .*drop_last"):
                softclip_loss(v[:n], t[:n], 6.0, r[:n], g[:n])

    def test_guides_that_are_missing(self):
        v, t, r, g = features()
        with pytest.raises(ValueError, match=r"'roi_tag' needs tag features: give them, or .*'self', or 'roi_only'"):
            softclip_loss(v, t, 6.0, r)
        with pytest.raises(ValueError, match="needs roi features: give them, or take guidance 'self'"):
            softclip_loss(v, t, 6.0, None, g)
        with pytest.raises(ValueError, match="needs roi and tag features"):
            softclip_loss(v, t, 6.0)
        with pytest.raises(ValueError, match="'roi_only' needs roi"):
            softclip_loss(v, t, 6.0, None, g, guidance="roi_only")
        with pytest.raises(ValueError, match="roi_tag_weight needs roi and tag"):
            softclip_loss(v, t, 6.0, guidance="self", roi_tag_weight=1.0)

    def test_targets(self):
        v, t, _, _ = features()
        flat = torch.full((7, 7), 1 / 7, dtype=torch.float64)
        negative = flat.clone()
        negative[0, 0], negative[0, 1] = -1 / 7, 3 / 7
        for wrong, message in (
            (flat[:6], r"targets \(6, 7\) must be 7 x 7"),
            (flat[:, :6], r"targets \(7, 6\) must be 7 x 7"),
            (2 * flat, "which sum to 1"),
            (flat * math.nan, "which sum to 1"),
            (negative, "must be probabilities"),
            (torch.eye(7), "zeros make symmetric_kl infinite: take divergence 'kl'"),
        ):
            with pytest.raises(ValueError, match=message):
                softclip_loss(v, t, 6.0, guidance="targets", targets=(wrong, wrong))


class TestModule:
    def test_it_is_the_function(self):
        v, t, r, g = features()
        options = {
            "beta": 0.2,
            "lam": 0.5,
            "divergence": "kl",
            "target_scale": 4.0,
            "clip_weight": 0.1,
            "roi_tag_weight": 0.3,
        }
        module = SoftClipLoss(**options, chunk_size=2)
        loss = module(v, t, scale_of(6.0), None, r, g, FOUND, TAGGED, GROUPS)
        valid = {"roi_valid": FOUND, "tag_valid": TAGGED, "group_ids": GROUPS}
        same(loss, softclip_loss(v, t, 6.0, r, g, **options, **valid).loss, v, t, r, g)

    @pytest.mark.parametrize("weight", [0.0, 0.3])
    def test_what_open_clip_sums_is_the_loss(self, weight):
        v, t, r, g = features()
        s, module = scale_of(6.0), SoftClipLoss(roi_tag_weight=weight, clip_weight=0.2)
        given = {
            "roi_features": r,
            "tag_features": g,
            "roi_boxes": None,
            "epoch": 3,
        }  # it passes on all that a model returns
        terms = module(v, t, s, output_dict=True, **given)
        assert set(terms) == {"contrastive_loss"} | ({"roi_tag_loss"} if weight else set())
        same(sum(terms.values()), module(v, t, s, **given), v, t, s, r, g)
        if weight:
            assert_close(terms["roi_tag_loss"], weight * ClipLoss()(r, g, s))
        assert not module.latest.loss.requires_grad
        assert_close(module.latest.loss, sum(terms.values()).detach())

    def test_a_bias_changes_nothing(self):
        v, t, r, g = features()
        module, bias = SoftClipLoss(), torch.tensor(-10.0)
        assert torch.equal(module(v, t, scale_of(6.0), bias, r, g), module(v, t, scale_of(6.0), None, r, g))
        assert bias == -10  # nor is it changed

    def test_images_and_texts_guide_themselves_where_nothing_else_does(self):
        v, t, r, _ = features()
        expected = softclip_loss(v, t, 6.0, guidance="self").loss
        assert_close(SoftClipLoss(roi_tag_weight=1.0)(v, t, scale_of(6.0)), expected)
        with pytest.raises(ValueError, match="needs tag features"):
            SoftClipLoss()(v, t, scale_of(6.0), roi_features=r)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"beta": 2.0}, "beta is a share"),
            ({"lam": -1.0}, "lam must be >= 0"),
            ({"clip_weight": -1.0}, "clip_weight must be >= 0"),
            ({"divergence": "l2"}, "divergence must be one of"),
            ({"use_horovod": True}, "use_horovod"),
            ({"local_loss": True, "world_size": 2}, "local_loss without gather_with_grad loses the gradient"),
        ],
    )
    def test_wrong_options_are_refused_at_once(self, options, message):
        with pytest.raises(ValueError, match=message):
            SoftClipLoss(**options)

    def test_open_clips_arguments_are_taken(self):
        SoftClipLoss(
            local_loss=True, gather_with_grad=False, cache_labels=True, rank=0, world_size=1, use_horovod=False
        )


def test_two_processes_give_what_one_gives_with_the_whole_batch(tmp_path):
    mp.spawn(run_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    (first, message), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert "drop_last" in message
    found = iter(zip(first, second, strict=True))

    def agrees(loss, leaves, local):
        (value, grads), (other_value, other_grads) = next(found)
        assert_close((value + other_value) / 2, loss.detach())
        assert torch.isclose(value, other_value, rtol=1e-12, atol=0) != local
        for mine, other, expected in zip(grads, other_grads, gradients(loss, *leaves), strict=True):
            assert_close(mine, expected, rtol=1e-10, atol=1e-12)
            assert_close(other, expected, rtol=1e-10, atol=1e-12)

    def whole():
        leaves = [*features(6), scale_of(6.0)]
        return leaves, (*leaves[:2], leaves[4], *leaves[2:4])

    for options, names in OF_RANKS:
        for mode in MODES:
            leaves, inputs = whole()
            loss = softclip_loss(*inputs, **options, **{name: NUMBERS[name] for name in names}).loss
            agrees(loss, leaves, mode.get("local_loss", False))
    leaves, inputs = whole()
    targets = tuple(torch.softmax(2 * (x @ x.T).detach(), 1) for x in leaves[2:4])
    agrees(softclip_loss(*inputs[:3], guidance="targets", targets=targets).loss, leaves, True)
