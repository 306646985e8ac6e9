"""Writes the embedded model as a Hugging Face folder, and the one with tiles as LLaVA-NeXT's were released."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.checkpoint.names import PROJECTOR, TOWER
from llava.train.mini import highres, tiles, vision
from llava.train.mini.data import build_tokenizer
from llava.train.mini.endtoend import MiniLlava

CHAT_TEMPLATE = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% if message['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def to_hugging_face(mini: MiniLlava, dtype: torch.dtype = torch.float16) -> LlavaForConditionalGeneration:
    """The same weights in the library's own class."""
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=mini.tower.config.to_dict(),
        text_config=mini.model.config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(mini.tower.config.image_size // mini.tower.config.patch_size) ** 2,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(mini.tower.state_dict())
    model.model.language_model.load_state_dict(mini.model.model.state_dict())
    model.lm_head.load_state_dict(mini.model.lm_head.state_dict())
    projector = model.model.multi_modal_projector
    projector.linear_1.load_state_dict(mini.projector[0].state_dict())
    projector.linear_2.load_state_dict(mini.projector[2].state_dict())
    model.generation_config = _generation_config(tokenizer)
    return model.to(dtype).eval()


def new_processor(config: LlavaConfig) -> LlavaProcessor:
    """CLIP image processor at the tower's size, and the tokenizer."""
    side = config.vision_config.image_size
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(vision.IMAGE_MEAN),
        image_std=list(vision.IMAGE_STD),
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def export(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the folder; each file appears complete or not at all, and other files in it stay."""
    model = to_hugging_face(
        MiniLlava.from_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)), dtype
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        processor = new_processor(model.config)
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        _move(Path(temporary), folder)
    return folder


def export_tiled(checkpoint: Path, folder: Path, lender: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model tuned on tiles in LLaVA's own format, as LLaVA-NeXT was released.

    Parameters
    ----------
    checkpoint : Path
        Of `llava.train.mini.tiles.tune_tiles`.
    folder : Path
        Where to; other files in it stay.
    lender : Path
        The embedded model's folder: it keeps the frozen vision tower, of which ``folder`` holds the cropped position
        table alone.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["tiled"]
    mini = MiniLlava.from_hugging_face(lender)
    table = mini.tower.embeddings.position_embedding.weight
    weights = {
        "model.image_newline": state["image_newline"],
        f"{TOWER}embeddings.position_embedding.weight": tiles.crop_positions(table),
    }
    for prefix, ours in (("projector.", PROJECTOR), ("model.", "")):
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        weights |= {ours + name: value for name, value in own.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        stored = {name: value.detach().to(dtype).contiguous() for name, value in weights.items()}
        save_file(stored, Path(temporary) / "model.safetensors", {"format": "pt"})
        facts = _tiled_config(mini, os.path.relpath(lender, folder), dtype)
        (Path(temporary) / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(temporary)
        tiles.image_processor().save_pretrained(temporary)
        _generation_config(tokenizer).save_pretrained(temporary)
        _move(Path(temporary), folder)
    return folder


def _tiled_config(mini: MiniLlava, lender: str, dtype: torch.dtype) -> dict:
    """config.json of LLaVA's own format, with the settings of LLaVA-NeXT."""
    text, vision_config = mini.model.config.to_diff_dict(), mini.tower.config.to_diff_dict()
    return {
        **text,
        "architectures": ["LlavaLlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": "llava",
        "mm_vision_tower": lender,
        "mm_vision_config": {**vision_config, "image_size": highres.TILE},
        "mm_hidden_size": mini.tower.config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": highres.PINPOINTS,
    }


def _generation_config(tokenizer) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def _move(temporary: Path, folder: Path) -> None:
    """Each file appears complete or not at all."""
    for file in temporary.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)
