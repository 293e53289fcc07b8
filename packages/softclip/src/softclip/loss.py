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


class SoftClipOutput(NamedTuple):
    """The loss, and what it is made of. Only ``loss`` and ``roi_tag`` have gradients; the rest is for logs.

    Args:
        loss: the weighted sum. soft: L_soft. relation: L_re. clip: L_CLIP, 0 if ``clip_weight`` is. roi_tag: L_CLIP(R, G), 0 if
            its weight is. target_entropy: mean entropy of the softened targets, nats; near 0 they are one-hot again.
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
    _check(given, logit_scale, beta, lam, divergence, guidance, targets, group_ids, roi_valid, tag_valid)
    for name, value in (("clip_weight", clip_weight), ("roi_tag_weight", roi_tag_weight)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if roi_tag_weight and (roi is None or tag is None):
        raise ValueError("roi_tag_weight needs roi and tag features")
    if not detach_targets and (gather or guidance in ("targets", "label_smoothing", "torch_label_smoothing")):
        raise ValueError("detach_targets=False is for one process and guidance by features")
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with torch.autocast(image.device.type, enabled=False):
        v, t = image.to(dtype), text.to(dtype)
        r, g = (None if x is None else x.to(dtype) for x in (roi, tag))
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=v.device)
        target_s = scale.detach() if target_scale is None else scale.new_tensor(target_scale)
        guides = {"self": (v, t), "roi_tag": (r, g), "roi_only": (r, r)}.get(guidance, (None, None))
        valid = (roi_valid, roi_valid if guidance == "roi_only" else tag_valid)
        if guidance not in ("roi_tag", "roi_only"):
            valid = (None, None)
        ids = torch.arange(len(v), device=v.device) if group_ids is None else group_ids
        if gather and group_ids is None and dist.is_initialized():
            ids = ids + dist.get_rank() * len(v)
        of_pairs = (
            info_nce(r, g, scale, symmetric=True, gather=gather)
            if roi_tag_weight and r is not None and g is not None
            else scale.new_zeros(())
        )  # noqa: E501
        if not detach_targets:
            output = _dense(
                v,
                t,
                scale,
                guides,
                valid,
                ids,
                target_s if target_scale is not None else scale,
                beta,
                lam,
                divergence,
                clip_weight,
            )  # noqa: E501
            return output._replace(loss=output.loss + roi_tag_weight * of_pairs, roi_tag=of_pairs)
        (all_v, all_t), _ = gather_features(v, t) if gather else ([v, t], 0)
        (all_ids,), _ = gather_features(ids, with_grad=False) if gather else ([ids], 0)
        loss = roi_tag_weight * of_pairs
        directions = []
        for i, (rows, columns) in enumerate(((v, all_t), (t, all_v))):
            guide = None
            if beta or lam:
                guide = _guide(
                    guidance, guides[i], target_s, ids, all_ids, gather, None if targets is None else targets[i]
                )
            direction = SoftRows(guide, (ids, all_ids), valid[i], beta, lam, clip_weight, divergence)
            weights = rows.new_full((len(rows),), 0.5 / len(rows))
            loss = loss + streamed(rows, columns, scale, direction, weights, None, chunk_size)[0]
            directions.append(direction)
        means = [
            sum(getattr(d, name) for d in directions) / (2 * len(v)) for name in ("soft", "relation", "clip", "entropy")
        ]
    if not torch.isfinite(loss):
        _blame(given)
    return SoftClipOutput(loss, *means[:3], of_pairs, means[3])


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
            return torch.zeros_like(positive, dtype=scale.dtype).masked_fill_(positive, within)

        return smoothing
    rows = features.detach()
    (columns,), _ = gather_features(rows, with_grad=False) if gather else ([rows], 0)
    return lambda part: (rows[part] * scale) @ columns.T


def _dense(
    v: Tensor, t: Tensor, scale: Tensor, guides: tuple[Tensor | None, Tensor | None], valid: tuple[Tensor | None, Tensor | None],
    ids: Tensor, target_scale: Tensor, beta: float, lam: float, divergence: str, clip_weight: float,
) -> SoftClipOutput:  # fmt: skip
    """The same loss with whole matrices, through which gradients reach the targets."""
    positive = ids.unsqueeze(1) == ids
    hard = positive / positive.sum(1, keepdim=True).to(v.dtype)
    sums = []
    for logits, guide, has in ((scale * v @ t.T, guides[0], valid[0]), (scale * t @ v.T, guides[1], valid[1])):
        assert guide is not None
        similarity = target_scale * guide @ guide.T
        soft = torch.ones(len(v), 1, dtype=v.dtype, device=v.device) if has is None else has.unsqueeze(1).to(v.dtype)
        log_t = soften(torch.log_softmax(similarity, 1), beta * soft, positive)
        one_hot = soft.squeeze(1) * beta == 0

        def distance(logits: Tensor, log_t: Tensor, one_hot: Tensor) -> Tensor:
            if divergence == "ce":
                return -torch.where(log_t == -torch.inf, 0.0, log_t.exp() * torch.log_softmax(logits, 1)).sum(1)
            kl = soft_kl(logits, log_target=log_t, reduction="none")
            if divergence == "kl":
                return kl
            safe = log_t.masked_fill(one_hot.unsqueeze(1), 0.0)
            return torch.where(one_hot, kl, soft_kl(logits, log_target=safe, symmetric=True, reduction="none"))

        some = ~positive.all(1) & (soft.squeeze(1) > 0)
        negatives = logits.masked_fill(positive, -torch.inf)
        relation = distance(negatives[some], negatives_log_softmax(similarity, positive)[some], one_hot[some] & False)
        entropy = -torch.where(log_t == -torch.inf, 0.0, log_t.exp() * log_t).sum(1)
        clip = soft_cross_entropy(logits, hard, reduction="none")
        sums.append(torch.stack([x.sum() for x in (distance(logits, log_t, one_hot), relation, clip, entropy)]))
    soft_mean, relation, clip, entropy = (sums[0] + sums[1]) / (2 * len(v))
    loss = soft_mean + lam * relation + clip_weight * clip
    return SoftClipOutput(
        loss, soft_mean.detach(), relation.detach(), clip.detach(), loss.new_zeros(()), entropy.detach()
    )


class SoftClipLoss(nn.Module):
    """:func:`softclip_loss` where open_clip's ``ClipLoss`` stands: the same constructor's arguments, and a forward that takes what
    a model returns.

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
        _check_options(beta, lam, divergence, guidance)
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
    preds: Float[Tensor, "n d"], targets: Float[Tensor, "n d"], temp: float = 0.125, detach_target: bool = False
) -> Float[Tensor, ""]:
    r"""MindEye's ``soft_clip_loss`` (Scotti et al. 2023), which fMRI decoding calls SoftCLIP: the target of each row is how like
    the frozen teacher's embeddings are to each other.

    .. math:: A = p q^T / temp, \quad B = \mathrm{softmax}(q q^T / temp), \quad
        L = \tfrac12 \operatorname{mean}_i \bigl[ \mathrm{CE}(B_i, A_i) + \mathrm{CE}(B_i, (A^T)_i) \bigr]

    Unlike :func:`softclip_loss` it has no hard target, no relation term, and no learnt temperature.

    Args:
        preds: p, what is learnt. targets: q, embeddings of a frozen teacher. Normalise both first, as for the original.
        temp: > 0; MindEye raises it from 0.004 to 0.0075 as it trains.
        detach_target: True: no gradient passes into B (the original lets it pass, which matters if ``targets`` is trained).

    Raises:
        ValueError: for shapes that differ, fewer than 2 rows, or a temp that is not positive.
    """
    if preds.shape != targets.shape or preds.dim() != 2 or len(preds) < 2:
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


def _check_options(beta: float, lam: float, divergence: str, guidance: str) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is a share, 0 to 1; got {beta}")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam must be >= 0, got {lam}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance must be one of {', '.join(GUIDANCE)}; got {guidance!r}")
    if beta == 1 and guidance == "label_smoothing":
        raise ValueError("beta 1 with label_smoothing leaves nothing to the positive: take beta < 1")


def _check(
    given: dict[str, Tensor | None],
    logit_scale: float | Tensor,
    beta: float,
    lam: float,
    divergence: str,
    guidance: str,
    targets: tuple[Tensor, Tensor] | None,
    group_ids: Tensor | None,
    roi_valid: Tensor | None,
    tag_valid: Tensor | None,
) -> None:
    _check_options(beta, lam, divergence, guidance)
    image, text = given["image"], given["text"]
    assert image is not None and text is not None
    n = len(image)
    if image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} features must have the same shape")
    if n < 2:
        raise ValueError(
            f"need at least 2 pairs, got {n}: a pair alone has no negatives; use drop_last for a short last batch"
        )
    if n == 2 and lam and group_ids is None:
        warnings.warn("with 2 pairs each has one negative, and the relation term is 0", stacklevel=3)
    if (beta or lam) and guidance in ("roi_tag", "roi_only"):
        missing = [name for name in ("roi", "tag")[: 1 if guidance == "roi_only" else 2] if given[name] is None]
        if missing:
            raise ValueError(
                f"guidance {guidance!r} needs {' and '.join(missing)} features: give them, or take guidance 'self'"
                + (", or 'roi_only'" if missing == ["tag"] else "")
            )
    if (guidance == "targets") != (targets is not None):
        raise ValueError("guidance 'targets' and the argument targets go together")
    if targets is not None:
        for matrix in targets:
            if matrix.shape[:1] != (n,) or ((matrix.sum(1) - 1).abs() > 1e-3).any():
                raise ValueError(
                    f"targets {tuple(matrix.shape)} must have a row for each of {n} pairs, which sums to 1"
                )
            if divergence == "symmetric_kl" and (matrix <= 0).any():
                raise ValueError("targets with zeros make symmetric_kl infinite: take divergence 'kl'")
    for name, flags in (("group_ids", group_ids), ("roi_valid", roi_valid), ("tag_valid", tag_valid)):
        if flags is not None and flags.shape != (n,):
            raise ValueError(f"{name} {tuple(flags.shape)} must have one number for each of {n} pairs")
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
        valid = {"roi": roi_valid, "tag": tag_valid}.get(name)
        if valid is not None:
            lengths = lengths[valid]
        if len(lengths) and not (lengths - 1).abs().max() < 0.05:
            if not torch.isfinite(lengths).all():
                _blame(given)
            low, high = lengths.min().item(), lengths.max().item()
            warnings.warn(
                f"rows of {name} features have lengths {low:.3g} to {high:.3g}, not 1: normalise them "
                "(torch.nn.functional.normalize(x, dim=1, eps=1e-6))",
                stacklevel=3,
            )


def _blame(given: dict[str, Tensor | None]) -> None:
    for name, rows in given.items():
        if rows is not None and not torch.isfinite(rows).all():
            raise ValueError(f"{name} features hold NaN or infinite numbers")
