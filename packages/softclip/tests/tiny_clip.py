"""Features, small towers, and the loss written row by row, for the tests of the method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from softclip.loss import SoftClipLoss, softclip_loss

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """The arrays of a golden case; scalars as numbers."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) if arrays[key].shape else arrays[key].item() for key in arrays}


def features(n=7, dim=5, seed=0, dtype=torch.float64):
    """Of images, texts, regions, tags: correlated, with rows of length 1."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, n, dim, generator=generator, dtype=torch.float64)
    return [F.normalize(base + x, dim=1).to(dtype).requires_grad_() for x in noise]


def literal(
    v, t, s, r=None, g=None, *, beta=0.3, lam=1.0, divergence="symmetric_kl", guidance="roi_tag", target_scale=None,
    clip_weight=0.0, roi_tag_weight=0.0, roi_valid=None, tag_valid=None, group_ids=None, targets=None, detach_targets=True,
):  # fmt: skip
    """The definition, pair by pair, with probabilities and not their logarithms: loss, L_soft, L_re, L_CLIP, mean entropy."""
    n = len(v)
    groups = list(range(n)) if group_ids is None else group_ids.tolist()
    s_t = s if target_scale is None else target_scale
    guides = {"self": (v, t), "roi_tag": (r, g), "roi_only": (r, r)}.get(guidance)
    valid = (roi_valid, roi_valid if guidance == "roi_only" else tag_valid)

    def distance(p, q, one_hot=False):
        kl = sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True) if a > 0)
        if divergence == "kl" or (divergence == "symmetric_kl" and one_hot):
            return kl
        if divergence == "ce":
            return -sum(a * b.log() for a, b in zip(p, q, strict=True) if a > 0)
        return (kl + sum(b * (b.log() - a.log()) for a, b in zip(p, q, strict=True))) / 2

    def similarity(direction, i, among):
        if targets is not None:
            row = targets[direction][i]
        elif guides is None:
            others = [0.0 if guidance == "label_smoothing" and groups[j] == groups[i] else 1.0 for j in range(n)]
            others = others if any(others) else [1.0] * n
            row = torch.tensor(others, dtype=v.dtype)
        else:
            guide = guides[direction]
            row = torch.exp(s_t * (guide @ guide[i] - 1))
        row = (row.detach() if detach_targets else row)[among]
        return row / row.sum()

    terms = dict.fromkeys(("soft", "relation", "clip", "entropy"), 0.0)
    for direction, (rows, columns) in enumerate(((v, t), (t, v))):
        for i in range(n):
            share = beta
            if guides is not None and valid[direction] is not None and not valid[direction][i]:
                share = 0.0
            positive = torch.tensor([groups[j] == groups[i] for j in range(n)])
            q = torch.softmax(s * (columns @ rows[i]), 0)
            hard = positive.to(v.dtype) / positive.sum()
            target = (1 - share) * hard
            if share:
                target = target + share * similarity(direction, i, slice(None))
            terms["soft"] += distance(target, q, one_hot=not share)
            terms["clip"] += -(hard * q.log()).sum()
            terms["entropy"] += -sum(a * a.log() for a in target if a > 0)
            usable = guides is None or valid[direction] is None or valid[direction][i]
            if lam and usable and not positive.all():
                negatives = torch.softmax(s * (columns @ rows[i])[~positive], 0)
                terms["relation"] += distance(similarity(direction, i, ~positive), negatives)
    terms = {name: torch.as_tensor(total) / (2 * n) for name, total in terms.items()}
    loss = terms["soft"] + lam * terms["relation"] + clip_weight * terms["clip"]
    if roi_tag_weight:
        own = torch.arange(n)
        loss = loss + roi_tag_weight * sum(F.cross_entropy(s * a @ b.T, own) for a, b in ((r, g), (g, r))) / 2
    return loss, terms


def dense(v, t, s, r, g, beta, lam, s_t):
    """What one writes first, of symmetric KL: whole matrices of n x n, and autograd."""
    n, total = len(v), 0.0
    eye = torch.eye(n, dtype=torch.bool)
    for logits, guide in ((s * v @ t.T, r), (s * t @ v.T, g)):
        log_p = torch.log_softmax(s_t * guide @ guide.T, 1)
        log_t = torch.where(eye, torch.log(1 - beta + beta * log_p.exp()), log_p + torch.tensor(beta).log())
        log_q = torch.log_softmax(logits, 1)
        log_n, log_m = (torch.log_softmax(x.masked_fill(eye, -1e4), 1) for x in (s_t * guide @ guide.T, logits))
        for (a, b), weight in (((log_t, log_q), 1.0), ((log_n, log_m), lam)):
            total = total + weight * ((a.exp() - b.exp()) * (a - b)).sum() / (4 * n)
    return total


OF_RANKS = [  # options of the loss, then which numbers of pairs go with them; groups cross ranks
    ({}, ()),
    ({"divergence": "kl", "roi_tag_weight": 0.5, "clip_weight": 0.3}, ("roi_valid", "tag_valid")),
    ({"guidance": "self", "target_scale": 3.0}, ("group_ids",)),
    ({"guidance": "label_smoothing", "divergence": "ce"}, ("group_ids",)),
    ({"beta": 0.0, "lam": 0.0}, ()),
]
NUMBERS = {
    "group_ids": torch.tensor([0, 1, 2, 3, 1, 0]),
    "roi_valid": torch.tensor([1, 1, 0, 1, 1, 0]).bool(),
    "tag_valid": torch.tensor([1, 0, 1, 1, 1, 1]).bool(),
}
MODES = [{"local_loss": True, "gather_with_grad": True}, {"gather_with_grad": True}, {}]


def run_rank(rank, store, folder):
    """One of two processes, with half of the batch: values and the gradients that data-parallel training averages."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half, found = slice(3 * rank, 3 * rank + 3), []

    def step(loss_of):
        inputs = features(6)
        scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
        loss = loss_of([x[half] for x in inputs], scale)
        total = sum(loss.values()) if isinstance(loss, dict) else loss
        total.backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*inputs, scale)]
        for grad in grads:
            dist.all_reduce(grad)
        return total.detach(), [grad / 2 for grad in grads]

    for options, names in OF_RANKS:
        for mode in MODES:
            module = SoftClipLoss(**options, **mode, rank=rank, world_size=2)
            own = {name: NUMBERS[name][half] for name in names}
            found.append(
                step(lambda x, s, module=module, own=own: module(*x[:2], s, None, *x[2:], **own, output_dict=bool(own)))
            )
    targets = [torch.softmax(2 * (x @ x.T).detach(), 1)[half] for x in features(6)[2:]]
    found.append(
        step(lambda x, s: softclip_loss(*x[:2], s, guidance="targets", targets=tuple(targets), gather=True).loss)
    )
    message = ""
    try:
        uneven = [x[: 2 + rank] for x in features(6)]
        SoftClipLoss(**MODES[0], world_size=2)(*uneven[:2], torch.tensor(6.0), None, *uneven[2:])
    except ValueError as error:
        message = str(error)
    torch.save((found, message), f"{folder}/{rank}.pt")
    dist.barrier()  # so that neither leaves while the other is talking
    dist.destroy_process_group()
