"""vLLM's plugin: LLaVA-1.5 and LLaVA-NeXT with reduced images, by `hf_overrides={"mustdrop": {...}}`.

Installing this package is enough: vLLM calls `register` (entry point `vllm.general_plugins`) in each of its processes.
Without the setting everything is vLLM's own.
"""

from __future__ import annotations

import json
import logging
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.serve.exact import Counter

logger = logging.getLogger("vllm.mustdrop")

SETTING = "mustdrop"
MODELS = {
    "LlavaForConditionalGeneration": "llava.serve.vllm_models:Llava",
    "LlavaNextForConditionalGeneration": "llava.serve.vllm_models:LlavaNext",
}
"""Architecture -> module and class that take the place of vLLM's own."""

PLAIN_ROPE = ("default", "linear", "llama3")
"""Kinds of rotary positions whose tables go on as they begin, however long they are."""

RECOMPUTED = 1e-6
"""`video_pruning_rate` above 0 has vLLM's runner ask the model for positions; nothing else reads it here."""

_counters: dict[str, Counter] = {}


def register() -> None:
    """Put our classes in the place of vLLM's; a setting for any other model is refused when the engine starts."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.platforms import current_platform

    for architecture in ModelRegistry.get_supported_archs():
        before = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        MODELS_CONFIG_MAP[architecture] = _checking(architecture, before)
    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)
    if current_platform.is_cpu():
        _complete_cpu_runner()


def _complete_cpu_runner() -> None:
    """Have vLLM's runner for CPUs note, as its runner for GPUs does, that a loaded model is to be asked for positions.

    Its own `load_model` (0.32) leaves that out, and would take the columns that tell them for embeddings.
    """
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    theirs = CPUModelRunner.load_model

    @wraps(theirs)
    def load_model(runner: Any, *args: Any, **kwargs: Any) -> None:
        theirs(runner, *args, **kwargs)
        asked = runner.model_config.multimodal_config
        runner.is_multimodal_pruning_enabled = (
            supports_multimodal_pruning(runner.get_model())
            and asked is not None
            and asked.is_multimodal_pruning_enabled()
        )

    CPUModelRunner.load_model = load_model


def _checking(architecture: str, before: type) -> type:
    """vLLM's own check of a model's configuration, and ours after it."""

    def verify(model_config: Any) -> None:
        before.verify_and_update_model_config(model_config)
        if settings_in(model_config.hf_config) is None:
            return
        if architecture not in MODELS:
            raise ValueError(f"{SETTING}: {architecture} is not supported, it must be one of {', '.join(MODELS)}")
        prepare(model_config)

    return type(f"Checked{architecture}", (before,), {"verify_and_update_model_config": staticmethod(verify)})


def settings_in(config: Any) -> Any:
    """The setting in a model's configuration, None where there is none."""
    return getattr(config, SETTING, None)


def counter_of(config: Any) -> Counter | None:
    """The counter for a model's configuration, made once for its sizes and settings; None without settings.

    Raises
    ------
    ValueError
        With one line, if the settings are wrong.
    """
    from llava.serve.exact import Counter, VisionSizes, read_settings

    settings = settings_in(config)
    if settings is None:
        return None
    sizes = VisionSizes.of(config)
    key = json.dumps([settings, repr(sizes)], sort_keys=True, default=str)
    if key not in _counters:
        _counters[key] = Counter(sizes, read_settings(settings))
    return _counters[key]


def prepare(model_config: Any) -> None:
    """Look the settings over before anything is loaded, say what they do, and let vLLM ask for positions.

    Raises
    ------
    ValueError
        With one line, if the settings are wrong or do not fit the model.
    """
    config = model_config.hf_config
    counter = counter_of(config)
    settings = counter.settings
    side = config.vision_config.image_size
    room = counter.of((side, side))
    note = f"; left out, as vLLM keeps all tokens in all layers: {', '.join(settings.left_out)}"
    logger.warning(
        "mustdrop: %s leaves %d tokens of an image of %d x %d pixels, which had %d, in every decoder layer; "
        "positions: %s%s",
        settings.method,
        room.tokens,
        side,
        side,
        room.span,
        settings.positions,
        note if settings.left_out else "",
    )
    if settings.positions == "renumber" or hasattr(config, "mrope_section"):
        return
    text = config.text_config
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in PLAIN_ROPE:
        raise ValueError(
            f"positions is {settings.positions!r}: it must be 'renumber' for a model whose rope_type is {kind!r}"
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Three rows of positions: the first is the model's, the second remembers where a token's image begins.
    config.mrope_section = [width // 2, 0, 0]
    config.spare_positions = text.max_position_embeddings  # what dropped tokens may take beyond the prompt's length
    text.max_position_embeddings *= 2
    if settings.positions == "original" and model_config.multimodal_config is not None:
        model_config.multimodal_config.video_pruning_rate = RECOMPUTED
