"""Stage 2, in prefill: drop what the text does not attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import check_layers, one_of, require
from mustdrop.hooks import DecoderStep, ImageFacts, Keep, Reducer
from mustdrop.keep import each_image
from mustdrop.stages.budget import Target, check_budget

PUBLISHED_LAYERS = (2, 6, 10, 14)  # of LLaVA-1.5-7B's 32


@dataclass
class DualAttentionFilter(Reducer):
    """The dual-attention filter (MustDrop, section 3.3).

    After some decoder layers, a vision token is dropped if the text after the image, taken together, pays it less
    than `global_threshold` of what it pays the whole image, and no single text token pays it `individual_threshold`.
    Protected tokens stay. Attention is the layer's own, mean over heads. Each image is judged by itself; a prompt with
    no text after its image gives no evidence, and nothing is dropped.

    With `budget`, or a `target` that says so, the same two numbers rank the tokens instead, each relative to its
    threshold, and a token is as good as the better of them. The thresholds would keep the same tokens if both were
    multiplied by one factor chosen for that image and layer. Counts follow from the image's own number of tokens and
    are known beforehand, so that nothing synchronises with the GPU; a prompt with no text after its image is judged by
    its last token.

    Parameters
    ----------
    global_threshold, individual_threshold : float
        As above; the first is relative, the second absolute. Published: 0.001/0.001 (192 tokens on TextVQA),
        0.0012/0.001 (128), 0.011/0.01 (64).
    layers : sequence of int or float, optional
        Decoder layers after which to filter; floats are fractions of the depth. Default: the published 2, 6, 10, 14
        of 32 as fractions.
    score_dtype : {"float32", "model"}
        Precision in which attention is averaged and summed; "model" is the authors'.
    budget : sequence of int or float, optional
        Tokens of an image with all its views that go on after each of the layers; floats are shares of its patches.
    target : Target, optional
        Instead of `budget`: the numbers of a whole reducer.
    """

    global_threshold: float = 0.011
    individual_threshold: float = 0.01
    layers: Sequence[int | float] | None = None
    score_dtype: str = "float32"
    budget: Sequence[int | float] | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        require(self.global_threshold >= 0, "global_threshold", self.global_threshold, "0 or more")
        require(self.individual_threshold >= 0, "individual_threshold", self.individual_threshold, "0 or more")
        one_of("score_dtype", self.score_dtype, ("float32", "model"))
        self.target = self.target or Target(budget=None if self.budget is None else tuple(self.budget))
        check_budget(self.target, len(PUBLISHED_LAYERS if self.layers is None else self.layers))
        ranks = self.global_threshold > 0 or self.individual_threshold > 0
        right = "more than 0 where individual_threshold is 0: tokens are ranked relative to them"
        require(not self.target.filters or ranks, "global_threshold", self.global_threshold, right)

    def schedule(
        self, layers: int, patches: int, entering: int, keys: int = 0, strict: bool = True
    ) -> Mapping[int, int]:
        """Decoder layer -> tokens that go on after it, of an image of which `entering` tokens enter the decoder.

        `keys` of them are key tokens. If the numbers are out of reach: ValueError, or if not `strict`, what comes
        nearest.
        """
        after = tuple(dict.fromkeys(self.layers_of(layers)))
        return self.target.solve(patches, tokens=entering, keys=keys, after=after, layers=layers, strict=strict).after

    def check_tokens(self, layers: int, tokens: int) -> None:
        self.check_counts(layers, (1, tokens), tokens)

    def check_counts(self, layers: int, grid: tuple[int, int], tokens: int, keys: int = 0) -> None:
        if self.target.filters:
            self.schedule(layers, grid[0] * grid[1], tokens, keys)

    def asks_after(self, layers: int) -> set[int]:
        return set(self.layers_of(layers))

    def drops_after(self, layers: int, tokens: int, patches: int | None = None) -> set[int]:
        return set(self.layers_of(layers))

    def layers_of(self, layers: int) -> list[int]:
        """The filter layers of a decoder that is `layers` deep."""
        chosen = [layer / 32 for layer in PUBLISHED_LAYERS] if self.layers is None else self.layers
        return [ops.layer_index(layer, layers) for layer in chosen]

    def check(self, layers: int, blocks: int) -> None:
        if self.layers is not None:
            check_layers("filter_layers", self.layers, layers)
        elif self.target.budget is not None:
            right = f"given where a decoder of {layers} layers has too few for the published ones"
            require(len(set(self.layers_of(layers))) == len(self.target.budget), "filter_layers", self.layers, right)

    def after_decoder_layer(self, step: DecoderStep) -> Keep | None:
        tokens = step.tokens
        if self.target.filters:
            return self._best(step)
        if step.layer not in self.layers_of(step.layers) or not tokens.instruction_tokens:
            return None
        attention = self._attention(step, *tokens.instruction_rows())
        return Keep.where(ops.dual_attention_keep(attention, tokens.image, tokens.images, *self._thresholds))

    @property
    def _thresholds(self) -> tuple[float, float]:
        return self.global_threshold, self.individual_threshold

    def _best(self, step: DecoderStep) -> Keep | None:
        """The best tokens of every image; None if no image has more."""
        tokens = step.tokens

        def count(image: ImageFacts) -> int:
            schedule = self.schedule(step.layers, image.patches, image.tokens_in, image.keys, strict=False)
            return schedule.get(step.layer, image.tokens)

        counts = each_image(tokens, count)
        if counts == each_image(tokens, lambda image: image.tokens):
            return None
        rows, real = tokens.last_row(), torch.ones_like(tokens.vision[:, :1])
        if tokens.instruction_tokens:
            of_text, real = tokens.instruction_rows()
            rows = torch.cat([of_text, rows], dim=1)
            real = torch.cat([real, ~real.any(-1, keepdim=True)], dim=1)
        attention = self._attention(step, rows, real)
        score = dual_attention_score(attention, tokens.image, tokens.images, *self._thresholds)
        return Keep.top(score, counts)

    def _attention(self, step: DecoderStep, rows: Tensor, real: Tensor) -> Tensor:
        """Attention of some rows, mean over heads, zero where they are not `real`: `[batch, rows, length]`."""
        attention = step.attention.probabilities(rows)
        if self.score_dtype == "model":
            attention = attention.to(step.hidden.dtype)
        return attention.mean(1).masked_fill(~real[..., None], 0)


def dual_attention_score(
    attention: Tensor, image: Tensor, images: int, global_threshold: float, individual_threshold: float
) -> Tensor:
    """How good each vision token is by the two numbers of the dual-attention filter, up to a common factor.

    The larger of (its share of the attention paid to its image) / `global_threshold` and (the most that any row pays
    it) / `individual_threshold`; times both thresholds, so that one of them may be 0. Arguments as in
    `ops.dual_attention_keep`, which keeps the tokens whose score is at least the thresholds' product.

    Returns
    -------
    `[batch, length]`
    """
    vision, own = image >= 0, image.clamp(min=0)
    total, strongest = attention.sum(1), attention.amax(1)
    on_image = total.new_zeros(len(total), images).scatter_add(1, own, total * vision).gather(1, own)
    share = total / on_image.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.maximum(share * individual_threshold, strongest * global_threshold)
