"""The LLaMA decoder of LLaVA: its configuration, and the model that runs the decoder loop."""

from __future__ import annotations

from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.layers import LlamaDecoderLayer
from llava.model.language_model.loop import DecoderLoop, Record
from llava.model.llava_arch import LlavaMetaModel
from mustdrop.hooks import ForwardState, Tokens


class LlavaConfig(LlamaConfig):
    """LLaMA's configuration plus LLaVA's `mm_*` fields (original LLaVA names).

    `mm_vision_config` holds the CLIP vision configuration, so that a saved folder is complete in itself.
    """

    model_type = "llava_llama"

    mm_vision_tower: str | None = None
    mm_vision_config: dict | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    mm_patch_merge_type: str = "flat"
    image_aspect_ratio: str | None = "pad"
    image_grid_pinpoints: list | str | None = None
    protocol: str = "model"
    sliding_window: int | None = None


class LlavaLlamaModel(DecoderLoop, LlavaMetaModel, LlamaModel):
    """Vision tower, projector and LLaMA decoder; the loop over layers is in `loop`."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.__class__ = LlamaDecoderLayer  # the same parts, run as the loop wants it
        self.build_vision(config)

    def forward(
        self,
        inputs_embeds: Tensor,
        tokens: Tokens | None = None,
        state: ForwardState | None = None,
        cache: VisionCache | None = None,
        attention_mask: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Hidden states of new positions `[batch, length, width]`: a prefill, unless the cache is filled.

        `attention_mask` is only for a 4-D mask of the caller's own; padding is part of `tokens`.
        """
        if cache is not None and cache.filled:
            hidden = self.decode(inputs_embeds, cache, record)
        else:
            hidden = self.prefill(inputs_embeds, tokens, state, cache, attention_mask, record)
        hidden = self.norm(hidden)
        if record is not None and record.hidden is not None:
            record.hidden[-1] = hidden  # as in transformers, the last of the hidden states is the normalised one
        return hidden
