"""Attention probabilities on demand: the model's own attention never leaves its fast kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop.vision_tokens import VisionTokens


@dataclass
class Attention:
    """Attention probabilities of one layer, computed only for the rows that are asked for.

    A few text rows against all keys cost about 0.1 % of a prefill; materialising all rows would cost the fast kernel.

    Parameters
    ----------
    queries : callable, int64 rows `[batch, rows]` -> `[batch, heads, rows, head_dim]`
        Recomputes the (rotated) queries of these rows.
    keys : callable, () -> `[batch, kv_heads, tokens, head_dim]`
        The layer's (rotated) keys; in a decoder the cached ones.
    scale : float
        Factor on the scores before the softmax.
    valid : bool `[batch, tokens]` or None
        False for padded keys.
    first_row : int or None
        Position in `keys` of row 0 of a causal attention; None when the attention is not causal.
    hides : callable, int64 rows `[batch, rows]` -> bool `[batch, rows, tokens]`, or None
        True for keys that these rows do not see besides (a sliding window).
    """

    queries: Callable[[Tensor], Tensor]
    keys: Callable[[], Tensor]
    scale: float
    valid: Tensor | None = None
    first_row: int | None = None
    hides: Callable[[Tensor], Tensor] | None = None

    def probabilities(self, rows: Tensor) -> Tensor:
        """Softmax over all visible keys for the given rows, float32 `[batch, heads, rows, tokens]`."""
        queries, keys = self.queries(rows), self.keys()
        batch, heads, count, dim = queries.shape
        grouped = queries.reshape(batch, keys.shape[1], -1, dim)
        scores = (grouped @ keys.transpose(-1, -2)).view(batch, heads, count, -1).float().mul_(self.scale)
        columns = torch.arange(scores.shape[-1], device=scores.device)
        if self.first_row is not None:
            scores.masked_fill_((columns > rows[..., None] + self.first_row)[:, None], torch.finfo(scores.dtype).min)
        if self.valid is not None:
            scores.masked_fill_(~self.valid[:, None, None], torch.finfo(scores.dtype).min)
        if self.hides is not None:
            scores.masked_fill_(self.hides(rows)[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1)

    def mean_over_heads(self, rows: Tensor) -> Tensor:
        """`probabilities` averaged over the heads, float32 `[batch, rows, tokens]`."""
        return self.probabilities(rows).mean(1)


def cls_attention(attention: Attention, tokens: VisionTokens, by_all: bool = False) -> Tensor:
    """Attention that CLS pays each token of a vision block, mean over heads, float32 `[rows, tokens]`.

    Of an encoder without CLS, or with `by_all`, what all its tokens pay it on average, CLS among them.
    """
    prefix = tokens.prefix
    rows = torch.arange(tokens.hidden.shape[1] if by_all or not prefix else 1, device=tokens.device)
    paid = attention.mean_over_heads(rows.expand(len(tokens.patch_index), -1))
    if tokens.valid is None or len(rows) == 1:
        return paid.mean(1)[:, prefix:]
    real = tokens.valid_with_prefix.to(paid.dtype)
    return (real[:, None] @ paid)[:, 0, prefix:] / real.sum(-1, keepdim=True)
