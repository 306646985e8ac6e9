"""Load a LLaVA checkpoint of any form, with its tokenizer and image processor."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoint import Checkpoint, describe_checkpoint
from llava.model.checkpoint.config import check_protocol
from llava.model.checkpoint.load import check_weights, load_weights
from llava.model.checkpoint.settings import LoadSettings
from llava.model.hosted.load import load_stock, stock_config
from llava.model.language_model import early
from llava.model.language_model.compiled import compile_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.processor import load_processor
from llava.model.tokenizer import load_tokenizer, tokenizer_folder


def load_pretrained_model(
    model_path: str | os.PathLike,
    model_base: str | os.PathLike | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict | None = "auto",
    device: str | torch.device | None = None,
    compile: bool = False,
    protocol: str | None = None,
    drop_early: bool = True,
    **kwargs: Any,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, CLIPImageProcessorPil | ProcessorMixin | None, int]:
    """Load everything that inference needs.

    What `model_path` holds is found from its files, see docs/checkpoints.md.

    Parameters
    ----------
    model_path : str or path
        Folder or hub id: an original LLaVA checkpoint, a Hugging Face one (`llava-hf/*`), only a projector
        (`mm_projector.bin`) or only an adapter (LoRA).
    model_base : str or path, optional
        Language model, or LLaVA, that a projector or an adapter belongs to; an adapter's settings may name it.
    model_name : str, optional
        LLaVA's argument; decides nothing.
    load_8bit, load_4bit : bool
        Quantise the language model with bitsandbytes; vision tower, projector and head stay as they are.
    device_map : str, dict or None
        As in transformers. On a machine without an accelerator "auto" means the CPU.
    device : optional
        Put the whole model there instead.
    compile : bool
        Run the decoder through torch.compile, see `compile_model`; the first prompts take longer.
    protocol : {"model", "flat"}, optional
        How a LLaVA-NeXT lays out images. "flat": in two by two tiles whatever their shape, one tile after another,
        nothing cut off and no newlines; the 2880 tokens of papers. Default: as the model does it.
    drop_early : bool
        Leave out of decoder layers what nobody reads, see `llava.model.drop_early`; False: compute whole layers.
    **kwargs
        `torch_dtype` (default float16 on an accelerator, float32 on the CPU), `attn_implementation` (default sdpa),
        LLaVA's `use_flash_attn`, and what `LoadSettings` lists for transformers and the hub.

    Returns
    -------
    tuple
        `(tokenizer, model, image_processor, context_len)`; the model is in evaluation mode. The image processor is
        None only for a model without a vision tower. Of a stock model (LLaVA-NeXT, LLaVA-OneVision, Video-LLaVA,
        Qwen-VL, InternVL, Hugging Face's LLaVA on other text models than LLaMA) these are transformers' own class and
        its processor.

    Raises
    ------
    ValueError
        With one line that names what is missing or wrong, before any weights are loaded.
    TypeError
        If an argument's name is unknown.
    """
    settings = LoadSettings.of(load_8bit, load_4bit, device_map, device, kwargs)
    check_protocol(protocol, "anyres")  # its name, before anything is fetched
    if stock := stock_config(model_path, **settings.hub):
        check_stock(stock[1], model_base, compile, protocol)
        model, processor = load_stock(model_path, *stock, settings)
        if not drop_early:
            early.drop_early(model, False)
        return processor.tokenizer, model, processor, stock[1].text_config.max_position_embeddings
    checkpoint = describe_checkpoint(model_path, LlavaConfig, model_base, **settings.hub)
    set_protocol(checkpoint, protocol)
    check_weights(LlavaLlamaForCausalLM, checkpoint)
    tokenizer = load_tokenizer(tokenizer_folder(checkpoint.folders))
    rows = check_tokenizer(tokenizer, checkpoint)
    processor = load_processor(checkpoint.folders, checkpoint.config, **settings.hub)
    model = load_weights(LlavaLlamaForCausalLM, checkpoint, **settings.arguments)
    if rows > model.config.vocab_size:
        model.resize_token_embeddings(rows)
    if model.get_vision_tower() is not None:
        model.get_vision_tower().image_processor = processor
    if compile:
        compile_model(model)
    if not drop_early:
        early.drop_early(model, False)
    return tokenizer, model.eval(), processor, _context_length(model.config)


def _context_length(config: LlavaConfig) -> int:
    """Positions that a prompt and its answer may take, as LLaVA reads them from a configuration."""
    return getattr(config, "max_sequence_length", None) or getattr(config, "tokenizer_model_max_length", None) or 2048


def set_protocol(checkpoint: Checkpoint, protocol: str | None) -> None:
    """Let a model lay out images by a protocol, None for its configuration's; ValueError if it cannot."""
    if protocol is None:
        return
    try:
        check_protocol(protocol, checkpoint.config.image_aspect_ratio)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    checkpoint.config.protocol = protocol


def check_stock(
    config: PreTrainedConfig,
    model_base: str | os.PathLike | None = None,
    compile: bool = False,
    protocol: str | None = None,
) -> None:
    """Raise ValueError for what cannot be done with a stock model."""
    if protocol not in (None, "model"):
        raise ValueError(
            f"protocol is {protocol!r}: {config.model_type} is transformers' own class, which lays out images its "
            "own way; LLaVA's original format takes 'flat'"
        )
    if model_base is not None:
        raise ValueError(f"model_base is {str(model_base)!r}: {config.model_type} is a whole model and needs no base")
    if compile:
        raise ValueError(f"compile: {config.model_type} is transformers' own class, use torch.compile(model)")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> int:
    """Add the tokens with which some early checkpoints mark images; returns the rows that the embeddings need.

    Raises
    ------
    ValueError
        If the tokenizer has tokens without an embedding.
    """
    config, places = checkpoint.config, checkpoint.config.vocab_size
    if config.mm_use_im_start_end:
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= places:
        raise ValueError(
            f"tokenizer: has tokens up to {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but vocab_size is "
            f"{places}: the embeddings were not resized when tokens were added"
        )
    if config.mm_use_im_patch_token:  # never part of a prompt, so its embedding may be anything
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    return len(tokenizer) if tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_PATCH_TOKEN) == places else places
