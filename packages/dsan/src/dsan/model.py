"""DSAN: double supervised network with attention mechanism (Gao et al., VCIP 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsan._widths import Columns, keep
from dsan.attention import TextAttention
from dsan.backbones import build_backbone
from dsan.branches import BLSTM, Branch
from dsan.charset import ALPHANUMERIC, CTCCharset
from dsan.decode import Reading, ctc_beam, ctc_greedy, ctc_lexicon
from dsan.images import Size, collate, fit, normalize, open_image
from dsan.loss import END, KINDS, attention_targets

DECODE, SEARCH = ("ctx", "enh", "fuse"), ("greedy", "beam", "lexicon")


class DSANOutput(NamedTuple):
    """Logits (batch, frames, K + 1), or (batch, steps, K + 2) of an attention decoder; None where a branch was not asked for.

    ``lengths``: (batch,), frames that count, or None for all. ``attention``: the text mask at the stride of 4, or None.

    >>> model = DSAN().eval()
    >>> output = model(torch.zeros(1, 1, 32, 100), branches="both")
    >>> output.enhancement.shape, output.attention.shape
    (torch.Size([1, 25, 37]), torch.Size([1, 1, 8, 25]))
    """

    context: Tensor | None
    enhancement: Tensor | None
    lengths: Tensor | None
    attention: Tensor | None


class DSAN(nn.Module, PyTorchModelHubMixin, library_name="dsan", license="apache-2.0"):
    """A network that reads a word in an image.

    Convolutions make features; text attention weighs them where there is text; more convolutions make a row of columns. Two
    branches read the columns: a recurrent one that knows the context, and one without, whose supervision enhances that of single
    characters in training (the paper's abstract; layers are ours, see :mod:`dsan.backbones`).

    Args:
        backbone: "tiny", "base", "vgg" or "timm/NAME". widths: its layers' channels, see :func:`dsan.backbones.build_backbone`.
        characters: what it can read. context: "ctc" or "attn". enhancement: "ctc", "attn", "frame" or None for no such branch.
        attention: whether there is text attention; attention_mode, attention_maps: see :class:`dsan.TextAttention`.
        hidden: of the recurrent layers, each way; 64 for tiny, else 256. dropout: before the enhancement branch's classifier.
        max_length: characters at most, for attention decoders; CTC has no such limit but its frames.
        channels, height, width, keep_ratio, max_width, rotate_tall: how images are fitted, see :func:`dsan.images.fit`.

    Raises:
        ValueError: for an unknown kind, another height than 32 (the networks end at a height of 1), or a width below 16.

    Example:
        >>> model = DSAN(backbone="tiny").eval()
        >>> model(torch.zeros(2, 1, 32, 100)).context.shape
        torch.Size([2, 25, 37])
    """

    def __init__(
        self,
        backbone: str = "tiny",
        *,
        widths: Sequence[int] | None = None,
        characters: str = ALPHANUMERIC,
        context: str = "ctc",
        enhancement: str | None = "ctc",
        attention: bool = True,
        attention_mode: str = "residual",
        attention_maps: str = "spatial",
        hidden: int | None = None,
        dropout: float = 0.1,
        max_length: int = 25,
        channels: int = 1,
        height: int = 32,
        width: int = 100,
        keep_ratio: bool = False,
        max_width: int = 800,
        rotate_tall: bool = False,
    ) -> None:
        super().__init__()
        if context not in KINDS[:2]:
            raise ValueError(f"context must be ctc or attn; got {context!r}")
        if enhancement is not None and enhancement not in KINDS:
            raise ValueError(f"enhancement must be one of {', '.join(KINDS)} or None; got {enhancement!r}")
        if height != 32 or width < 16:
            raise ValueError(f"images must be 32 high and at least 16 wide; got height {height}, width {width}")
        self.size = Size(height, width, channels, keep_ratio, max_width, rotate_tall)
        self.charset = CTCCharset(characters)
        self.context_kind, self.enhancement_kind = context, enhancement
        hidden = hidden or (64 if backbone == "tiny" else 256)
        k = len(self.charset)
        # Every part has random numbers of its own: networks with and without a part share all other weights.
        new = _Parts()
        self.backbone = new(lambda: build_backbone(backbone, channels, widths))
        self.attention = new(
            lambda: (
                TextAttention(
                    self.backbone.middle, 32 if backbone == "tiny" else 64, mode=attention_mode, maps=attention_maps
                )
                if attention
                else None
            )
        )
        dim = self.backbone.dim
        self.context = new(
            lambda: Branch(
                context,
                dim,
                k,
                blstm=BLSTM(dim, hidden, project=backbone != "tiny"),
                hidden=hidden,
                max_length=max_length,
            )
        )
        self.enhancement = new(
            lambda: (
                Branch(enhancement, dim, k, hidden=hidden, dropout=dropout, max_length=max_length)
                if enhancement
                else None
            )
        )

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        widths: Int[Tensor, " batch"] | None = None,
        targets: tuple[Tensor, Tensor] | None = None,
        branches: str | None = None,
    ) -> DSANOutput:
        """Logits of a batch.

        Args:
            images: -1 to 1, 32 high. widths: (batch,), columns of each that are the crop; what is beyond never changes a result.
                None: all.
            targets: ids of all words in one row and their lengths: what attention decoders are fed in training.
            branches: "ctx", "enh" or "both"; both in training, the context's otherwise.

        Raises:
            ValueError: for images of another height or number of channels, or narrower than 16 pixels.
        """
        if images.shape[1:3] != (self.size.channels, 32) or images.shape[3] < 16:
            raise ValueError(
                f"images are {tuple(images.shape)}: expected (batch, {self.size.channels}, 32, at least 16)"
            )
        branches = branches or ("both" if self.training else "ctx")
        columns, lengths, mask = self.columns(images, widths)
        context = enhancement = None
        if branches != "enh":
            context = self._branch(self.context, columns, lengths, targets)
        if branches != "ctx" and self.enhancement is not None:
            enhancement = self._branch(self.enhancement, columns, lengths, targets)
        return DSANOutput(context, enhancement, lengths, mask)

    def columns(self, images: Tensor, widths: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The visual sequence (batch, frames, dim), its lengths, and the text mask."""
        if widths is not None and not self.backbone.masks:
            if (widths != images.shape[3]).any():
                raise ValueError(
                    "crops of different widths cannot share a batch of a timm backbone: use read(), or one width"
                )
            widths = None
        features, lengths = self.backbone.stem(images, widths)
        mask = None
        if self.attention is not None:
            features, mask = self.attention(features, lengths)
        features, lengths = self.backbone.rest(features, lengths)
        return keep(features, lengths).squeeze(2).transpose(1, 2), lengths, mask

    def _branch(self, branch: Branch, columns: Tensor, lengths: Tensor | None, targets: Any) -> Tensor:
        fed = None
        if targets is not None and not isinstance(branch.head, nn.Linear):
            fed = attention_targets(targets[0].to(columns.device), targets[1], branch.head.steps)
        return branch(columns, lengths, fed)

    def frames(self, width: int) -> int:
        """Columns of a crop that is ``width`` wide: CTC needs one for each character, and one between equal neighbours."""
        if isinstance(self.backbone.stem, Columns) and isinstance(self.backbone.rest, Columns):
            return int(self.backbone.rest.after(self.backbone.stem.after(torch.tensor([width]))))
        was, like = self.training, next(self.parameters())
        with torch.no_grad():
            columns, _, _ = self.eval().columns(like.new_zeros(1, self.size.channels, 32, width))
        self.train(was)
        return columns.shape[1]

    def attention_map(self, images: Tensor, widths: Tensor | None = None) -> Tensor:
        """Where the text is, to the network: (batch, height, width) in 0 to 1, at the images' size.

        Raises:
            ValueError: for a network without text attention.
        """
        if self.attention is None:
            raise ValueError("this network has no text attention (attention=False)")
        with torch.no_grad():
            mask = self.columns(images, widths)[2]
        assert mask is not None
        return F.interpolate(mask.float().mean(1, keepdim=True), images.shape[2:], mode="bilinear").squeeze(1)

    @torch.inference_mode()
    def read(
        self,
        images: Sequence[Any],
        *,
        decode: str = "ctx",
        search: str = "greedy",
        beam_width: int = 10,
        lexicon: Sequence[str] | None = None,
        lexicon_mode: str = "ctc",
        max_edits: int | None = None,
        batch_size: int = 64,
    ) -> list[Reading]:
        """The words in some images: paths, bytes, PIL images or arrays (see :func:`dsan.images.open_image`).

        The result of an image does not depend on the others. The network is in eval mode afterwards.

        Args:
            decode: "ctx": the context branch; "enh": the enhancement branch, faster, without recurrence; "fuse": of both, the one
                that is more confident (geometric mean of its characters; the context's if equal). The paper does not say.
            search, beam_width: "greedy", "beam" or "lexicon"; see :mod:`dsan.decode`. Attention decoders are greedy.
            lexicon, lexicon_mode, max_edits: see :func:`dsan.ctc_lexicon`.

        Raises:
            ValueError: for an image that cannot be read (naming it), a branch that is not there, or a search that does not apply.
        """
        fitted = [fit(open_image(image), **dataclasses.asdict(self.size)) for image in images]
        return self.read_fitted(
            fitted, decode=decode, search=search, beam_width=beam_width, lexicon=lexicon, lexicon_mode=lexicon_mode,
            max_edits=max_edits, batch_size=batch_size,
        )  # fmt: skip

    @torch.inference_mode()
    def read_fitted(self, arrays: Sequence[Any], *, batch_size: int = 64, **how: Any) -> list[Reading]:
        """:meth:`read` for arrays (channels, 32, width), uint8, that are fitted already; crops of like width share a batch."""
        self.eval()
        self._check(how.get("decode", "ctx"), how.get("search", "greedy"), how.get("lexicon"))
        device = next(self.parameters()).device
        order = sorted(range(len(arrays)), key=lambda i: arrays[i].shape[2])
        parts = [order] if self.backbone.masks else [list(g) for _, g in groupby(order, lambda i: arrays[i].shape[2])]
        readings: dict[int, Reading] = {}
        for part in parts:
            for start in range(0, len(part), batch_size):
                chosen = part[start : start + batch_size]
                images, widths = collate([arrays[i] for i in chosen])
                if not self.backbone.masks:
                    images = images[..., : int(widths[0])]
                uneven = bool((widths != images.shape[3]).any())
                found = self._read(normalize(images.to(device)), widths if uneven else None, **how)
                readings.update(zip(chosen, found, strict=True))
        return [readings[i] for i in range(len(arrays))]

    def _check(self, decode: str, search: str, lexicon: Any) -> None:
        if decode not in DECODE:
            raise ValueError(f"decode must be one of {', '.join(DECODE)}; got {decode!r}")
        if search not in SEARCH:
            raise ValueError(f"search must be one of {', '.join(SEARCH)}; got {search!r}")
        if decode != "ctx" and self.enhancement is None:
            raise ValueError(f"decode {decode!r}: this network has no enhancement branch")
        if (search == "lexicon") != (lexicon is not None):
            raise ValueError("search 'lexicon' and a lexicon come together")
        kinds = {"ctx": self.context_kind, "enh": self.enhancement_kind}
        if search != "greedy" and any(kind == "attn" for branch, kind in kinds.items() if decode in (branch, "fuse")):
            raise ValueError(f"search {search!r} needs CTC; an attention decoder is greedy")

    def _read(
        self, images: Tensor, widths: Tensor | None, decode: str = "ctx", search: str = "greedy", beam_width: int = 10,
        lexicon: Sequence[str] | None = None, lexicon_mode: str = "ctc", max_edits: int | None = None,
    ) -> list[Reading]:  # fmt: skip
        output = self(images, widths, branches="both" if decode == "fuse" else decode)

        def words(logits: Tensor, kind: str | None) -> list[Reading]:
            if kind == "attn":
                return attention_greedy(logits, self.charset)
            if search == "beam":
                return ctc_beam(logits, self.charset, output.lengths, beam_width=beam_width)
            if search == "lexicon":
                assert lexicon is not None
                return ctc_lexicon(
                    logits, self.charset, lexicon, output.lengths, mode=lexicon_mode, max_edits=max_edits
                )
            return ctc_greedy(logits, self.charset, output.lengths)

        context = words(output.context, self.context_kind) if output.context is not None else []
        enhancement = words(output.enhancement, self.enhancement_kind) if output.enhancement is not None else []
        for reading in enhancement:
            reading.branch = "enh"
        if decode != "fuse":
            return context or enhancement
        return [e if e.certainty > c.certainty else c for c, e in zip(context, enhancement, strict=True)]


def attention_greedy(logits: Tensor, charset: CTCCharset) -> list[Reading]:
    """Words of an attention decoder: up to [s], or all of it without one; [GO] is no character."""
    best, ids = logits.float().softmax(2).max(2)
    readings = []
    for row, scores in zip(ids.tolist(), best.tolist(), strict=True):
        until = row.index(END) if END in row else len(row)
        kept = [(i - 1, p) for i, p in zip(row[:until], scores[:until], strict=True) if i > END]
        values = [p for _, p in kept]
        readings.append(
            Reading(charset.decode(i for i, _ in kept), sum(values) / len(values) if values else 0.0, values)
        )
    return readings


class _Parts:
    """Makes each part of a network with random numbers of its own, from one draw of the global ones."""

    def __init__(self) -> None:
        self.seed = int(torch.randint(2**31 - 1000, ()))

    def __call__(self, make: Callable[[], Any]) -> Any:
        self.seed += 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return make()
