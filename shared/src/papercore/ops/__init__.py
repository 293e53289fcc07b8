"""Tensor operations that more than one paper needs; torch only."""

from papercore.ops.contrastive import info_nce
from papercore.ops.device import autocast_dtype, full_precision, peak_memory, pick_device, seed_everything
from papercore.ops.distributed import gather_features
from papercore.ops.memory_bank import MemoryBank
from papercore.ops.pairwise import pairwise_lp
from papercore.ops.soft_targets import negatives_log_softmax, soft_cross_entropy, soft_kl, soften
from papercore.ops.transport import (
    SinkhornResult,
    balanced_assignment,
    sinkhorn,
    sinkhorn_cost,
    sinkhorn_divergence,
)

__all__ = [
    "MemoryBank",
    "SinkhornResult",
    "autocast_dtype",
    "balanced_assignment",
    "full_precision",
    "gather_features",
    "info_nce",
    "negatives_log_softmax",
    "pairwise_lp",
    "peak_memory",
    "pick_device",
    "seed_everything",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_divergence",
    "soft_cross_entropy",
    "soft_kl",
    "soften",
]
