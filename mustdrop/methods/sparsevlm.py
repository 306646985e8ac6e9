"""SparseVLM (arXiv 2410.04417): the text tokens that look at the image choose what stays of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import check_layers, one_of, require
from mustdrop.hooks import DecoderStep, Keep, Tokens, gather
from mustdrop.keep import each_image, padded
from mustdrop.methods.layerwise import LayerwiseDrop, Stage
from mustdrop.methods.sparsevlm_ops import raters, recycle, recycled, rotary_similarity
from mustdrop.retain import check_retain, tokens_of

LAYERS = {False: (2, 6, 15), True: (2, 6, 15, 19)}  # of 32; by whether the rank decides
HEADS = 14  # of 32
RANK_TOLERANCE = 576 * 2**-23  # torch's own for as many columns, whatever the padding
# Tokens kept after them, of 576, for a mean of so many: the authors' code.
KEEPS = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@dataclass
class SparseVLM(LayerwiseDrop):
    """SparseVLM.

    Raters are the text tokens after the image whose embedding is more similar to the vision tokens' than the average
    text token's (softmax over the text, mean over the vision tokens). After some decoder layers, each image keeps the
    tokens to which the raters attend most in that layer, mean over heads and raters. Of the tokens that go, the best
    three tenths are recycled: clustered, and every cluster's mean goes on in the place of its centre (version 1).
    Version 2 (SparseVLM+) recycles nothing and looks only at those heads, 14 of 32, that attend most to vision tokens.
    A prompt without text after its image has no raters and drops nothing.

    Parameters
    ----------
    version : {1, 2}
        Of the authors' code.
    retain : int or float, optional
        Mean vision tokens per decoder layer and image, by the authors' meter: the published numbers (192, 128 or 64,
        whichever is closest) are scaled to it, recycled tokens included. A float is a share of the image's patches.
        Default: a third of the tokens.
    keeps : sequence of int or float, optional
        Instead: tokens of an image that go on after each of the layers; floats are shares.
    rank_scale, rank_bias : float, optional
        Instead, in version 1: keep as many as the rank of the raters' attention to an image, times the scale, plus the
        bias. Published: 13.5 and 0 (192 tokens), 9 and 6 (128), 0.8 and 0 (64).
    layers : sequence of int or float, optional
        Decoder layers after which tokens are dropped; floats are fractions of the depth. Default: 2, 6, 15 of 32, and
        19 where the rank decides.
    compat : {"default", "official"}
        "official": published numbers are taken as they are whatever the model's depth, 14 heads are chosen of any
        number, attention is in the model's precision. In version 1 recycled tokens come after the image's others,
        positions are renumbered after every drop, and a generated token's position is the layer's cache length. In
        version 2 attention is divided by what its rotation alone would give, a correction that changes sign with the
        distance.
    rope_theta : float
        Base of the model's rotary embedding, for that correction.

    Raises
    ------
    ValueError
        If a setting is out of range, or `retain` out of reach.
    """

    version: int = 1
    retain: int | float | None = None
    keeps: Sequence[int | float] | None = None
    rank_scale: float | None = None
    rank_bias: float = 0.0
    layers: Sequence[int | float] | None = None
    compat: str = "default"
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        require(self.version in KEEPS, "version", self.version, "1 or 2")
        one_of("compat", self.compat, ("default", "official"))
        renumbers = self.version == 1 and self.compat == "official"
        self.positions = "renumber" if renumbers else "original"
        self.decode_positions = "cache_length" if renumbers else "continue"
        check_retain(self.retain)
        require(self.retain is None or self.keeps is None, "retain", self.retain, "left out where keeps are given")
        require(self.layers is None or len(self.layers) > 0, "layers", self.layers, "at least one")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "more than 0")
        by_rank = self.rank_scale is not None
        require(by_rank or self.rank_bias == 0, "rank_bias", self.rank_bias, "left out without rank_scale")
        alone = self.version == 1 and self.retain is None and self.keeps is None
        require(not by_rank or alone, "rank_scale", self.rank_scale, "left out but in version 1 without retain, keeps")
        require(not by_rank or self.rank_scale >= 0, "rank_scale", self.rank_scale, "0 or more")
        stages = len(self._layers())
        require(self.keeps is None or len(self.keeps) == stages, "keeps", self.keeps, f"as many as layers, {stages}")
        free = by_rank or self.keeps is not None
        require(free or stages == 3, "layers", self.layers, "3 without keeps or rank_scale")
        for keep in self.keeps or ():
            fits = 0 <= keep <= 1 if isinstance(keep, float) else keep >= 0
            require(fits, "keeps", keep, "a number of tokens or a share of them between 0 and 1")

    def check(self, layers: int, blocks: int) -> None:
        check_layers("layers", self.layers or (), layers)

    def check_counts(self, layers: int, grid: tuple[int, int], tokens: int, keys: int = 0) -> None:
        super().check_counts(layers, grid, tokens, keys)
        if self.keeps is not None:
            counts = list(self.schedule(layers, tokens).values())
            falling = all(now >= then for now, then in pairwise((tokens, *counts)))
            require(falling, "keeps", self.keeps, f"numbers that do not rise, from the {tokens} tokens of an image on")

    def merges_after(self, layers: int, tokens: int, patches: int | None = None) -> set[int]:
        if self.rank_scale is not None:
            return set(self.schedule(layers, tokens))
        stages = self.stages(self.schedule(layers, tokens, patches), tokens)
        return {layer for layer, stage in stages.items() if stage.after > stage.kept}

    def drops_after(self, layers: int, tokens: int, patches: int | None = None) -> set[int]:
        by_rank = self.rank_scale is not None
        return set(self.schedule(layers, tokens)) if by_rank else super().drops_after(layers, tokens, patches)

    def asks_after(self, layers: int) -> list[int]:
        return [ops.layer_index(layer, layers) for layer in self._layers()]

    def schedule(self, layers: int, tokens: int, patches: int | None = None) -> dict[int, int]:
        after = self.asks_after(layers)
        if self.rank_scale is not None:
            return dict.fromkeys(after, tokens)
        if self.keeps is not None:
            keeps = [round(keep * tokens) if isinstance(keep, float) else keep for keep in self.keeps]
            return dict(zip(after, keeps, strict=True))
        retain, published = tokens_of(self.retain or round(tokens / 3), patches or tokens), KEEPS[self.version]
        closest = min(published, key=lambda mean: abs(mean - retain * 576 / tokens))
        shares = [keep / 576 for keep in published[closest]]

        def scaled(factor: float) -> dict[int, int]:
            keeps = (min(1.0, factor * share) * tokens for share in shares)
            return {layer: max(1, round(keep)) for layer, keep in zip(after, keeps, strict=True)}

        if self.compat == "official" and retain in published:
            return scaled(1.0)
        return self.solve(retain, layers, tokens, patches, lambda factor: scaled(factor / min(shares)))

    def added(self, dropped: int) -> int:
        return recycled(dropped)[1] if self.version == 1 else 0

    def before_decoder_layer(self, step: DecoderStep) -> None:
        """Choose the raters from the embeddings."""
        tokens = step.tokens
        if step.layer == 0 and tokens.instruction_tokens:
            rows, real = tokens.instruction_rows()
            step.scratch["raters"] = raters(step.hidden, tokens.vision, rows, real, self.compat == "official")

    def after_decoder_layer(self, step: DecoderStep) -> Keep | None:
        return super().after_decoder_layer(step) if "raters" in step.scratch else None

    def keep(self, step: DecoderStep, stages: list[list[Stage | None]]) -> Keep:
        tokens, rating = step.tokens, step.scratch["raters"].to(step.hidden.device)
        score, rated = self._score(step, rating)
        score = score.masked_fill(tokens.protected, float("inf"))
        now = each_image(tokens, lambda image: image.tokens)
        if self.rank_scale is not None:
            counts, stays = None, self._by_rank(tokens, rating, rated)
            most = max(number for own in now for number in own)
        else:
            counts = self._counts(step, stages)
            stays = padded(counts, tokens.images, score.device)
            pairs = zip(now, counts, strict=True)
            most = max(before - after for pair in pairs for before, after in zip(*pair, strict=True))
        if self.version == 2 or not most:
            return Keep.top(score, counts)
        official = self.compat == "official"
        noise = self._noise(step, now, counts or [[0] * len(own) for own in now], most) if official else None
        return recycle(step.hidden, tokens, score, stays, most, counts, last=official, noise=noise)

    def _noise(self, step: DecoderStep, now: list[list[int]], counts: list[list[int]], most: int) -> Tensor:
        """Random numbers for the recycled tokens of each image, as if it were alone, `[batch, images, tokens]`."""
        noise = torch.zeros(len(now), step.tokens.images, recycled(most)[0])
        generators = step.scratch.setdefault("noise", {})
        for row, (before, after) in enumerate(zip(now, counts, strict=True)):
            for image, (tokens, stay) in enumerate(zip(before, after, strict=True)):
                generator = generators.setdefault((row, image), torch.Generator().manual_seed(0))
                joining = recycled(tokens - stay)[0]
                noise[row, image, :joining] = torch.rand(joining, generator=generator)
        return noise.to(step.hidden.device)

    def _counts(self, step: DecoderStep, stages: list[list[Stage | None]]) -> list[list[int]]:
        """Tokens of each image that stay as they are; all where no text after the image could choose."""
        return [
            [max(number, image.keys) if prompt.instruction_tokens else image.tokens for number, image in pairs]
            for prompt, own in zip(step.tokens.facts(), self.wanted(step, stages), strict=True)
            for pairs in [zip(own, prompt.images, strict=True)]
        ]

    def _by_rank(self, tokens: Tokens, rating: Tensor, rated: Tensor) -> Tensor:
        """The same where the rank of the raters' attention decides, int64 `[batch, images]`."""
        now = ops.tokens_per_image(tokens.image, tokens.images)
        own = tokens.image[:, None] == torch.arange(tokens.images, device=tokens.image.device)[:, None]
        rank = torch.linalg.matrix_rank((rated[:, None] * own[:, :, None]).float(), rtol=RANK_TOLERANCE)
        wanted = (rank * self.rank_scale + self.rank_bias).long().clamp(min=1)
        return torch.where(rating.any(-1, keepdim=True), torch.minimum(wanted, now), now)

    def _score(self, step: DecoderStep, rating: Tensor) -> tuple[Tensor, Tensor]:
        """Mean attention of the raters `[batch, length]`; in version 1 also of each, `[batch, raters, length]`."""
        rows, _ = step.tokens.instruction_rows()
        count = rating.sum(1).clamp(min=1)
        if self.version == 1:
            rated = self.mean_over_heads(step.attention, rows, step.hidden.dtype) * rating[..., None]
            return rated.sum(1) / count[:, None], rated
        attention, share = step.attention.probabilities(rows), HEADS / 32
        if self.compat == "official":
            position = step.tokens.position
            gravity = rotary_similarity(
                position.gather(-1, rows), position, step.attention.keys().shape[-1], self.rope_theta
            )
            attention, share = attention.to(step.hidden.dtype) / gravity[:, None], min(1.0, HEADS / attention.shape[1])
        attention = (attention * rating[:, None, :, None]).sum(2) / count[:, None, None]
        heads = (attention * step.tokens.vision[:, None]).sum(-1).topk(max(1, round(share * attention.shape[1])))
        return gather(attention, heads.indices).mean(1), attention

    def _layers(self) -> Sequence[int | float]:
        return self.layers or [layer / 32 for layer in LAYERS[self.rank_scale is not None]]
