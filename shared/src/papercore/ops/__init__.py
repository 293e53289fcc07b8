"""Tensor operations that more than one paper needs; torch only."""

from papercore.ops.contrastive import info_nce as info_nce
from papercore.ops.device import autocast_dtype as autocast_dtype
from papercore.ops.device import full_precision as full_precision
from papercore.ops.device import peak_memory as peak_memory
from papercore.ops.device import pick_device as pick_device
from papercore.ops.device import seed_everything as seed_everything
from papercore.ops.distributed import gather_features as gather_features
from papercore.ops.memory_bank import MemoryBank as MemoryBank
from papercore.ops.pairwise import pairwise_lp as pairwise_lp
from papercore.ops.soft_targets import negatives_log_softmax as negatives_log_softmax
from papercore.ops.soft_targets import soft_cross_entropy as soft_cross_entropy
from papercore.ops.soft_targets import soft_kl as soft_kl
from papercore.ops.soft_targets import soften as soften
from papercore.ops.transport import SinkhornResult as SinkhornResult
from papercore.ops.transport import balanced_assignment as balanced_assignment
from papercore.ops.transport import sinkhorn as sinkhorn
from papercore.ops.transport import sinkhorn_cost as sinkhorn_cost
from papercore.ops.transport import sinkhorn_divergence as sinkhorn_divergence
