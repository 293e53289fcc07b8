"""Tensor operations that more than one paper needs; torch only."""

from papercore.ops.device import autocast_dtype, peak_memory, pick_device, seed_everything

__all__ = ["autocast_dtype", "peak_memory", "pick_device", "seed_everything"]
