"""Prompts ready for the decoder: what stands at each position, stacked over a batch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX
from mustdrop.hooks import APART, ForwardState, ImageFacts, PromptFacts, Tokens, VisionTokens


@dataclass
class Prompt:
    """A batch of prompts ready for the decoder.

    `embeds` `[batch, length, width]`, the record of every position, `labels` `[batch, length]` or None, the forward
    pass they belong to, and the number of rotary positions that the longest prompt takes.
    """

    embeds: Tensor
    tokens: Tokens
    labels: Tensor | None
    state: ForwardState
    positions: int = 0

    def begin(self) -> ForwardState:
        """The forward pass; ValueError if it has been run: what the reducer noted in it belongs to that one."""
        if self.state.tokens_in:
            raise ValueError("prompt: it has been through the decoder already, splice the ids and images again")
        return self.state


def text_prompt(
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    state: ForwardState,
) -> Prompt:
    """Prompts given as embeddings `[batch, length, width]`: all text, padded where `attention_mask` is zero."""
    batch, length = embeds.shape[:2]
    column = torch.arange(length, device=embeds.device).repeat(batch, 1)
    valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    none, nothing = torch.full_like(column, -1), torch.zeros_like(column, dtype=torch.bool)
    position = column if position_ids is None else position_ids.expand(batch, -1)
    state.images.extend([] for _ in range(batch))
    state.views.extend([] for _ in range(batch))
    return Prompt(embeds, Tokens(position, column, none, none, nothing, nothing, valid), labels, state, length)


class Splicing:
    """One prompt under construction: the segments of every per-position tensor, and its images for the trace."""

    def __init__(self, renumber: bool):
        self.renumber = renumber
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self.images: list[tuple[int, Tensor]] = []
        self.facts: list[ImageFacts] = []
        self.position = self.vision_tokens = self.text = self.instruction_tokens = 0

    def add_text(self, embeds: Tensor, labels: Tensor | None) -> None:
        """Append text embeddings `[length, width]`."""
        count, device = len(embeds), embeds.device
        instruction = bool(self.images)
        self.text += count
        self.instruction_tokens += count * instruction
        self._add(
            embeds,
            labels,
            position=torch.arange(self.position, self.position + count, device=device),
            image=torch.full((count,), -1, device=device),
            vision_index=torch.full((count,), -1, device=device),
            row=torch.full((count,), -1, device=device),
            column=torch.full((count,), -1, device=device),
            protected=torch.zeros(count, dtype=torch.bool, device=device),
            instruction=torch.full((count,), instruction, device=device),
        )
        self.position += count

    def add_image(self, encoded: VisionTokens, row: int, wants_labels: bool) -> None:
        """Append the tokens of an encoded image, and in front of those of each view the tokens it comes with (CLS)."""
        count, views = encoded.known_lengths[row], encoded.known_views[row]
        patch_to_token, place = encoded.patch_to_token[row], encoded.patch_index[row, :count]
        (height, width) = encoded.known_grids[row]
        patches = height * width
        device, extras = place.device, 0 if encoded.extras is None else encoded.extras.shape[2]
        view = place // patches
        protected = torch.zeros_like(place, dtype=torch.bool)
        record = {
            "embeds": encoded.hidden[row, :count],
            "position": place + extras * (view + 1),
            "image": torch.full_like(place, len(self.images)),
            "vision_index": torch.arange(self.vision_tokens, self.vision_tokens + count, device=device),
            "row": place % patches // width + APART * view,
            "column": place % width,
            "protected": protected if encoded.protected is None else encoded.protected[row, :count],
        }
        if extras:
            before = torch.arange(views, device=device).repeat_interleave(extras)
            states = encoded.extras[row, :views].flatten(0, 1)
            order = torch.cat([2 * before, 2 * view + 1]).argsort(stable=True)
            position = torch.arange(extras, device=device).repeat(views) + before * (extras + patches)
            first = {"embeds": states, "position": position, "protected": torch.zeros_like(before, dtype=torch.bool)}
            none = torch.full_like(before, -1)
            record = {name: torch.cat([first.get(name, none), value])[order] for name, value in record.items()}
        total = count + extras * views
        if self.renumber:
            record["position"] = torch.arange(total, device=device)
        record["position"] = record["position"] + self.position
        ignored = torch.full((total,), IGNORE_INDEX, device=device) if wants_labels else None
        self._add(labels=ignored, instruction=torch.zeros(total, dtype=torch.bool, device=device), **record)
        keys = 0 if encoded.keys is None else encoded.keys[row]
        self.images.append((count, patch_to_token[: views * patches]))
        self.facts.append(ImageFacts(views * patches, count, count, keys))
        self.position += total if self.renumber else views * (extras + patches)
        self.vision_tokens += count
        self.text += extras * views

    def known(self) -> PromptFacts:
        """What the host knows of the prompt."""
        return PromptFacts(self.text, self.instruction_tokens, tuple(self.facts))

    def _add(self, embeds: Tensor, labels: Tensor | None, **record: Tensor) -> None:
        for name, value in {"embeds": embeds, "labels": labels, **record}.items():
            if value is not None:
                self.parts[name].append(value)


def padded(sequences: list[Splicing], side: str, limit: int | None, state: ForwardState) -> Prompt:
    """Stack prompts of different lengths."""
    fillers = {"labels": IGNORE_INDEX, "image": -1, "vision_index": -1, "row": -1, "column": -1}
    device = sequences[0].parts["embeds"][0].device
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for sequence in sequences:
        for name, parts in sequence.parts.items():
            columns[name].append(torch.cat([part.to(device) for part in parts])[:limit])
    lengths = [len(embeds) for embeds in columns["embeds"]]
    cut = limit is not None and max(sequence.known().length for sequence in sequences) > limit
    stacked = {
        name: pad_sequence(values, batch_first=True, padding_value=fillers.get(name, 0), padding_side=side)
        for name, values in columns.items()
    }
    embeds, labels = stacked.pop("embeds"), stacked.pop("labels", None)
    valid = None
    if min(lengths) < max(lengths):
        ones = [torch.ones(length, dtype=torch.bool, device=device) for length in lengths]
        valid = pad_sequence(ones, batch_first=True, padding_side=side)
    tokens = Tokens(
        **stacked,
        original_column=torch.arange(max(lengths), device=device).repeat(len(lengths), 1),
        valid=valid,
        images=max(len(sequence.images) for sequence in sequences),
        instruction_tokens=max(sequence.instruction_tokens for sequence in sequences),
        prompts=None if cut else tuple(sequence.known() for sequence in sequences),
    )
    positions = max(sequence.position for sequence in sequences)
    return Prompt(embeds, tokens, labels, state, positions if limit is None else min(positions, limit))
