"""Image features spliced into the text: what every LLaVA language model has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig

from llava.model.inputs import assign_images, distinct_stacks, image_stacks, split_at_images, text_ids
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.prompts import Prompt, Splicing, padded
from llava.model.stitched import TiledImages, check_sizes, has_newline, sizes_of, splice_stitched, stitches, tile_grids
from mustdrop.hooks import (
    ForwardState,
    Reducer,
    TraceRecorder,
    VisionStep,
    VisionTokens,
    active,
)


class LlavaMetaModel:
    """Mixin of the decoder: owns the vision tower and the projector."""

    def build_vision(self, config) -> None:
        """Create the vision tower and projector that `config` describes (`mm_vision_config`, a CLIP vision config)."""
        vision_config = getattr(config, "mm_vision_config", None)
        if vision_config is None:
            return
        if isinstance(vision_config, dict):
            vision_config = CLIPVisionConfig(**vision_config)
        vision_config._attn_implementation = config._attn_implementation
        self.vision_tower = CLIPVisionTower(
            vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature
        )
        self.mm_projector = build_vision_projector(config)
        if has_newline(config):
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) / config.hidden_size**0.5)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """The vision tower, None for a model without one."""
        return getattr(self, "vision_tower", None)


class HookKey:
    """What reducers know a model by: an object of its own, which a copy of the model does not share."""


class LlavaMetaForCausalLM:
    """Mixin of the causal model: encodes images, splices them into prompts, and finds the reducer.

    Attributes
    ----------
    hook_key : object
        What reducers that are on know this model by; a copy of the model has one of its own.
    """

    def init_hooks(self) -> None:
        """Let reducers be switched on."""
        self.hook_key = HookKey()

    @property
    def reducer(self) -> Reducer:
        """What is called at the hook points here and now; does nothing outside of `reducer.on(model)`."""
        return self.new_state().reducer

    @property
    def run(self) -> TraceRecorder | None:
        """Where traces are collected here and now."""
        return self.new_state().recorder

    def new_state(self) -> ForwardState:
        """A forward pass of the reducer that is on here and now; it keeps that one to its end."""
        found = active(self.hook_key)
        return ForwardState(Reducer()) if found is None else ForwardState(found.reducer, found.run)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def num_vision_layers(self) -> int:
        """Number of vision-encoder blocks, 0 without a vision tower."""
        tower = self.get_vision_tower()
        return 0 if tower is None else tower.config.num_hidden_layers

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """The vision tower, None for a model without one."""
        return self.get_model().get_vision_tower()

    def encode_images(
        self,
        images: Tensor,
        state: ForwardState | None = None,
        views: Sequence[int] | None = None,
        tiles: Sequence[tuple[int, int] | None] | None = None,
    ) -> Tensor | VisionTokens:
        """Projected features of preprocessed images `[images, 3, height, width]`.

        Returns the plain tensor `[images, tokens, width]` as in LLaVA, or the `VisionTokens` when a `state` is given;
        with `views`, how many neighbouring ones are the tiles or frames of one image, in one row for each image;
        `tiles` are rows and columns of tiles, where they are known.
        """
        asked = state
        state = state or self.new_state()

        def encode(images: Tensor, views: Sequence[int] | None) -> VisionTokens:
            tokens = self._projected(images, state, views)
            return tokens if views is None else tokens.joined(views)

        with state.timed("vision", images.device):
            apart = state.overrides("on_pixels") and views is not None and len(set(views)) > 1
            tokens = _apart(encode, images, views, state) if apart else encode(images, views)
            sizes = zip(tokens.known_grids, tokens.known_views, strict=True)
            state.view_patches = [rows * columns for (rows, columns), count in sizes for _ in range(count)]
            tokens = tokens if tiles is None else replace(tokens, tiles=tuple(tiles))
            tokens = state.choose("on_projected_features", VisionStep(tokens))
        return tokens if asked is not None else tokens.hidden

    def _projected(self, images: Tensor, state: ForwardState, views: Sequence[int] | None) -> VisionTokens:
        """What the vision tower leaves of `[images, 3, height, width]`, `views` each of one, in the decoder's width."""
        tower, projector = self.get_vision_tower(), getattr(self.get_model(), "mm_projector", None)
        if tower is None:
            raise ValueError("the prompt has images but the model has no vision tower (mm_vision_tower in config.json)")
        tokens = tower.encode(images, state, views)
        # A packed weight's dtype (uint8, int8) says nothing about what its layer computes in.
        types = (parameter.dtype for parameter in projector.parameters() if parameter.is_floating_point())
        return tokens.with_hidden(projector(tokens.hidden.to(next(types, tokens.hidden.dtype))))

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        padding_side: str = "right",
        image_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
    ) -> Prompt:
        """Replace every image token of a batch of prompts by the features of its image.

        Parameters
        ----------
        input_ids : int64 `[batch, length]`
            Text ids, `IMAGE_TOKEN_INDEX` (-200) where an image goes.
        attention_mask : `[batch, length]`, optional
            Zero for padding.
        labels : int64 `[batch, length]`, optional
            Training targets; image positions become `IGNORE_INDEX`. With labels, prompts longer than the
            configuration's `tokenizer_model_max_length` are cut, as in LLaVA's training.
        images : `[images, 3, height, width]`, or a list of images or of stacks of tiles `[tiles, 3, height, width]`
            In the order in which the prompts mention them. A text-only prompt of a mixed batch may bring a dummy. A
            tensor that stands in a list several times is encoded once: questions about one image share its encoding.
        padding_side : {"left", "right"}
            Where shorter prompts are padded.
        image_sizes : sequence of (width, height), optional
            Of every image in pixels, before it was cut into tiles; needed where these are stitched.

        Raises
        ------
        ValueError
            If the number of images does not fit the image tokens, or their sizes do not fit their tiles.
        """
        state = self.new_state()
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            found, right = list(attention_mask.shape), list(input_ids.shape)
            raise ValueError(f"attention_mask: has shape {found}, expected that of the ids, {right}")
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), keep.cpu(), strict=True)]
        chunks = [split_at_images(row) for row in rows]
        stacks = image_stacks(images)
        assigned = assign_images(len(stacks), [len(row) - 1 for row in chunks])
        distinct, which = distinct_stacks(stacks, [i for own in assigned for i in own])
        sizes = sizes_of(image_sizes, stacks)
        if distinct and stitches(self.config, images) and state.reducer.tile_order != "flat":
            shown = [(which[i], sizes[i]) for own in assigned for i in own]
            targets = None if labels is None else [row[mask] for row, mask in zip(labels, keep, strict=True)]
            return self._stitched(rows, chunks, targets, distinct, shown, state, padding_side)
        # In training a batch without images encodes one, so that all processes gather and reduce the same parameters.
        dummies = stacks[:1] if labels is not None and not distinct else []
        encoded, shown = None, distinct or dummies
        if shown:
            views, known = [len(stack) for stack in shown], {place: sizes[i] for i, place in which.items()}
            sized = [(count, known.get(place)) for place, count in enumerate(views)]
            if state.reducer.needs_tiles:
                check_sizes(self.config, sized)
            tiles = tile_grids(self.config, sized)
            encoded = self.encode_images(torch.cat(shown), state, views, tiles)
        embedding = self.get_input_embeddings()
        text = embedding(text_ids(chunks, embedding.num_embeddings).to(embedding.weight.device))
        if dummies:
            text = torch.cat([text, encoded.hidden[:0].flatten(0, 1).to(text)])
        places = [[which[i] for i in own] for own in assigned]
        first = [0, *accumulate(map(len, distinct))]
        state.views.extend([list(range(*first[place : place + 2])) for place in own] for own in places)
        if distinct and state.overrides("on_instruction"):
            encoded, places = self._ask(encoded, places, text, chunks, state)
        sequences = [Splicing(state.reducer.positions == "renumber") for _ in rows]
        used = 0
        for number, (sequence, own, row) in enumerate(zip(sequences, places, chunks, strict=True)):
            targets = None if labels is None else labels[number][keep[number]].to(text.device)
            start = 0
            for place, chunk in enumerate(row):
                if place:
                    sequence.add_image(encoded, own[place - 1], wants_labels=targets is not None)
                end = start + len(chunk)
                sequence.add_text(text[used : used + len(chunk)], None if targets is None else targets[start:end])
                used, start = used + len(chunk), end + 1
            state.images.append(sequence.images)
            state.text.append(sequence.text)
        limit = getattr(self.config, "tokenizer_model_max_length", None) if labels is not None else None
        return padded(sequences, padding_side, limit, state)

    def _stitched(self, rows, chunks, labels, distinct, shown, state: ForwardState, side: str) -> Prompt:
        """`splice` where tiles are stitched; `shown` are the stack and the size of each image of the prompts."""
        with state.timed("vision", distinct[0].device):
            encoded = self._projected(torch.cat(distinct), state, [len(stack) for stack in distinct])
        images = TiledImages.of(self.config, encoded, [len(stack) for stack in distinct], shown)
        embedding = self.get_input_embeddings()
        text = embedding(text_ids(chunks, embedding.num_embeddings).to(embedding.weight.device))
        newline = getattr(self.get_model(), "image_newline", None)
        limit = getattr(self.config, "tokenizer_model_max_length", None) if labels is not None else None
        spliced = splice_stitched(rows, text, labels, images, newline, state, side, limit)
        return Prompt(*spliced[:3], state, spliced[3])

    def _ask(
        self,
        encoded: VisionTokens,
        places: list[list[int]],
        text: Tensor,
        chunks: list[list[list[int]]],
        state: ForwardState,
    ) -> tuple[VisionTokens, list[list[int]]]:
        """What the reducer leaves of every prompt's images once it knows their text, and the rows of each prompt."""
        own = text.split([sum(map(len, row)) for row in chunks])
        after = [part[len(row[0]) :] for part, row in zip(own, chunks, strict=True)]
        after = [part for part, images in zip(after, places, strict=True) for _ in images]
        real = pad_sequence([torch.ones_like(part[:, 0], dtype=torch.bool) for part in after], batch_first=True)
        rows = encoded.rows([place for images in places for place in images])
        with state.timed("vision", text.device):
            step = VisionStep(rows, instruction=pad_sequence(after, batch_first=True), real=real)
            asked = state.choose("on_instruction", step)
        numbers = iter(range(len(real)))
        return asked, [[next(numbers) for _ in images] for images in places]

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """LLaVA's own name for `splice`, with LLaVA's signature and result.

        Returns
        -------
        tuple
            `(None, position_ids, attention_mask, past_key_values, inputs_embeds, labels)`; position ids, mask and
            labels are None where they were None. Padding rows are zero.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        side = getattr(self.config, "tokenizer_padding_side", "right")
        prompt = self.splice(input_ids, attention_mask, labels, images, side, image_sizes)
        tokens = prompt.tokens
        mask = None
        if attention_mask is not None:
            valid = torch.ones_like(tokens.image, dtype=torch.bool) if tokens.valid is None else tokens.valid
            mask = valid.to(attention_mask.dtype)
        position = None if position_ids is None else tokens.position
        return None, position, mask, past_key_values, prompt.embeds, prompt.labels


def _apart(
    encode: Callable[[Tensor, list[int]], VisionTokens], images: Tensor, views: Sequence[int], state: ForwardState
) -> VisionTokens:
    """Images of different numbers of views, of which a reducer may want different sizes: each number by itself."""
    for hook in ("inside_vision_block", "after_vision_block", "on_vision_features"):
        if state.overrides(hook):
            raise ValueError(
                f"images: got images of {sorted(set(views))} views in one batch, expected equal numbers where one "
                "reducer changes the images' sizes and another one works in the vision tower"
            )
    stacks, groups = images.split(list(views)), {}
    for number, count in enumerate(views):
        groups.setdefault(count, []).append(number)
    parts = [encode(torch.cat([stacks[i] for i in own]), [count] * len(own)) for count, own in groups.items()]
    numbers = [number for own in groups.values() for number in own]
    return VisionTokens.stacked(parts, sorted(range(len(numbers)), key=numbers.__getitem__))
