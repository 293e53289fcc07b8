"""A frozen vision encoder and a frozen language model, joined by the Multi-Modal Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmict.corpus import Example, Images, corpus_of
from mmict.dialogs import Dialogs, make_demonstrations, make_dialogs
from mmict.hub import MHub
from mmict.lm import is_seq2seq
from mmict.processor import Processor
from mmict.saving import load_parts, load_trained, save
from mmict.vision import VisionEncoder


class Runs(NamedTuple):
    """Rows (any, width), of which each dialog has a run: where it begins and how long it is, (dialogs,). ``hidden``: (any,), rows
    that nothing attends to."""

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    hidden: Tensor | None = None


class Variant(NamedTuple):
    """What a pair gives to the hub, and which rows of it the language model gets."""

    vision: bool = False
    text: bool = False
    queries: bool = False  # rows
    words: bool = False  # rows of the text
    raw: bool = False  # the language model's own embeddings of the text


VARIANTS = {
    "vt_text": Variant(vision=True, text=True, words=True),
    "text": Variant(text=True, words=True),
    "raw_text": Variant(raw=True),
    "visual": Variant(vision=True, queries=True),
    "tv_visual": Variant(vision=True, text=True, queries=True),
    "vt_both": Variant(vision=True, text=True, queries=True, words=True),
    "visual+raw_text": Variant(vision=True, queries=True, raw=True),
    "none": Variant(),
}
GUIDED, PLAIN = Variant(vision=True, text=True, queries=True, raw=True), Variant(vision=True, queries=True, raw=True)


@dataclass
class MMICTConfig:
    """How demonstrations and queries enter the language model.

    Args:
        demonstration: what of a demonstration does: "vt_text" (MMICT: visual-guided textual features), "text", "raw_text",
            "visual", "tv_visual", "vt_both", "visual+raw_text" (vanilla in-context tuning) or "none".
        guided: the query's visual features are guided by its prompt (MMICT), or uni-modal (BLIP-2, vanilla in-context tuning).
        separator: the end-of-chunk row after each demonstration: "learned", from the language model's mean embedding or its own
            end-of-chunk token, or "frozen" (official: a new row that is never trained). Ours: learned.
        marks: keep the rows of the hub tokenizer's marks around a demonstration's text (official).
        reduction: of the loss: "token", the mean over all target tokens, or "dialog", of each dialog's mean (official, ragged).
        official_padding: as the official code, give the language model also the rows of padding behind a demonstration's text,
            and let a decoder-only one begin to answer from the padding behind the prompt: then a dialog's result depends on
            which others share its batch. For parity only.

    Raises:
        ValueError: for an unknown demonstration, separator or reduction.

    >>> vanilla = MMICTConfig(demonstration="visual+raw_text", guided=False)
    >>> MMICTConfig().demonstration
    'vt_text'
    """

    demonstration: str = "vt_text"
    guided: bool = True
    separator: str = "learned"
    marks: bool = True
    reduction: str = "token"
    official_padding: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("demonstration", tuple(VARIANTS)),
            ("separator", ("learned", "frozen")),
            ("reduction", ("token", "dialog")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")


class MMICTOutput(NamedTuple):
    """``loss``: a number. ``logits``: (dialogs, positions, vocabulary), of targets; a decoder-only model's, of all positions.
    ``nll``, ``tokens``: (dialogs,), summed over target tokens, and their number."""

    loss: Tensor
    logits: Tensor
    nll: Tensor
    tokens: Tensor


@dataclass
class Demonstrations:
    """Encoded demonstrations, (rows, lm_width): they do not depend on the query, so any number of queries can share them.

    :meth:`MMICTModel.encode_demonstrations` makes them. They stand one after the other, so two sets can be joined:

    >>> three, two = Demonstrations(torch.zeros(3 * 8, 128)), Demonstrations(torch.ones(2 * 8, 128))
    >>> Demonstrations(torch.cat([three.rows, two.rows])).rows.shape
    torch.Size([40, 128])
    """

    rows: Tensor


class MMICTModel(nn.Module):
    """A multi-modal language model that learns with in-context examples.

    The input of the language model is, for each dialog (paper, method; order and rows from the official code),
    ``[F_1[n:]; e; ...; F_k[n:]; e; F_{k+1}[:n]; Emb(prompt)]``: visual-guided textual features of the demonstrations, each ended
    by the separator e, then the query's textual-guided visual features and its prompt. The loss is the cross-entropy of the
    query's text. Only the hub, the separator and, if asked for, LoRA are trained; the encoder and the language model stay in eval
    mode.

    Make one with :meth:`from_parts`, :meth:`from_blip2` or :meth:`from_pretrained`.

    Args:
        vision, hub, lm, processor: the parts. config: how they are joined.

    Raises:
        ValueError: if their widths or vocabularies do not fit.

    Example:
        >>> from mmict.hub import MHubConfig
        >>> from mmict.sample import render_shapes
        >>> from mmict.small import word_tokenizers
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> shapes = render_shapes(6)  # pictures of coloured shapes, with captions
        >>> processor = Processor(*word_tokenizers(shapes.texts, most=50))
        >>> vision = VisionEncoder(nn.Conv2d(3, 8, 16, 16), source="mine", image_size=48)
        >>> hub = MHub(MHubConfig(8, 16, queries=2, hidden=16, layers=1, heads=2, intermediate=16, vocabulary=100))
        >>> size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
        >>> lm = T5ForConditionalGeneration(T5Config(vocab_size=100, decoder_start_token_id=0, **size))
        >>> model = MMICTModel.from_parts(vision, hub, lm, processor)
        >>> shown = model.encode_demonstrations([Example(shapes.images[0], shapes.texts[0])])
        >>> len(model.generate(shapes.images[1:4], demonstrations=shown, num_beams=1, max_new_tokens=3))
        3
    """

    def __init__(
        self, vision: VisionEncoder, hub: MHub, lm: Any, processor: Processor, config: MMICTConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config or MMICTConfig()
        table = lm.get_input_embeddings().weight
        if vision.width != hub.config.vision_width:
            raise ValueError(f"the encoder's features are {vision.width} wide, the hub takes {hub.config.vision_width}")
        if table.shape[1] != hub.config.lm_width:
            raise ValueError(f"the language model is {table.shape[1]} wide, the hub gives {hub.config.lm_width}")
        if len(processor.hub_tokenizer) > hub.config.vocabulary:
            raise ValueError(
                f"the hub's tokenizer has {len(processor.hub_tokenizer)} tokens, the hub {hub.config.vocabulary}"
            )
        if is_seq2seq(lm) == processor.causal:
            raise ValueError("processor.causal must be True for a decoder-only language model, and only for one")
        self.vision, self.hub, self.lm, self.processor = vision, hub, lm, processor
        own = processor.lm_tokenizer.get_vocab().get("<|endofchunk|>")
        start = table.float().mean(0) if own is None else table[own].float()
        self.separator = nn.Parameter(start.detach().clone()[None], requires_grad=self.config.separator == "learned")
        if not hasattr(lm, "peft_config"):
            lm.requires_grad_(False)
        lm.eval()

    @classmethod
    def from_parts(
        cls, vision: VisionEncoder, hub: MHub, lm: Any, processor: Processor, config: MMICTConfig | None = None
    ) -> MMICTModel:
        """The same as the class itself, by the name that transformers' users know."""
        return cls(vision, hub, lm, processor, config)

    @classmethod
    def from_blip2(
        cls, name: str, *, bert: str | None = None, config: MMICTConfig | None = None, dtype: torch.dtype | None = None
    ) -> MMICTModel:
        """Everything from a BLIP-2 or InstructBLIP checkpoint of transformers; see :func:`mmict.blip2.from_blip2`."""
        from mmict.blip2 import from_blip2

        vision, hub, lm, hub_tokenizer, lm_tokenizer = from_blip2(name, bert=bert, dtype=dtype)
        return cls(vision, hub, lm, Processor(hub_tokenizer, lm_tokenizer, causal=not is_seq2seq(lm)), config)

    def train(self, mode: bool = True) -> MMICTModel:
        """Training mode for the hub, and for adapters in the language model; the frozen parts stay in eval mode."""
        super().train(mode)
        self.lm.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the hub is."""
        return self.separator.device

    def forward(self, dialogs: Dialogs, shown: Variant | None = None, asked: Variant | None = None) -> MMICTOutput:
        """The loss of a batch of dialogs; see :class:`MMICTOutput`.

        Args:
            dialogs: with labels. shown, asked: what of a demonstration and of a query enters, if not what the configuration says.

        Raises:
            ValueError: for dialogs without labels, or with a target of no token.
        """
        if dialogs.labels is None:
            raise ValueError("these dialogs have no labels to learn from")
        return self.answer(self.context(dialogs, shown, asked), dialogs.labels)

    def answer(self, context: Runs, labels: Tensor) -> MMICTOutput:
        """The loss of writing ``labels`` (dialogs, tokens) after rows from :meth:`context`."""
        targets = labels != -100
        if not targets.any(1).all():
            raise ValueError("a dialog has no target token: its text is empty")
        if self.processor.causal:
            words = labels[targets]
            embeds, mask = _lay([context, _runs(self._embedding(words), targets.sum(1))], self.lm.dtype)
            labels = embeds.new_full(mask.shape, -100, dtype=torch.long)
            place = torch.arange(mask.shape[1], device=mask.device)
            labels[mask & (place >= context.lengths[:, None])] = words
            logits = self.lm(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).logits
            guessed, labels = logits[:, :-1], labels[:, 1:]
        else:
            embeds, mask = _lay([context], self.lm.dtype)
            fed = self.lm.prepare_decoder_input_ids_from_labels(labels)
            logits = guessed = self.lm(
                inputs_embeds=embeds, attention_mask=mask.long(), decoder_input_ids=fed, use_cache=False
            ).logits
        each = F.cross_entropy(guessed.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
        nll, tokens = each.sum(1), targets.sum(1)
        loss = nll.sum() / tokens.sum() if self.config.reduction == "token" else (nll / tokens).mean()
        return MMICTOutput(loss, logits, nll, tokens)

    def context(self, dialogs: Dialogs, shown: Variant | None = None, asked: Variant | None = None) -> Runs:
        """All rows that enter the language model, one dialog after the other; ``shown`` and ``asked`` as in :meth:`forward`."""
        shown = shown or VARIANTS[self.config.demonstration]
        asked = asked or (GUIDED if self.config.guided else PLAIN)
        query = dialogs.query
        if shown == VARIANTS["none"] and not query.all():
            raise ValueError("demonstration is 'none', but there are demonstrations: ask for k = 0")
        n, text, raw = self.hub.config.queries, dialogs.hub_ids.shape[1], dialogs.lm_ids.shape[1]

        def per_pair(name: str) -> Tensor:
            return torch.where(query, getattr(asked, name), getattr(shown, name))

        words, prompts = dialogs.hub_mask, dialogs.lm_mask
        if not self.config.marks:
            words = words & ~_marks(dialogs.hub_ids, self.processor.hub_tokenizer.all_special_ids)
        if self.config.official_padding:
            words, prompts = torch.ones_like(words), prompts | query[:, None]
        taken = torch.cat(
            [
                per_pair("queries")[:, None].expand(-1, n),
                per_pair("words")[:, None] & words,
                per_pair("raw")[:, None] & prompts,
                ~query[:, None],
            ],
            1,
        )
        of_hub = taken[:, : n + text]
        rows = self.hub.proj(self.encode(dialogs, per_pair("vision"), per_pair("text"))[of_hub])
        own = self._embedding(dialogs.lm_ids[taken[:, n + text : n + text + raw]])
        separators = self.separator.expand(int((~query).sum()), -1)
        column = taken.nonzero()[:, 1]  # of each row that is taken, in order
        kind = (column >= n + text).long() + (column >= n + text + raw)
        order = kind.argsort(stable=True).argsort()
        dialog = query.cumsum(0) - query.long()
        lengths = torch.zeros(int(dialog[-1]) + 1, dtype=torch.long, device=query.device)
        lengths = lengths.index_add(0, dialog, taken.sum(1))
        merged = torch.cat([rows, own.to(rows.dtype), separators.to(rows.dtype)])[order]
        hidden = F.pad(~dialogs.lm_mask, (n + text, 1))[taken] if self.config.official_padding else None
        return _runs(merged, lengths, hidden)

    def encode(self, dialogs: Dialogs, sees: Tensor, reads: Tensor) -> Tensor:
        """The hub's rows of all pairs, (pairs, queries + text, hidden), in one call for all that see their picture, and one for
        all that read their text alone. ``sees``, ``reads``: (pairs,) bool; rows that a pair's mode has not are of no meaning."""
        n, text = self.hub.config.queries, dialogs.hub_ids.shape[1]
        alone = reads & ~sees
        parts, of = [], []
        if sees.any():
            vision = dialogs.vision if dialogs.vision.dim() == 3 else self.vision(dialogs.vision)
            frames = dialogs.frames[sees]
            there = (frames >= 0)[:, :, None].expand(-1, -1, vision.shape[1]).flatten(1)
            seen = vision[frames.clamp(min=0)].flatten(1, 2).to(self.hub.norm.weight.dtype)
            whole = None if there.all() else there
            if (reads & sees).any():
                # A pair whose text is masked gives the rows of mode V.
                mask = dialogs.hub_mask[sees] & reads[sees][:, None]
                parts.append(self.hub(dialogs.hub_ids[sees], mask, seen, whole, mode="VT"))
            else:
                parts.append(F.pad(self.hub(vision=seen, vision_mask=whole, mode="V"), (0, 0, 0, text)))
            of.append(sees.nonzero()[:, 0])
        if alone.any():
            found = self.hub(dialogs.hub_ids[alone], dialogs.hub_mask[alone], mode="T")
            parts.append(F.pad(found, (0, 0, n, 0)))
            of.append(alone.nonzero()[:, 0])
        if len(parts) == 1 and len(parts[0]) == len(sees):
            return parts[0]
        rows = parts[0].new_zeros(len(sees), n + text, self.hub.config.hidden)
        return rows.index_copy(0, torch.cat(of), torch.cat(parts))

    def _embedding(self, ids: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(ids)

    @torch.inference_mode()
    def generate_dialogs(self, dialogs: Dialogs, demonstrations: Demonstrations | None = None, **how: Any) -> list[str]:
        """What the language model writes after each dialog. ``demonstrations`` go before all of them; ``how``: transformers'
        options of generate, by default those of the official code but for lengths: 5 beams, no sampling."""
        self.eval()
        parts = [self.context(dialogs)]
        if demonstrations is not None:
            count = torch.full_like(parts[0].lengths, len(demonstrations.rows))
            parts.insert(0, Runs(demonstrations.rows.to(parts[0].rows), torch.zeros_like(count), count))
        embeds, mask = _lay(parts, self.lm.dtype, left=self.processor.causal)
        options = {"num_beams": 5, "max_new_tokens": 30, "do_sample": False, **how}
        options["min_new_tokens"] = options.pop("min_length", 1)
        written = self.lm.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), pad_token_id=self.processor.pad,
            eos_token_id=self.processor.lm_tokenizer.eos_token_id, **options,
        )  # fmt: skip
        return [self.processor.text(ids) for ids in written.tolist()]

    @torch.inference_mode()
    def encode_demonstrations(self, examples: Sequence[Example]) -> Demonstrations:
        """Demonstrations that :meth:`generate` can use for any number of queries."""
        self.eval()
        return Demonstrations(
            self.context(make_demonstrations(corpus_of(examples, self.processor, self.vision)).to(self.device)).rows
        )

    def generate(
        self,
        images: Sequence[Images],
        questions: Sequence[str] | None = None,
        *,
        demonstrations: Sequence[Example] | Demonstrations | None = None,
        batch_size: int = 16,
        **how: Any,
    ) -> list[str]:
        """Captions of pictures, or answers to a question about each.

        The official code generates without demonstrations; here they may be given, once for all queries.

        Args:
            images: for each query a picture, or the frames of a video; see :func:`papercore.lab.images.open_image`.
            questions: one for each query, or None for captions.
            demonstrations: examples, or what :meth:`encode_demonstrations` made of them.
            how: num_beams (5), max_new_tokens (30), min_length (1) and transformers' other options of generate.

        Returns:
            one text for each query; it does not depend on the others.

        Raises:
            ValueError: for a picture that cannot be read, or as many questions as there are not images.
        """
        if questions is not None and len(questions) != len(images):
            raise ValueError(f"{len(questions)} questions for {len(images)} images: give one for each")
        if not images:
            return []
        if demonstrations is not None and not isinstance(demonstrations, Demonstrations):
            demonstrations = self.encode_demonstrations(demonstrations) if demonstrations else None
        asked = zip(images, questions or [""] * len(images), strict=True)
        queries = corpus_of([Example(of, "-", question) for of, question in asked], self.processor, self.vision)
        found: list[str] = []
        for start in range(0, len(queries), batch_size):
            rows = range(start, min(start + batch_size, len(queries)))
            dialogs = make_dialogs(queries, rows, queries, [[]] * len(rows))
            found += self.generate_dialogs(dialogs.to(self.device), demonstrations, **how)
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """What was trained (model.safetensors), the tokenizers, and config.json, which names the frozen parts and their
        fingerprints. Local parts are named relative to ``folder``."""
        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> MMICTModel:
        """A checkpoint with its frozen parts, which are read from where they were. ``changes``: of :class:`MMICTConfig`.

        Raises:
            ValueError: if the folder is no checkpoint, lacks weights, or a frozen part is not the one it was trained with.
        """
        record, vision, lm, hub, processor = load_parts(Path(folder))
        model = cls(vision, hub, lm, processor, MMICTConfig(**{**record, **changes}))
        load_trained(model, Path(folder) / "model.safetensors")
        return model.eval()


def _runs(rows: Tensor, lengths: Tensor, hidden: Tensor | None = None) -> Runs:
    """Rows of which each dialog has the next so many."""
    return Runs(rows, lengths.cumsum(0) - lengths, lengths, hidden)


def _lay(parts: Sequence[Runs], dtype: torch.dtype, left: bool = False) -> tuple[Tensor, Tensor]:
    """The runs of each dialog one after the other, (dialogs, longest, width), padded on one side; and what may be attended to."""
    lengths = torch.stack([part.lengths for part in parts])
    total, before = lengths.sum(0), lengths.cumsum(0) - lengths
    place = torch.arange(int(total.max()), device=total.device).expand(len(total), -1)
    if left:
        place = place - (place.shape[1] - total[:, None])
    index, base = torch.zeros_like(place), 0
    for part, begin in zip(parts, before, strict=True):
        local = place - begin[:, None]
        inside = (local >= 0) & (local < part.lengths[:, None])
        index = torch.where(inside, base + part.starts[:, None] + local, index)
        base += len(part.rows)
    mask = (place >= 0) & (place < total[:, None])
    rows = torch.cat([part.rows.to(dtype) for part in parts])[index] * mask[:, :, None]
    hidden = [
        torch.zeros_like(part.rows[:, 0], dtype=torch.bool) if part.hidden is None else part.hidden for part in parts
    ]
    return rows, mask & ~torch.cat(hidden)[index]


def _marks(ids: Tensor, special: Sequence[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(list(special), device=ids.device))
