"""A stock model with hook points: what is particular to a family, and a forward pass of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from llava.model.hosted.layout import Layout
from mustdrop.hooks import ForwardState, Reducer, VisionTokens, active

TEXTS = "llama", "mistral", "qwen2", "qwen3", "phi3"
"""`model_type` of text models whose layers our loop runs."""

TOWERS = "clip_vision_model", "siglip_vision_model"
"""`model_type` of vision towers whose blocks our loop runs."""

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
    rows : int or None
        Last positions of which logits are wanted, if not of all.
    begun : bool
        Whether the decoder has been entered.
    """

    host: Host
    state: ForwardState
    ids: Tensor | None
    inputs: dict[str, Any]
    towers: list[VisionTokens] = field(default_factory=list)
    new_tokens: int | None = None
    rows: int | None = None
    begun: bool = False

    @cached_property
    def layouts(self) -> list[tuple[str, Layout]]:
        """Every image and video, in the order of the towers' calls."""
        return self.host.layouts(self.inputs)

    def views(self, rows: int) -> list[int]:
        """How many of the rows of the towers' coming call are the views of one image each."""
        views = [layout.views for _, layout in self.layouts]
        first = sum(len(tower.patch_index) for tower in self.towers)
        ends = [0, *accumulate(views)]
        if first not in ends or first + rows not in ends:
            raise ValueError(f"pixel_values: a vision tower is given {rows} views, the images and videos have {views}")
        return views[ends.index(first) : ends.index(first + rows)]


_current: ContextVar[Pass | None] = ContextVar("hosted_pass", default=None)


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

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        """Every image and video of a batch, in the order of the towers' calls: "image" or "video", and its layout."""
        raise NotImplementedError

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """The id of an image's placeholder, and of a video's where there are such."""
        found = {kind: getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        return {kind: token for kind, token in found.items() if token is not None}

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
        for name, config, known in (("text_config", self.config, TEXTS), ("vision_config", self.vision_config, TOWERS)):
            if config.model_type not in known:
                raise ValueError(f"{name}.model_type is {config.model_type!r}: supported are {', '.join(known)}")
        reducer.check_placeholders()
        if not isinstance(self.feature_layer, int) and any(map(reducer.overrides, TOWER_HOOKS)):
            raise ValueError(
                f"vision_feature_layer: the features are those of {self.feature_layer} side by side, but "
                f"{type(reducer).__name__} works in the vision tower, which has to have one last block"
            )
        heads, patches, blocks = self.config.num_attention_heads, self.side**2, self.num_vision_layers
        run = self.feature_layer % (blocks + 1) if isinstance(self.feature_layer, int) else blocks
        reducer.check_sizes(self.num_layers, blocks, run, patches, heads, one_view=self.fixed_size)

    @property
    def feature_layer(self) -> int | list[int]:
        """The hidden states of a tower that give the features."""
        return self.model.config.vision_feature_layer

    def begin(self, ids: Tensor | None, inputs: dict[str, Any]) -> Pass | None:
        """A forward pass of the reducer that is on here and now; None without one."""
        found = active(self)
        return None if found is None else Pass(self, ForwardState(found.reducer, found.run), ids, inputs)


@contextmanager
def under_way(current: Pass | None) -> Iterator[None]:
    """Let a forward pass be the one that the model's parts find."""
    token = _current.set(current)
    try:
        yield
    finally:
        _current.reset(token)


def current_of(host: Host) -> Pass | None:
    """The pass that is under way for a model and has not reached the decoder."""
    current = _current.get()
    return current if current is not None and current.host is host and not current.begun else None
