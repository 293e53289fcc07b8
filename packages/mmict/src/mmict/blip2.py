"""A start from BLIP-2 or InstructBLIP, as transformers keeps them: encoder, hub, language model and tokenizers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils.hub import cached_file

from mmict.checkpoints import PARTS, read_tensors
from mmict.hub import MHub, MHubConfig
from mmict.lm import load_lm
from mmict.vision import VisionEncoder, load_vision

NAMES = {  # in these checkpoints, and in the hub
    "vision_model.post_layernorm.": "norm.",
    "qformer.layernorm.": "qformer.embeddings.layernorm.",
    "language_projection.": "proj.",
}
BERT = "bert-base-uncased"  # its vocabulary is that of the Q-Former, which has one token more, [DEC]
TEXT = ("embeddings.word_embeddings", "embeddings.position_embeddings", ".intermediate.dense", ".output.dense", ".output.LayerNorm")


def from_blip2(
    name: str, *, bert: str | None = None, dtype: torch.dtype | None = None
) -> tuple[VisionEncoder, MHub, PreTrainedModel, Any, Any]:
    """The parts of a Blip2ForConditionalGeneration or InstructBlipForConditionalGeneration checkpoint.

    The encoder's final LayerNorm there is the hub's first (``ln_vision`` of the official code). InstructBLIP has the whole hub.
    BLIP-2 has no text branch; the official code takes its embeddings and feed-forward layers from bert-base-uncased.

    Args:
        name: folder or Hub name. bert: folder or Hub name of a BERT that the text branch is taken from, if BLIP-2 lacks it; its
            tokenizer becomes the hub's. dtype: of the language model; see :func:`mmict.lm.load_lm`.

    Returns:
        encoder, hub, language model, tokenizer of the hub, tokenizer of the language model.

    Raises:
        ValueError: if it is neither of the two, or lacks weights of the hub, or BERT has other sizes. OSError: if one is not found.

    Warns:
        UserWarning: if the text branch remains random.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in PARTS:
        raise ValueError(f"{name} is {config.model_type}; expected a checkpoint of {' or '.join(sorted(PARTS))}")
    found = read_tensors(name, "qformer.", "query_tokens", *NAMES)
    for theirs, ours in NAMES.items():
        found = {key.replace(theirs, ours) if key.startswith(theirs) else key: value for key, value in found.items()}
    sizes = config.qformer_config
    words = found.get("qformer.embeddings.word_embeddings.weight")
    hub_tokenizer = AutoTokenizer.from_pretrained(*_hub_tokenizer(name, bert, words is not None))
    hub = MHub(
        MHubConfig(
            vision_width=config.vision_config.hidden_size,
            lm_width=config.text_config.hidden_size,
            queries=config.num_query_tokens,
            hidden=sizes.hidden_size,
            layers=sizes.num_hidden_layers,
            heads=sizes.num_attention_heads,
            intermediate=sizes.intermediate_size,
            vocabulary=max(sizes.vocab_size, len(hub_tokenizer) + 1) if words is None else len(words),
            positions=sizes.max_position_embeddings,
            dropout=sizes.hidden_dropout_prob,
            cross_attention_frequency=sizes.cross_attention_frequency,
        )
    )
    if words is None and bert is not None:
        found |= _text_branch(hub, bert)
    missing, unknown = hub.load_state_dict(found, strict=False)
    lost = [key for key in missing if words is not None or not _is_text(key)]
    if lost or unknown:
        raise ValueError(f"{name} does not fit the hub: {[*lost, *unknown][0]} is {'missing' if lost else 'unknown'}")
    if missing:
        warnings.warn(
            f"{name} has no text branch ({missing[0]} and {len(missing) - 1} more): it stays random. Name a BERT to take it from, "
            f"such as bert='{BERT}'",
            stacklevel=2,
        )
    return load_vision(name), hub, load_lm(name, dtype), hub_tokenizer, AutoTokenizer.from_pretrained(name)
