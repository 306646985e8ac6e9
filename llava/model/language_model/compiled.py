"""torch.compile for the decoder: prefill layer by layer, a decode step as one graph over buffers of fixed size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.projections import whole_layer
from llava.model.language_model.stream import Stream
from llava.model.masks import WITH_4D_MASKS, expand_mask

STEP = 64  # capacities are multiples of this, so that few shapes occur
# Layers differ in the number they carry; taken as a variable, it does not make a program of its own for each. The
# programs of all models in a process count towards one limit.
_SETTINGS = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 64}


def compile_model(model, backend: str = "inductor", graphs: bool | None = None):
    """Let a model's decoder run through torch.compile from now on; returns the model.

    The first calls compile: a few programs, which serve every layer and every length. Decoding works on buffers of
    fixed size, one size per layer, which are kept for the next call. As if not compiled run layers with a `LayerPlan`
    or packed rows, anything with gradients or attention probabilities asked for, and the decoding of reducers that have
    plans or drop cached tokens meanwhile, of models with forward hooks on layers, of flash attention, and of several
    tokens at once.

    Parameters
    ----------
    model
        What `load_pretrained_model` returns.
    backend : str
        Of torch.compile.
    graphs : bool, optional
        A decode step is one program, on CUDA replayed as a CUDA graph (`mode="reduce-overhead"`): faster, but compiled
        anew for every grouping of layers by what they cache, for minutes. Default: on CUDA.

    Raises
    ------
    ValueError
        If the model is spread over several devices.
    """
    devices = {parameter.device for parameter in model.get_model().layers.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"compile: the decoder is on {names}, it must be on one device")
    graphs = devices.pop().type == "cuda" if graphs is None else graphs
    model.get_model().compiled = Compiled(backend, graphs)
    return model


class Compiled:
    """The compiled parts of a decoder, and the buffers that its decode steps work on."""

    def __init__(self, backend: str = "inductor", graphs: bool = False):
        quick = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}  # nobody swaps a Linear
        self._layer = torch.compile(_layer, backend=backend, dynamic=True, options=quick)
        if graphs:
            mode = "reduce-overhead" if backend == "inductor" else None
            self._step = torch.compile(_step, backend=backend, mode=mode)
        else:
            self._step = partial(_step, run=torch.compile(_new_rows, backend=backend, dynamic=True, options=quick))
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._owner: weakref.ref | None = None

    def layer(self, layer: nn.Module, stream: Stream, cache: VisionCache | None) -> Tensor:
        """Output of a decoder layer `[batch, length, width]` in prefill."""
        with torch._dynamo.config.patch(_SETTINGS):
            hidden, keys, values = self._layer(layer, stream.hidden, stream.mask_of(layer), stream.rotary)
        if cache is not None:
            cache.update(keys, values, layer.self_attn.layer_idx)
        return hidden

    def decodes(self, config, hidden: Tensor, cache: VisionCache) -> bool:
        """Whether there is a compiled step for this."""
        plain = not cache.state.overrides("after_decode_layer") and all(plan is None for plan in cache.state.plans)
        known = config._attn_implementation in WITH_4D_MASKS
        return plain and known and hidden.shape[1] == 1

    def decode(self, model: nn.Module, hidden: Tensor, cache: VisionCache) -> Tensor:
        """Run one new position per prompt `[batch, 1, width]` through all layers."""
        groups: dict[tuple, int] = {}
        shared, which = [], []
        for index in range(len(cache.layers)):
            self._reserve(index, cache)
            used = cache.length(index)
            key = id(cache.records[index]), id(cache.next_position[index]), used
            if key not in groups:
                groups[key] = len(groups)
                slot = torch.arange(used, used + 1, device=hidden.device)
                shared.append((cache.records[index].valid, slot, cache.positions(index, 1)))
            which.append(groups[key])
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(_SETTINGS):
            hidden = self._step(model, hidden, shared, tuple(which), [layer.buffers for layer in cache.layers])
        for layer in cache.layers:
            layer.show(layer.keys.shape[-2] + 1)
        return hidden

    def _reserve(self, index: int, cache: VisionCache) -> None:
        """See to it that a layer has room in buffers whose size and place seldom change."""
        layer = cache.layers[index]
        used = layer.keys.shape[-2]
        if layer.buffered and used < layer.buffers[0].shape[-2]:
            return
        if self._owner is None or self._owner() is not cache:
            if self._owner is not None and self._owner() is not None:
                self._buffers = {}  # another cache still lives in them
            self._owner = weakref.ref(cache)
        capacity = -(-(used + max(1, cache.expected - cache.generated)) // STEP) * STEP
        shapes = [(*states.shape[:2], capacity, states.shape[3]) for states in (layer.keys, layer.values)]
        buffers = self._buffers.get(index)
        same = buffers is not None and buffers[0].dtype == layer.keys.dtype
        if not same or [tuple(buffer.shape) for buffer in buffers] != shapes:
            buffers = None
        layer.reserve(capacity, buffers)
        if buffers is None:
            self._buffers[index] = layer.buffers
            for buffer in layer.buffers:
                torch._dynamo.mark_static_address(buffer, guard=False)
                torch._dynamo.maybe_mark_dynamic(buffer, 2)


class _Seen:
    """Stands in for a cache: notes the keys and values of the one layer that is run."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _Slots:
    """Stands in for a cache: writes into one layer's buffers at `slot` and shows all of them."""

    def __init__(self, buffers: tuple[Tensor, Tensor], slot: Tensor):
        self.buffers, self.slot = buffers, slot

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer.index_copy_(2, self.slot, states)
        return self.buffers


def _layer(layer: nn.Module, hidden: Tensor, mask: Any, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, keys and values of a decoder layer."""
    seen = _Seen()
    return whole_layer(layer, hidden, mask, rotary, seen)[0], seen.keys, seen.values


def _new_rows(
    layer: nn.Module,
    hidden: Tensor,
    mask: Tensor,
    rotary: tuple[Tensor, Tensor],
    buffers: tuple[Tensor, Tensor],
    slot: Tensor,
) -> Tensor:
    """Output of a decoder layer for the position `slot`, whose keys and values go into its buffers."""
    return whole_layer(layer, hidden, mask, rotary, _Slots(buffers, slot))[0]


def _step(
    model: nn.Module,
    hidden: Tensor,
    groups: list[tuple[Tensor | None, Tensor, Tensor]],
    which: tuple[int, ...],
    buffers: list[tuple[Tensor, Tensor]],
    run: Callable = _new_rows,
) -> Tensor:
    """All layers on `hidden` `[batch, 1, width]`; no shape changes from step to step.

    `groups` holds, for each group of layers that cache the same tokens, which prompt positions are real (bool
    `[batch, prompt]` or None), the slot to write to `[1]` and the rotary position `[batch, 1]`; `which` says each
    layer's group.
    """
    masks, rotary = [], []
    for group, (valid, slot, position) in enumerate(groups):
        capacity = buffers[which.index(group)][0].shape[2]
        sees = (torch.arange(capacity, device=slot.device) <= slot)[None, None, None]
        if valid is not None:
            sees = sees & F.pad(valid, (0, capacity - valid.shape[1]), value=True)[:, None, None]
        masks.append(expand_mask(model.config, sees, hidden.dtype))
        rotary.append(model.rotary_emb(hidden, position))
    for layer, group, own in zip(model.layers, which, buffers, strict=True):
        hidden = run(layer, hidden, masks[group], rotary[group], own, groups[group][1])
    return hidden
