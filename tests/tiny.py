"""Tiny random LLaVA models for tests: Hugging Face's class and ours on the same weights."""

from __future__ import annotations

import tempfile
from functools import cache

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as HuggingFaceConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from mustdrop.hooks import Reducer

IMAGE_TOKEN = 120  # Hugging Face's placeholder id in the tiny vocabulary
SIDE = 12  # patches per side
LAYERS = 8


@cache
@torch.inference_mode(False)  # a test that runs in inference mode may be the first to ask
def hugging_face(layers: int = LAYERS, kv_heads: int = 2, strategy: str = "default", side: int = SIDE, seed: int = 0):
    """A random `LlavaForConditionalGeneration` whose attention is far from uniform, so that choices have a margin."""
    torch.manual_seed(seed)
    config = HuggingFaceConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=14 * side,
            patch_size=14,
            initializer_factor=1.0,
        ),
        text_config=LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.18 if "q_proj" in name or "k_proj" in name else 0.06)
    return model


@cache
@torch.inference_mode(False)  # a test that runs in inference mode may be the first to ask
def ours(attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32, **shape) -> LlavaLlamaForCausalLM:
    """Our class on the weights of `hugging_face(**shape)`, through its saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        hugging_face(**shape).save_pretrained(folder)
        model = LlavaLlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation)
    return model.eval()


def pictures(count: int, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    """Pixels `[count, 3, 14 side, 14 side]`: smooth blobs on noise of growing strength, so that some windows merge."""
    generator = torch.Generator().manual_seed(seed)
    size = 14 * side
    line = torch.linspace(-1, 1, size)
    images = []
    for number in range(count):
        x, y, radius = torch.rand(3, generator=generator).tolist()
        blob = torch.exp(-((line[None] - 2 * x + 1) ** 2 + (line[:, None] - 2 * y + 1) ** 2) / (0.1 + radius))
        noise = torch.randn(3, size, size, generator=generator) * (line[None, :, None] > 0.2 * number) * 1.5
        images.append(2 * blob[None] + noise)
    return torch.stack(images)


def prompt(text_before: int, text_after: int, images: int = 1, seed: int = 0) -> torch.Tensor:
    """Ids of a prompt `[1, length]`: BOS, text, images with a text token between them, text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 110, (text_before + text_after + images,), generator=generator).tolist()
    ids = [1, *text[:text_before]]
    for number in range(images):
        ids += [IMAGE_TOKEN_INDEX] + ([text.pop()] if number + 1 < images else [])
    return torch.tensor([ids + text[text_before : text_before + text_after]])


def batch(prompts: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts `[1, length]` padded to one batch: `input_ids` and `attention_mask`."""
    rows = [ids[0] for ids in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_value=0, padding_side=side)
    return {"inputs": ids, "attention_mask": mask}


def expand_for_hugging_face(ids: torch.Tensor, tokens_per_image: int) -> torch.Tensor:
    """Our ids with every -200 replaced by as many placeholders as the image has tokens."""
    row = [t for i in ids[0].tolist() for t in ([IMAGE_TOKEN] * tokens_per_image if i == IMAGE_TOKEN_INDEX else [i])]
    return torch.tensor([row])


def run(model: LlavaLlamaForCausalLM, reducer: Reducer, new_tokens: int = 4, **inputs):
    """Greedy ids, the logits of every step `[batch, steps, vocabulary]`, and the traces."""
    with reducer.on(model) as record:
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences, torch.stack(output.logits, dim=1), record.traces
