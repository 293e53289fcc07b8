"""The two branches over the columns of an image: context, and supervision enhancement."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dsan.loss import GO


class BLSTM(nn.Module):
    """Bidirectional LSTM layers over columns; each direction of a crop starts at that crop's own end.

    Args:
        project: a linear layer from 2 x hidden to hidden after each layer, as in the deep-text-recognition-benchmark.
    """

    def __init__(self, dim: int, hidden: int, layers: int = 2, project: bool = False) -> None:
        super().__init__()
        self.dim = hidden if project else 2 * hidden
        self.lstms = nn.ModuleList(
            nn.LSTM(dim if i == 0 else self.dim, hidden, bidirectional=True, batch_first=True) for i in range(layers)
        )
        self.linears = nn.ModuleList(nn.Linear(2 * hidden, hidden) if project else nn.Identity() for _ in range(layers))

    def forward(self, columns: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(b, T, dim) -> (b, T, self.dim); beyond a crop's ``lengths`` zeros enter the next layer."""
        frames = columns.shape[1]
        for lstm, linear in zip(self.lstms, self.linears, strict=True):
            if lengths is None:
                columns, _ = lstm(columns)
            else:
                packed = pack_padded_sequence(columns, lengths.cpu(), batch_first=True, enforce_sorted=False)
                columns, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=frames)
            columns = linear(columns)
        return columns


class AttentionDecoder(nn.Module):
    r"""One character after another, each from a weighted mean of the columns (Bahdanau et al. 2015).

    .. math:: e_i = v^\top \tanh(W_h H_i + W_s s_{t-1} + b), \; \alpha = \mathrm{softmax}(e), \; g_t = \sum_i \alpha_i H_i, \;
        s_t = \mathrm{LSTM}([g_t; y_{t-1}], s_{t-1})

    Args:
        dim: of the columns. characters: K; classes are [GO] 0, [s] 1, characters 2 to K + 1. max_length: characters at most.
    """

    def __init__(self, dim: int, hidden: int, characters: int, max_length: int = 25) -> None:
        super().__init__()
        self.classes, self.steps = characters + 2, max_length + 1
        self.of_columns = nn.Linear(dim, hidden, bias=False)
        self.of_state = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.cell = nn.LSTMCell(dim + self.classes, hidden)
        self.output = nn.Linear(hidden, self.classes)

    def forward(self, columns: Tensor, lengths: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """(b, T, dim) -> (b, steps, K + 2) logits. targets: (b, steps) classes to be fed back instead of its own characters."""
        b, frames, _ = columns.shape
        keys = self.of_columns(columns)
        beyond = None
        if lengths is not None:
            beyond = torch.arange(frames, device=columns.device) >= lengths.to(columns.device).unsqueeze(1)
        state = cell = columns.new_zeros(b, self.cell.hidden_size)
        character = torch.full((b,), GO, device=columns.device)
        logits = []
        for step in range(self.steps):
            scores = self.score(torch.tanh(keys + self.of_state(state).unsqueeze(1))).squeeze(2)
            if beyond is not None:
                scores = scores.masked_fill(beyond, -torch.inf)
            glimpse = torch.bmm(scores.softmax(1).unsqueeze(1), columns).squeeze(1)
            onehot = nn.functional.one_hot(character, self.classes).to(columns.dtype)
            state, cell = self.cell(torch.cat([glimpse, onehot], 1), (state, cell))
            logits.append(self.output(state))
            character = logits[-1].argmax(1) if targets is None else targets[:, step]
        return torch.stack(logits, 1)


class Branch(nn.Module):
    """What reads the columns: a classifier of each ("ctc", "frame") or an attention decoder ("attn"), behind a BLSTM or not.

    The context branch has the BLSTM. The supervision enhancement branch has none, so that each column must be decodable from
    what is seen there; its dropout (ours) is before the classifier.
    """

    def __init__(
        self, kind: str, dim: int, characters: int, *, blstm: BLSTM | None = None, hidden: int = 256, dropout: float = 0.0,
        max_length: int = 25,
    ) -> None:  # fmt: skip
        super().__init__()
        self.blstm, self.dropout = blstm, nn.Dropout(dropout)
        dim = dim if blstm is None else blstm.dim
        self.head = (
            AttentionDecoder(dim, hidden, characters, max_length) if kind == "attn" else nn.Linear(dim, characters + 1)
        )

    def forward(self, columns: Tensor, lengths: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        if self.blstm is not None:
            columns = self.blstm(columns, lengths)
        columns = self.dropout(columns)
        return self.head(columns, lengths, targets) if isinstance(self.head, AttentionDecoder) else self.head(columns)
