"""HoloV (arXiv 2510.02912): every part of the image gets its share of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import one_of, require
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.salience import AfterTower


@dataclass
class HoloV(AfterTower):
    """HoloV.

    After the projector, an image's tokens in raster order are cut into chunks of neighbours. A chunk's share of the
    places goes by the attention that CLS paid its tokens in the last vision block (all tokens, where there is no CLS),
    and inside a chunk those stay that it paid most. The paper adds the variance of a token's similarities in its chunk;
    the authors' code scales that to the chunk's own attention first, so that it changes no share, and is left out.

    Parameters
    ----------
    retain : int or float
        Tokens that every image keeps with all its views; a float is a share of its patches.
    chunks : int
        Parts of an image.
    compat : {"default", "official"}
        "official": positions are consecutive, and tokens of a chunk come by falling attention. Where a chunk is given
        more places than it has tokens, the authors leave vectors of zeros; here the next best tokens of all take them.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    retain: int | float = 64
    chunks: int = 16
    compat: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("compat", self.compat, ("default", "official"))
        require(self.chunks > 0, "chunks", self.chunks, "1 or more")
        self.positions = "renumber" if self.compat == "official" else "original"

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens)
        if counts is None:
            return None
        attention = tokens.notes["cls_attention"]
        chunk = chunk_of(tokens.known_lengths, self.chunks, attention)
        rank, quota = ranks_and_quotas(attention, chunk, self.chunks, counts, tokens.valid)
        score = attention.masked_fill(rank < quota, float("inf"))
        order = as_given(rank, quota, chunk) if self.compat == "official" else None
        return Keep.top(score, counts, order=order)


def chunk_of(lengths: tuple[int, ...], chunks: int, like: Tensor) -> Tensor:
    """The chunk of every token, int64 like `[rows, tokens]`; the first ones are longer by one where they have to be."""
    length = torch.tensor(lengths, device=like.device)[:, None]
    column, size, longer = torch.arange(like.shape[1], device=like.device), length // chunks, length % chunks
    after = column - longer * (size + 1)
    chunk = torch.where(after < 0, column // (size + 1), longer + after // size.clamp(min=1))
    return chunk.clamp(max=chunks - 1)


def as_given(rank: Tensor, quota: Tensor, chunk: Tensor) -> Tensor:
    """Sort key of tokens by chunk, and in it by falling attention, int64 `[rows, tokens]`.

    A chunk with more places than tokens is handed over as it is.
    """
    column = torch.arange(chunk.shape[1], device=chunk.device)
    size = (chunk[:, None] == chunk[..., None]).sum(-1)
    return chunk * chunk.shape[1] + torch.where(quota > size, column, rank)


def ranks_and_quotas(
    attention: Tensor, chunk: Tensor, chunks: int, counts: list[int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's place in its chunk by attention, and the places its chunk is given: int64 `[rows, tokens]`.

    Shares of `counts` are rounded down, and what is left goes to the best chunks, one each (HoloV, section 3.3).
    """
    real = torch.ones_like(attention) if valid is None else valid.to(attention.dtype)
    own = chunk[:, None] == torch.arange(chunks, device=chunk.device)[:, None]
    own = own & (real > 0)[:, None]
    mean = (own * attention[:, None]).sum(-1) / own.sum(-1).clamp(min=1)
    _, wanted = ops.for_rows(counts, attention.device)
    quota = (mean / mean.sum(-1, keepdim=True) * wanted).floor().long()
    left = wanted - quota.sum(-1, keepdim=True)
    quota = quota + ops.top_count(mean, left)
    rank = attention[:, None].masked_fill(~own, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = rank.argsort(dim=-1)
    return (rank * own).sum(1), quota.gather(1, chunk)
