"""TReVS (2026): image and question choose before the decoder, the heads that discriminate inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import require
from mustdrop.compose import Compose
from mustdrop.greedy import Nearest, cosines, in_turn
from mustdrop.hooks import DecoderStep, Keep, VisionStep
from mustdrop.methods.two_stages import Entrance, Inside, of_text, step_attention

BY_SCORE = 0.75  # of the tokens that enter; the others are the farthest from them
EPSILON = 1e-8


@dataclass
class TReVS(Compose):
    """TReVS.

    Twice `retain` tokens of every image enter the decoder: three quarters by a score of what CLS paid a token in the
    last vision block (all tokens, where there is no CLS) and how similar its projection is to the text after the first
    image, each measured in deviations from its median; the others one after the other, the least similar to those
    chosen. From a quarter of the depth on, two thirds of `retain` stay: by the most that a text token would pay them in
    the layer to come, mean over the half of the heads that differ most between the image's tokens. The mean over the
    layers is `retain`.

    Parameters
    ----------
    retain : int or float
        Mean vision tokens per decoder layer and image with all its views; a float is a share of its patches.
    visual_temperature : float
        Divides the deviations of CLS's attention.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    retain: int | float = 64
    visual_temperature: float = 1.4

    def __post_init__(self) -> None:
        require(self.visual_temperature > 0, "visual_temperature", self.visual_temperature, "more than 0")
        parts = [_ByImageAndText(self.retain, 2.0, self.visual_temperature), _ByText(self.retain, {8 / 32: 2 / 3})]
        super().__init__(parts)


@dataclass
class _ByImageAndText(Entrance):
    counts_at: ClassVar[str] = "on_instruction"

    visual_temperature: float = 1.4

    def on_instruction(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens)
        if counts is None:
            return None
        textual = similarity_to_text(tokens.patches, step.instruction, step.real)
        score = both(tokens.notes["cls_attention"], textual, self.visual_temperature, tokens.valid)
        return Keep.top(with_farthest(tokens.patches, score, counts, tokens.valid), counts)


class _ByText(Inside):
    def score(self, step: DecoderStep) -> Tensor:
        attention, real = of_text(step_attention(step), step.tokens)
        return strongest_by_variable_heads(attention, real, step.tokens.image, step.tokens.images)


def similarity_to_text(features: Tensor, text: Tensor, real: Tensor) -> Tensor:
    """Root mean square over a text's tokens of their positive cosine similarity, float32 `[rows, tokens]`.

    `features` `[rows, tokens, width]`, `text` `[rows, length, width]`, padded where `real` bool `[rows, length]` is
    False.
    """
    units = F.normalize(features.float(), dim=-1)
    similarity = (units @ F.normalize(text.float(), dim=-1).transpose(1, 2)).clamp(min=0)
    return ((similarity.square() @ real[..., None].float())[..., 0] / real.sum(-1, keepdim=True).clamp(min=1)).sqrt()


def both(visual: Tensor, textual: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """The larger of two scores plus their geometric mean, both in deviations above their medians, `[rows, tokens]`."""
    by_image, by_text = deviation(visual, valid) / temperature, deviation(textual, valid)
    return torch.maximum(by_image, by_text) + (by_image * by_text).sqrt() + 1e-6 * (visual + textual)


def deviation(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """How many median absolute deviations a score lies above its row's median, 0 below it."""
    real = score if valid is None else score.masked_fill(~valid, float("nan"))
    away = real - real.nanmedian(-1, keepdim=True).values
    above = away / (away.abs().nanmedian(-1, keepdim=True).values + EPSILON)
    return above.clamp(min=0).nan_to_num(nan=0.0)


def with_farthest(features: Tensor, score: Tensor, counts: list[int], valid: Tensor | None = None) -> Tensor:
    """A score `[rows, tokens]` whose best `counts` are three quarters by `score`, and then the farthest from those."""
    ranked = score if valid is None else score.masked_fill(~valid, float("-inf"))
    _, wanted = ops.for_rows([int(BY_SCORE * count) for count in counts], score.device)
    first = ops.top_count(ranked, wanted)
    nearest = Nearest(cosines(features), first)
    open_ = ~first if valid is None else valid & ~first
    most = max(count - int(BY_SCORE * count) for count in counts)
    turn = in_turn(most, lambda: -nearest.largest, nearest.take, open_)
    return turn.float().masked_fill(first, float("inf"))


def strongest_by_variable_heads(attention: Tensor, real: Tensor, image: Tensor, images: int) -> Tensor:
    """The most that any row pays a token, mean over the half of the heads with the largest variance in its image.

    Parameters
    ----------
    attention : `[batch, heads, rows, length]`
    real : bool `[batch, rows]`
    image : int64 `[batch, length]`
        The image each column belongs to, -1 for text.
    images : int
        Most images of a prompt.

    Returns
    -------
    `[batch, length]`
    """
    heads = attention.shape[1]
    attention = attention * real[:, None, :, None]
    mean = attention.sum(2) / real.sum(-1).clamp(min=1)[:, None, None]
    own = (image[:, None] == torch.arange(images, device=image.device)[:, None]).to(mean.dtype)
    number = own.sum(-1)[:, None].clamp(min=1)
    centre = mean @ own.transpose(1, 2) / number
    spread = (mean - centre @ own).square() @ own.transpose(1, 2) / number
    chosen = ops.top_count(spread.transpose(1, 2).flatten(0, 1), max(1, heads // 2)).unflatten(0, spread.shape[::2])
    weight = chosen.transpose(1, 2).to(mean.dtype) @ own / max(1, heads // 2)
    return (attention * weight[:, :, None]).sum(1).amax(1)
