"""Load a LLaVA checkpoint of either format, with its tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.mm_utils import load_image_processor
from llava.model.language_model.compiled import compile_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.tokenizer import load_tokenizer


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict | None = "auto",
    device: str | torch.device | None = None,
    compile: bool = False,
    **kwargs,
):
    """Load everything that inference needs.

    Parameters
    ----------
    model_path : str
        Folder or hub id: an original LLaVA checkpoint, a Hugging Face one (`llava-hf/*`), a projector-only folder
        (`mm_projector.bin`) or LoRA weights; the last two need `model_base`.
    model_base : str, optional
        Language model that a projector or LoRA weights belong to.
    model_name : str, optional
        Only read for "lora" in it.
    load_8bit, load_4bit : bool
        Quantise with bitsandbytes (CUDA).
    device_map : str, dict or None
        As in transformers. On a machine without an accelerator "auto" means the CPU.
    device : optional
        Put the whole model there instead.
    compile : bool
        Run the decoder through torch.compile, see `compile_model`; the first prompts take longer.
    **kwargs
        Passed to `from_pretrained`: `torch_dtype` (default float16 on an accelerator, float32 on the CPU),
        `attn_implementation` (default sdpa), ... LLaVA's `multimodal` and `use_flash_attn` are understood.

    Returns
    -------
    tuple
        `(tokenizer, model, image_processor, context_len)`; the model is in evaluation mode.

    Raises
    ------
    ValueError
        With one line that names what is missing or wrong, before any weights are read.
    """
    kwargs.pop("multimodal", None)
    if kwargs.pop("use_flash_attn", False):
        kwargs["attn_implementation"] = "flash_attention_2"
    accelerated = torch.cuda.is_available() and str(device) != "cpu"
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", torch.float16 if accelerated else torch.float32))
    kwargs.setdefault("attn_implementation", "sdpa")
    if load_8bit or load_4bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit, load_in_4bit=load_4bit, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4"
        )
    if device is not None:
        device_map = {"": device}
    elif device_map == "auto" and not accelerated:
        device_map = None

    partial = _partial_kind(model_path, model_name)
    if partial and model_base is None:
        raise ValueError(f"model_base: {model_path} holds only {partial}, name the language model it belongs to")
    weights = model_base if partial else model_path
    config = AutoConfig.from_pretrained(model_path) if partial else None
    tokenizer = load_tokenizer(weights)
    model = LlavaLlamaForCausalLM.from_pretrained(weights, config=config, dtype=dtype, device_map=device_map, **kwargs)
    if partial:
        model = _add_partial(model, model_path, partial)
    _add_image_tokens(tokenizer, model)
    processor = _load_image_processor(model_path, model)
    if model.get_vision_tower() is not None:
        model.get_vision_tower().image_processor = processor
    context = getattr(model.config, "max_sequence_length", None) or getattr(
        model.config, "tokenizer_model_max_length", 2048
    )
    if compile:
        compile_model(model)
    return tokenizer, model.eval(), processor, context


def _partial_kind(model_path: str, model_name: str | None) -> str | None:
    folder = Path(model_path)
    if "lora" in (model_name or "").lower() or (folder / "adapter_config.json").is_file():
        return "LoRA weights"
    return "a projector" if (folder / "mm_projector.bin").is_file() else None


def _add_partial(model: LlavaLlamaForCausalLM, path: str, kind: str) -> LlavaLlamaForCausalLM:
    """Add a projector or merge LoRA weights into a base model."""
    names = {"a projector": "mm_projector.bin", "LoRA weights": "non_lora_trainables.bin"}
    extra = torch.load(Path(path) / names[kind], map_location="cpu", weights_only=True)
    extra = {
        "model." + key[key.index("mm_projector") :] if "mm_projector" in key else key: v for key, v in extra.items()
    }
    model.load_state_dict({key.removeprefix("base_model.model."): value for key, value in extra.items()}, strict=False)
    if kind == "LoRA weights":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model


def _add_image_tokens(tokenizer, model: LlavaLlamaForCausalLM) -> None:
    """Some early LLaVA checkpoints mark images with tokens of their own."""
    added = 0
    if model.config.mm_use_im_patch_token:
        added += tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if model.config.mm_use_im_start_end:
        added += tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    if added and len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))


def _load_image_processor(model_path: str, model: LlavaLlamaForCausalLM) -> CLIPImageProcessorPil | None:
    """The checkpoint's processor, else its tower's, else CLIP's own numbers at the tower's image size."""
    tower = model.get_vision_tower()
    if tower is None:
        return None
    named = model.config.mm_vision_tower
    for place in (model_path, named and Path(model_path) / named, named):
        try:
            return load_image_processor(str(place)) if place else None
        except (OSError, ValueError):
            continue
    side = tower.config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
