"""Hook points for transformers' own multimodal classes, for the length of `reducer.on(model)`.

Processor, packing, positions and `generate()` stay stock. Replaced are the forwards of the language model (by our loop
over its layers) and of the vision tower (by our loop over its blocks). A prompt keeps all its image placeholders on the
way through the stock code; what the tower dropped or merged leaves at the door of the decoder, in one compaction.

A new family: a file with its class, and a line in `HOSTS`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module

from transformers import GenerationMixin, PreTrainedModel

from llava.model.hosted.attach import opened
from llava.model.hosted.base import Host

HOSTS = {
    "llava": "llava_family:Llava",
    "llava_next": "llava_family:LlavaNext",
    "llava_onevision": "llava_family:LlavaOnevision",
    "video_llava": "llava_family:VideoLlava",
    "qwen2_vl": "qwen_vl:Qwen2VL",
    "qwen2_5_vl": "qwen_vl:Qwen25VL",
    "qwen3_vl": "qwen_vl:Qwen3VL",
    "internvl": "internvl:InternVL",
}
"""`model_type` of a configuration -> file and class that host such models."""


def hosts(model: object) -> bool:
    """Whether this is a whole model, head and `generate()` included, of a family in `HOSTS`."""
    whole = isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)
    return whole and model.config.model_type in HOSTS


def hosting(model: PreTrainedModel) -> AbstractContextManager[Host]:
    """Give a stock model hook points for the length of a `with` block; blocks of several threads share them.

    Raises
    ------
    ValueError
        If the model is of a form that cannot be hosted.
    """
    return opened(model, host_class(model.config.model_type))


def host_class(model_type: str) -> type[Host]:
    """The class that hosts the models of a configuration's `model_type`."""
    file, name = HOSTS[model_type].split(":")
    return getattr(import_module(f"{__name__}.{file}"), name)
