"""The hooks between a multimodal model and the methods that make it cheaper.

A model calls the `Reducer` that is on (`mustdrop.active`) at seven points; the base class does nothing at any of them,
and the model then computes exactly what it would compute without:

1. `on_pixels`              the images before they are cut into patches
2. `after_vision_block`     merge or drop tokens inside the vision encoder, choose tokens that must stay;
   `inside_vision_block`    the same between a block's attention and its MLP
3. `on_vision_features`     the selected features before the projector; `on_projected_features` after it, and
   `on_instruction`         once more for every prompt, with the text that asks about the image
4. `before_decoder_layer`   what to compute for vision tokens in the coming decoder layer
5. `after_decoder_layer`    in prefill: which tokens go on to the next layer
6. `after_prefill`          which cached keys and values each layer keeps
7. `after_decode_layer`     the same after each decode step, from what the new token attended to

Attention is computed on demand (`Attention`): a hook gets the probabilities of the rows it asks for, recomputed from
queries and cached keys, so the model never leaves its fast attention kernel. One compaction (`compact`) carries hidden
states, positions, token records, masks and caches; what goes on after a decoder layer is said by one `Keep`. All that
a call needs to remember lives in a `ForwardState` made for it; reducers and models hold no state of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mustdrop.active import activated, active, carrying
from mustdrop.attention import Attention
from mustdrop.compute_plan import LEAST_ROWS, LayerPlan
from mustdrop.hosts import host_of, hosting_modules
from mustdrop.keep import Keep
from mustdrop.neighbours import SplitRows, causal_blocks
from mustdrop.reach import Fitting, Tower
from mustdrop.recording import ForwardState, TraceRecorder
from mustdrop.tokens import APART, ImageFacts, PromptFacts, Tokens, compact, gather
from mustdrop.vision_tokens import VisionTokens

__all__ = [
    "APART",
    "Attention",
    "CacheStep",
    "ForwardState",
    "DecoderStep",
    "ImageFacts",
    "Keep",
    "LEAST_ROWS",
    "LayerPlan",
    "PromptFacts",
    "Reducer",
    "TraceRecorder",
    "SplitRows",
    "Tokens",
    "Tower",
    "VisionStep",
    "VisionTokens",
    "active",
    "carrying",
    "causal_blocks",
    "compact",
    "gather",
    "hooked_model",
]


@dataclass
class VisionStep:
    """What a reducer sees of the images before they join the text.

    Attributes
    ----------
    tokens : VisionTokens
        The present tokens.
    scratch : dict
        What this reducer remembers during the forward pass.
    block, blocks, run : int
        The vision-encoder block that has been run, how many there are, and how many are run; -1 and 0 outside.
    attention, next_attention : Attention or None
        The block's own attention (on its input), and the following block's on the present tokens; None after the last
        block, and outside.
    instruction : `[images, length, width]` or None
        Embeddings of the text after the prompt's first image, padded where `real` bool `[images, length]` is False.
    """

    tokens: VisionTokens
    scratch: dict = field(default_factory=dict)
    block: int = -1
    blocks: int = 0
    run: int = 0
    attention: Attention | None = None
    next_attention: Attention | None = None
    instruction: Tensor | None = None
    real: Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether this is the last block that is run."""
        return self.block + 1 == self.run


@dataclass
class DecoderStep:
    """What a reducer sees before or after a decoder layer.

    `hidden` is the layer's input before it, its output `[batch, length, width]` after it. After a layer, `attention`
    is the layer's own and `next_attention` the following layer's on the present hidden states (None after the last
    layer); `norm` is the model's final norm. In a decode step `tokens` describes the layer's cache, whose last entry is
    the new token.
    """

    layer: int
    layers: int
    tokens: Tokens
    hidden: Tensor
    attention: Attention | None = None
    next_attention: Attention | None = None
    scratch: dict = field(default_factory=dict)
    norm: Callable[[Tensor], Tensor] | None = None


@dataclass
class CacheStep:
    """What a reducer sees of a layer's cache when prefill ends.

    `tokens` describes the keys and values that the layer has cached, `final` the tokens that left the last layer;
    `attention` has a single row 0: the prompt's last token, whose output is the first generated one. It is None for a
    reducer that says not to read it.
    """

    layer: int
    layers: int
    tokens: Tokens
    final: Tokens
    attention: Attention | None = None
    scratch: dict = field(default_factory=dict)


class Reducer(Fitting):
    """Base class of all methods. Every hook does nothing; a method overrides the ones it needs.

    Attributes
    ----------
    positions : {"original", "renumber"}
        Rotary positions of the tokens that stay: those they had in the full prompt, or 0..n-1 after every change.
    decode_positions : {"continue", "cache_length"}
        Position of generated tokens: the one after the prompt's last, or the length of the layer's cache.
    tile_order : {"model", "flat"}
        How the tiles of an image stand in the prompt: as the model has them, or ("flat") one after another with nothing
        cut off and nothing between them, which is what the authors' code of some methods does.
    needs_tiles : bool
        Whether it has to know how the tiles of an image lie (`VisionTokens.tiles`): then an image's size is needed.
    reads_output_attention : bool
        Whether `after_prefill` asks for attention; where it does not, nothing is kept for it.
    by_attention : bool
        Whether `after_decoder_layer` reads of its step only the records and the layer's own attention. Then it may be
        asked before the layer's MLP (`llava.model.drop_early`), and is shown a `hidden` without values.
    proportional_attention : bool
        Whether vision blocks count a token as often as it has patches, once some have been merged.
    thresholds : mapping of str to float
        Thresholds that calibration scales together, at reference values; the higher, the fewer tokens stay.
    """

    positions: str = "original"
    decode_positions: str = "continue"
    tile_order: str = "model"
    needs_tiles: bool = False
    reads_output_attention: bool = True
    by_attention: ClassVar[bool] = False
    proportional_attention: ClassVar[bool] = False
    thresholds: ClassVar[Mapping[str, float]] = {}

    def overrides(self, hook: str) -> bool:
        """Whether a hook is overridden; models skip idle ones altogether."""
        names = (
            (hook, "pixels_of_views") if hook == "on_pixels" else (hook,)
        )  # the same hook, told what belongs together
        return any(getattr(type(self), name) is not getattr(Reducer, name) for name in names)

    def asks_after(self, layers: int) -> Collection[int]:
        """Decoder layers, of so many, after which `after_decoder_layer` may have something to say; by default all."""
        return range(layers)

    def asked_at(self, hook: str) -> list[Reducer]:
        """The reducers that are asked at a hook, one after the other: itself, or the parts it is made of."""
        return [self] if self.overrides(hook) else []

    def on_pixels(self, images: Tensor, patch_size: int) -> Tensor | None:
        """Change the preprocessed images `[images, 3, height, width]`, their sizes too, or None."""

    def pixels_of_views(self, images: Tensor, patch_size: int, views: Sequence[int]) -> Tensor | None:
        """As `on_pixels`, where so many neighbouring rows each are the tiles or frames of one image."""
        return self.on_pixels(images, patch_size)

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        """Return which tokens go on, or None for all."""

    def inside_vision_block(self, step: VisionStep) -> Keep | None:
        """As `after_vision_block`, on what attention has added to a block's input and before its MLP."""

    def on_vision_features(self, step: VisionStep) -> Keep | None:
        """Return which of the selected features go on to the projector, or None for all."""

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        """Return which of the projected features (`prefix` 0) join the text, or None for all."""

    def on_instruction(self, step: VisionStep) -> Keep | None:
        """As `on_projected_features`, one row for every image of every prompt, with `step.instruction`."""

    def before_decoder_layer(self, step: DecoderStep) -> LayerPlan | None:
        """Return what the layer shall compute for vision tokens, or None for everything."""

    def after_decoder_layer(self, step: DecoderStep) -> Keep | None:
        """Return which tokens go on, or None for all."""

    def after_prefill(self, step: CacheStep) -> Keep | None:
        """Return which entries of a layer's cache stay, or None for all."""

    def after_decode_layer(self, step: DecoderStep) -> Keep | None:
        """Return which entries of the layer's cache stay, or None for all."""

    @contextmanager
    def on(self, model, timing: bool = False, keep: int | None = None, count: bool = False) -> Iterator[TraceRecorder]:
        """Reduce everything `model` computes inside the `with` block, and in threads that are started there.

        Other threads and tasks are not concerned, see `mustdrop.active`. A call that is under way when the block ends
        goes on as it began.

        Parameters
        ----------
        model
            A model with hook points, bare or in wrappers, see `hooked_model`. It may have a vision tower that knows its
            `num_patches`.
        timing : bool
            Also measure `Trace.times_ms` (synchronises with the device; leave off when timing from outside).
        keep : int, optional
            Only the newest so many traces are kept, for a block that lives long. Default: all.
        count : bool
            Also count the matrix products of the reducer itself (`Trace.selector_macs`) in the first forward pass of
            the block, which must be of one prompt and without beams.

        Raises
        ------
        TypeError
            If there is no model with hook points, or there are several.
        ValueError
            If the settings do not fit the model's depth, or are out of reach for its number of vision tokens.
        """
        run = TraceRecorder(timing, keep, count)
        with _hook_points(hooked_model(model)) as points:
            points.check(self) if hasattr(points, "check") else self._check_model(points)
            with activated(points.hook_key, self, run):
                yield run

    def _check_model(self, model) -> None:
        """Raise ValueError if the settings do not fit a model with hook points of its own."""
        tower = getattr(model, "get_vision_tower", lambda: None)()
        sizes = (getattr(tower, "blocks_run", None), tower.num_patches) if tower is not None else ()
        config = getattr(model, "config", None)
        heads, tiled = (
            getattr(config, "num_attention_heads", None),
            getattr(config, "image_aspect_ratio", None) == "anyres",
        )
        self.check_sizes(model.num_layers, model.num_vision_layers, *sizes, heads=heads, one_view=not tiled)


def _hook_points(model: object) -> AbstractContextManager[Any]:
    """What has the hook points of a model inside a `with` block: itself, or its host."""
    return nullcontext(model) if _has_hooks(model) else host_of(model).hosting(model)


def _has_hooks(model: object) -> bool:
    """Whether a model has hook points of its own."""
    return "hook_key" in getattr(model, "__dict__", ()) and hasattr(model, "num_layers")


def hooked_model(model: object) -> object:
    """The model with hook points that really runs when `model` is called.

    Parameters
    ----------
    model
        Has the attributes `hook_key`, `num_layers` and `num_vision_layers` of its own, or somebody who hosts it
        (`mustdrop.hosts`), or is a module that wraps one such, at any depth: PEFT, torch.compile, DataParallel,
        DistributedDataParallel, accelerate, DeepSpeed.

    Raises
    ------
    TypeError
        If there is none, or several.
    """
    inside = list(model.modules()) if isinstance(model, torch.nn.Module) else [model]
    found = [part for part in inside if _has_hooks(part)]
    if not found:
        hosts = hosting_modules()
        found = [part for part in inside if any(host.hosts(part) for host in hosts)]
    if len(found) == 1:
        return found[0]
    kind = type(model).__name__
    if found:
        raise TypeError(f"{kind} holds {len(found)} models with hook points, give the one to reduce")
    raise TypeError(
        f"{kind} has no hook points: load it with llava.model.builder; transformers' own classes need llava imported"
    )
