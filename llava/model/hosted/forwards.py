"""What takes the place of a stock model's forwards; each passes on to the stock one where no reducer is on."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava.model.hosted.base import Host, Pass, current_of, under_way
from llava.model.hosted.decoder import HostedDecoder
from llava.model.hosted.door import Arrival, enter
from llava.model.language_model.cache import CACHE_NAME, VisionCache
from llava.model.language_model.layers import LlamaDecoderLayer
from llava.model.language_model.loop import Record
from llava.model.language_model.stream import Stream
from llava.model.masks import labels_of


class HostedCache(VisionCache):
    """Our cache, filled for a stock model: only a block that hosts the model knows how to go on with it."""

    def get_mask_sizes(self, *args, **kwargs):
        if self.filled:
            raise RuntimeError(
                "past_key_values: this cache was filled while a reducer was on, go on with it inside such a block"
            )
        return super().get_mask_sizes(*args, **kwargs)


def outer(host: Host, stock: Callable, *args: Any, **kwargs: Any) -> Any:
    """The whole model's forward: a loss is that of the tokens that reach the end."""
    given = {**dict(zip(signature(stock).parameters, args, strict=False)), **kwargs} if args else kwargs
    current = None if _goes_on(given) else _fresh(host, given)
    if current is None:
        return stock(*args, **kwargs)
    if given.get("labels") is None:
        rows = given.get("logits_to_keep", 0)
        current.rows = (rows or None) if isinstance(rows, int) else None
        with under_way(current):
            return stock(*args, **kwargs)
    labels, as_tuple = given.pop("labels"), given.pop("return_dict", None) is False
    extra = {name: given.pop(name) for name in ("num_items_in_batch",) if name in given}
    with under_way(current):
        output = stock(return_dict=True, **given)
    left = labels_of(current.state.tokens_out[-1], labels)
    loss = host.model.loss_function(logits=output.logits, labels=left, vocab_size=host.config.vocab_size, **extra)
    output = type(output)(loss=loss, **output)
    return output.to_tuple() if as_tuple else output


def inner(host: Host, stock: Callable, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
    """The forward of the model without its head: towers, packing, and the text model."""
    if _goes_on(kwargs):
        return stock(input_ids=input_ids, **host.going_on(kwargs))
    current = _fresh(host, {"input_ids": input_ids, **kwargs})
    if current is None:
        return stock(input_ids=input_ids, **kwargs)
    with under_way(current), host.unchanged():
        return stock(input_ids=input_ids, **kwargs)


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache that a forward is given, under the name of any release."""
    return next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)


def _goes_on(kwargs: dict[str, Any]) -> bool:
    """Whether a forward goes on with a prompt that has been prefilled here."""
    cache = cache_in(kwargs)
    return isinstance(cache, HostedCache) and cache.filled


def _fresh(host: Host, inputs: dict[str, Any]) -> Pass | None:
    """The pass that is under way for a model, unless it is over; else a new one, if a reducer is on."""
    return current_of(host) or host.begin(inputs.get("input_ids"), inputs)


def text(host: Host, stock: Callable, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
    """The text model's forward: the door of the decoder and our loop over its layers, or more of a cached prompt."""
    current = current_of(host)
    if _goes_on(kwargs):
        return _decode(host, cache_in(kwargs), kwargs)
    if current is None or input_ids is not None:
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
    given = cache_in(kwargs)
    if given is not None and given.get_seq_length():
        kind = type(given).__name__
        raise ValueError(
            f"past_key_values: a {kind} that holds positions already cannot be gone on with while a reducer is on"
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        raise ValueError("attention_mask: with a reducer on it must be [batch, length], zero for padding")
    if position_ids is not None and position_ids.dim() == 3 and len(position_ids) == 4:
        position_ids = position_ids[1:]  # in front of M-RoPE's three axes `generate` counts the text along a fourth
    arrival = Arrival(current.state, current.ids, host.placeholder_ids, current.layouts, current.towers)
    hidden, tokens = enter(arrival, inputs_embeds, attention_mask, position_ids)
    model = host.text
    training = model.gradient_checkpointing and model.training and torch.is_grad_enabled()
    wanted = model.config.use_cache if use_cache is None else use_cache
    cache = None
    if not training and (wanted or given is not None):
        cache = HostedCache(model.config, current.state)
        if current.new_tokens is not None:
            cache.expect(current.new_tokens)
    record = _record(model.config, kwargs)
    record.rows = current.rows
    hidden = host.decoder(kwargs).prefill(hidden, tokens, current.state, cache, record=record)
    return _output(model, hidden, cache, record)


def _decode(host: Host, cache: HostedCache, kwargs: dict[str, Any]) -> BaseModelOutputWithPast:
    """New positions `[rows, new, width]` of prompts that are cached."""
    embeds, record = kwargs["inputs_embeds"], _record(host.config, kwargs)
    hidden = HostedDecoder(host.text).decode(embeds, cache, record)
    return _output(host.text, hidden, cache, record)


def _output(model: nn.Module, hidden: Tensor, cache: HostedCache | None, record: Record) -> BaseModelOutputWithPast:
    """What the stock text model would return."""
    hidden = model.norm(hidden)
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


def layer(layer: nn.Module, stock: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward: as our loop wants it where that calls it."""
    if args and isinstance(args[0], Stream):
        return LlamaDecoderLayer.forward(layer, hidden_states, *args, **kwargs)
    return stock(hidden_states, *args, **kwargs)
