"""Multiply-adds of every part of a prompt, from shapes and token counts alone.

Only matrix products count, as in torch's own counter, and attention is counted over all pairs of positions (`n^2`)
unless `causal` is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise, zip_longest

import torch

from mustdrop.compute_plan import LEAST_ROWS, LayerPlan
from mustdrop.neighbours import SplitRows, causal_blocks
from mustdrop.shape import ImageShape, ModelShape
from mustdrop.tokens import Tokens


@dataclass(frozen=True)
class PlannedLayer:
    """A decoder layer that computes less for vision tokens: its plan, and pairs of vision rows and keys in a head."""

    plan: LayerPlan
    pairs: int


@dataclass(frozen=True)
class Workload:
    """What one prompt makes a model compute; `Workload.of` fills in and checks.

    Attributes
    ----------
    vision_tokens : tuple of int
        Vision tokens entering each decoder layer (`Trace.vision_tokens`).
    text_tokens : int
        Text tokens before and after the images, and CLS where it comes with them.
    image_tokens : tuple of int
        Per image: patch tokens that enter the decoder, fewer than the patches if some were merged or dropped before.
    cache_lengths : tuple of int
        Vision and text tokens each layer has cached when prefill ends (`Trace.cache_lengths`).
    filter_layers : tuple of int
        Decoder layers after which the text tokens score the vision tokens.
    new_tokens : int
        Generated tokens; the first one comes out of prefill, each other one is a decode step.
    images : tuple of ImageShape
        Per image: what it is before anything is dropped.
    tower_tokens : tuple of tuple of int
        Per view of each image: patch tokens entering each vision block that is run, and those leaving the last one.
    before_mlp : bool
        Whether they change between a vision block's attention and its MLP instead of after both.
    plans : tuple of PlannedLayer or None
        Per decoder layer: what it computes for vision tokens, None for everything.
    full_text_tokens : int
        `text_tokens` with the newlines of rows of which nothing is left.
    selector_macs : int or None
        Multiply-adds of the method itself, None where they are not known.
    mlp_lengths : tuple of int
        Vision and text tokens that go through each decoder layer's output projection and MLP
        (`Trace.mlp_lengths`); empty: all of them, as papers count.
    """

    vision_tokens: tuple[int, ...]
    text_tokens: int
    image_tokens: tuple[int, ...]
    cache_lengths: tuple[int, ...]
    filter_layers: tuple[int, ...]
    new_tokens: int
    tower_tokens: tuple[tuple[int, ...], ...]
    before_mlp: bool
    plans: tuple[PlannedLayer | None, ...]
    images: tuple[ImageShape, ...]
    full_text_tokens: int
    selector_macs: int | None = None
    mlp_lengths: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        vision_tokens: int | float | Sequence[int] | None = None,
        *,
        text_tokens: int = 60,
        image_tokens: Sequence[int] | None = None,
        cache_lengths: Sequence[int] | None = None,
        filter_layers: Sequence[int] | None = None,
        new_tokens: int = 1,
        tower_tokens: Sequence[Mapping[int, int]] | None = None,
        before_mlp: bool = False,
        plans: Mapping[int, LayerPlan | Mapping] | None = None,
        images: Sequence[ImageShape] | None = None,
        full_text_tokens: int | None = None,
    ) -> Workload:
        """A prompt, by default of one image of which nothing is dropped.

        `images` says what they are before that, by default `shape.image()`; their newlines are part of `text_tokens`.

        `vision_tokens` may also be one number for all layers, or a fraction below 1 of all vision tokens. The filter
        layers are by default those after which tokens disappear, and the cache holds what prefill saw. `tower_tokens`
        says per view how many patch tokens are left after which vision block (-1: before the first, of a smaller
        image); by default `image_tokens` after block 0, shared evenly by the views.
        `plans` are the layers that compute less for vision tokens: `Trace.plans`, or a `LayerPlan` for each; the pairs
        of the latter are estimated as if all text came before the images, and tokens lay evenly on the grid. A layer
        that is skipped has no vision tokens. What choosing costs is taken to be what MustDrop's costs, and a layer's
        second half to be left out as MustDrop allows: for tokens that a filter drops, and in the last layer for all
        but the last positions.

        Raises
        ------
        ValueError
            If a number cannot be; it is named.
        """
        images = list(images or [shape.image()] * len(image_tokens or [1]))
        image_tokens = image_tokens or [image.tokens for image in images]
        spliced = sum(image_tokens)
        if vision_tokens is None:
            vision_tokens = spliced
        if not isinstance(vision_tokens, Sequence):
            full = sum(image.tokens for image in images)
            vision_tokens = [round(vision_tokens * full) if 0 < vision_tokens < 1 else vision_tokens] * shape.layers
        views, vision_tokens = sum(image.views for image in images), list(vision_tokens)
        planned = {
            int(layer): _planned(shape, plan, views, vision_tokens[int(layer)], text_tokens)
            for layer, plan in (plans or {}).items()
        }
        for layer, plan in planned.items():
            vision_tokens[layer] = 0 if plan.plan.skip else vision_tokens[layer]
        if filter_layers is None:
            drops = [layer for layer, (now, then) in enumerate(pairwise(vision_tokens)) if now != then]
            filter_layers = [layer for layer in drops if layer + 1 not in planned or not planned[layer + 1].plan.skip]
        check("text_tokens", [text_tokens])
        check("new_tokens", [new_tokens], least=1)
        check("image_tokens", image_tokens, most=max(image.tokens for image in images))
        check("vision_tokens", vision_tokens, count=shape.layers, most=spliced)
        check("filter_layers", filter_layers, most=shape.layers - 1)
        cache_lengths = cache_lengths or [tokens + text_tokens for tokens in vision_tokens]
        check("cache_lengths", cache_lengths, count=shape.layers)
        if tower_tokens is None:
            shares = [(image.views, tokens / image.tokens) for image, tokens in zip(images, image_tokens, strict=True)]
            tower_tokens = [{0: round(shape.view_tokens * share)} for count, share in shares for _ in range(count)]
        check("tower_tokens", [count for left in tower_tokens for count in left.values()], most=shape.view_tokens)
        sequences = (tuple(values) for values in (image_tokens, cache_lengths, filter_layers))
        tower = tuple(_through_tower(shape, left) for left in tower_tokens)
        layerwise = tuple(planned.get(layer) for layer in range(shape.layers))
        full_text = text_tokens if full_text_tokens is None else full_text_tokens
        facts = tower, before_mlp, layerwise, tuple(images), full_text
        work = cls(tuple(vision_tokens), text_tokens, *sequences, new_tokens, *facts)
        return replace(work, selector_macs=mustdrop_selector_macs(shape, work), mlp_lengths=_finished(work))

    @classmethod
    def of_trace(cls, shape: ModelShape, trace: Mapping) -> Workload:
        """The prompt that a trace (`Trace.to_dict`) tells of, up to the first new token.

        What choosing cost is what the trace says; it is not known if the trace did not count. Traces that do not say
        what was left out of layers are of whole ones.
        """
        # Traces of before tiles had one view an image, whose blocks were the tower's own.
        alone = [[[-1, image["patches"]], *image["blocks"]] for image in trace["images"]]
        tower = trace.get("tower", alone)
        first = accumulate((image.get("views", 1) for image in trace["images"]), initial=0)
        firsts = [tower[number] for number, _ in zip(first, trace["images"], strict=False)]
        work = cls.of(
            shape,
            trace["vision_tokens"],
            text_tokens=trace["text_tokens"],
            image_tokens=[image["tokens"] for image in trace["images"]],
            tower_tokens=[dict(view) for view in tower],
            before_mlp=trace["before_mlp"],
            plans=trace["plans"],
            cache_lengths=trace["cache_lengths"],
            images=[_whole(shape, image, view) for image, view in zip(trace["images"], firsts, strict=True)],
            full_text_tokens=trace.get("full_text_tokens"),
        )
        return replace(work, selector_macs=trace.get("selector_macs"), mlp_lengths=tuple(trace.get("mlp_lengths", ())))

    @property
    def in_whole_layers(self) -> Workload:
        """The same with nothing left out of any decoder layer, as papers count."""
        return replace(self, mlp_lengths=())

    @property
    def vision_tokens_after(self) -> list[int]:
        """Vision tokens leaving each decoder layer (`Trace.vision_tokens_after`); all, if the next one is skipped."""
        layers = pairwise(zip(self.vision_tokens, self.plans, strict=True))
        after = [now if plan and plan.plan.skip else then for (now, _), (then, plan) in layers]
        return [*after, self.vision_tokens[-1]]

    def unreduced(self, shape: ModelShape, tokens: int | None = None) -> Workload:
        """The same prompt with nothing merged or filtered: all vision tokens, or `tokens`, in every layer."""
        facts = {"text_tokens": self.full_text_tokens, "new_tokens": self.new_tokens, "images": self.images}
        return Workload.of(shape, tokens, **facts)


def _whole(shape: ModelShape, image: Mapping, view: Sequence[Sequence[int]]) -> ImageShape:
    """An image of a trace as it was before it was made smaller; `view` is the record of its first view in the tower."""
    return ImageShape(image.get("views", 1), round(image["patches"] * shape.view_tokens / view[0][1]))


def _planned(
    shape: ModelShape, plan: LayerPlan | Mapping, images: int, vision_tokens: int, text_tokens: int
) -> PlannedLayer:
    """A layer's plan as a trace writes it, or a plan alone with its pairs estimated."""
    if isinstance(plan, Mapping):
        heads = tuple(plan["heads"]) if isinstance(plan["heads"], Sequence) else plan["heads"]
        settings = {key: value for key, value in plan.items() if key != "pairs"} | {"heads": heads}
        return PlannedLayer(LayerPlan(**settings), plan["pairs"])
    keys: float = vision_tokens
    if plan.window is not None:
        whole = shape.view_tokens * images
        keys = _grid_pairs(*shape.token_grid, images, plan.window) / whole * min(1, vision_tokens / whole)
    return PlannedLayer(plan, round(vision_tokens * (keys + text_tokens)))


@cache
def _grid_pairs(rows: int, columns: int, images: int, window: int) -> int:
    """Pairs that the blocks of whole images hold."""
    number = torch.arange(images * rows * columns)[None]
    image, patch = number // (rows * columns), number % (rows * columns)
    none = torch.zeros_like(image, dtype=torch.bool)
    tokens = Tokens(number, number, image, number, none, none, row=patch // columns, column=patch % columns)
    return SplitRows.of(tokens, window).pairs()


def _finished(work: Workload) -> tuple[int, ...]:
    """Positions that go through the second half of each decoder layer, where filters choose by attention."""
    after = [
        then if layer in work.filter_layers and plan is None else now
        for layer, (now, then, plan) in enumerate(
            zip(work.vision_tokens, work.vision_tokens_after, work.plans, strict=True)
        )
    ]
    lengths = [tokens + work.text_tokens for tokens in after]
    if work.plans[-1] is None:
        lengths[-1] = min(lengths[-1], LEAST_ROWS)
    return tuple(lengths)


def _through_tower(shape: ModelShape, left: Mapping[int, int]) -> tuple[int, ...]:
    """Patch tokens entering each vision block and leaving the last, from those left after some blocks (-1: before)."""
    counts = [left.get(-1, shape.view_tokens)]
    for block in range(shape.vision_layers):
        counts.append(left.get(block, counts[-1]))
    return tuple(counts)


def check(
    field: str, values: Sequence[int], *, count: int | None = None, least: int = 0, most: float = math.inf
) -> None:
    if count is not None and len(values) != count:
        raise ValueError(f"{field}: {len(values)} numbers must be {count}, one per decoder layer")
    for value in values:
        if not isinstance(value, int) or not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{field}: {value} must be a whole number {limits}")


def vision_macs(shape: ModelShape, tokens: Sequence[int], mlp_tokens: Sequence[int] | None = None) -> int:
    """Patch embedding and blocks of the tower for one image.

    `tokens` are those entering each block that is run, `mlp_tokens` those entering its MLP if these are not the same,
    `merge^2` patches each; CLS is added here.
    """
    d, patch, cls = shape.vision_hidden, shape.merge**2, shape.vision_cls
    embedding = tokens[0] * patch * 3 * shape.frames * shape.patch_size**2 * d
    attention = sum(
        (n * patch + cls) * d * 4 * d + 2 * tower_pairs(shape, block, n) * d for block, n in enumerate(tokens)
    )
    mlp = sum((n * patch + cls) * d * shape.vision_products * shape.vision_mlp for n in mlp_tokens or tokens)
    return embedding + attention + mlp


def tower_pairs(shape: ModelShape, block: int, tokens: int) -> int:
    """Pairs of rows and keys in a head of a vision block; dropped tokens are taken to come evenly from all windows."""
    if not shape.vision_window or block in shape.vision_full_blocks:
        return (tokens * shape.merge**2 + shape.vision_cls) ** 2
    high, wide = (_cut(side, shape.vision_window) for side in shape.token_grid)
    whole = sum((a * b * shape.merge**2) ** 2 for a in high for b in wide)
    return round(whole * (tokens / shape.view_tokens) ** 2)


def _cut(side: int, window: int) -> list[int]:
    """A side in windows, the last of which may be smaller."""
    return [min(window, side - start) for start in range(0, side, window)]


def projector_macs(shape: ModelShape, tokens: int) -> int:
    """The projector on `tokens` features, and the mergers that feed decoder layers."""
    return tokens * (1 + shape.deepstack) * sum(width * after for width, after in pairwise(shape.projector_widths))


def layer_macs(shape: ModelShape, rows: int, keys: int, causal: bool = False) -> int:
    """One decoder layer on `rows` tokens that attend to `keys` tokens, the rows being the last of them.

    Projections (grouped-query attention has `kv_heads` keys and values), scores and values, and a SwiGLU MLP. With
    `causal`, only the pairs that the causal mask leaves are counted, else all of them.
    """
    inner = shape.heads * shape.head_dim
    projections = 2 * shape.hidden * (inner + shape.kv_heads * shape.head_dim)
    pairs = rows * keys - (rows * (rows - 1) // 2 if causal else 0)
    return rows * (projections + 3 * shape.hidden * shape.mlp) + 2 * pairs * inner


def planned_layer_macs(shape: ModelShape, vision_tokens: int, text_tokens: int, layer: PlannedLayer) -> int:
    """One decoder layer of a prefill that computes less for vision tokens.

    Vision rows have the queries and outputs of active heads, the values that these need, all keys (the softmax of text
    rows counts them), and part of the MLP; text rows have everything, against all positions. Where inactive heads
    ignore vision keys alone, vision rows have the queries and outputs of all heads.
    """
    plan, length = layer.plan, vision_tokens + text_tokens
    active, keys_alone = plan.active_heads(shape.heads), plan.head_scope == "keys"
    valued = len({head * shape.kv_heads // shape.heads for head in active})
    with_rows = shape.heads if keys_alone else len(active)
    vision = shape.head_dim * (2 * with_rows + shape.kv_heads + valued) + 3 * plan.neurons(shape.mlp)
    if keys_alone and plan.window is None:  # all rows in blocks, which multiply values of text alone
        seen = sum((stop - start) * stop for start, stop in causal_blocks(length)) - length * text_tokens
        pairs = 2 * len(active) * layer.pairs + (shape.heads - len(active)) * seen
    else:
        pairs = 2 * with_rows * layer.pairs
    attention = shape.head_dim * pairs
    return layer_macs(shape, text_tokens, length) + vision_tokens * shape.hidden * vision + attention


def prefill_macs(
    shape: ModelShape,
    vision_tokens: Sequence[int],
    text_tokens: int,
    causal: bool = False,
    plans: Sequence[PlannedLayer | None] = (),
    mlp_lengths: Sequence[int] = (),
) -> int:
    """All decoder layers, each on its vision tokens and the text, and the vocabulary for the last token only.

    `causal` is for layers without a plan: what a planned one computes is in its plan. `mlp_lengths` are the positions
    that go through each layer's output projection and MLP, by default all.
    """
    total, second_half = shape.hidden * shape.vocab, shape.hidden * (shape.heads * shape.head_dim + 3 * shape.mlp)
    for tokens, plan, finished in zip_longest(vision_tokens, plans, mlp_lengths):
        length = tokens + text_tokens
        full = plan is None or not tokens
        total += (
            layer_macs(shape, length, length, causal) if full else planned_layer_macs(shape, tokens, text_tokens, plan)
        )
        total -= 0 if finished is None else (length - finished) * second_half
    return total


def decode_step_macs(shape: ModelShape, cache_lengths: Sequence[int]) -> int:
    """One new token against the tokens each layer has cached, and itself."""
    return sum(layer_macs(shape, 1, length + 1) for length in cache_lengths) + shape.hidden * shape.vocab


def decode_macs(shape: ModelShape, cache_lengths: Sequence[int], steps: int) -> int:
    """So many decode steps, every cache growing by one token each."""
    return sum(decode_step_macs(shape, [length + step for length in cache_lengths]) for step in range(steps))


def key_probe_macs(shape: ModelShape, tokens: int) -> int:
    """Attention of the CLS row in the first block that is not run: all keys, one query, one row of scores.

    Without CLS every patch asks, in the last block that is run.
    """
    d, keys = shape.vision_hidden, tokens * shape.merge**2 + shape.vision_cls
    rows = 1 if shape.vision_cls else keys
    return (keys + rows) * d**2 + rows * keys * d


def filter_macs(shape: ModelShape, rows: int, keys: int) -> int:
    """Attention on demand in one decoder layer: the queries of some rows anew, their scores with all cached keys."""
    return rows * shape.heads * shape.head_dim * (shape.hidden + keys)


def mustdrop_selector_macs(shape: ModelShape, work: Workload) -> int:
    """MustDrop's choosing: if there are filter layers, the key tokens' probe and attention on demand of the text.

    Of all text, an upper bound: only what follows the first image asks. Window similarities need no matrix product, and
    several images are not padded to the longest.
    """
    if not work.filter_layers:
        return 0
    probes = sum(key_probe_macs(shape, tokens[-1]) for tokens in work.tower_tokens)
    keys = (work.vision_tokens[layer] + work.text_tokens for layer in work.filter_layers)
    return probes + sum(filter_macs(shape, work.text_tokens, length) for length in keys)


def costs(shape: ModelShape, work: Workload) -> dict[str, int | None]:
    """Multiply-adds of every part of one prompt; None for the selector where its cost is not known.

    What is computed: where `work` leaves something out of decoder layers, so does `prefill`.
    """
    leaving = sum(tokens[-1] for tokens in work.tower_tokens)
    features = max(leaving, sum(work.image_tokens)) + shape.feature_cls * len(work.tower_tokens)
    return {
        "vision_tower": sum(
            vision_macs(shape, tokens[:-1], tokens[1:] if work.before_mlp else None) for tokens in work.tower_tokens
        ),
        "projector": projector_macs(shape, features),
        "selector": work.selector_macs,
        "prefill": prefill_macs(
            shape, work.vision_tokens, work.text_tokens, plans=work.plans, mlp_lengths=work.mlp_lengths
        ),
        "decode": decode_macs(shape, work.cache_lengths, work.new_tokens - 1),
    }


def cache_bytes(shape: ModelShape, cache_lengths: Sequence[int]) -> int:
    """Bytes of the keys and values of one prompt, `cache_lengths` tokens in each layer."""
    return shape.cache_bytes_per_token // shape.layers * sum(cache_lengths)


def mean_tokens(entering: Sequence[int]) -> float:
    """Vision tokens per layer, every layer counted with the tokens it computes on.

    For MustDrop's layers 2, 6, 10, 14 of 32 this is (3N' + 4n1 + 4n2 + 4n3 + 17n4) / 32.
    """
    return sum(entering) / len(entering)


def mean_tokens_official(entering: Sequence[int]) -> float:
    """The authors' meter: a layer after which tokens are dropped counts as if it had not computed them.

    For MustDrop's layers 2, 6, 10, 14 of 32 this is (2N' + 4n1 + 4n2 + 4n3 + 18n4) / 32.
    """
    return mean_tokens([*entering[1:], entering[-1]])


def floor_tokens(tokens: int, layers: int = 32, first_filter: int = 2, key_share: float = 0.08) -> list[int]:
    """Tokens entering each layer if nothing but MustDrop's key tokens outlives its first filter: no mean is lower."""
    after = max(0, layers - first_filter - 1)
    return [tokens] * (layers - after) + [math.ceil(key_share * tokens)] * after


def formula_macs(
    shape: ModelShape,
    vision_tokens: Sequence[int],
    text_tokens: int = 0,
    *,
    mlp_products: int = 3,
    causal: bool = False,
    plans: Sequence[PlannedLayer | None] = (),
) -> float:
    """The papers' formula over all layers, `4nd^2 + 2n^2 d + 3ndm` (YOPO, arXiv 2410.06169).

    Blind to grouped queries and the vocabulary. `mlp_products` 2 gives the `2ndm` variant; `causal` counts the
    n(n+1)/2 pairs that the mask leaves instead of n^2. In a layer with a plan, vision tokens take their share of heads
    in projections and attention, their share of the MLP, and at most as many vision keys as the window has patches.
    Where inactive heads ignore vision keys alone, what is saved are the values of these: half of the attention to them.
    """
    d, m, total = shape.hidden, shape.mlp, 0
    for vision, layer in zip_longest(vision_tokens, plans):
        n = vision + text_tokens
        full = vision * (vision + 1) // 2 if causal else vision * n
        rows, heads, neurons, pairs = 1, 1, m, full
        if layer is not None:
            plan = layer.plan
            rows = heads = len(plan.active_heads(shape.heads)) / shape.heads
            if plan.head_scope == "keys":
                rows, heads = 1, (1 + heads) / 2 if plan.window is None else 1
            neurons = plan.neurons(m)
            if plan.window is not None:
                pairs = min(full, vision * (plan.window**2 + (0 if causal else text_tokens)))
        all_pairs = n * (n + 1) // 2 if causal else n * n
        total += text_tokens * d * (4 * d + mlp_products * m) + vision * d * (4 * d * rows + mlp_products * neurons)
        total += 2 * d * (all_pairs - full + heads * pairs)
    return total
