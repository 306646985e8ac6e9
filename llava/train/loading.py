"""The model that is trained: a LLaVA checkpoint, or a language model with a vision tower and a new projector."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import load_image_processor
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.tokenizer import load_tokenizer
from llava.train.arguments import ModelArguments, TrainingArguments
from llava.train.lora import ADAPTER_FILE

log = logging.getLogger(__name__)

VISION_DEFAULTS = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}
PARTS = {ADAPTER_FILE: "LoRA weights", "mm_projector.bin": "a projector"}

Loaded = tuple[PreTrainedTokenizerBase, LlavaLlamaForCausalLM, Any]


def load_model(args: ModelArguments, training: TrainingArguments) -> Loaded:
    """Tokenizer, model and image processor, ready for LoRA or for freezing.

    Raises
    ------
    ValueError
        With one line, if what is named is no complete model or does not fit the other arguments.
    """
    facts = _read_config(args.model_name_or_path)
    _refuse_stitched_tiles(args.model_name_or_path, facts)
    with _whole_weights():
        if "vision_config" in facts or facts.get("mm_vision_tower") or facts.get("mm_vision_config"):
            tokenizer, model, processor = _load_llava(args, training, facts)
        else:
            tokenizer, model, processor = _load_parts(args, training)
        before = model.config.vocab_size
        add_image_tokens(tokenizer, model, args)
        if training.lora_enable and model.config.vocab_size > before:
            raise ValueError("mm_use_im_start_end: got True with lora_enable, expected a base that has these tokens")
        if args.pretrain_mm_mlp_adapter:
            load_projector(model, args.pretrain_mm_mlp_adapter)
    prepare_tokenizer(tokenizer, training.model_max_length, args.version)
    model.config.tokenizer_model_max_length = training.model_max_length
    model.config.tokenizer_padding_side = "right"
    if training.model_max_length > model.config.max_position_embeddings:
        positions = model.config.max_position_embeddings
        log.warning("model_max_length: %d is more than the model's %d positions", training.model_max_length, positions)
    return tokenizer, model, processor


def _read_config(path: str) -> dict:
    folder = Path(path)
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*")]
    for name, kind in PARTS.items():
        if (folder / name).is_file() and not weights:
            raise ValueError(f"model_name_or_path: {path} holds only {kind}, expected a complete model")
    try:
        facts, _ = PreTrainedConfig.get_config_dict(path)
    except OSError:
        facts = {}
    if not facts:
        raise ValueError(f"model_name_or_path: got {path!r}, expected a folder with config.json or a hub id")
    return facts


def _refuse_stitched_tiles(path: str, facts: dict) -> None:
    """Raise ValueError for a LLaVA-NeXT: batches of training do not carry the sizes that its tiles are stitched by."""
    merge = facts.get("mm_patch_merge_type") or "flat"
    if merge != "flat":
        raise ValueError(f"mm_patch_merge_type: {path} has {merge!r}, expected 'flat': stitched tiles are not trained")


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Load whole weights on every process: DeepSpeed cuts them up itself when training starts.

    transformers would cut up a model for ZeRO-3 while loading, and tower, projector and new tokens then find nothing.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            set_hf_deepspeed_config(reference())


def weight_settings(training: TrainingArguments) -> dict[str, Any]:
    """How weights are loaded: data type, quantisation, attention.

    DeepSpeed keeps a float32 copy of bfloat16 weights, LoRA does not change them; otherwise they stay float32 and
    bfloat16 is autocast.
    """
    half = training.bf16 and (bool(training.deepspeed) or training.lora_enable)
    settings = {"attn_implementation": training.attn_implementation, "device_map": None}
    dtype = torch.bfloat16 if half else torch.float32
    if training.bits != 16:
        settings["device_map"] = {"": training.device}
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=training.bits == 4,
            load_in_8bit=training.bits == 8,
            llm_int8_skip_modules=["model.mm_projector", "model.vision_tower", "lm_head"],
            bnb_4bit_compute_dtype=torch.bfloat16 if training.bf16 else dtype,
            bnb_4bit_use_double_quant=training.double_quant,
            bnb_4bit_quant_type=training.quant_type,
        )
    return settings | {"dtype": dtype}


def _load_llava(args: ModelArguments, training: TrainingArguments, facts: dict[str, Any]) -> Loaded:
    """A LLaVA checkpoint, with its own projector and settings; `vision_tower` may say where its tower lies now."""
    settings = weight_settings(training)
    if args.vision_tower and facts.get("mm_vision_tower") and not facts.get("mm_vision_config"):
        moved = {"model_type": LlavaConfig.model_type, "mm_vision_tower": args.vision_tower}
        own = LlavaConfig.from_dict(facts | moved)
        tokenizer = load_tokenizer(args.model_name_or_path)
        model = LlavaLlamaForCausalLM.from_pretrained(args.model_name_or_path, config=own, **settings)
        processor = load_image_processor(args.vision_tower)
    else:
        if args.vision_tower:
            log.info("vision_tower: %s has one inside, %s is not read", args.model_name_or_path, args.vision_tower)
        tokenizer, model, processor, _ = load_pretrained_model(args.model_name_or_path, **settings)
    for name in VISION_DEFAULTS:
        asked, there = getattr(args, name), getattr(model.config, name)
        if asked is not None and asked != there:
            raise ValueError(f"{name}: got {asked!r}, expected {there!r} as {args.model_name_or_path} was trained with")
    return tokenizer, model, processor


def _load_parts(args: ModelArguments, training: TrainingArguments) -> Loaded:
    """A language model, a CLIP tower, and a projector that is new."""
    if args.vision_tower is None:
        raise ValueError(f"vision_tower: {args.model_name_or_path} has none, name a CLIP folder or hub id")
    try:
        vision = CLIPVisionConfig.from_pretrained(args.vision_tower)
        processor = load_image_processor(args.vision_tower)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"vision_tower: got {args.vision_tower!r}, no CLIP folder or hub id ({reason})") from None
    settings = weight_settings(training)
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = LlavaLlamaForCausalLM.from_pretrained(args.model_name_or_path, **settings)
    config = model.config
    config.mm_vision_tower, config.mm_vision_config, config.mm_hidden_size = args.vision_tower, vision.to_dict(), None
    config.mm_hidden_size = vision.hidden_size
    for name, value in VISION_DEFAULTS.items():
        setattr(config, name, value if getattr(args, name) is None else getattr(args, name))
    model.get_model().build_vision(config)
    tower, lost = CLIPVisionModel.from_pretrained(args.vision_tower, output_loading_info=True)
    if lost["missing_keys"]:
        raise ValueError(f"vision_tower: {args.vision_tower} lacks weights: {', '.join(sorted(lost['missing_keys']))}")
    model.get_vision_tower().vision_tower.load_state_dict(tower.state_dict())
    for part in (model.get_vision_tower(), model.get_model().mm_projector):
        part.to(device=model.lm_head.weight.device, dtype=settings["dtype"])
    if not args.pretrain_mm_mlp_adapter and not args.tune_mm_mlp_adapter:
        log.warning("pretrain_mm_mlp_adapter: not given, the projector begins with random weights")
    return tokenizer, model, processor


def load_projector(model: LlavaLlamaForCausalLM, file: str) -> None:
    """Load `mm_projector.bin` of the alignment stage."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that is cut or foreign fails in many ways
        reason = str(error).splitlines()[0]
        raise ValueError(f"pretrain_mm_mlp_adapter: {file} cannot be read ({reason})") from None
    mark = "mm_projector."
    if others := [key for key in state if mark not in key]:
        raise ValueError(f"pretrain_mm_mlp_adapter: {file} holds {others[0]}, expected a projector alone")
    own = {key[key.index(mark) + len(mark) :]: value for key, value in state.items()}
    projector = model.get_model().mm_projector
    shapes = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in own.items()}
    if shapes != found:
        raise ValueError(f"pretrain_mm_mlp_adapter: {file} holds {found}, expected {shapes}")
    projector.load_state_dict(own)


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, model: LlavaLlamaForCausalLM, args: ModelArguments) -> None:
    """LLaVA's tokens around images; new rows of the embeddings are the mean of the others, as in LLaVA."""
    wanted = [DEFAULT_IMAGE_PATCH_TOKEN] if args.mm_use_im_patch_token else []
    wanted += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if args.mm_use_im_start_end else []
    tokenizer.add_tokens(wanted, special_tokens=True)
    model.config.mm_use_im_start_end |= args.mm_use_im_start_end
    model.config.mm_use_im_patch_token |= args.mm_use_im_patch_token
    before = model.config.vocab_size
    if wanted and len(tokenizer) > before:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                weight[before:] = weight[:before].mean(0)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, limit: int, version: str) -> None:
    """Length, padding side and a padding token: batches are masked by length, so any token will do."""
    tokenizer.model_max_length, tokenizer.padding_side = limit, "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no padding, unknown or end token, expected one of them")
    end = conv_templates[version].sep2
    if end and end.startswith("<") and len(tokenizer(end, add_special_tokens=False).input_ids) > 1:
        log.warning("version: %r ends answers with %r, which is no token of this tokenizer", version, end)
