"""The door of the decoder: what a stock model has spliced comes in, what was dropped stays outside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.hosted.base import TowerRun
from llava.model.hosted.layout import Layout
from llava.model.hosted.places import Places
from llava.model.hosted.tokens import untouched
from mustdrop.hooks import ForwardState, ImageFacts, PromptFacts, Tokens, VisionStep, VisionTokens, compact, gather


@dataclass
class Arrival:
    """What is known of a batch of prompts when its embeddings reach the decoder.

    Attributes
    ----------
    state : ForwardState
        The forward pass.
    ids : int64 `[prompts, length]` or None
        Of the prompts; None for the caller's own embeddings, which are text.
    placeholders : dict
        The id of an image's placeholder, and of a video's.
    layouts : list of (str, Layout)
        Every image and video, in the order in which the towers were given them.
    towers : list of TowerRun
        What the towers did; empty where they ran as stock.
    """

    state: ForwardState
    ids: Tensor | None
    placeholders: dict[str, int]
    layouts: list[tuple[str, Layout]]
    towers: list[TowerRun]


def enter(arrival: Arrival, embeds: Tensor, mask: Tensor | None, position: Tensor | None) -> tuple[Tensor, Tokens]:
    """What enters the decoder: embeddings and their record.

    Parameters
    ----------
    arrival : Arrival
        What is known of the prompts.
    embeds : `[rows, length, width]`
        Embeddings as the stock model has spliced them; a prompt's copies for beams lie side by side.
    mask : `[rows, length]`, optional
        Zero for padding.
    position : int64 `[..., rows or 1, length]`, optional
        Rotary positions, with a leading axis where a model counts along several.
    """
    rows, length = embeds.shape[:2]
    if arrival.ids is None and arrival.layouts:
        raise ValueError("inputs_embeds: give input_ids with images, their placeholders say where the images stand")
    prompts = rows if arrival.ids is None else len(arrival.ids)
    copies = rows // prompts
    embeds = embeds[::copies]
    ids = torch.full((rows, length), -1) if arrival.ids is None else arrival.ids.cpu()
    valid = None if mask is None else mask[::copies].cpu().bool()
    valid = None if valid is None or bool(valid.all()) else valid
    places = Places.of(ids, valid, arrival.layouts, arrival.placeholders)
    if position is None:
        position = torch.arange(length, device=embeds.device)[None]
    position = position.expand(*position.shape[:-2], rows, -1)[..., ::copies, :]
    tokens = _record(places, position, valid)
    state = arrival.state
    state.text.extend(fact.text for fact in tokens.prompts)
    if not places.counts:
        state.images.extend([] for _ in range(prompts))
        state.views.extend([] for _ in range(prompts))
    else:
        embeds, tokens = _images(arrival, places, embeds, tokens)
    if state.reducer.positions == "renumber":
        tokens = tokens.renumbered()
    return (embeds, tokens) if copies == 1 else (embeds.repeat_interleave(copies, 0), tokens.repeated(rows))


def _record(places: Places, position: Tensor, valid: Tensor | None) -> Tokens:
    """The record of all positions, on the embeddings' device."""
    device = position.device
    vision = places.image >= 0
    table = torch.stack([places.image, torch.where(vision, vision.cumsum(-1) - 1, -1), places.row, places.column]).to(
        device, non_blocking=True
    )
    image, vision_index, row, column = table
    facts = _facts(places, places.counts, places.counts, None, (~vision & places.valid).sum(-1).tolist())
    return Tokens(
        position=position,
        original_column=torch.arange(position.shape[-1], device=device).repeat(position.shape[-2], 1),
        image=image,
        vision_index=vision_index,
        protected=torch.zeros_like(image, dtype=torch.bool),
        instruction=places.instruction.to(device, non_blocking=True),
        valid=None if valid is None else valid.to(device, non_blocking=True),
        images=places.images,
        instruction_tokens=max(fact.instruction_tokens for fact in facts),
        row=row,
        column=column,
        prompts=facts,
    )


def _facts(places: Places, patches, tokens, keys, text: list[int]) -> tuple[PromptFacts, ...]:
    """What the host knows of every prompt; `patches`, `tokens` and `keys` are numbers of each image."""
    instruction = places.instruction.sum(-1).tolist()

    def facts(image: int) -> ImageFacts:
        return ImageFacts(patches[image], tokens[image], tokens[image], 0 if keys is None else keys[image])

    return tuple(
        PromptFacts(text[number], instruction[number], tuple(map(facts, images)))
        for number, images in enumerate(places.prompts)
    )


def _images(arrival: Arrival, places: Places, embeds: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
    """Prompts without what was dropped: by the towers, after the projector, and by what the prompts ask."""
    state = arrival.state
    hooks = [hook for hook in ("on_projected_features", "on_instruction") if state.overrides(hook)]
    columns = places.columns.to(embeds.device, non_blocking=True)
    shown = _shown(places, columns, embeds, bool(hooks))
    left = _after_towers(shown, places, [run.tokens for run in arrival.towers])
    with state.timed("vision", embeds.device):
        for hook in hooks:
            left = state.choose(hook, _step(hook, left, places, embeds))
    _note_views(state, places, arrival)
    lengths = left.known_lengths
    state.images.extend(
        [(lengths[image], left.patch_to_token[image, : places.counts[image]]) for image in images]
        for images in places.prompts
    )
    same = left.patch_to_token is shown.patch_to_token and left.hidden is shown.hidden
    if same and left.protected is None:
        return embeds, tokens
    return _compacted(places, columns, left, embeds, tokens, hooks)


def _note_views(state: ForwardState, places: Places, arrival: Arrival) -> None:
    """Say which rows of the towers' output show an image, and number what they did by slots."""
    towers, layouts, ends = arrival.towers, arrival.layouts, [0, *accumulate(places.views)]
    state.views.extend([list(range(*ends[image : image + 2])) for image in images] for images in places.prompts)
    state.view_patches = [layout.slot.shape[1] for _, layout in layouts for _ in range(layout.views)]
    by_view = places.plain and places.even
    present = [run.start for run in towers]
    for block in sorted({block for run in towers for block in run.maps}):
        present = [run.maps.get(block, before) for run, before in zip(towers, present, strict=True)]
        stands = torch.cat([_widened(stands, places) for stands in present])
        state.vision[block] = stands if by_view else _by_slot(stands, places, ends)
        if not by_view:
            state.encoded[block] = stands


def _widened(of_patches: Tensor, places: Places) -> Tensor:
    """Something of the patches of views `[views, patches]`, with -1 up to the number of the largest view."""
    return F.pad(of_patches, (0, places.slot.shape[1] - of_patches.shape[1]), value=-1)


def _by_slot(stands: Tensor, places: Places, ends: list[int]) -> Tensor:
    """A `patch_to_token` map of views as one of images, in the row of each one's first view; -1 in all others."""
    (views, patches), device = stands.shape, stands.device
    number = torch.arange(views, device=device)[:, None]
    apart = torch.where(stands < 0, stands, stands + number * patches).flatten()  # tokens of several views
    slots = torch.where(places.columns < places.shape[0] * places.shape[1], places.middle, -1).to(device)
    own = torch.where(slots < 0, slots, apart[slots.clamp(min=0)])
    by_slot = stands.new_full((views, own.shape[1]), -1)
    return by_slot.index_copy(0, torch.tensor(ends[:-1], device=device), own)


def _shown(places: Places, columns: Tensor, embeds: Tensor, states: bool) -> VisionTokens:
    """All that the prompts show: one row per image, a token for every slot, with their states if they are wanted."""
    flat = embeds.flatten(0, 1)
    most = columns.shape[1]
    hidden = flat[columns.clamp(max=len(flat) - 1)] if states else flat.new_empty(*columns.shape, 0)
    slot = torch.arange(most, device=columns.device).expand_as(columns)
    full = min(places.counts) == most
    valid = None if full else columns < len(flat)
    return VisionTokens(
        hidden=hidden,
        patch_index=slot,
        patch_to_token=slot if full else slot.masked_fill(~valid, -1),
        grid=(1, most),
        prefix=0,
        valid=valid,
        lengths=places.counts,
        views=places.frames,
        shown=places.counts,
    )


def _after_towers(shown: VisionTokens, places: Places, towers: list[VisionTokens]) -> VisionTokens:
    """The same without what the towers dropped, in slots: a token takes the one that shows the patch it sits on."""
    idle = all(map(untouched, towers)) and all(tower.protected is None for tower in towers)
    if idle and not any(tower.notes for tower in towers):
        return shown
    images, most = shown.patch_index.shape
    device = shown.patch_index.device
    slot, image = places.slot.to(device), places.image_of_view.to(device)
    first, marks, stands, notes = 0, [], [], []
    for tower in towers:  # one for images, one for videos
        rows = slice(first, first + len(tower.patch_index))
        first = rows.stop
        own = slot[rows].gather(1, tower.patch_index)
        own = own if tower.valid is None else own.masked_fill(~tower.valid, -1)
        to = torch.where(own < 0, images * most, image[rows, None] * most + own)
        notes.append((to, tower.notes or {}))
        marks.append((to, torch.zeros_like(to, dtype=torch.bool) if tower.protected is None else tower.protected))
        stand = own.gather(1, tower.patch_to_token.clamp(min=0)).masked_fill(tower.patch_to_token < 0, -1)
        stands.append(_widened(stand, places))
    shown = replace(shown, notes=_in_slots(notes, images, most))
    if idle:
        return shown
    alive, keys = torch.zeros(2, images * most + 1, dtype=torch.bool, device=device)
    for to, protected in marks:
        alive.scatter_(0, to.flatten(), True)
        keys.scatter_(0, torch.where(protected, to, images * most).flatten(), True)
    alive, keys = alive[:-1].view(images, most), keys[:-1].view(images, most)
    stand = torch.cat([of.flatten() for of in stands])[places.middle.to(device)]
    stand = torch.where(alive | (stand < 0), shown.patch_index, stand)
    left = shown
    if not all(map(untouched, towers)):
        # Where every patch has a slot of its own the host knows how many tokens are left, and nothing is read.
        lengths = places.of_images(_known(towers)) if places.plain else alive.sum(-1).tolist()
        left = shown.select(alive, lengths, stand, order=_order(towers, places, alive))
        keys = keys.gather(1, left.patch_index)
        keys = keys if left.valid is None else keys & left.valid
    if all(tower.protected is None for tower in towers):
        return left
    told = places.plain and all(tower.protected is None or tower.keys is not None for tower in towers)
    numbers = [tower.keys or (0,) * len(tower.patch_index) for tower in towers]
    known = places.of_images([number for own in numbers for number in own]) if told else keys.sum(-1).tolist()
    return left.with_protected(keys, known)


def _in_slots(notes: list[tuple[Tensor, dict[str, Tensor]]], images: int, most: int) -> dict[str, Tensor] | None:
    """What was noted of the tokens of towers, by slot `[images, most]`: the mean of those that a slot shows."""
    by_slot = {}
    for to, noted in notes:
        for name, values in noted.items():
            total = by_slot.get(name, values.new_zeros(images * most + 1))
            by_slot[name] = total.scatter_reduce(0, to.flatten(), values.flatten(), "mean", include_self=False)
    return {name: values[:-1].view(images, most) for name, values in by_slot.items()} or None


def _known(towers: list[VisionTokens]) -> list[int]:
    """How many tokens are left of every view."""
    return [length for tower in towers for length in tower.known_lengths]


def _order(towers: list[VisionTokens], places: Places, alive: Tensor) -> Tensor | None:
    """Sort key of the slots: their tokens' order, where an image is one view in one piece; else as they are shown."""
    if not places.raster or sum(len(tower.patch_index) for tower in towers) != len(alive):
        return None
    keys = []
    for tower in towers:
        place = tower.patch_index
        place = place if tower.valid is None else place.masked_fill(~tower.valid, alive.shape[1])
        column = torch.arange(place.shape[1], device=place.device).expand_as(place)
        key = place.new_zeros(len(place), alive.shape[1] + 1).scatter(1, place, column)
        keys.append(key[:, :-1])
    return torch.cat(keys)


def _step(hook: str, left: VisionTokens, places: Places, embeds: Tensor) -> VisionStep:
    """What a reducer sees of the projected tokens, before or after it knows the text."""
    if hook == "on_projected_features":
        return VisionStep(left)
    columns, real = compact(places.instruction, pad="right", length=places.instruction.sum(-1).tolist())
    prompt = torch.zeros(len(places.counts), dtype=torch.long)
    for number, images in enumerate(places.prompts):
        prompt[images] = number
    real = torch.ones_like(columns, dtype=torch.bool) if real is None else real
    prompt, columns, real = (part.to(embeds.device) for part in (prompt, columns, real))
    return VisionStep(left, instruction=gather(embeds, columns)[prompt], real=real[prompt])


def _compacted(
    places: Places, columns: Tensor, left: VisionTokens, embeds: Tensor, tokens: Tokens, hooks: list[str]
) -> tuple[Tensor, Tokens]:
    """Prompts in which only what is left of their images stands."""
    end, device = embeds.shape[0] * embeds.shape[1], embeds.device
    at = columns.gather(1, left.patch_index)
    at = at if left.valid is None else at.masked_fill(~left.valid, end)
    if hooks:
        embeds = F.pad(embeds.flatten(0, 1), (0, 0, 0, 1)).index_copy(0, at.flatten(), left.hidden.flatten(0, 1))
        embeds = embeds[:end].view(*places.shape, -1)

    def everywhere(values: Tensor | bool, fill: Tensor) -> Tensor:
        return F.pad(fill.flatten(), (0, 1)).index_put((at,), torch.as_tensor(values, device=device))[:end]

    none = torch.zeros(end, dtype=torch.bool, device=device)
    alive = everywhere(True, none).view(places.shape)
    protected = none if left.protected is None else everywhere(left.protected, none)
    tokens = replace(tokens, protected=protected.view(places.shape) & alive)
    text, extras = tokens.image < 0, bool((places.extra >= 0).any())
    if extras:
        text = text & _extras_left(places, alive)
    numbers = [fact.text for fact in tokens.prompts]
    if extras:
        numbers = (text if tokens.valid is None else text & tokens.valid).sum(-1).tolist()
    order = None
    if places.raster:  # tokens in their own order, at the places of the image's first ones
        column = torch.arange(end, device=device)
        order = everywhere(columns[:, :1] + torch.arange(at.shape[1], device=device), column).view(places.shape)
    facts = _facts(places, places.counts, left.known_lengths, left.keys, numbers)
    indices, tokens = tokens.select(text | alive, order=order, prompts=facts)
    vision = tokens.vision
    tokens = replace(tokens, vision_index=torch.where(vision, vision.cumsum(-1) - 1, -1))
    return gather(embeds, indices), tokens


def _extras_left(places: Places, alive: Tensor) -> Tensor:
    """False for extras of whose group no patch is left, bool `[prompts, length]`."""
    group, extra = places.group.to(alive.device), (places.extra >= 0).to(alive.device)
    used = torch.zeros(int(places.group.max()) + 2, dtype=torch.bool, device=alive.device)
    used = used.index_put((torch.where(alive, group, -1).flatten(),), torch.tensor(True, device=alive.device))
    return ~extra | used[group]
