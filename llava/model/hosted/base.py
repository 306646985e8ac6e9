"""What hosting a stock model takes: which functions are replaced, by what, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import logging

from llava.model.hosted.door import Arrival, enter
from llava.model.hosted.layout import Layout
from llava.model.hosted.replaced import Replaced
from llava.model.hosted.towers.vit import run_tower
from llava.model.language_model.arguments import check_generation, new_tokens
from llava.model.language_model.cache import CACHE_NAME, VisionCache
from llava.model.language_model.layers import LlamaDecoderLayer
from llava.model.language_model.loop import DecoderLoop, Record
from llava.model.language_model.stream import Stream
from llava.model.masks import labels_of
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from mustdrop.hooks import ForwardState, Reducer, VisionTokens, active, carrying
from mustdrop.reach import Tower, square

logger = logging.get_logger(__name__)

TOWER_HOOKS = "on_pixels", "after_vision_block", "inside_vision_block", "on_vision_features"


@dataclass
class Pass:
    """One forward pass of a stock model, from its ids to the end of the prefill.

    Attributes
    ----------
    host : Host
        Whose.
    state : ForwardState
        What the reducer remembers and finds.
    ids : int64 `[prompts, length]` or None
        Of the prompts, without the copies that beams need; None where the caller brought embeddings.
    inputs : dict
        Pixels, sizes, and what else the stock model is given with them.
    towers : list of VisionTokens
        What the towers left, in the order of their calls.
    new_tokens : int or None
        Positions that will be generated, if that is known.
    begun : bool
        Whether the decoder has been entered.
    """

    host: Host
    state: ForwardState
    ids: Tensor | None
    inputs: dict[str, Any]
    towers: list[VisionTokens] = field(default_factory=list)
    new_tokens: int | None = None
    begun: bool = False


_current: ContextVar[Pass | None] = ContextVar("hosted_pass", default=None)


class HostedCache(VisionCache):
    """Our cache, filled for a stock model: only a block that hosts the model knows how to go on with it."""

    def get_mask_sizes(self, *args, **kwargs):
        if self.filled:
            raise RuntimeError(
                "past_key_values: this cache was filled while a reducer was on, go on with it inside such a block"
            )
        return super().get_mask_sizes(*args, **kwargs)


class HostedDecoder(DecoderLoop):
    """Our loop over the layers of a text model of transformers."""

    def __init__(self, text: PreTrainedModel):
        self.layers, self.norm, self.rotary_emb, self.config = text.layers, text.norm, text.rotary_emb, text.config


class Host:
    """A stock model with hook points; subclasses say what is particular to a family.

    Attributes
    ----------
    towers : tuple of str
        Where the model's vision towers are.
    fixed_size : bool
        Whether every image has as many vision tokens as a tower has patches.
    """

    towers: ClassVar[tuple[str, ...]] = ("vision_tower",)
    fixed_size: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel):
        self.model, self.inner = model, model.model
        self.text = self.inner.language_model
        self.users = 0
        self._replaced: list[Replaced] = []
        self._kind: type | None = None

    # What the family says

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        """Every image and video of a batch, in the order of the towers' calls: "image" or "video", and its layout."""
        raise NotImplementedError

    # What a reducer asks for

    @property
    def hook_key(self) -> Host:
        """What reducers know the model by."""
        return self

    @property
    def config(self):
        """Of the text model."""
        return self.text.config

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def num_vision_layers(self) -> int:
        """Number of blocks of a vision tower."""
        return self.vision_config.num_hidden_layers

    @property
    def vision_config(self):
        """Of the towers."""
        return self.model.config.vision_config

    @property
    def side(self) -> int:
        """Patches along the side of a view."""
        return self.vision_config.image_size // self.vision_config.patch_size

    def check(self, reducer: Reducer) -> None:
        """Raise ValueError, in one line, if a reducer cannot work on this model."""
        reducer.check_placeholders()
        if not isinstance(self.feature_layer, int) and any(map(reducer.overrides, TOWER_HOOKS)):
            raise ValueError(
                f"vision_feature_layer: the features are those of {self.feature_layer} side by side, but "
                f"{type(reducer).__name__} works in the vision tower, which has to have one last block"
            )
        heads, patches, blocks = self.config.num_attention_heads, self.side**2, self.num_vision_layers
        run = self.feature_layer % (blocks + 1) if isinstance(self.feature_layer, int) else blocks
        reducer.check_sizes(self.num_layers, blocks, run, patches if self.fixed_size else None, heads=heads)
        if not self.fixed_size:
            reducer.check_tower(Tower(blocks, run, square(patches)))

    @property
    def feature_layer(self) -> int | list[int]:
        """The hidden states of a tower that give the features."""
        return self.model.config.vision_feature_layer

    # How it is on

    def attach(self) -> None:
        """Replace the model's functions; each passes on to the stock one where no reducer is on."""
        layers = [(layer, _layer, (layer,)) for layer in self.text.layers]
        towers = [(tower, _tower, (self, tower)) for tower in (getattr(self.inner, name) for name in self.towers)]
        ours = [(self.model, _outer, (self,)), (self.inner, _inner, (self,)), (self.text, _text, (self,))]
        try:
            for module, function, arguments in (*ours, *towers, *layers):
                self._replaced.append(Replaced(module, function, arguments))
            self._kind = type(self.model)
            self.model.__class__ = _generating(self._kind)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Make the model what it was."""
        for replaced in reversed(self._replaced):
            replaced.undo()
        self._replaced.clear()
        if self._kind is not None:
            self.model.__class__ = self._kind

    def begin(self, ids: Tensor | None, inputs: dict[str, Any]) -> Pass | None:
        """A forward pass of the reducer that is on here and now; None without one."""
        found = active(self)
        return None if found is None else Pass(self, ForwardState(found.reducer, found.run), ids, inputs)

    @property
    def window(self) -> int | None:
        """Positions that the text model sees where it does not see all."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and "sliding_attention" not in kinds:
            return None
        return getattr(self.config, "sliding_window", None)

    def check_window(self, positions: int) -> None:
        """Raise ValueError for more positions than the text model's window."""
        if self.window is not None and positions > self.window:
            raise ValueError(
                f"sliding_window: {self.model.config.model_type}'s text model sees {self.window} positions at a time, "
                f"with a reducer on a prompt and its answer may take no more, got {positions}"
            )


_open: dict[int, Host] = {}
_lock = threading.Lock()


@contextmanager
def opened(model: PreTrainedModel, family: type[Host]) -> Iterator[Host]:
    """The host of a model, attached until the last block and the last call that need it have ended."""
    with _lock:
        host = _open.get(id(model)) or family(model)
        if not host.users:
            host.attach()
            _open[id(model)] = host
        host.users += 1
    try:
        yield host
    finally:
        with _lock:
            host.users -= 1
            if not host.users:
                del _open[id(model)]
                host.detach()


@contextmanager
def _under_way(current: Pass | None) -> Iterator[None]:
    """Let a forward pass be the one that the model's parts find."""
    token = _current.set(current)
    try:
        yield
    finally:
        _current.reset(token)


class _Generating:
    """What a hosted model's class has in front of its own."""

    @carrying
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `generate` of the model, with the reducer that is on where this was looked up."""
        host = _open.get(id(self))
        if host is None or active(host) is None:
            return super().generate(inputs, *args, **kwargs)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        check_generation(ids, kwargs, self.generation_config)
        held = _cache_in(kwargs)
        if held is not None and held.get_seq_length():
            raise ValueError("past_key_values: holds positions already, with a reducer generate() starts with none")
        if kwargs.pop("use_cache", True) is False:
            logger.warning_once("use_cache=False is ignored: with a reducer generate() always decodes from the cache")
        _check_copies(self, kwargs)
        current = host.begin(ids, dict(kwargs))
        current.new_tokens = new_tokens(kwargs, self.generation_config, ids.shape[1])
        with opened(self, type(host)), _under_way(current):
            return super().generate(inputs, *args, use_cache=True, **kwargs)


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


def _outer(host: Host, stock: Callable, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """The whole model's forward: a loss is that of the tokens that reach the end."""
    current = None if labels is None or _goes_on(kwargs) else _fresh(host, kwargs)
    if current is None:
        return stock(*args, **kwargs) if labels is None else stock(*args, labels=labels, **kwargs)
    as_tuple = kwargs.pop("return_dict", None) is False
    extra = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
    with _under_way(current):
        output = stock(*args, return_dict=True, **kwargs)
    left = labels_of(current.state.tokens_out[-1], labels)
    loss = host.model.loss_function(logits=output.logits, labels=left, vocab_size=host.config.vocab_size, **extra)
    output = type(output)(loss=loss, **output)
    return output.to_tuple() if as_tuple else output


def _inner(host: Host, stock: Callable, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
    """The forward of the model without its head: towers, packing, and the text model."""
    if _goes_on(kwargs):
        return stock(input_ids=input_ids, **kwargs)
    current = _fresh(host, {"input_ids": input_ids, **kwargs})
    with _under_way(current):
        return stock(input_ids=input_ids, **kwargs)


def _cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache that a forward is given, under the name of any release."""
    return next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)


def _goes_on(kwargs: dict[str, Any]) -> bool:
    """Whether a forward goes on with a prompt that has been prefilled here."""
    cache = _cache_in(kwargs)
    return isinstance(cache, HostedCache) and cache.filled


def _fresh(host: Host, inputs: dict[str, Any]) -> Pass | None:
    """The pass that is under way for a model, unless it is over; else a new one, if a reducer is on."""
    current = _current.get()
    if current is not None and current.host is host and not current.begun:
        return current
    return host.begin(inputs.get("input_ids"), inputs)


def _tower(host: Host, tower: nn.Module, stock: Callable, pixel_values: Tensor, **kwargs: Any) -> Any:
    """A vision tower's forward: our loop up to the one hidden state that is asked for."""
    current = _current.get()
    layer = kwargs.get("output_hidden_states", host.feature_layer)
    layer = host.feature_layer if isinstance(layer, bool) else layer
    if current is None or current.host is not host or current.begun or not isinstance(layer, int):
        return stock(pixel_values, **kwargs)
    tokens, states = run_tower(CLIPVisionTower.around(tower, layer), pixel_values, current.state)
    current.towers.append(tokens.without_prefix())
    return BaseModelOutputWithPooling(hidden_states={layer: states})


def _text(host: Host, stock: Callable, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
    """The text model's forward: the door of the decoder and our loop over its layers, or more of a cached prompt."""
    current = _current.get()
    if _goes_on(kwargs):
        return _decode(host, _cache_in(kwargs), kwargs)
    if current is None or current.host is not host or current.begun or input_ids is not None:
        return stock(input_ids=input_ids, **kwargs)
    current.begun = True
    return _prefill(host, current, **kwargs)


def _prefill(
    host: Host,
    current: Pass,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Prompts through the decoder; `inputs_embeds` `[rows, length, width]`, several rows a prompt for beams."""
    given = _cache_in(kwargs)
    if given is not None and given.get_seq_length():
        kind = type(given).__name__
        raise ValueError(
            f"past_key_values: a {kind} that holds positions already cannot be gone on with while a reducer is on"
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise ValueError("attention_mask: with a reducer on it must be [batch, length], zero for padding")
    host.check_window(inputs_embeds.shape[1])
    arrival = Arrival(current.state, current.ids, host.placeholder_ids, host.layouts(current.inputs), current.towers)
    hidden, tokens = enter(arrival, inputs_embeds, attention_mask, position_ids)
    text = host.text
    training = text.gradient_checkpointing and text.training and torch.is_grad_enabled()
    wanted = text.config.use_cache if use_cache is None else use_cache
    cache = None
    if not training and (wanted or given is not None):
        cache = HostedCache(text.config, current.state)
        cache.positions_seen = inputs_embeds.shape[1]
        if current.new_tokens is not None:
            cache.expect(current.new_tokens)
    record = _record(text.config, kwargs)
    hidden = HostedDecoder(text).prefill(hidden, tokens, current.state, cache, record=record)
    return _output(text, hidden, cache, record)


def _decode(host: Host, cache: HostedCache, kwargs: dict[str, Any]) -> BaseModelOutputWithPast:
    """New positions `[rows, new, width]` of prompts that are cached."""
    embeds, record = kwargs["inputs_embeds"], _record(host.config, kwargs)
    host.check_window(cache.positions_seen + cache.generated + embeds.shape[1])
    hidden = HostedDecoder(host.text).decode(embeds, cache, record)
    return _output(host.text, hidden, cache, record)


def _output(text: nn.Module, hidden: Tensor, cache: HostedCache | None, record: Record) -> BaseModelOutputWithPast:
    """What the stock text model would return."""
    hidden = text.norm(hidden)
    if record.hidden is not None:
        record.hidden[-1] = hidden
    seen = {"hidden_states": record.hidden, "attentions": record.attentions}
    seen = {name: None if states is None else tuple(states) for name, states in seen.items()}
    return BaseModelOutputWithPast(hidden, **{CACHE_NAME: cache}, **seen)


def _record(config, kwargs: dict[str, Any]) -> Record:
    """Where the layers leave what the caller asks for."""
    hidden, attentions = (
        kwargs.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")
    )
    if attentions and config._attn_implementation != "eager":
        raise ValueError(
            f"output_attentions: {config._attn_implementation} attention makes no probabilities, load the model with "
            "attn_implementation='eager'"
        )
    return Record([] if hidden else None, [] if attentions else None)


def _layer(layer: nn.Module, stock: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward: as our loop wants it where that calls it."""
    if args and isinstance(args[0], Stream):
        return LlamaDecoderLayer.forward(layer, hidden_states, *args, **kwargs)
    return stock(hidden_states, *args, **kwargs)
