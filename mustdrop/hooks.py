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

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mustdrop.active import activated, active, carrying
from mustdrop.checks import fits_type, require
from mustdrop.hosts import host_of
from mustdrop.keep import Keep
from mustdrop.neighbours import SplitRows
from mustdrop.reach import Fitting
from mustdrop.tokens import ImageFacts, PromptFacts, Tokens, VisionTokens, compact, gather
from mustdrop.trace import Trace

if TYPE_CHECKING:
    from mustdrop.macs import Workload
    from mustdrop.shape import ModelShape

__all__ = [
    "Attention",
    "CacheStep",
    "ForwardState",
    "DecoderStep",
    "ImageFacts",
    "Keep",
    "LayerPlan",
    "PromptFacts",
    "Reducer",
    "TraceRecorder",
    "SplitRows",
    "Tokens",
    "VisionStep",
    "VisionTokens",
    "active",
    "carrying",
    "compact",
    "gather",
    "hooked_model",
]


@dataclass
class Attention:
    """Attention probabilities of one layer, computed only for the rows that are asked for.

    A few text rows against all keys cost about 0.1 % of a prefill; materialising all rows would cost the fast kernel.

    Parameters
    ----------
    queries : callable, int64 rows `[batch, rows]` -> `[batch, heads, rows, head_dim]`
        Recomputes the (rotated) queries of these rows.
    keys : callable, () -> `[batch, kv_heads, tokens, head_dim]`
        The layer's (rotated) keys; in a decoder the cached ones.
    scale : float
        Factor on the scores before the softmax.
    valid : bool `[batch, tokens]` or None
        False for padded keys.
    first_row : int or None
        Position in `keys` of row 0 of a causal attention; None when the attention is not causal.
    """

    queries: Callable[[Tensor], Tensor]
    keys: Callable[[], Tensor]
    scale: float
    valid: Tensor | None = None
    first_row: int | None = None

    def probabilities(self, rows: Tensor) -> Tensor:
        """Softmax over all visible keys for the given rows, float32 `[batch, heads, rows, tokens]`."""
        queries, keys = self.queries(rows), self.keys()
        batch, heads, count, dim = queries.shape
        grouped = queries.reshape(batch, keys.shape[1], -1, dim)
        scores = (grouped @ keys.transpose(-1, -2)).view(batch, heads, count, -1).float() * self.scale
        columns = torch.arange(scores.shape[-1], device=scores.device)
        if self.first_row is not None:
            scores.masked_fill_((columns > rows[..., None] + self.first_row)[:, None], torch.finfo(scores.dtype).min)
        if self.valid is not None:
            scores.masked_fill_(~self.valid[:, None, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1)

    def mean_over_heads(self, rows: Tensor) -> Tensor:
        """`probabilities` averaged over the heads, float32 `[batch, rows, tokens]`."""
        return self.probabilities(rows).mean(1)


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


@dataclass(frozen=True)
class LayerPlan:
    """What a decoder layer computes for vision tokens (YOPO, arXiv 2410.06169); what it leaves out is not computed.

    Text tokens compute everything. See `mustdrop.methods.yopo` for what each strategy means.

    Attributes
    ----------
    window : int or None
        Side of the square of patches around a vision token whose tokens it attends to, odd; None for causal attention.
    heads : float in [0, 1] or tuple of bool
        Attention heads that are active for vision tokens: a share, counted from the first, or one bool per head.
    mlp_share : float in (0, 1]
        Share of the MLP's neurons, counted from the first, that vision tokens go through.
    skip : bool
        The layer, and every later one, does without vision tokens.
    """

    window: int | None = None
    heads: float | tuple[bool, ...] = 1.0
    mlp_share: float = 1.0
    skip: bool = False

    def active_heads(self, heads: int) -> list[int]:
        """Which of a layer's heads are active; ValueError if the plan is made for another number of them."""
        if not isinstance(self.heads, tuple):
            return list(range(round(self.heads * heads)))
        if len(self.heads) != heads:
            raise ValueError(f"heads: the mask has {len(self.heads)} heads per layer, it must have the model's {heads}")
        return [head for head, active in enumerate(self.heads) if active]

    def neurons(self, mlp: int) -> int:
        """Neurons of an MLP of `mlp` that vision tokens go through."""
        return round(self.mlp_share * mlp)

    @classmethod
    def all_of(cls, plans: Sequence[LayerPlan]) -> LayerPlan | None:
        """The plan that computes only what all do; None if there is none."""
        return reduce(cls.__and__, plans) if plans else None

    def __and__(self, other: LayerPlan) -> LayerPlan:
        """The plan that computes only what both do."""
        masks = [plan.heads for plan in (self, other) if isinstance(plan.heads, tuple)]
        heads: float | tuple[bool, ...] = min(self.heads, other.heads) if not masks else masks[0]
        if masks:
            both = set(self.active_heads(len(masks[0]))) & set(other.active_heads(len(masks[0])))
            heads = tuple(head in both for head in range(len(masks[0])))
        windows = [plan.window for plan in (self, other) if plan.window is not None]
        share, skip = min(self.mlp_share, other.mlp_share), self.skip or other.skip
        return LayerPlan(min(windows, default=None), heads, share, skip)


class Reducer(Fitting):
    """Base class of all methods. Every hook does nothing; a method overrides the ones it needs.

    Attributes
    ----------
    positions : {"original", "renumber"}
        Rotary positions of the tokens that stay: those they had in the full prompt, or 0..n-1 after every change.
    decode_positions : {"continue", "cache_length"}
        Position of generated tokens: the one after the prompt's last, or the length of the layer's cache.
    reads_output_attention : bool
        Whether `after_prefill` asks for attention; where it does not, nothing is kept for it.
    proportional_attention : bool
        Whether vision blocks count a token as often as it has patches, once some have been merged.
    thresholds : mapping of str to float
        Thresholds that calibration scales together, at reference values; the higher, the fewer tokens stay.
    """

    positions: str = "original"
    decode_positions: str = "continue"
    reads_output_attention: bool = True
    proportional_attention: ClassVar[bool] = False
    thresholds: ClassVar[Mapping[str, float]] = {}

    def selector_macs(self, shape: ModelShape, work: Workload) -> int:
        """Multiply-adds of what the method itself computes on a prompt to choose and merge; matrix products only."""
        return 0

    def overrides(self, hook: str) -> bool:
        """Whether a hook is overridden; models skip idle ones altogether."""
        return getattr(type(self), hook) is not getattr(Reducer, hook)

    def asked_at(self, hook: str) -> list[Reducer]:
        """The reducers that are asked at a hook, one after the other: itself, or the parts it is made of."""
        return [self] if self.overrides(hook) else []

    def on_pixels(self, images: Tensor, patch_size: int) -> Tensor | None:
        """Change the preprocessed images `[images, 3, height, width]`, their sizes too, or None."""

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
    def on(self, model, timing: bool = False, keep: int | None = None) -> Iterator[TraceRecorder]:
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

        Raises
        ------
        TypeError
            If there is no model with hook points, or there are several.
        ValueError
            If the settings do not fit the model's depth, or are out of reach for its number of vision tokens.
        """
        run = TraceRecorder(timing, keep)
        with _hook_points(hooked_model(model)) as points:
            points.check(self) if hasattr(points, "check") else self._check_model(points)
            with activated(points.hook_key, self, run):
                yield run

    def _check_model(self, model) -> None:
        """Raise ValueError if the settings do not fit a model with hook points of its own."""
        tower = getattr(model, "get_vision_tower", lambda: None)()
        sizes = (getattr(tower, "blocks_run", None), tower.num_patches) if tower is not None else ()
        config = getattr(model, "config", None)
        self.check_sizes(
            model.num_layers, model.num_vision_layers, *sizes, heads=getattr(config, "num_attention_heads", None)
        )


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
    found = [part for part in inside if _has_hooks(part)] or [part for part in inside if host_of(part)]
    if len(found) == 1:
        return found[0]
    kind = type(model).__name__
    if found:
        raise TypeError(f"{kind} holds {len(found)} models with hook points, give the one to reduce")
    raise TypeError(
        f"{kind} has no hook points: load it with llava.model.builder, or import llava for transformers' own classes"
    )


@dataclass
class TraceRecorder:
    """Collects one `Trace` per prompt while a reducer is on, of which the newest `keep` stay (None: all)."""

    timing: bool = False
    keep: int | None = None
    traces: list[Trace] = field(default_factory=list)

    def __post_init__(self) -> None:
        fits = self.keep is None or (fits_type(self.keep, int) and self.keep >= 0)
        require(fits, "keep", self.keep, "a number of traces, or none for all")

    def add(self, traces: Iterable[Trace]) -> None:
        """Note traces, and forget the oldest ones that are too many."""
        self.traces.extend(traces)
        if self.keep is not None:
            del self.traces[: max(0, len(self.traces) - self.keep)]


class ForwardState:
    """Everything one forward pass (and the decoding that follows it) needs to remember.

    Holds each reducer's scratch, what happened to the tokens, and the time spent per part.
    """

    def __init__(self, reducer: Reducer, recorder: TraceRecorder | None = None):
        self.reducer = reducer
        self.recorder = recorder
        self.scratch: dict[int, dict] = {}  # per reducer, what it remembers
        self._asked: dict[str, list[tuple[Reducer, dict]]] = {}
        self.vision: dict[int, Tensor] = {}  # patch_to_token map after each vision block that changed the tokens
        self.images: list[list[tuple[int, Tensor]]] = []  # per prompt and image: tokens spliced in, patch_to_token map
        self.tiles: list[list[int]] = []  # per prompt and image: its row in what the vision encoder computed
        self.pruned_layers: list[int] = []  # decoder layers after which the reducer chose
        self.plans: list[LayerPlan | None] = []  # per decoder layer
        self.merge_maps: dict[int, Tensor] = {}  # `Keep.merge_into` after each decoder layer that merged tokens
        self.tokens_in: list[Tokens] = []  # per decoder layer
        self.tokens_out: list[Tokens] = []
        self.cached: list[Tokens] = []
        self.kv_bytes: list[int] = []  # bytes of one cached position, per layer
        self.seconds: dict[str, float] = defaultdict(float)

    def overrides(self, hook: str) -> bool:
        """Whether the reducer has something to do at a hook: an idle hook costs nothing."""
        return bool(self._asked_at(hook))

    def any(self, attribute: str, hook: str | None = None) -> bool:
        """Whether an attribute is true for one of the reducers that are asked at a hook, by default at any."""
        hooks = [hook] if hook else [name for name in vars(Reducer) if name.startswith(("on_", "after_", "inside_"))]
        return any(getattr(part, attribute) for name in hooks for part, _ in self._asked_at(name))

    def ask(self, hook: str, step: VisionStep | DecoderStep | CacheStep) -> list:
        """What the reducers that are asked at a hook answer to the same step, those left out that have no answer."""
        with self.timed("selector", step.tokens.device):
            answers = [getattr(part, hook)(replace(step, scratch=own)) for part, own in self._asked_at(hook)]
        return [answer for answer in answers if answer is not None]

    def pixels(self, images: Tensor, patch_size: int) -> Tensor:
        """The preprocessed images `[images, 3, height, width]` that the vision encoder is given."""
        for part, _ in self._asked_at("on_pixels"):
            changed = part.on_pixels(images, patch_size)
            images = images if changed is None else changed
        return images

    def choose(self, hook: str, step: VisionStep) -> VisionTokens:
        """The vision tokens that go on after a hook; each reducer that is asked sees what the one before it left."""
        tokens, asked = step.tokens, self._asked_at(hook)
        if not asked:
            return tokens
        with self.timed("selector", tokens.device):
            for part, own in asked:
                keep = getattr(part, hook)(replace(step, tokens=tokens, scratch=own))
                tokens = tokens if keep is None else keep.apply(tokens)
        return tokens

    def _asked_at(self, hook: str) -> list[tuple[Reducer, dict]]:
        """The reducers that are asked at a hook, and what each remembers."""
        if hook not in self._asked:
            parts = self.reducer.asked_at(hook)
            self._asked[hook] = [(part, self.scratch.setdefault(id(part), {})) for part in parts]
        return self._asked[hook]

    def timed(self, part: str, device: torch.device):
        """Context that adds its duration to `seconds[part]` when the run asks for timing."""
        return self._clock(part, device) if self.recorder is not None and self.recorder.timing else nullcontext()

    @contextmanager
    def _clock(self, part: str, device: torch.device) -> Iterator[None]:
        synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        synchronise()
        start = time.perf_counter()
        yield
        synchronise()
        self.seconds[part] += time.perf_counter() - start

    def finish_prefill(self, cached: list[Tokens], kv_bytes: list[int]) -> None:
        """Note what the cache holds and hand the prompts' traces to the run."""
        self.cached, self.kv_bytes = list(cached), kv_bytes
        if self.recorder is not None:
            prompts = len(self.images)
            every = len(self.tokens_in[0].image) // prompts  # a prompt's beams lie side by side
            self.recorder.add(Trace(self, row=prompt * every, prompt=prompt) for prompt in range(prompts))
