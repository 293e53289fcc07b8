"""A start from BLIP-2 or InstructBLIP, as transformers keeps them: encoder, hub, language model and tokenizers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BertModel, PreTrainedModel

from mmict.checkpoints import PARTS, quiet_loading, read_tensors
from mmict.hub import MHub, MHubConfig
from mmict.lm import load_lm
from mmict.vision import VisionEncoder, load_vision

NAMES = {  # in these checkpoints, and in the hub
    "vision_model.post_layernorm.": "norm.",
    "qformer.layernorm.": "qformer.embeddings.layernorm.",
    "language_projection.": "proj.",
}
WORDS, POSITIONS = (f"qformer.embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
BERT = "google-bert/bert-base-uncased"


def from_blip2(
    name: str, *, bert: str | None = None, dtype: torch.dtype | None = None
) -> tuple[VisionEncoder, MHub, PreTrainedModel, Any, Any]:
    """The parts of a Blip2ForConditionalGeneration or InstructBlipForConditionalGeneration checkpoint.

    The encoder's final LayerNorm there is the hub's first (``ln_vision`` of the official code); its epsilon is the hub's, 1e-5,
    not 1e-6. InstructBLIP has the whole hub. BLIP-2 lacks the text branch: its embeddings and feed-forward layers come from BERT,
    as in the official code.

    Args:
        name: folder or Hub name, in safetensors.
        bert: folder or Hub name of the BERT that BLIP-2's text branch and tokenizer are taken from; InstructBLIP has its own.
            None: bert-base-uncased, from the Hub.
        dtype: of the language model; see :func:`mmict.lm.load_lm`.

    Returns:
        Encoder, hub, language model, the hub's tokenizer, the language model's.

    Raises:
        ValueError: if it is neither of the two, lacks weights of the hub, or BERT has other sizes. OSError: if one is not found.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in PARTS:
        raise ValueError(f"{name} is of the type {config.model_type}; expected {' or '.join(sorted(PARTS))}")
    weights = {_renamed(key): tensor for key, tensor in read_tensors(name, "qformer.", "query_tokens", *NAMES).items()}
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith("position_ids")}
    if WORDS in weights:
        hub_tokenizer = AutoTokenizer.from_pretrained(name, subfolder="qformer_tokenizer")
    else:
        branch, hub_tokenizer = _text_branch(name, bert or BERT)
        weights |= branch
    sizes = config.qformer_config
    hub = MHub(
        MHubConfig(
            vision_width=config.vision_config.hidden_size,
            lm_width=config.text_config.hidden_size,
            queries=config.num_query_tokens,
            hidden=sizes.hidden_size,
            layers=sizes.num_hidden_layers,
            heads=sizes.num_attention_heads,
            intermediate=sizes.intermediate_size,
            vocabulary=len(weights[WORDS]),
            positions=len(weights[POSITIONS]),
            dropout=sizes.hidden_dropout_prob,
            cross_attention_frequency=sizes.cross_attention_frequency,
        )
    )
    try:
        hub.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit the hub: {str(error).splitlines()[1].strip()}") from None
    return load_vision(name), hub, load_lm(name, dtype), hub_tokenizer, AutoTokenizer.from_pretrained(name)


def _renamed(key: str) -> str:
    for theirs, ours in NAMES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _text_branch(name: str, bert: str) -> tuple[dict[str, Tensor], Any]:
    """A BERT's embeddings of words and positions, its feed-forward layers, and its tokenizer.

    The vocabulary gets one row more, for the mark [DEC] of the official code, which the hub never reads.
    """
    try:
        with quiet_loading():
            model = BertModel.from_pretrained(bert, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(bert)
    except OSError:
        raise OSError(
            f"{name} has no text branch and takes one from BERT, but {bert} was not found: name a folder"
        ) from None
    kinds = ("embeddings.word_", "embeddings.position_", ".intermediate.", ".output.")
    branch = {
        f"qformer.{key}": tensor
        for key, tensor in model.state_dict().items()
        if any(kind in key for kind in kinds) and ".attention." not in key
    }
    return branch | {WORDS: F.pad(branch[WORDS], (0, 0, 0, 1))}, tokenizer
