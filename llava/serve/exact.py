"""Images reduced before the decoder to a number of tokens that is known beforehand, for engines that must know it.

An engine such as vLLM lays a prompt out before an image is encoded, gives a token the same cache in every decoder layer
and keeps no attention. So only what is decided before the decoder fits, and of that only what leaves an exact number.
Nothing here needs vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from llava.anyres import get_anyres_image_grid_shape
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.prompts import Prompt
from llava.model.stitched import TiledImages, layouts_of, splice_stitched
from llava.serve.positions import POSITIONS, Room
from mustdrop.checks import one_of, shown
from mustdrop.compose import Compose
from mustdrop.config import load_reducer
from mustdrop.hooks import ForwardState, Reducer
from mustdrop.mustdrop_plus import MustDropPlus
from mustdrop.reach import COUNTED

IN_DECODER = ("before_decoder_layer", "after_decoder_layer", "after_prefill", "after_decode_layer")
IN_TOWER = ("on_pixels", "inside_vision_block", "after_vision_block", "on_vision_features")
_NARROW = 8
TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


@dataclass(frozen=True)
class Settings:
    """What is asked of the images, looked over: the reducer, and where its tokens stand."""

    method: str
    reducer: Reducer
    positions: str = "original"
    left_out: tuple[str, ...] = ()


def read_settings(settings: object) -> Settings:
    """Settings as in a method's YAML file, and `positions`, one of `POSITIONS`.

    Of `mustdrop_plus` the encoder's half is taken; `left_out` names the rest.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"mustdrop: got {shown(settings)}, expected settings such as {{'method': 'divprune'}}")
    fields = dict(settings)
    positions = fields.pop("positions", POSITIONS[0])
    one_of("positions", positions, POSITIONS)
    whole = load_reducer(fields)
    name = str(fields["method"])
    parts = _encoder_parts(whole, name)
    for part in parts:
        if part.overrides("on_instruction"):
            raise ValueError(
                f"method is {name!r}: it chooses by the question, and an image's cached tokens know none; "
                "take one that chooses by the image alone"
            )
    left_out = [type(part).__name__ for part in _flat(whole) if not any(part is one for one in parts)]
    return Settings(name, Compose(parts), positions, tuple(left_out))


def _flat(reducer: Reducer) -> list[Reducer]:
    return reducer.flat() if isinstance(reducer, Compose) else [reducer]


def _encoder_parts(reducer: Reducer, name: str) -> list[Reducer]:
    """The parts of a reducer that work before the decoder; ValueError if others may not be left out."""
    if isinstance(reducer, MustDropPlus):
        return [part for part in reducer.flat() if not any(map(part.overrides, IN_DECODER))]
    if isinstance(reducer, Compose):
        return [one for part in reducer.parts for one in _encoder_parts(part, name)]
    _refuse_decoder(reducer, name)
    return [reducer]


def _refuse_decoder(reducer: Reducer, name: str) -> None:
    """Raise ValueError if a reducer works inside the decoder."""
    hooks = [hook for hook in IN_DECODER if reducer.overrides(hook)]
    if hooks:
        instead = "stages: [vision] with merge_to" if name == "mustdrop" else "one that chooses before it"
        raise ValueError(
            f"method is {name!r}: it works inside the decoder ({hooks[0]}), where an engine keeps the same tokens in "
            f"every layer; take {instead}"
        )


@dataclass(frozen=True)
class VisionSizes:
    """What of a model counts depend on.

    Attributes
    ----------
    vision : dict
        The vision tower's configuration.
    select_layer : int
        Hidden state that gives the features.
    layers, heads : int
        Of the decoder.
    pinpoints : tuple of (int, int), optional
        Widths and heights that images are cut into tiles for; None for a model without tiles.
    """

    vision: Any
    select_layer: int
    layers: int
    heads: int
    pinpoints: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, config: Any) -> VisionSizes:
        """The sizes in a Hugging Face configuration of LLaVA-1.5 or LLaVA-NeXT.

        Raises
        ------
        ValueError
            If the model is of a form whose tower or features are others.
        """
        kind = getattr(config.vision_config, "model_type", None)
        one_of("vision_config.model_type", kind, TOWERS)
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer is {layer}: it must be one layer, several have no common tokens")
        if kind == "clip_vision_model" and strategy != "default":
            raise ValueError(f"vision_feature_select_strategy is {strategy!r}: it must be 'default', without CLS")
        tiled = getattr(config, "image_grid_pinpoints", None)
        pinpoints = None if tiled is None else tuple((int(width), int(height)) for height, width in tiled)
        text = config.text_config
        return cls(config.vision_config, layer, text.num_hidden_layers, text.num_attention_heads, pinpoints)

    @property
    def side(self) -> int:
        """Patches along a side of a view."""
        return self.vision.image_size // self.vision.patch_size

    def new_tower(self, tiny: bool = False) -> CLIPVisionTower:
        """A vision tower of these sizes, without trained weights; a `tiny` one is narrow, but takes the same images."""
        config = self.vision
        if tiny:
            narrow = {"hidden_size": _NARROW, "intermediate_size": _NARROW, "num_attention_heads": 2}
            config = type(config)(**{**config.to_dict(), **narrow})
        config._attn_implementation = "sdpa"
        tower = CLIPVisionTower.around(TOWERS[config.model_type](config), self.select_layer)
        tower.select_feature = "patch"
        return tower


class ImageEncoder(LlavaMetaForCausalLM):
    """A vision tower and a projector under a reducer: LLaVA without its language model.

    Parameters
    ----------
    sizes : VisionSizes
        Of the model.
    settings : Settings
        What is asked of the images.
    tower : CLIPVisionTower
        Our loop over a CLIP or SigLIP tower.
    projector : nn.Module
        From the tower's features `[..., width]` to the decoder's.
    width : int
        Of the decoder.
    newline : `[width]`, optional
        What stands at the end of a row of tiles.
    """

    def __init__(
        self,
        sizes: VisionSizes,
        settings: Settings,
        tower: CLIPVisionTower,
        projector: nn.Module,
        width: int,
        newline: Tensor | None = None,
    ):
        self.sizes, self.settings, self.tower = sizes, settings, tower
        self.parts = SimpleNamespace(mm_projector=projector, image_newline=newline)
        self.width = width
        self.config = SimpleNamespace(
            mm_patch_merge_type="spatial_unpad" if sizes.pinpoints else None,
            image_aspect_ratio="anyres" if sizes.pinpoints else None,
            image_grid_pinpoints=None if sizes.pinpoints is None else [list(size) for size in sizes.pinpoints],
            mm_vision_config={"image_size": sizes.vision.image_size},
            protocol="model",
        )

    def get_model(self) -> SimpleNamespace:
        return self.parts

    def get_vision_tower(self) -> CLIPVisionTower:
        return self.tower

    def get_input_embeddings(self) -> nn.Embedding:
        """Of no text: there is none in a prompt that is one image."""
        weight = next(self.parts.mm_projector.parameters())
        return nn.Embedding(1, self.width, device=weight.device, dtype=weight.dtype)

    def new_state(self) -> ForwardState:
        return ForwardState(self.settings.reducer)

    def prompt(self, stacks: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> Prompt:
        """Images as prompts of nothing else, one each, padded on the left.

        Parameters
        ----------
        stacks : sequence of `[views, 3, height, width]`
            Preprocessed pixels, the tiles of an image in one stack.
        sizes : sequence of (width, height), optional
            Of the images in pixels; needed of tiles.
        """
        ids = torch.full((len(stacks), 1), IMAGE_TOKEN_INDEX)
        return self.splice(ids, images=list(stacks), image_sizes=sizes, padding_side="left")

    @torch.inference_mode()
    def images(
        self, stacks: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The tokens of every image `[tokens, width]`, and where each stands, int64 `[tokens]`.

        Positions count from the image's first patch. Arguments as for `prompt`.
        """
        prompt = self.prompt(stacks, sizes)
        length = prompt.embeds.shape[1]
        first = [length - facts.length for facts in prompt.tokens.facts()]
        rows = zip(prompt.embeds, prompt.tokens.position, first, strict=True)
        return [(states[start:], position[start:]) for states, position, start in rows]

    def _stitched(self, rows, chunks, labels, distinct, shown, state, side):
        """As in LLaVA, but all newlines of an image stay: how many rows have a patch left depends on what it shows."""
        encoded = self._projected(torch.cat(distinct), state, [len(stack) for stack in distinct])
        images = TiledImages.of(self.config, encoded, [len(stack) for stack in distinct], shown)
        images.layouts = [replace(layout, group=torch.zeros_like(layout.group)) for layout in images.layouts]
        text = self.get_input_embeddings().weight[:0]
        embeds, tokens, _, positions = splice_stitched(
            rows, text, labels, images, self.parts.image_newline, state, side
        )
        return Prompt(embeds, tokens, None, state, positions)


class Counter:
    """How many tokens a reducer leaves of an image, whatever it shows.

    Found by running the reducer itself on noise, in a tower that is as deep as the model's but a few numbers wide.

    Parameters
    ----------
    sizes : VisionSizes
        Of the model.
    settings : Settings
        What is asked of the images.

    Raises
    ------
    ValueError
        With one line, if the settings do not fit the model, or leave a number that depends on the image.
    """

    def __init__(self, sizes: VisionSizes, settings: Settings):
        self.sizes, self.settings = sizes, settings
        reducer, side = settings.reducer, sizes.side
        tiled = sizes.pinpoints is not None
        depth = sizes.vision.num_hidden_layers
        with _on_the_host():
            tower = sizes.new_tower(tiny=True).float()
            newline = torch.zeros(_NARROW) if tiled else None
            self._encoder = ImageEncoder(sizes, settings, tower, nn.Linear(_NARROW, _NARROW).float(), _NARROW, newline)
        known = {"run": tower.blocks_run, "patches": side**2, "heads": sizes.heads, "one_view": not tiled}
        reducer.check_sizes(sizes.layers, depth, **known)
        if tiled:
            reducer.check_placeholders()
        _check_exact(settings, (side, side))
        self._count = lru_cache(maxsize=4096)(self._measure)

    def of(self, size: tuple[int, int] | None = None) -> Room:
        """The room that an image of a size (width, height) in pixels takes; the size matters to tiles alone.

        Raises
        ------
        ValueError
            If what the vision tower leaves of it depends on what it shows.
        """
        return self._count(None if self.sizes.pinpoints is None else size)

    def views(self, size: tuple[int, int] | None) -> int:
        """Views that an image of a size (width, height) is cut into: an overview and its tiles."""
        if size is None:
            return 1
        columns, rows = get_anyres_image_grid_shape(size, list(self.sizes.pinpoints), self.sizes.vision.image_size)
        return 1 + columns * rows

    def _measure(self, size: tuple[int, int] | None) -> Room:
        views, pixels = self.views(size), self.sizes.vision.image_size
        with _on_the_host(), torch.inference_mode():
            noise = torch.rand(views, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
            prompt = self._encoder.prompt([noise], None if size is None else [size])
            if size is not None and any(map(self.settings.reducer.overrides, IN_TOWER)):
                self._check_border(noise, size, prompt.tokens.facts()[0].images[0].tokens)
        return Room(prompt.embeds.shape[1], prompt.positions)

    def _check_border(self, noise: Tensor, size: tuple[int, int], left: int) -> None:
        """Raise ValueError unless the tower leaves enough tokens wherever the border that is cut off takes some."""
        encoder, views = self._encoder, len(noise)
        after_tower = sum(encoder._projected(noise, encoder.new_state(), [views]).known_lengths)
        (layout,) = layouts_of(encoder.config, self.sizes.side, [(views, size)])
        border = views * self.sizes.side**2 - int(layout.shows.sum())
        if left > after_tower - border:
            raise ValueError(
                f"image of {size[0]} x {size[1]} pixels: {self.settings.method} leaves {after_tower} tokens of its "
                f"tiles, and how many lie on the border that is cut off depends on the image; "
                "take a method that chooses after the projector, such as divprune"
            )


def _check_exact(settings: Settings, grid: tuple[int, int]) -> None:
    """Raise ValueError if what a part leaves of an image depends on what that shows."""
    tokens = grid[0] * grid[1]
    parts = _flat(settings.reducer)
    for part in (part for hook in COUNTED for part in parts if part.counts_at == hook):
        left = part.leaves(grid, tokens)
        if left is None:
            raise ValueError(
                f"method is {settings.method!r}: how many tokens {type(part).__name__} leaves depends on the image, an "
                "engine must know it before; give numbers (retain, merge_to) instead of thresholds"
            )
        grid, tokens = part.shrinks(grid), left


@contextmanager
def _on_the_host() -> Iterator[None]:
    """Tensors on the CPU in float32, wherever and in whatever an engine builds its model; its random numbers stay."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(before)
