"""The frozen language model: loaded as its checkpoint is, with gradients that pass through it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, T5Config
from transformers.modeling_layers import GradientCheckpointingLayer

from mmict.checkpoints import PARTS, quiet_loading, read_tensors


def is_seq2seq(lm: Any) -> bool:
    """Whether a language model is an encoder-decoder; otherwise it is decoder-only."""
    return bool(lm.config.is_encoder_decoder)


def load_lm(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A pretrained language model, frozen and in eval mode.

    Args:
        name: folder, or Hub name, of an encoder-decoder (FLAN-T5) or decoder-only model (OPT, Llama); or of BLIP-2 or
            InstructBLIP, whose language model is taken.
        dtype: of its weights. None: float32 (official).

    Raises:
        ValueError: for T5 in float16, which overflows; for a checkpoint that lacks weights; or if the model's table of outputs or
            of inputs is not the checkpoint's: transformers 5 ties the two of every T5, FLAN-T5's too, unless a checkpoint with
            two overrules it. OSError: if it is not found.
    """
    config = AutoConfig.from_pretrained(name)
    how: dict[str, Any] = {}
    if part := config.model_type in PARTS:
        config = config.text_config
        how = {"key_mapping": {r"^language_model\.": ""}}
    dtype = dtype or torch.float32
    if dtype == torch.float16 and "t5" in config.model_type:
        raise ValueError(f"{name}: T5 overflows in float16; load it in bfloat16 or float32")
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with quiet_loading():
        lm, info = auto.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **how)
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights of the language model, such as {sorted(info['missing_keys'])[0]}")
    check_tables(lm, name, "language_model." if part else "")
    frozen: PreTrainedModel = lm.eval().requires_grad_(False)
    return frozen


def check_tables(lm: PreTrainedModel, name: str, prefix: str = "") -> None:
    """Compare a model's ``lm_head`` and ``shared`` with those of its checkpoint, where this has them in safetensors.

    Raises:
        ValueError: if one differs, because it was tied to another.
    """
    try:
        tables = read_tensors(name, *(f"{prefix}{table}.weight" for table in ("lm_head", "shared")))
    except OSError:
        return
    for key, theirs in tables.items():
        ours = lm.get_parameter(key.removeprefix(prefix))
        if not torch.equal(ours, theirs.to(ours)):
            raise ValueError(
                f"{name}: {key} of the loaded model is not the checkpoint's; transformers tied it to another table. Load it with "
                "transformers 5.23 or newer"
            )


def untied_t5(config: T5Config) -> T5Config:
    """The same config, for a T5 whose outputs have a table of their own, as FLAN-T5's: transformers 5 ties them whatever the
    constructor is told. Outputs are then not scaled.

    >>> config = T5Config(tie_word_embeddings=False)
    >>> config.tie_word_embeddings, untied_t5(config).tie_word_embeddings
    (True, False)
    """
    config.tie_word_embeddings = False
    config.scale_decoder_outputs = False
    return config


def add_lora(lm: PreTrainedModel, rank: int, alpha: float, targets: list[str] | None = None) -> Any:
    """Trainable low-rank adapters on a frozen language model, which changes; a ``peft.PeftModel``.

    Args:
        rank: of each adapter. alpha: its output is scaled by alpha / rank.
        targets: ends of the names of the layers that get one. None: peft's choice for this kind of model.

    Raises:
        ValueError: without peft, or if it has no choice for this model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("LoRA needs peft: pip install 'mmict[lora]'") from None
    return get_peft_model(lm, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)).eval()  # type: ignore[arg-type]


def checkpoint_layers(lm: nn.Module) -> None:
    """Keep only each layer's input for the backward pass, and compute the layer again there: less memory, more time.

    transformers' own switch does nothing in eval mode, in which a frozen model must be; and reentrant checkpoints would cut the
    gradient of rows that come from elsewhere.

    Raises:
        ValueError: if the model has no layers that can be computed again.
    """
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(lm).__name__} has no layers for gradient checkpointing; train without it")
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    without_cache = {"past_key_values": None, "use_cache": False}  # a second pass would add to it again
    kwargs |= {name: value for name, value in without_cache.items() if name in kwargs}
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
