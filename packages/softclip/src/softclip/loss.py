"""SoftCLIP's loss (Gao et al., AAAI 2024): softened targets, and the negatives by themselves.

The paper's full text was not at hand: what is written here is our reading of the method, from its abstract, a public reading
note, and the same authors' code of PyramidCLIP. Each choice that is ours is an argument.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from papercore.ops import gather_features, info_nce, negatives_log_softmax, soft_cross_entropy, soft_kl, soften
from papercore.ops._streaming import streamed
from torch import Tensor, nn

from softclip._rows import Guide, SoftRows

DIVERGENCES = ("symmetric_kl", "kl", "ce")
GUIDANCE = ("roi_tag", "roi_only", "self", "label_smoothing", "torch_label_smoothing", "targets")


# Features whose similarities guide one direction, and bool (n), which of the rows have them (None: all).
_Guided = tuple[Tensor | None, Tensor | None]


class SoftClipOutput(NamedTuple):
    """The loss, and what it is made of. Only ``loss`` and ``roi_tag`` have gradients; the rest is for logs.

    Args:
        loss: the weighted sum. soft: L_soft. relation: L_re. clip: L_CLIP. roi_tag: L_CLIP(R, G). A term whose weight is 0 is 0.
        target_entropy: mean entropy of the softened targets, nats; near 0 they are one-hot again.

    >>> rows = torch.eye(3)
    >>> output = softclip_loss(rows, rows, 2.0, rows, rows, beta=0.3)
    >>> output.target_entropy, bool(output.loss == output.soft + output.relation)
    (tensor(0.2819), True)
    """

    loss: Tensor
    soft: Tensor
    relation: Tensor
    clip: Tensor
    roi_tag: Tensor
    target_entropy: Tensor


def softclip_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "text_n text_d"],
    logit_scale: float | Float[Tensor, ""],
    roi: Float[Tensor, "roi_n roi_d"] | None = None,
    tag: Float[Tensor, "tag_n tag_d"] | None = None,
    *,
    beta: float = 0.3,
    lam: float = 1.0,
    divergence: str = "symmetric_kl",
    guidance: str = "roi_tag",
    target_scale: float | None = None,
    clip_weight: float = 0.0,
    roi_tag_weight: float = 0.0,
    roi_valid: Bool[Tensor, " roi_rows"] | None = None,
    tag_valid: Bool[Tensor, " tag_rows"] | None = None,
    group_ids: Int[Tensor, " ids"] | None = None,
    targets: tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]] | None = None,
    detach_targets: bool = True,
    gather: bool = False,
    chunk_size: int | None = None,
) -> SoftClipOutput:
    r"""L = L_soft + lam L_re + clip_weight L_CLIP + roi_tag_weight L_CLIP(R, G), in memory O(chunk x n), backward included.

    With V, T, R, G the features of images, texts, regions and tags, s the scale, P(A) the softmax of the rows of A and N(A) the
    same without the positives:

    .. math:: L_{soft} = \tfrac12 \operatorname{mean}_i \bigl[ D((1-\beta) I + \beta P(s_t R R^T), P(s V T^T))_i
        + D((1-\beta) I + \beta P(s_t G G^T), P(s T V^T))_i \bigr]

    .. math:: L_{re} = \tfrac12 \operatorname{mean}_i \bigl[ D(N(s_t R R^T), N(s V T^T))_i + D(N(s_t G G^T), N(s T V^T))_i \bigr]

    Args:
        image, text: V and T, with rows of length 1; any floating type, computed in float32 at least. n >= 2.
        logit_scale: s = 1 / temperature, after exponentiation.
        roi, tag: R and G, with rows of length 1; their widths need be neither d nor equal.
        beta: weight of the similarities in the target, 0 to 1 (the paper's value is unknown; ours: 0.3).
        lam: weight of the relation between negatives, >= 0 (the paper's is unknown; ours: 1).
        divergence: D(p, q), p the target. "kl": KL(p‖q); "ce": the same without the target's entropy; "symmetric_kl":
            ½ [KL(p‖q) + KL(q‖p)] (whether the paper halves is unknown). Where a target is one-hot, KL(q‖p) is infinite, and
            D is the cross-entropy, so that beta = lam = 0 is CLIP.
        guidance: where similarities come from. "roi_tag": R R^T for images, G G^T for texts. "roi_only": R R^T for both.
            "self": V V^T and T T^T. "targets": the matrices given by ``targets``. "label_smoothing": beta shared by the n - 1
            negatives; "torch_label_smoothing": by all n, as PyTorch does.
        target_scale: s_t. None: s, without its gradient. As s grows the targets become one-hot: then fix it.
        clip_weight: of CLIP's own loss. roi_tag_weight: of CLIP's loss between R and G, by which trained encoders of regions
            and tags learn.
        roi_valid, tag_valid: bool (n), False: nothing was found in that image; its target is one-hot.
        group_ids: int (n), pairs with the same number are positives of each other and share the hard target equally, such as
            several captions of one image.
        targets: P for the images' rows and for the texts' rows, (n, columns) each; they sum to 1. With ``gather`` the columns
            are those of all ranks.
        detach_targets: False lets gradients pass into the targets (ours: no); takes O(n^2) memory, one process.
        gather: columns of all ranks. The mean of the ranks' losses is the loss of the global batch, and the average of their
            gradients is its gradient.
        chunk_size: rows formed at a time; None: as suits the processor's cache.

    Raises:
        ValueError: for fewer than 2 pairs, shapes that do not fit, numbers outside their range, NaN or infinite features (it
            names the tensor), or guidance that lacks its features.

    Example:
        >>> rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]]), dim=1)
        >>> softclip_loss(rows, rows, 10.0, rows, rows, target_scale=10.0).relation
        tensor(0.)
    """
    given = {"image": image, "text": text, "roi": roi, "tag": tag}
    world = dist.get_world_size() if gather and dist.is_initialized() else 1
    _check_options(beta, lam, divergence, guidance, clip_weight, roi_tag_weight)
    _check_features(given, {"group_ids": group_ids, "roi_valid": roi_valid, "tag_valid": tag_valid}, logit_scale)
    _check_guidance(given, guidance, targets, divergence, len(image) * world, beta or lam, roi_tag_weight)
    if not detach_targets and (gather or guidance in ("targets", "label_smoothing", "torch_label_smoothing")):
        raise ValueError("detach_targets=False is for one process and guidance by features")
    if len(image) * world == 2 and lam and group_ids is None:
        warnings.warn("with 2 pairs each has one negative, and the relation term is 0", stacklevel=2)
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        v, t = image.to(dtype), text.to(dtype)
        r, g = (None if x is None else x.to(dtype) for x in (roi, tag))
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=v.device)
        target_s = scale if target_scale is None else scale.new_tensor(target_scale)
        guides: dict[str, tuple[_Guided, _Guided]] = {
            "self": ((v, None), (t, None)),
            "roi_tag": ((r, roi_valid), (g, tag_valid)),
            "roi_only": ((r, roi_valid), (r, roi_valid)),
        }
        guided = guides.get(guidance, ((None, None), (None, None)))
        ids = torch.arange(len(v), device=v.device) if group_ids is None else group_ids
        if world > 1 and group_ids is None:
            ids = ids + dist.get_rank() * len(v)
        of_pairs = scale.new_zeros(())
        if roi_tag_weight and r is not None and g is not None:
            of_pairs = info_nce(r, g, scale, symmetric=True, gather=gather)
        loss = roi_tag_weight * of_pairs
        if not detach_targets:
            output = _dense(v, t, scale, guided, ids, target_s, beta, lam, divergence, clip_weight)
            return output._replace(loss=output.loss + loss, roi_tag=of_pairs)
        (all_v, all_t), _ = gather_features(v, t) if gather else ([v, t], 0)
        (all_ids,), _ = gather_features(ids, with_grad=False) if gather else ([ids], 0)
        weights = v.new_full((len(v),), 0.5 / len(v))
        directions = []
        for i, (rows, columns) in enumerate(((v, all_t), (t, all_v))):
            (features, valid), guide = guided[i], None
            if beta or lam:
                target = None if targets is None else targets[i]
                guide = _guide(guidance, features, target_s.detach(), ids, all_ids, gather, target)
            direction = SoftRows(guide, (ids, all_ids), valid, beta, lam, clip_weight, divergence)
            loss = loss + streamed(rows, columns, scale, direction, weights, None, chunk_size)[0]
            directions.append(direction)
        soft, relation, clip, entropy = (
            sum(getattr(d, name) for d in directions) / (2 * len(v)) for name in ("soft", "relation", "clip", "entropy")
        )
    if not torch.isfinite(loss):
        _blame(given)
    return SoftClipOutput(loss, soft, relation, clip, of_pairs, entropy)


def _guide(
    guidance: str,
    features: Tensor | None,
    scale: Tensor,
    ids: Tensor,
    all_ids: Tensor,
    gather: bool,
    target: Tensor | None,
) -> Guide:
    """The logits of some rows' similarities, without gradients."""
    if target is not None:
        return lambda part: target[part].detach().to(scale).log()
    if features is None:
        within = 0.0 if guidance == "torch_label_smoothing" else -torch.inf

        def smoothing(part: slice) -> Tensor:
            positive = ids[part].unsqueeze(1) == all_ids
            positive &= ~positive.all(1, keepdim=True)  # without negatives there is nobody to share with
            return torch.zeros_like(positive, dtype=scale.dtype).masked_fill_(positive, within)

        return smoothing
    rows = features.detach()
    (columns,), _ = gather_features(rows, with_grad=False) if gather else ([rows], 0)
    return lambda part: (rows[part] * scale) @ columns.T


def _dense(
    v: Tensor,
    t: Tensor,
    scale: Tensor,
    guided: tuple[_Guided, _Guided],
    ids: Tensor,
    target_scale: Tensor,
    beta: float,
    lam: float,
    divergence: str,
    clip_weight: float,
) -> SoftClipOutput:
    """The same loss with whole matrices, through which gradients reach the targets."""
    positive = ids.unsqueeze(1) == ids
    hard = positive / positive.sum(1, keepdim=True).to(v.dtype)
    sums = []
    for logits, (guide, valid) in ((scale * v @ t.T, guided[0]), (scale * t @ v.T, guided[1])):
        assert guide is not None
        similarity = target_scale * guide @ guide.T
        has = positive.new_ones(len(v)) if valid is None else valid
        soft = beta * has.unsqueeze(1).to(v.dtype)
        log_t = soften(torch.log_softmax(similarity, 1), soft, positive)
        some = ~positive.all(1) & has
        negatives = logits.masked_fill(positive, -torch.inf)[some]
        relation = _distance(negatives, negatives_log_softmax(similarity, positive)[some], divergence)
        distance = torch.where(
            soft.squeeze(1) > 0,
            _distance(logits, log_t.masked_fill(soft == 0, 0.0), divergence),
            _distance(logits, hard.log(), "ce" if divergence == "ce" else "kl"),
        )
        constant = log_t.detach()
        entropy = -torch.where(constant == -torch.inf, 0.0, constant.exp() * constant).sum(1)
        clip = soft_cross_entropy(logits, hard, reduction="none")
        sums.append(torch.stack([x.sum() for x in (distance, relation, clip, entropy)]))
    distance, relation, clip, entropy = (sums[0] + sums[1]) / (2 * len(v))
    loss, none = distance + lam * relation + clip_weight * clip, entropy.new_zeros(())
    terms = (distance, relation if lam else none, clip if clip_weight else none, none, entropy)
    return SoftClipOutput(loss, *(term.detach() for term in terms))


def _distance(logits: Tensor, log_target: Tensor, divergence: str) -> Tensor:
    """D(target, softmax(logits)) of each row."""
    if divergence == "ce":
        log_q = torch.log_softmax(logits, 1).masked_fill(log_target == -torch.inf, 0.0)
        return -(log_target.exp() * log_q).sum(1)
    symmetric = divergence == "symmetric_kl"
    return soft_kl(logits, log_target=log_target, symmetric=symmetric, reduction="none")


class SoftClipLoss(nn.Module):
    """:func:`softclip_loss` where open_clip's ``ClipLoss`` stands: the same constructor's arguments, and a forward that takes
    what a model returns.

    With ``guidance="roi_tag"`` and neither ``roi_features`` nor ``tag_features`` in a call, images and texts guide themselves, as
    with "self".

    Args:
        beta, lam, divergence, guidance, target_scale, clip_weight, roi_tag_weight, chunk_size, detach_targets: see
            :func:`softclip_loss`.
        local_loss: True: each rank's value is the loss of its own rows; False: it is that of all rows. The gradients that
            data-parallel training averages are the same, and exact.
        gather_with_grad: as open_clip's; False is refused with ``local_loss``, which would lose terms of the gradient. Without
            ``local_loss`` it changes nothing (in open_clip it divides the features' gradient by the number of ranks).
        cache_labels, rank, use_horovod: accepted, because open_clip passes them; nothing is cached, and Horovod is refused.
        world_size: more than 1: columns are gathered from all ranks.

    Example:
        >>> loss = SoftClipLoss(beta=0.2, target_scale=10.0)
        >>> rows = torch.eye(4)
        >>> sorted(loss(rows, rows, torch.tensor(10.0), output_dict=True))
        ['contrastive_loss']
    """

    def __init__(
        self,
        beta: float = 0.3,
        lam: float = 1.0,
        divergence: str = "symmetric_kl",
        *,
        guidance: str = "roi_tag",
        target_scale: float | None = None,
        clip_weight: float = 0.0,
        roi_tag_weight: float = 0.0,
        chunk_size: int | None = None,
        detach_targets: bool = True,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        _check_options(beta, lam, divergence, guidance, clip_weight, roi_tag_weight)
        if use_horovod:
            raise ValueError("use_horovod: this loss gathers by torch.distributed alone")
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                "local_loss without gather_with_grad loses the gradient that other ranks' rows give to this rank's features: "
                "set gather_with_grad=True (--gather-with-grad)"
            )
        self.options: dict[str, Any] = {
            "beta": beta, "lam": lam, "divergence": divergence, "guidance": guidance, "target_scale": target_scale,
            "clip_weight": clip_weight, "roi_tag_weight": roi_tag_weight, "chunk_size": chunk_size,
            "detach_targets": detach_targets,
        }  # fmt: skip
        self.local_loss, self.world_size = local_loss, world_size
        self.latest: SoftClipOutput | None = None  # of the latest call, for logs

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        roi_features: Tensor | None = None,
        tag_features: Tensor | None = None,
        roi_valid: Tensor | None = None,
        tag_valid: Tensor | None = None,
        group_ids: Tensor | None = None,
        output_dict: bool = False,
        **_: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss; or with ``output_dict`` its weighted terms, which sum to it (open_clip sums what it gets).

        ``logit_bias`` is the same for all pairs and changes no softmax.
        """
        options = dict(self.options)
        if options["guidance"] == "roi_tag" and roi_features is None and tag_features is None:
            options |= {"guidance": "self", "roi_tag_weight": 0.0}
        output = softclip_loss(
            image_features, text_features, logit_scale, roi_features, tag_features, roi_valid=roi_valid, tag_valid=tag_valid,
            group_ids=group_ids, gather=self.world_size > 1, **options,
        )  # fmt: skip
        loss = output.loss
        if self.world_size > 1 and not self.local_loss:
            value = loss.detach().clone()
            dist.all_reduce(value)
            loss = loss + (value / self.world_size - loss.detach())
        self.latest = SoftClipOutput(*(x.detach() for x in output))
        if not output_dict:
            return loss
        pairs = options["roi_tag_weight"] * output.roi_tag
        terms = {"contrastive_loss": loss - pairs}
        return terms | ({"roi_tag_loss": pairs} if options["roi_tag_weight"] else {})


def frozen_teacher_soft_clip_loss(
    preds: Float[Tensor, "n d"],
    targets: Float[Tensor, "targets_n targets_d"],
    temp: float = 0.125,
    detach_target: bool = False,
) -> Float[Tensor, ""]:
    r"""MindEye's ``soft_clip_loss`` (Scotti et al. 2023), which fMRI decoding calls SoftCLIP: the target of each row is how like
    the frozen teacher's embeddings are to each other.

    .. math:: A = p q^T / temp, \quad B = \mathrm{softmax}(q q^T / temp), \quad
        L = \tfrac12 \operatorname{mean}_i \bigl[ \mathrm{CE}(B_i, A_i) + \mathrm{CE}(B_i, (A^T)_i) \bigr]

    Unlike :func:`softclip_loss` it has no hard target, no relation term, and no learnt temperature.

    Args:
        preds: p, what is learnt. targets: q, embeddings of a frozen teacher. Normalise both first, as for the original.
        temp: > 0.
        detach_target: True: no gradient passes into B (the original lets it pass, which matters if ``targets`` is trained).

    Raises:
        ValueError: for shapes that differ, fewer than 2 rows, or a temp that is not positive.

    Example:
        >>> teacher = torch.eye(3)
        >>> frozen_teacher_soft_clip_loss(teacher, teacher) < frozen_teacher_soft_clip_loss(teacher.roll(1, 0), teacher)
        tensor(True)
    """
    if preds.shape != targets.shape or len(preds) < 2:
        raise ValueError(
            f"preds {tuple(preds.shape)} and targets {tuple(targets.shape)} must both be (n, d) with n of at least 2"
        )
    if not temp > 0:
        raise ValueError(f"temp must be positive, got {temp}")
    with torch.autocast(preds.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(preds.dtype, targets.dtype), torch.float32)
        p, q = preds.to(dtype), targets.to(dtype)
        similarity = torch.softmax((q.detach() @ q.detach().T if detach_target else q @ q.T) / temp, 1)
        logits = p @ q.T / temp
        return (soft_cross_entropy(logits, similarity) + soft_cross_entropy(logits.T, similarity)) / 2


def _check_options(
    beta: float, lam: float, divergence: str, guidance: str, clip_weight: float, roi_tag_weight: float
) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is a share, 0 to 1; got {beta}")
    for name, value in (("lam", lam), ("clip_weight", clip_weight), ("roi_tag_weight", roi_tag_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance must be one of {', '.join(GUIDANCE)}; got {guidance!r}")
    if beta == 1 and guidance == "label_smoothing":
        raise ValueError("beta 1 with label_smoothing leaves nothing to the positive: take beta < 1")


def _check_features(
    given: dict[str, Tensor | None], of_pairs: dict[str, Tensor | None], logit_scale: float | Tensor
) -> None:
    image, text = given["image"], given["text"]
    assert image is not None
    assert text is not None
    n = len(image)
    if image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} features must have the same shape")
    if n < 2:
        raise ValueError(
            f"need at least 2 pairs, got {n}: a pair alone has no negatives; use drop_last for a short last batch"
        )
    for name, numbers in of_pairs.items():
        if numbers is not None and numbers.shape != (n,):
            raise ValueError(f"{name} {tuple(numbers.shape)} must have one number for each of {n} pairs")
    scale = float(torch.as_tensor(logit_scale).detach())
    if not 0 < scale < math.inf:
        raise ValueError(f"logit_scale must be positive and finite, got {scale}: pass it after exponentiation")
    if scale < 1:
        warnings.warn(f"logit_scale is {scale:.3g}, below 1: is it still a logarithm? pass its exp()", stacklevel=3)
    for name, rows in given.items():
        if rows is None:
            continue
        if rows.dim() != 2 or len(rows) != n:
            raise ValueError(f"{name} features {tuple(rows.shape)} must have a row for each of {n} pairs")
        lengths = torch.linalg.vector_norm(rows.detach().float(), dim=1)
        valid = of_pairs.get(f"{name}_valid")
        if valid is not None:
            lengths = lengths[valid]
        if len(lengths) and not (lengths - 1).abs().max() < 0.05:
            _blame(given)
            warnings.warn(
                f"rows of {name} features have lengths {lengths.min():.3g} to {lengths.max():.3g}, not 1: normalise them "
                "(torch.nn.functional.normalize(x, dim=1, eps=1e-6))",
                stacklevel=3,
            )


def _check_guidance(
    given: dict[str, Tensor | None],
    guidance: str,
    targets: tuple[Tensor, Tensor] | None,
    divergence: str,
    columns: int,
    guided: float,
    roi_tag_weight: float,
) -> None:
    needed = {"roi_tag": ("roi", "tag"), "roi_only": ("roi",)}.get(guidance, ())
    missing = [name for name in needed if guided and given[name] is None]
    if missing:
        raise ValueError(
            f"guidance {guidance!r} needs {' and '.join(missing)} features: give them, or take guidance 'self'"
            + (", or 'roi_only'" if missing == ["tag"] else "")
        )
    if roi_tag_weight and (given["roi"] is None or given["tag"] is None):
        raise ValueError("roi_tag_weight needs roi and tag features")
    if (guidance == "targets") != (targets is not None):
        raise ValueError("guidance 'targets' and the argument targets go together")
    n = len(given["image"])  # type: ignore[arg-type]
    for matrix in targets or ():
        if matrix.shape != (n, columns):
            raise ValueError(
                f"targets {tuple(matrix.shape)} must be {n} x {columns}: rows of pairs, columns of all ranks' pairs"
            )
        if not ((matrix >= 0).all() and ((matrix.sum(1) - 1).abs() <= 1e-3).all()):
            raise ValueError("each row of targets must be probabilities, which sum to 1")
        if divergence == "symmetric_kl" and (matrix == 0).any():
            raise ValueError("targets with zeros make symmetric_kl infinite: take divergence 'kl'")


def _blame(given: dict[str, Tensor | None]) -> None:
    for name, rows in given.items():
        if rows is not None and not torch.isfinite(rows).all():
            raise ValueError(f"{name} features hold NaN or infinite numbers")
