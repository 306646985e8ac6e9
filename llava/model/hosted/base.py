"""A stock model with hook points: what is particular to a family, and a forward pass of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.model.hosted.decoder import HostedDecoder
from llava.model.hosted.layout import Layout
from llava.model.hosted.pixels import check_budget
from mustdrop.hooks import ForwardState, Reducer, VisionTokens, active

BLOCK_HOOKS = "after_vision_block", "inside_vision_block", "on_vision_features"
TOWER_HOOKS = "on_pixels", *BLOCK_HOOKS


@dataclass
class TowerRun:
    """What a call of a vision tower did.

    Attributes
    ----------
    tokens : VisionTokens
        What is left of its views, without prefix; views of several sizes are padded, `patch_to_token` with -1.
    start : int64 `[views, patches]`
        `patch_to_token` before the first block.
    maps : dict of int to Tensor
        `patch_to_token` after every block that changed the tokens.
    """

    tokens: VisionTokens
    start: Tensor
    maps: dict[int, Tensor]

    @classmethod
    def of(cls, tokens: VisionTokens, maps: dict[int, Tensor]) -> TowerRun:
        """Of a call whose views have equally many patches."""
        to = tokens.patch_to_token
        return cls(tokens, torch.arange(to.shape[1], device=to.device).expand_as(to), maps)


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
    towers : list of TowerRun
        What the towers did, in the order of their calls.
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
    towers: list[TowerRun] = field(default_factory=list)
    new_tokens: int | None = None
    rows: int | None = None
    begun: bool = False

    @cached_property
    def layouts(self) -> list[tuple[str, Layout]]:
        """Every image and video, in the order of the towers' calls."""
        found = self.host.layouts({**self.inputs, "input_ids": self.ids})
        check_budget(self.state.reducer, found)
        return found

    def views(self, rows: int) -> list[int]:
        """How many of the rows of the towers' coming call are the views of one image each."""
        views = [layout.views for _, layout in self.layouts]
        first = sum(len(run.tokens.patch_index) for run in self.towers)
        ends = [0, *accumulate(views)]
        if first not in ends or first + rows not in ends:
            raise ValueError(f"pixel_values: a vision tower is given {rows} views, the images and videos have {views}")
        return views[ends.index(first) : ends.index(first + rows)]


_current: ContextVar[Pass | None] = ContextVar("hosted_pass", default=None)


class Host:
    """A stock model with hook points; subclasses say what is particular to a family.

    Attributes
    ----------
    texts, kinds : tuple of str
        `model_type` of the text models whose layers our loop runs, and of the vision towers.
    changing : tuple of str
        Attributes of the model without its head that a forward pass of the stock code overwrites.
    any_size : bool
        Whether images have as many tokens as their processor gives them.
    frames_are_tiles : bool
        Whether the frames of videos are prepared as one tile of an image is.
    """

    texts: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3", "phi3")
    kinds: ClassVar[tuple[str, ...]] = ()
    changing: ClassVar[tuple[str, ...]] = ()
    any_size: ClassVar[bool] = False
    frames_are_tiles: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel):
        self.model, self.inner = model, model.model
        self.text = self.inner.language_model

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        """Every image and video of a batch, in the order of the towers' calls: "image" or "video", and its layout.

        `inputs` are those of a stock forward, `input_ids` being None for the caller's own embeddings.
        """
        raise NotImplementedError

    def tower_parts(self) -> list[tuple[nn.Module, Callable, tuple]]:
        """Modules of the vision towers, what takes the place of their forwards, and what that is given first."""
        raise NotImplementedError

    def decoder(self, given: dict[str, Any]) -> HostedDecoder:
        """Our loop over the text model's layers for a prefill, of which the text model is `given` so much besides."""
        return HostedDecoder(self.text)

    def going_on(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a forward that goes on with a cached prompt, so that the stock code need remember nothing."""
        return inputs

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put back what the stock code overwrites."""
        before = {name: getattr(self.inner, name) for name in self.changing}
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.inner, name, value)

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

    def check(self, reducer: Reducer) -> None:
        """Raise ValueError, in one line, if a reducer cannot work on this model."""
        self.check_kinds(self.config, self.vision_config)
        reducer.check_placeholders(self.any_size)
        if self.any_size and any(part.pixel_budget(1) is None for part in reducer.asked_at("on_pixels")):
            raise ValueError(
                f"method: {type(reducer).__name__} changes the pixels of images, but {self.model.config.model_type} is "
                "given them cut up by its processor: set max_pixels, or max_patches, of that one instead"
            )

    @classmethod
    def check_kinds(cls, text: Any, vision: Any) -> None:
        """Raise ValueError if a text model or a vision tower of these configurations is of another kind."""
        for name, config, known in (("text_config", text, cls.texts), ("vision_config", vision, cls.kinds)):
            if config.model_type not in known:
                raise ValueError(f"{name}.model_type is {config.model_type!r}: supported are {', '.join(known)}")

    def begin(self, ids: Tensor | None, inputs: dict[str, Any]) -> Pass | None:
        """A forward pass of the reducer that is on here and now; None without one."""
        found = active(self)
        return None if found is None else Pass(self, ForwardState(found.reducer, found.run), ids, inputs)


class OneLayerHost(Host):
    """A host of towers whose features are one of their hidden states."""

    @property
    def feature_layer(self) -> int | list[int]:
        """The hidden states of a tower that give the features."""
        return self.model.config.vision_feature_layer

    @property
    def blocks_run(self) -> int:
        """Blocks of a tower that the features need."""
        layer, blocks = self.feature_layer, self.num_vision_layers
        return layer % (blocks + 1) if isinstance(layer, int) else blocks

    def check(self, reducer: Reducer) -> None:
        super().check(reducer)
        self.asked_layer(None, reducer)

    def asked_layer(self, asked: int | list[int] | bool | None, reducer: Reducer) -> int | list[int]:
        """The hidden state that a call of a tower is asked for, by default the configuration's.

        Raises
        ------
        ValueError
            If there are several, and a reducer works in the tower.
        """
        layer = self.feature_layer if asked is None or isinstance(asked, bool) else asked
        if not isinstance(layer, int) and any(map(reducer.overrides, TOWER_HOOKS)):
            raise ValueError(
                f"vision_feature_layer: the features are those of {layer} side by side, but {type(reducer).__name__} "
                "works in the vision tower, which has to have one last block"
            )
        return layer


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
