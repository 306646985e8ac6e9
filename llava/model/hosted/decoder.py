"""Our loop over the layers of a text model of transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from llava.model.language_model.loop import DecoderLoop
from llava.model.language_model.stream import Stream


class HostedDecoder(DecoderLoop):
    """The loop over a text model's own layers."""

    def __init__(self, text: PreTrainedModel):
        self.layers, self.norm, self.rotary_emb, self.config = text.layers, text.norm, text.rotary_emb, text.config
        self.drops_early = getattr(text, "drops_early", True)


@dataclass
class Deepstack:
    """Features of earlier vision blocks that are added to vision tokens after the first decoder layers.

    `features` are `[placeholders, width]`, one tensor a layer, of all placeholders of a batch in their order; `number`
    int64 `[rows, length]` says which of them stands in each column of the full prompts.
    """

    features: list[Tensor]
    number: Tensor

    @classmethod
    def of(cls, features: list[Tensor], shows: Tensor) -> Deepstack:
        """From the placeholders of full prompts, bool `[rows, length]`."""
        number = shows.flatten().cumsum(0).view(shows.shape) - 1
        return cls(features, number.clamp(min=0))

    def added(self, index: int, stream: Stream) -> Stream:
        """The stream after layer `index`: what is left of the placeholders gets the features of its own."""
        tokens, hidden = stream.tokens, stream.hidden
        own = self.number.to(hidden.device).gather(1, tokens.original_column)
        features = self.features[index].to(hidden)[own]
        return stream.with_hidden(hidden + features.masked_fill(~tokens.vision[..., None], 0))


class DeepstackDecoder(HostedDecoder):
    """The loop of a model with deepstack."""

    def __init__(self, text: PreTrainedModel, deepstack: Deepstack):
        super().__init__(text)
        self.deepstack = deepstack

    def after_layer(self, index: int, stream: Stream) -> Stream:
        if index >= len(self.deepstack.features) or not stream.tokens.images:
            return stream
        return self.deepstack.added(index, stream)
