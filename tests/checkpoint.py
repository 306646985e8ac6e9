"""A small random LLaVA checkpoint with tokenizer and image processor, for tests that start from a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 6
VOCABULARY = 320


def save_checkpoint(folder: Path, tokenizer_folder: Path) -> Path:
    """Write a Hugging Face-format LLaVA of 36 patches and 8 decoder layers; returns ``folder``."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=14 * SIDE,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=VOCABULARY - 1,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.5 if "q_proj" in name or "k_proj" in name else 0.15)
    model.save_pretrained(folder)
    side = 14 * SIDE
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(folder)
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    return folder
