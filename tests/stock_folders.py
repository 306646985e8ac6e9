"""Whole folders of tiny random stock models, with the processors that real ones have."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import transformers as hf
from stock import GRIDS, PIXELS, SIDE, TILE, stock
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# Family -> the tokens that stand for an image and for a video, and what is put around them.
PLACEHOLDERS = {
    "qwen": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
    "llava": ("<image>", "<video>", "", ""),
}
PROCESSORS = {
    "llava": ("LlavaProcessor", {"patch_size": 14, "num_additional_image_tokens": 1}),
    "next": ("LlavaNextProcessor", {"patch_size": 14, "num_additional_image_tokens": 1}),
    "onevision": ("LlavaOnevisionProcessor", {"num_image_tokens": SIDE**2}),
    "video": ("VideoLlavaProcessor", {"patch_size": 14, "num_additional_image_tokens": 1}),
    "qwen2": ("Qwen2VLProcessor", {}),
    "qwen2.5": ("Qwen2_5_VLProcessor", {}),
    "qwen3": ("Qwen3VLProcessor", {}),
    "internvl": ("InternVLProcessor", {"image_seq_length": (TILE // 2) ** 2}),
}
LEAST, MOST = 56 * 56, 28 * 28 * 40  # pixels of an image for the Qwens


def placeholders(family: str) -> tuple[str, str, str, str]:
    """An image's and a video's, what stands before each, and after."""
    return next((tokens for name, tokens in PLACEHOLDERS.items() if family.startswith(name)), PLACEHOLDERS["llava"])


def chat(family: str) -> str:
    """A chat template; processors of InternVL put the marks of images around them."""
    image, video, before, after = placeholders(family)
    before, after = (before, after) if family.startswith("qwen") else ("", "")
    parts = "".join(
        f"{{% {word} part['type'] == '{kind}' %}}{before}{token}{after}"
        for word, kind, token in (("if", "image", image), ("elif", "video", video))
    )
    return (
        "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
        + parts
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def image_processor(family: str):
    """As the checkpoints of a family have it, at the size of the tiny models."""
    size = {"height": PIXELS, "width": PIXELS}
    if family.startswith("qwen"):
        return Qwen2VLImageProcessorPil(min_pixels=LEAST, max_pixels=MOST)
    if family == "internvl":
        tile = {"height": 14 * TILE, "width": 14 * TILE}
        return GotOcr2ImageProcessorPil(size=tile, crop_to_patches=True, min_patches=1, max_patches=6)
    if family in ("llava", "video"):
        return CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size)
    if family == "next":
        return LlavaNextImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size, image_grid_pinpoints=GRIDS)
    return LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=GRIDS)


def tokenizer(folder: Path, family: str):
    """A small sentencepiece tokenizer with the placeholders of a family; its model lies in the folder."""
    tokens = [token for token in placeholders(family) if token]
    named = {}
    if family == "internvl":
        names = "context_image_token", "video_token", "start_image_token", "end_image_token"
        named = {"extra_special_tokens": dict(zip(names, tokens, strict=True))}
    made = hf.LlamaTokenizer.from_pretrained(folder, **named)
    made.add_tokens(tokens, special_tokens=True)
    made.pad_token = "</s>"
    made.chat_template = chat(family)
    return made


def save(folder: Path, family: str, text: str, tokenizer_folder: Path) -> Path:
    """A whole checkpoint of a random stock model, with its processor; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    words, model = tokenizer(folder, family), copy.deepcopy(stock(family, text))
    image, video, *around = placeholders(family)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    model.config.image_token_id = model.config.image_token_index = words.convert_tokens_to_ids(image)
    if family in ("onevision", "video") or family.startswith("qwen"):
        model.config.video_token_id = model.config.video_token_index = words.convert_tokens_to_ids(video)
    if family.startswith("qwen"):
        ends = words.convert_tokens_to_ids(around)
        model.config.vision_start_token_id, model.config.vision_end_token_id = ends
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    kind, facts = PROCESSORS[family]
    strategy = "full" if family == "onevision" else "default"
    facts = {"processor_class": kind, "vision_feature_select_strategy": strategy, "image_token": image, **facts}
    (folder / "processor_config.json").write_text(json.dumps(facts))
    return folder
