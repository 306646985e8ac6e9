"""Models of any LLaVA shape with random weights, their Hugging Face twins, and prompts to time them with."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as HuggingFaceConfig
from transformers.initialization import no_init_weights

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from mustdrop.checks import shown
from mustdrop.shape import NAMED, ModelShape

SHAPES = {"llava-1.5-7b": "llava-1.5-7b", "7b": "llava-1.5-7b", "llava-1.5-13b": "llava-1.5-13b",
          "13b": "llava-1.5-13b", "llava-mini": "llava-mini", "mini": "llava-mini"}  # fmt: skip
SYSTEM_SHARE = 35 / 60  # of a LLaVA-1.5 prompt's text stands before the picture
_NAMES = {  # of weights: Hugging Face's -> ours
    "model.language_model.": "model.",
    "model.vision_tower.": "model.vision_tower.vision_tower.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
}


def read_shape(source: str, layers: int | None, dtype: str) -> ModelShape:
    """A shape by a name in `SHAPES`, or from a config.json or its folder; `layers` overrides the decoder's depth.

    Raises
    ------
    ValueError
        If there is no such shape.
    """
    if source in SHAPES:
        shape = ModelShape.from_config(NAMED[SHAPES[source]], SHAPES[source], dtype)
    elif os.path.exists(source):
        shape = ModelShape.from_config(source, dtype=dtype)
    else:
        known = ", ".join(SHAPES)
        raise ValueError(f"shape: got {shown(source)}, expected {known}, a config.json or a folder with one")
    return shape if layers is None else replace(shape, layers=layers)


def random_model(shape: ModelShape, dtype: torch.dtype, attention: str, device: str) -> LlavaLlamaForCausalLM:
    """A LLaVA of a shape in evaluation mode; weights are noise, the same for the same shape.

    The tower has one block more than are run, as LLaVA's has: MustDrop reads its attention.
    """
    config = LlavaConfig(
        **_decoder_settings(shape),
        mm_vision_config=_vision_config(shape).to_dict(),
        mm_hidden_size=shape.vision_hidden,
        mm_projector_type=shape.projector_type,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="cls_patch" if shape.feature_cls else "patch",
    )
    with torch.device(device), no_init_weights():
        model = LlavaLlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(float("norm" in name and name.endswith("weight")))
                continue
            for part in weight.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    return model.eval()


def hugging_face_twin(model: LlavaLlamaForCausalLM, shape: ModelShape) -> LlavaForConditionalGeneration | None:
    """Plain Hugging Face LLaVA on the very same weights (shared, not copied); None if it cannot have this shape."""
    if shape.projector_type != "mlp2x_gelu" or model.config.mm_vision_select_layer != -2:
        return None
    config = HuggingFaceConfig(
        vision_config=CLIPVisionConfig(**model.config.mm_vision_config),
        text_config=LlamaConfig(**_decoder_settings(shape), rope_parameters=model.config.rope_parameters),
        image_token_index=placeholder(shape),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if shape.feature_cls else "default",
    )
    with torch.device("meta"), no_init_weights():
        twin = LlavaForConditionalGeneration._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )

    def our_name(name: str) -> str:
        prefix = next((prefix for prefix in _NAMES if name.startswith(prefix)), "")
        return _NAMES.get(prefix, "") + name.removeprefix(prefix)

    weights, buffers = model.state_dict(), dict(model.named_buffers())
    twin.load_state_dict({name: weights[our_name(name)] for name in twin.state_dict()}, assign=True)
    for name, _ in list(twin.named_buffers()):  # rotary frequencies and the like are not part of the weights
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(leaf, buffers[our_name(name)], persistent=False)
    return twin.eval()


def placeholder(shape: ModelShape) -> int:
    """The id that stands for a vision token in Hugging Face's prompts: the last one, which no text here uses."""
    return shape.vocab - 1


@dataclass
class Inputs:
    """Prompts with a picture each: ids `[batch, text + 1]`, one of them -200, pixels `[batch, 3, side, side]`."""

    ids: Tensor
    pixels: Tensor

    @classmethod
    def random(cls, shape: ModelShape, batch: int, text: int, dtype: torch.dtype, device: str) -> Inputs:
        """Prompts of `text` tokens before and after the picture, all different, the same in every run."""
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(3, placeholder(shape), (batch, text), generator=generator)
        words[:, 0] = 1
        before = min(max(1, round(text * SYSTEM_SHARE)), text - 1)
        image = torch.full((batch, 1), IMAGE_TOKEN_INDEX)
        pixels = torch.randn(batch, 3, shape.image_size, shape.image_size, generator=generator)
        ids = torch.cat([words[:, :before], image, words[:, before:]], dim=1)
        return cls(ids.to(device), pixels.to(device, dtype))

    def expanded(self, shape: ModelShape) -> Tensor:
        """The ids as Hugging Face wants them, one placeholder per vision token: `[batch, text + vision tokens]`."""
        place = int((self.ids[0] == IMAGE_TOKEN_INDEX).nonzero())
        count = shape.patches + shape.feature_cls
        image = torch.full((len(self.ids), count), placeholder(shape), device=self.ids.device)
        return torch.cat([self.ids[:, :place], image, self.ids[:, place + 1 :]], dim=1)


def _decoder_settings(shape: ModelShape) -> dict:
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 1 << 15,
    }


def _vision_config(shape: ModelShape) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=shape.vision_layers + 1,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
