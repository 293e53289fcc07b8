"""The Multi-Modal Hub: one Q-Former by which pictures and texts guide each other into rows for a language model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

MODES = ("VT->V", "VT->T", "VT", "V", "T", "QT->V", "QT->T", "QT")


@dataclass
class MHubConfig:
    """Sizes of the hub; defaults are the official code's (BERT-base shaped, on EVA-CLIP ViT-g and FLAN-T5-XL).

    Args:
        vision_width: of the visual features. lm_width: of the language model's embeddings. queries: n.
        hidden, layers, heads, intermediate, dropout: of the Q-Former. vocabulary, positions: of its text.
        cross_attention_frequency: queries look at the picture in every so many layers, from the first.

    >>> small = MHubConfig(vision_width=96, lm_width=128, queries=8, hidden=64, layers=2, heads=4, intermediate=128)
    >>> small.queries, MHubConfig().queries
    (8, 32)
    """

    vision_width: int = 1408
    lm_width: int = 2048
    queries: int = 32
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 30523
    positions: int = 512
    dropout: float = 0.1
    cross_attention_frequency: int = 2


class MHub(nn.Module):
    """The M-Hub (paper, section on the Multi-Modal Hub; the exact layers are the official code's).

    Learnt queries and a text share the self-attention of one transformer; in every second layer the queries also attend to the
    visual features. So the query rows are visual features that the text has guided, and the text rows are textual features that
    the picture has guided. The same weights serve every mode:

    =========  =================  ==================================================
    mode       needs              rows it returns
    =========  =================  ==================================================
    ``VT->V``  picture and text   queries: textual-guided visual features
    ``VT->T``  picture and text   text: visual-guided textual features
    ``VT``     picture and text   both, queries first
    ``V``      picture            queries: uni-modal visual features, as BLIP-2's
    ``T``      text               text: uni-modal textual features
    ``QT->V``  text               queries that have seen the text alone
    ``QT->T``  text               text beside the queries, without a picture
    ``QT``     text               both, queries first
    =========  =================  ==================================================

    Queries have no positions; those of the text begin at 0.

    Example:
        >>> sizes = dict(queries=5, hidden=32, layers=2, heads=4, intermediate=64, vocabulary=50)
        >>> hub = MHub(MHubConfig(vision_width=24, lm_width=40, **sizes))
        >>> words, picture = torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 11, 24)
        >>> hub(words, torch.ones(2, 7), picture, mode="VT->T").shape, hub(vision=picture, mode="V").shape
        (torch.Size([2, 7, 32]), torch.Size([2, 5, 32]))
    """

    def __init__(self, config: MHubConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.vision_width)
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.hidden).normal_(0, 0.02))
        self.qformer = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.intermediate,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                max_position_embeddings=config.positions,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=config.vision_width,
            )
        )
        self.proj = nn.Linear(config.hidden, config.lm_width)

    def forward(
        self,
        ids: Int[Tensor, "pairs text"] | None = None,
        mask: Shaped[Tensor, "pairs text"] | None = None,
        vision: Float[Tensor, "pairs tokens width"] | None = None,
        vision_mask: Shaped[Tensor, "pairs tokens"] | None = None,
        *,
        mode: str = "VT->T",
    ) -> Float[Tensor, "pairs rows hidden"]:
        """Rows of a batch of pairs, before :attr:`proj`.

        Args:
            ids, mask: tokens of each pair's text; 1 or True where there is one. A row without any text gives the query rows of
                mode V, so pairs of both kinds can share a call.
            vision, vision_mask: visual features, of all frames one after the other, before the LayerNorm.
            mode: see above. Masks are made inside.

        Raises:
            ValueError: for an unknown mode, or one whose text or picture is missing; or a text longer than ``positions``.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        given, rows = mode.split("->")[0], mode.split("->")[-1]
        if "T" in given and (ids is None or mask is None):
            raise ValueError(f"mode {mode} reads a text, but ids and mask were not given")
        if "V" in given and vision is None:
            raise ValueError(f"mode {mode} reads a picture, but vision was not given")
        if "T" in given and ids is not None and ids.shape[1] > self.config.positions:
            raise ValueError(f"the text has {ids.shape[1]} tokens; the hub has positions for {self.config.positions}")
        n = 0 if given == "T" else self.config.queries
        pairs = len(vision if "V" in given else ids)  # type: ignore[arg-type]
        with _without_pictures(self.qformer) if given == "QT" else contextlib.nullcontext():
            out = self.qformer(
                input_ids=ids if "T" in given else None,
                attention_mask=F.pad(mask.long(), (n, 0), value=1) if "T" in given and mask is not None else None,
                query_embeds=self.query_tokens.expand(pairs, -1, -1) if n else None,
                encoder_hidden_states=self.norm(vision) if "V" in given else None,
                encoder_attention_mask=vision_mask.long() if "V" in given and vision_mask is not None else None,
            ).last_hidden_state
        if rows == "V":
            return out[:, :n]
        return out[:, n:] if rows == "T" else out


@contextlib.contextmanager
def _without_pictures(qformer: InstructBlipQFormerModel) -> Iterator[None]:
    """transformers' class asks for a picture whenever there are queries; the official one leaves cross-attention out."""
    layers: list[Any] = [layer for layer in qformer.encoder.layer if layer.has_cross_attention]
    try:
        for layer in layers:
            layer.has_cross_attention = False
        yield
    finally:
        for layer in layers:
            layer.has_cross_attention = True
