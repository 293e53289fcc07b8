"""The parts of the golden forward passes, from their files: stub tokenizers, language models, weights by our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmict.dialogs import Dialogs, pad
from mmict.hub import MHub, MHubConfig
from mmict.model import MMICTConfig, MMICTModel
from mmict.processor import Processor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden"


class Identity(nn.Module):
    """In place of a vision encoder: the golden cases begin at its features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.network, self.source = width, nn.Identity(), "identity"

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


def tokenizer(words: list[str], special: dict[str, int], before: str | None, after: str | None) -> Any:
    """Words by number + 3, with marks."""
    vocab = {**special, **{word: i + 3 for i, word in enumerate(words)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(special))))
    inner.normalizer = normalizers.Replace("\n", " <nl>")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = " ".join(filter(None, [before, "$A", after]))
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(mark, special[mark]) for mark in {before, after} if mark]
    )
    marks = list(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=marks[0], eos_token=after or marks[1], bos_token=before
    )


def hub_name(name: str) -> str:
    return name.replace("embeddings.LayerNorm", "embeddings.layernorm").replace(
        "attention.self.", "attention.attention."
    )


def load(kind: str, **config: Any) -> tuple[MMICTModel, dict[str, Any], dict[str, Any]]:
    """The model of forward_<kind>_*.npz, its meta data, its arrays."""
    path = next(GOLDEN.glob(f"forward_{kind}_*.npz"))
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop("meta")))
    weights = {k[3:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("w::")}
    bert = tokenizer(meta["words"], {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2}, "[CLS]", "[SEP]")
    lm: Any
    if kind == "t5":
        own = tokenizer(meta["words"], {"<pad>": 0, "</s>": 1}, None, "</s>")
        shape = T5Config(
            vocab_size=29, d_model=40, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        shape.tie_word_embeddings, shape.scale_decoder_outputs = False, False
        shape.dense_act_fn = "gelu"
        lm = T5ForConditionalGeneration(shape)
    else:
        own = tokenizer(meta["words"], {"<pad>": 1, "</s>": 2}, "</s>", None)
        lm = OPTForCausalLM(
            OPTConfig(
                vocab_size=29, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, dropout=0.0,
                word_embed_proj_dim=40, max_position_embeddings=128, pad_token_id=1, bos_token_id=2, eos_token_id=2,
                tie_word_embeddings=False,
            )
        )  # fmt: skip
    found = lm.load_state_dict(
        {k.split("_model.", 1)[1]: v for k, v in weights.items() if k.startswith(f"{kind}_model.")}
    )
    assert not found.missing_keys
    lm.requires_grad_(False)
    hub = MHub(
        MHubConfig(
            vision_width=24, lm_width=40, queries=5, hidden=32, layers=4, heads=4, intermediate=64, vocabulary=28, positions=24,
            dropout=0.0,
        )
    )  # fmt: skip
    ours = {"query_tokens": weights["query_tokens"]}
    for key, value in weights.items():
        if key.startswith("Qformer.bert."):
            ours[f"qformer.{hub_name(key.removeprefix('Qformer.bert.'))}"] = value
        elif key.startswith(("ln_vision.", f"{kind}_proj.")):
            ours[key.replace("ln_vision", "norm").replace(f"{kind}_proj", "proj")] = value
    hub.load_state_dict(ours)
    processor = Processor(bert, own, causal=kind == "opt", official_targets=True)
    model = MMICTModel.from_parts(Identity(24), hub, lm, processor, MMICTConfig(separator="frozen", **config))  # type: ignore[arg-type]
    with torch.no_grad():
        model.separator.copy_(lm.get_input_embeddings().weight[28][None])
    return model, meta, arrays


def dialogs_of(model: MMICTModel, meta: dict[str, Any], image: Tensor) -> Dialogs:
    """The raw pairs of a golden case as a batch."""
    frames: list[list[int]] = []
    texts: list[str] = []
    dialog: list[int] = []
    waiting: list[int] = []
    for i, (text, number) in enumerate(zip(meta["text_input"], meta["dialog_id"], strict=True)):
        if number < 0:
            continue
        waiting.append(i)
        if text != "none":
            frames.append(waiting)
            texts.append(text)
            dialog.append(number)
            waiting = []
    query = [i + 1 == len(dialog) or dialog[i + 1] != dialog[i] for i in range(len(dialog))]
    read, answers = [], []
    for text, last in zip(texts, query, strict=True):
        asked, bar, answer = text.partition("|")
        read.append(text if not last else asked.strip() if bar else meta["prompt"][0])
        if last:
            answers.append(answer.strip() if bar else text)
    hub_ids, hub_mask = pad(model.processor.hub(read))
    lm_ids, lm_mask = pad(model.processor.lm(read), model.processor.pad)
    labels = pad(model.processor.targets(answers), -100)[0]
    return Dialogs(image, pad(frames, -1)[0], hub_ids, hub_mask, lm_ids, lm_mask, torch.tensor(query), labels)
