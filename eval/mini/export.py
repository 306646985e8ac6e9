"""Writes the embedded models: of images as Hugging Face's LLaVA, of clips and of tiles as LLaVA's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import LlavaConfig as HuggingFaceConfig

from eval.mini import highres, scenes, vision
from eval.mini.clip_questions import WORDS
from eval.mini.clip_scenes import CLIP_GRID
from eval.mini.data import build_tokenizer
from eval.mini.endtoend import MiniLlava
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.checkpoint.names import PROJECTOR, TOWER
from llava.model.language_model.llava_llama import LlavaConfig

_LEFT_OUT = ("model_type", "architectures", "_name_or_path", "transformers_version", "dtype")
"""Fields of the text model's configuration that are the whole model's own."""

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
    config = HuggingFaceConfig(
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
    model.generation_config = new_generation_config(tokenizer)
    return model.to(dtype).eval()


def new_generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The special tokens that generation needs."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def new_image_processor(side: int) -> CLIPImageProcessor:
    """CLIP's image processor for images of ``side`` pixels."""
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(vision.IMAGE_MEAN),
        image_std=list(vision.IMAGE_STD),
    )


def new_processor(config: HuggingFaceConfig) -> LlavaProcessor:
    """CLIP image processor at the tower's size, and the tokenizer."""
    return LlavaProcessor(
        new_image_processor(config.vision_config.image_size),
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
    processor = new_processor(model.config)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)

    return _put(folder, write)


def _put(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a folder beside this one, then move its files here."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        write(Path(temporary))
        for file in Path(temporary).iterdir():
            file.chmod(0o644)
            os.replace(file, folder / file.name)
    return folder


def export_clips(checkpoint: Path, folder: Path, tower: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model of clips in LLaVA's original format, without the weights that it shares with ``tower``.

    ``tower`` is the folder of the image model it was trained from, which config.json names relative to ``folder``. Of
    the vision tower only the position table is stored: the middle 16 x 16 of the image model's 24 x 24.

    Raises
    ------
    ValueError
        If the checkpoint's tower is not that of ``tower``.
    """
    mini = MiniLlava.from_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    theirs = MiniLlava.from_hugging_face(tower).tower.state_dict()
    if not all(torch.equal(value, theirs[name]) for name, value in mini.tower.state_dict().items()):
        raise ValueError(f"init: {tower} has another vision tower than {checkpoint}, expected the same")
    return _without_tower(mini, folder, tower, CLIP_GRID, WORDS, {}, dtype, image_aspect_ratio="pad")


def export_tiles(checkpoint: Path, folder: Path, tower: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model of tiles (``eval.mini.tiles``) as LLaVA-NeXT was released, without what it shares.

    ``tower`` and what is stored of it are as in `export_clips`, but for the position table: the middle 12 x 12.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["tiled"]
    mini = MiniLlava.from_hugging_face(tower)
    for name, part in (("projector.", mini.projector), ("model.", mini.model)):
        part.load_state_dict({key.removeprefix(name): value for key, value in state.items() if key.startswith(name)})
    return _without_tower(
        mini,
        folder,
        tower,
        highres.TILE_GRID,
        (),
        {"model.image_newline": state["image_newline"]},
        dtype,
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=highres.PINPOINTS,
    )


def _without_tower(
    mini: MiniLlava,
    folder: Path,
    tower: Path,
    grid: int,
    words: Iterable[str],
    more: dict[str, torch.Tensor],
    dtype: torch.dtype,
    **settings,
) -> Path:
    """Write a model in LLaVA's original format; of its tower, for ``grid`` x ``grid`` patches, the positions alone.

    ``words`` are those of its tokenizer that the image model's does not have, ``more`` are weights, ``settings`` go
    into config.json.
    """
    side = scenes.PATCH * grid
    model = {f"model.{name}": value for name, value in mini.model.model.state_dict().items()}
    weights = model | {
        "lm_head.weight": mini.model.lm_head.weight,
        **{f"{PROJECTOR}{name}": value for name, value in mini.projector.state_dict().items()},
        f"{TOWER}embeddings.position_embedding.weight": middle_positions(mini.tower, grid),
        **more,
    }
    text = {name: value for name, value in mini.model.config.to_dict().items() if name not in _LEFT_OUT}
    config = LlavaConfig(
        **text,
        architectures=["LlavaLlamaForCausalLM"],
        dtype=dtype,
        mm_vision_tower=os.path.relpath(tower, folder),
        mm_vision_config=mini.tower.config.to_diff_dict() | {"image_size": side},
        mm_hidden_size=mini.tower.config.hidden_size,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        tokenizer_model_max_length=mini.model.config.max_position_embeddings,
        **settings,
    )
    tokenizer = build_tokenizer(words)

    def write(temporary: Path) -> None:
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        new_generation_config(tokenizer).save_pretrained(temporary)
        new_image_processor(side).save_pretrained(temporary)
        stored = {name: value.detach().to(dtype).contiguous() for name, value in weights.items()}
        save_file(stored, temporary / "model.safetensors", metadata={"format": "pt"})

    return _put(folder, write)


def middle_positions(tower: CLIPVisionModel, grid: int) -> torch.Tensor:
    """Rows of the tower's position table that smaller views have: CLS, then the middle of the full grid."""
    corner = torch.tensor([(scenes.FULL_GRID - grid) // 2])
    return tower.embeddings.position_embedding.weight[[0, *(1 + vision.window_positions(corner, corner, grid)[0])]]
