"""DART (arXiv 2502.11494): a few pivots stay, and the vision tokens that duplicate them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.hooks import DecoderStep, Keep, Tokens, gather
from mustdrop.keep import padded
from mustdrop.methods.layerwise import SingleDrop, Stage


@dataclass
class DART(SingleDrop):
    """Before one decoder layer, pivots take the tokens that duplicate them least, in turn an equal share each.

    Pivots are the `pivots` vision tokens of an image, which stay, and the `text_pivots` text tokens after the prompt's
    first image whose keys in the layer before have the largest L1 norm; similarity is the cosine of states after the
    final norm. Of an image `tokens` stay, by default 64. `layer`, `retain` and errors are those of `SingleDrop`.
    `compat` "official": shares are rounded down, an image's pivots come on top, turns are in a Python set's order.
    """

    tokens: int | None = None
    pivots: int = 4
    text_pivots: int = 4

    instead, least = "tokens", {"tokens": 1, "pivots": 1, "text_pivots": 0}

    def kept(self, tokens: int) -> int:
        number = 64 if self.tokens is None else self.tokens
        more = self.pivots - number % (self.pivots + self.text_pivots)
        return number + more if self.compat == "official" else number

    def keep(self, step: DecoderStep, stages: list[list[Stage | None]]) -> Keep:
        counts, norms = self.wanted(step, stages), step.attention.keys().float().abs().sum((1, 3))
        units = F.normalize(step.norm(step.hidden).float(), dim=-1)
        return Keep.top(self.least_duplicated(units, norms, step.tokens, counts).float(), counts)

    def least_duplicated(self, units: Tensor, norms: Tensor, tokens: Tokens, counts: Sequence[Sequence[int]]) -> Tensor:
        """Mark `counts` tokens of images by unit states `[batch, length, width]`, norms of keys `[batch, length]`."""
        own, (rows, real) = ops.of_each_image(tokens.image, tokens.images), tokens.instruction_rows()
        of_image = ops.largest(norms[:, None], own, self.pivots)
        of_text = rows.gather(1, ops.largest(norms.gather(1, rows), real, self.text_pivots))
        pivots = torch.cat([of_image, of_text[:, None].expand(-1, tokens.images, -1)], dim=-1)
        # Beside its own pivots an image keeps equal shares of all, the first of what is over; short texts have few.
        rest = (padded(counts, tokens.images, norms.device) - self.pivots).clamp(min=0)[..., None]
        number = self.pivots + real.sum(-1).clamp(max=of_text.shape[1])[:, None, None]
        place = torch.arange(pivots.shape[-1], device=norms.device)
        shares = (rest // number + (place < rest % number)) * (place < number)
        if self.compat == "official":
            turn = ops.set_order(tokens.position.gather(-1, pivots.flatten(1)).view_as(pivots), number)
            pivots, shares = pivots.gather(-1, turn), shares.gather(-1, turn)
        similarity = gather(units, pivots.flatten(1)).unflatten(1, pivots.shape[1:]) @ units[:, None].transpose(-1, -2)
        taken = torch.zeros_like(own).scatter(-1, of_image, True) & own
        return ops.in_turns(similarity, shares, own, taken).any(1)
