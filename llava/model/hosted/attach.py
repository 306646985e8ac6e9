"""Hooks on and off: a stock model's functions are replaced while a block or a call needs them, then put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from llava.model.hosted import forwards
from llava.model.hosted.base import Host, Pass, under_way
from llava.model.hosted.replaced import Replaced
from llava.model.language_model.arguments import check_generation, new_tokens
from mustdrop.hooks import active, carrying

logger = logging.get_logger(__name__)


@dataclass
class Attached:
    """A host, and how many blocks and calls need it."""

    host: Host
    users: int = 0
    replaced: list[Replaced] = field(default_factory=list)
    kind: type | None = None

    def attach(self) -> None:
        """Replace the model's functions."""
        host, inner, text = self.host, self.host.inner, self.host.text
        parts = [
            (host.model, forwards.outer, (host,)),
            (inner, forwards.inner, (host,)),
            (text, forwards.text, (host,)),
            *host.tower_parts(),
            *((layer, forwards.layer, (layer,)) for layer in text.layers),
        ]
        try:
            for part in parts:
                self.replaced.append(Replaced(*part))
            self.kind = type(host.model)
            host.model.__class__ = _generating(self.kind)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Make the model what it was."""
        for replaced in reversed(self.replaced):
            replaced.undo()
        self.replaced.clear()
        if self.kind is not None:
            self.host.model.__class__ = self.kind


_open: dict[int, Attached] = {}
_lock = threading.Lock()


@contextmanager
def opened(model: PreTrainedModel, family: type[Host]) -> Iterator[Host]:
    """The host of a model, attached until the last block and the last call that need it have ended."""
    with _lock:
        attached = _open.get(id(model)) or Attached(family(model))
        if not attached.users:
            attached.attach()
            _open[id(model)] = attached
        attached.users += 1
    try:
        yield attached.host
    finally:
        with _lock:
            attached.users -= 1
            if not attached.users:
                del _open[id(model)]
                attached.detach()


class _Generating:
    """What a hosted model's class has in front of its own."""

    @carrying
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate` of the model, with the reducer that is on where this was looked up."""
        attached = _open.get(id(self))
        if attached is None or active(attached.host) is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        given = kwargs if generation_config is None else {**kwargs, "generation_config": generation_config}
        current = _prompt(self, attached.host, inputs, given)
        with opened(self, type(attached.host)), under_way(current), attached.host.unchanged():
            return super().generate(inputs, generation_config, *args, **{**kwargs, "use_cache": True})


def _prompt(model: PreTrainedModel, host: Host, inputs: Tensor | None, given: dict[str, Any]) -> Pass:
    """The pass of a prompt that `generate` is given, which it encodes before it comes to the first forward.

    Raises
    ------
    ValueError
        If an argument asks for what cannot be done with a reducer.
    """
    ids = given.get("input_ids") if inputs is None else inputs
    check_generation(ids, given, model.generation_config)
    held = forwards.cache_in(given)
    if held is not None and held.get_seq_length():
        raise ValueError("past_key_values: holds positions already, with a reducer generate() starts with none")
    if given.get("use_cache") is False:
        logger.warning_once("use_cache=False is ignored: with a reducer generate() always decodes from the cache")
    _check_copies(model, given)
    current = host.begin(ids, given)
    current.new_tokens = new_tokens(given, model.generation_config, ids.shape[1])
    return current


def _check_copies(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where several rows a prompt need what releases of transformers before 5.23 do not do.

    Those repeat pixels image by image, which gives a prompt of several images the wrong ones.
    """
    given = kwargs.get("generation_config") or model.generation_config
    for name in ("num_beams", "num_return_sequences"):
        several = kwargs.get(name, getattr(given, name, None)) or 1
        if several > 1 and not hasattr(model, "_prepare_multimodal_encoder_kwargs_for_generation"):
            raise ValueError(f"{name}: got {several}, with a reducer this release of transformers can do 1, 5.23 more")


@cache
def _generating(kind: type) -> type:
    """A model's class with `_Generating` in front, under its own name."""
    return type(kind.__name__, (_Generating, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
