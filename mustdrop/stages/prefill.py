"""Stage 2, in prefill: drop what the text does not attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mustdrop import ops
from mustdrop.checks import one_of, require
from mustdrop.hooks import DecoderStep, Reducer

PUBLISHED_LAYERS = (2, 6, 10, 14)  # of LLaVA-1.5-7B's 32


@dataclass
class DualAttentionFilter(Reducer):
    """The dual-attention filter (MustDrop, section 3.3).

    After some decoder layers, a vision token is dropped if the text after the image, taken together, pays it less
    than `global_threshold` of what it pays the whole image, and no single text token pays it `individual_threshold`.
    Protected tokens stay. Attention is the layer's own, mean over heads. Each image is judged by itself; a prompt with
    no text after its image gives no evidence, and nothing is dropped.

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
    """

    global_threshold: float = 0.011
    individual_threshold: float = 0.01
    layers: Sequence[int | float] | None = None
    score_dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self.global_threshold >= 0, "global_threshold", self.global_threshold, "0 or more")
        require(self.individual_threshold >= 0, "individual_threshold", self.individual_threshold, "0 or more")
        one_of("score_dtype", self.score_dtype, ("float32", "model"))

    def layers_of(self, layers: int) -> list[int]:
        """The filter layers of a decoder that is `layers` deep."""
        chosen = [layer / 32 for layer in PUBLISHED_LAYERS] if self.layers is None else self.layers
        return [ops.layer_index(layer, layers) for layer in chosen]

    def check(self, layers: int, blocks: int) -> None:
        for layer in self.layers or ():
            fits = 0 <= layer < 1 if isinstance(layer, float) else -layers <= layer < layers
            require(fits, "filter_layers", layer, f"a layer from 0 to {layers - 1} or a fraction below 1")

    def after_decoder_layer(self, step: DecoderStep) -> Tensor | None:
        tokens = step.tokens
        if step.layer not in self.layers_of(step.layers) or not tokens.questions:
            return None
        rows, real = tokens.question_rows()
        attention = step.attention.probabilities(rows)
        if self.score_dtype == "model":
            attention = attention.to(step.hidden.dtype)
        attention = attention.mean(1).masked_fill(~real[..., None], 0)
        return ops.dual_attention_keep(
            attention, tokens.image, tokens.images, self.global_threshold, self.individual_threshold
        )
