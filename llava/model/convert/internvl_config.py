"""The configuration of an InternVL chat checkpoint (`model_type` `internvl_chat`) as transformers' InternVL has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import InternVLConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config

from llava.model.checkpoint.files import first_line

ORIGINAL = "internvl_chat"
"""`model_type` of checkpoints that bring their own code: InternVL 1.5, 2 and 2.5."""

TEXTS = {
    "InternLM2ForCausalLM": LlamaConfig,
    "Phi3ForCausalLM": Phi3Config,
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
}
"""What `llm_config.architectures` names, and the configuration that computes the same."""

_FIXED = {
    "ps_version": ("v2", "v1"),
    "pad2square": (False, False),
    "use_backbone_lora": (0, 0),
    "use_llm_lora": (0, 0),
    "use_thumbnail": (True, False),
}
"""Fields that transformers' class computes with one value only: that value, and what a missing field means."""

_NORM_EPS = 1e-6  # of the tower's norms of queries and keys, which transformers' class does not let one choose


def translated(facts: Mapping[str, Any]) -> InternVLConfig:
    """Transformers' configuration of the same model; the image placeholder's id is the tokenizer's, so not yet right.

    Parameters
    ----------
    facts : mapping
        What config.json holds.

    Raises
    ------
    ValueError
        In one line, naming the field, if something is asked for that is not computed.
    """
    text, vision = (_part(facts, name) for name in ("llm_config", "vision_config"))
    _check_fixed(facts)
    tied = bool(text.get("tie_word_embeddings", False))
    try:
        return InternVLConfig(
            text_config=_text(text).to_dict(),
            vision_config=_vision(vision, facts),
            image_seq_length=_tokens_per_tile(vision, facts),
            downsample_ratio=facts.get("downsample_ratio", 0.5),
            vision_feature_layer=facts.get("select_layer", -1),
            tie_word_embeddings=tied,
        )
    except (StrictDataclassError, TypeError, KeyError) as error:
        raise ValueError(f"config.json describes no InternVL ({first_line(error)})") from None


def _part(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(facts.get(name), Mapping):
        raise ValueError(f"{name} is {facts.get(name)!r}: it must be an object")
    return facts[name]


def _check_fixed(facts: Mapping[str, Any]) -> None:
    for name, (wanted, absent) in _FIXED.items():
        matters = name != "use_thumbnail" or facts.get("dynamic_image_size", False)
        if matters and facts.get(name, absent) != wanted:
            raise ValueError(f"{name} is {facts.get(name, absent)!r}: only {wanted!r} is supported")


def _tokens_per_tile(vision: Mapping[str, Any], facts: Mapping[str, Any]) -> int:
    size, patch = vision.get("image_size"), vision.get("patch_size")
    forced, ratio = facts.get("force_image_size"), facts.get("downsample_ratio", 0.5)
    if not all(isinstance(value, int) and value > 0 for value in (size, patch)) or size % patch:
        raise ValueError(f"vision_config: image_size is {size!r} and patch_size {patch!r}: one must divide the other")
    if forced not in (None, size):
        raise ValueError(f"force_image_size is {forced!r}: it must be vision_config's image_size, {size}")
    if not isinstance(ratio, float) or not 0 < ratio <= 1 or 1 / ratio % 1 or (size // patch * ratio) % 1:
        raise ValueError(f"downsample_ratio is {ratio!r}: it must be 1/n, and n divide the {size // patch} patches")
    return int(size // patch * ratio) ** 2


def _vision(vision: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    eps, normed = vision.get("layer_norm_eps", _NORM_EPS), bool(vision.get("qk_normalization", True))
    if normed and eps != _NORM_EPS:
        raise ValueError(f"vision_config: layer_norm_eps is {eps!r}: with qk_normalization only 1e-06 is supported")
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return {
        **{name: vision[name] for name in same},
        "hidden_act": vision.get("hidden_act", "gelu"),
        "norm_type": vision.get("norm_type", "rms_norm"),
        "layer_norm_eps": eps,
        "use_qk_norm": normed,
        "attention_bias": bool(vision.get("qkv_bias", False)),
    }


def _text(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The language model's configuration: its own fields, and its rotary embedding the way transformers nests it."""
    kind = next(iter(values.get("architectures") or ()), None)
    if kind not in TEXTS:
        raise ValueError(f"llm_config.architectures is {values.get('architectures')!r}: it must be {', '.join(TEXTS)}")
    if values.get("rope_pos_id_version", "default") != "default":
        raise ValueError(f"llm_config.rope_pos_id_version is {values['rope_pos_id_version']!r}: supported is 'default'")
    known = set(vars(TEXTS[kind])["__annotations__"]) - {"rope_parameters"}
    fields = {name: value for name, value in values.items() if name in known and value is not None}
    if kind == "InternLM2ForCausalLM":
        fields["attention_bias"] = bool(values.get("bias", True))
    return TEXTS[kind](**fields, rope_parameters=_rope(values))


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as one dictionary."""
    scaling = dict(values.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    scaling.pop("rope_type", None)
    kind = "longrope" if kind == "su" else kind  # Microsoft's name of it in the first Phi-3 checkpoints
    if kind not in ("default", "linear", "dynamic", "longrope", "llama3"):
        raise ValueError(
            f"llm_config.rope_scaling.type is {kind!r}: it must be linear, dynamic, su, longrope or llama3"
        )
    rope = {"rope_type": kind, "rope_theta": float(values.get("rope_theta", 10000.0)), **scaling}
    if kind == "longrope":
        rope["original_max_position_embeddings"] = values.get("original_max_position_embeddings", 4096)
    return rope
