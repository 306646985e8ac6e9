"""config.json of either format -> our configuration; what it asks for and we do not compute is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava.anyres import parse_grid_pinpoints
from llava.constants import PROTOCOLS
from llava.model.checkpoint.files import first_line

SUPPORTED = (
    "LLaVA-1.5 and LLaVA-NeXT on LLaMA or Mistral: original ('llava', 'llava_llama', 'llava_mistral') or, for "
    "LLaVA-1.5, Hugging Face ('llava'), and as transformers has them 'llava_next', 'llava_onevision', 'video_llava'"
)
MISTRAL = "llava_mistral"
_ORIGINAL_TYPES = ("llava", "llava_llama", "llama", MISTRAL)
_FEATURES = {"default": "patch", "full": "cls_patch"}
_NONE = (None, False)
MOST_LAYERS = 1000
"""More would take for ever to build, only to find that their weights are missing."""

# Fields that change what a model computes, and the values under which it is what is computed here.
_COMPUTED: dict[str, tuple] = {
    "mm_patch_merge_type": (None, "flat", "spatial", "spatial_unpad"),
    "mm_resampler_type": (None, "identity"),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "mm_newline_position": (None, "no_token"),
    "mm_spatial_pool_stride": (None, 1),
    "mm_spatial_pool_mode": (None,),
    "mm_spatial_pool_out_channels": (None,),
    "mm_pooling_position": (None,),
    "mm_perceiver_depth": (None,),
    "mm_perceiver_latents": (None,),
    "mm_video_tower": (None,),
    "mm_image_tower": (None,),
    "s2": _NONE,
    "mm_use_s2": _NONE,
    "add_faster_video": _NONE,
    "use_mm_proj": (None, True),
    "image_aspect_ratio": (None, "square", "original", "pad", "anyres"),
    "protocol": (None, *PROTOCOLS),
    "tokenizer_padding_side": (None, "left", "right"),
    "projector_hidden_act": (None, "gelu"),
    "multimodal_projector_bias": (None, True),
    "sliding_window": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "use_qk_norm": _NONE,
    "partial_rotary_factor": (None, 1.0),
    "num_local_experts": (None,),
    "is_encoder_decoder": _NONE,
}
# Fields of LLaVA's that the loader reads, or that only say how a model was trained.
_READ = {
    "mm_vision_tower",
    "mm_vision_config",
    "mm_hidden_size",
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
}
_TRAINING = {"mm_projector_lr", "mm_vision_tower_lr", "mm_tunable_parts"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "mm_vision_tower": str,
    "mm_vision_config": dict,
    "mm_hidden_size": int,
    "mm_projector_type": str,
    "mm_vision_select_layer": int,
    "mm_use_im_start_end": bool,
    "mm_use_im_patch_token": bool,
    "tokenizer_model_max_length": int,
    "max_sequence_length": int,
    "tie_word_embeddings": bool,
    "quantization_config": dict,
    "architectures": list,
}
_POSITIVE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)


def translate(facts: Mapping[str, Any], place: object, config_class: type) -> PreTrainedConfig:
    """Our configuration from the contents of a config.json.

    Raises
    ------
    ValueError
        If it is no LLaVA-1.5, or asks for something that is not computed here.
    """
    try:
        _check_values(facts)
        config = _from_hugging_face(facts, config_class) if is_hugging_face(facts) else _original(facts, config_class)
        _check_text(config)
    except ValueError as error:
        raise ValueError(f"{place}: {first_line(error)}") from None
    return config


def is_hugging_face(facts: Mapping[str, Any]) -> bool:
    """Whether these are the fields of `transformers.LlavaConfig`; both formats call themselves "llava"."""
    nested, flat = {"text_config", "vision_config"} & set(facts), {"mm_vision_tower", "mm_vision_config"} & set(facts)
    if nested and flat:
        raise ValueError(f"has {min(nested)} of Hugging Face's format and {min(flat)} of the original one")
    return facts.get("model_type") == "llava" and not flat and (bool(nested) or "hidden_size" not in facts)


def _check_values(facts: Mapping[str, Any]) -> None:
    for field, allowed in _COMPUTED.items():
        value = facts.get(field)
        if field == "sliding_window" and facts.get("model_type") == MISTRAL:
            continue
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in (None, *allowed)):
            named = " or ".join(repr(one) for one in allowed if one is not None) or "left out"
            raise ValueError(f"{field} is {value!r}: not computed here, it must be {named}")
    for field, kind in _TYPES.items():
        value = facts.get(field)
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not right:
            raise ValueError(f"{field} is {value!r}: it must be of type {kind.__name__}")
    for field in ("mm_vision_select_feature", "mm_vision_select_layer", "mm_projector_type"):
        if facts.get(field, "left out") is None:
            raise ValueError(f"{field} is None: it must say something, or be left out")
    known = _COMPUTED.keys() | _READ | _TRAINING
    for field, value in facts.items():
        if field.startswith("mm_") and field not in known and value not in (None, False):
            raise ValueError(f"{field} is {value!r}: an unknown field, what it changes is not computed here")
    _check_tiles(facts)
    _check_quantisation(facts.get("quantization_config"))


def _check_tiles(facts: Mapping[str, Any]) -> None:
    if facts.get("image_aspect_ratio") == "anyres":
        if not facts.get("image_grid_pinpoints"):
            raise ValueError("image_aspect_ratio is 'anyres': it needs image_grid_pinpoints, a list of [width, height]")
        parse_grid_pinpoints(facts["image_grid_pinpoints"])
    check_protocol(facts.get("protocol"), facts.get("image_aspect_ratio"))
    merge = facts.get("mm_patch_merge_type")
    feature = facts.get("mm_vision_select_feature", "patch")
    if merge not in (None, "flat") and feature != "patch":
        raise ValueError(
            f"mm_vision_select_feature is {feature!r}: with mm_patch_merge_type {merge!r} it must be 'patch'"
        )


def check_protocol(protocol: str | None, aspect_ratio: str | None) -> None:
    """Raise ValueError for a protocol that there is not, or one for tiles of a model that has none."""
    if protocol not in (None, *PROTOCOLS):
        raise ValueError(f"protocol is {protocol!r}: it must be one of {', '.join(PROTOCOLS)}")
    if protocol == "flat" and aspect_ratio != "anyres":
        raise ValueError(
            f"protocol is 'flat': it is for models that cut images into tiles (image_aspect_ratio 'anyres'), "
            f"this one's is {aspect_ratio!r}"
        )


def _check_quantisation(facts: Mapping[str, Any] | None) -> None:
    if facts is None:
        return
    if facts.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise ValueError(
            f"quantization_config.quant_method is {facts['quant_method']!r}: only 'bitsandbytes' is supported"
        )
    if bool(facts.get("load_in_4bit")) == bool(facts.get("load_in_8bit")):
        raise ValueError("quantization_config: exactly one of load_in_4bit and load_in_8bit must be true")


def _original(facts: Mapping[str, Any], config_class: type) -> PreTrainedConfig:
    kind = facts.get("model_type")
    if kind not in _ORIGINAL_TYPES:
        raise ValueError(f"model_type is {kind!r}: supported is {SUPPORTED}")
    names = [str(name) for name in facts.get("architectures") or []]
    decoder = "Mistral" if kind == MISTRAL else "Llama"
    foreign = [name for name in names if decoder not in name and "Llava" in name]
    if foreign and "LlavaForConditionalGeneration" not in foreign:
        raise ValueError(f"architectures is {foreign!r}, model_type is {kind!r}: supported is {SUPPORTED}")
    if kind == MISTRAL:  # a LLaMA with other defaults, and a window
        facts = {**_made(transformers.MistralConfig, facts, "config.json").to_dict(), **facts}
    facts = {**facts, "model_type": config_class.model_type}
    merge = facts.get("mm_patch_merge_type") or "flat"
    return _made(config_class, {**facts, "mm_patch_merge_type": merge}, "config.json")


def _made(config_class: type, facts: Mapping[str, Any], what: str) -> Any:
    """A configuration of some class; whatever transformers says against the facts becomes one ValueError."""
    try:
        return config_class.from_dict(dict(facts))
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{what}: no {config_class.__name__} ({first_line(error)})") from None


def _from_hugging_face(facts: Mapping[str, Any], config_class: type) -> PreTrainedConfig:
    """Translate `transformers.LlavaConfig`."""
    for part, kind in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        own = facts.get(part)
        if not isinstance(own, dict):
            raise ValueError(f"{part} is {own!r}: Hugging Face's format needs it, the original one mm_vision_tower")
        if own.get("model_type", kind) != kind:
            raise ValueError(f"{part}.model_type is {own['model_type']!r}: only {kind!r} is supported")
    layer, strategy = facts.get("vision_feature_layer", -2), facts.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"vision_feature_layer is {layer!r}: it must be one number, features come from one layer")
    if strategy not in tuple(_FEATURES):
        raise ValueError(f"vision_feature_select_strategy is {strategy!r}: it must be 'default' or 'full'")
    theirs = _made(transformers.LlavaConfig, facts, "config.json")
    text, vision = theirs.text_config.to_dict(), theirs.vision_config.to_dict()
    _check_values(facts["text_config"])
    for field in ("model_type", "architectures", "_name_or_path", "transformers_version", "dtype"):
        text.pop(field, None)
    config = config_class(
        **text,
        mm_vision_config=vision,
        mm_hidden_size=vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=layer,
        mm_vision_select_feature=_FEATURES[strategy],
        image_aspect_ratio=facts.get("image_aspect_ratio", "pad"),
        dtype=facts.get("dtype", facts.get("torch_dtype")),
    )
    config.tie_word_embeddings = theirs.tie_word_embeddings
    if facts.get("quantization_config"):
        config.quantization_config = facts["quantization_config"]
    return config


def check_sizes(config: PreTrainedConfig, names: tuple[str, ...]) -> None:
    """ValueError for sizes of which no model can be made."""
    for field in names:
        value = getattr(config, field, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{field} is {value!r}: it must be a positive whole number")
    if config.num_hidden_layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}: at most {MOST_LAYERS} are believed")


def check_small(field: str, value: float) -> None:
    """ValueError for what keeps a norm from dividing by zero, if it is no small number."""
    if not 0 < value < 1:
        raise ValueError(f"{field} is {value!r}: it must be above 0 and far below 1")


def _check_text(config: PreTrainedConfig) -> None:
    """What LlamaConfig takes without a word and no LLaMA can be made of."""
    check_sizes(config, _POSITIVE)
    check_small("rms_norm_eps", config.rms_norm_eps)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(f"num_key_value_heads is {groups}: it must divide the {heads} heads")
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        known = ", ".join(ROPE_INIT_FUNCTIONS)
        raise ValueError(f"rope_scaling.rope_type is {kind!r}: it must be one of default, {known}")
    theta = rope.get("rope_theta", 1.0)
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise ValueError(f"rope_theta is {theta!r}: it must be a positive number")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act is {config.hidden_act!r}: no activation of that name is known")
