"""MustDrop (arXiv 2411.10803): its three stages as one reducer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mustdrop.checks import one_of, require
from mustdrop.compose import Compose
from mustdrop.reach import Tower
from mustdrop.retain import check_per, check_retain
from mustdrop.stages import DiverseTokens, DualAttentionFilter, KeyTokens, LocalSpatialMerge, OutputAwareCache
from mustdrop.stages.budget import TAPER, Target
from mustdrop.stages.prefill import PUBLISHED_LAYERS

STAGES = ("vision", "prefill", "decode")

# What an option left at None means: by default, and with compat="official".
_COMPAT = {
    "merge_order": ("raster", "score"),
    "merge_count": ("per_image", "batch_minimum"),
    "per": ("image", "view"),
    "positions": ("original", "renumber"),
    "decode_positions": ("continue", "cache_length"),
    "score_dtype": ("float32", "model"),
    "filter_layers": (tuple(layer / 32 for layer in PUBLISHED_LAYERS), PUBLISHED_LAYERS),
}


@dataclass
class MustDrop(Compose):
    """Multi-stage vision token dropping.

    Thresholds decide how many tokens stay (the published method), or numbers do: with `retain`, or `budget` and
    `merge_to`, every image keeps exactly the planned number of tokens in every layer, chosen by the same scores. Shapes
    then depend on nothing in the image, and the GPU is never waited for. `mustdrop_plus` is our improved MustDrop.

    Parameters
    ----------
    global_threshold, individual_threshold : float
        Of the dual-attention filter: the thresholds that set how many tokens stay.
    window, similarity_threshold, merge_block
        Of local spatial merging: side of a window, least mean cosine similarity, ViT block after which to merge.
    key_rate, key_block
        Of the key token set: share of the merged tokens, ViT block whose CLS attention chooses them.
    filter_layers : sequence of int or float, optional
        Decoder layers after which to filter; floats are fractions of the depth. Default: the published 2, 6, 10, 14
        of 32.
    cache_from : int or float, optional
        First layer whose cache is cut to the survivors. Default: the first filter layer; 0 cuts all layers.
    retain : int or float, optional
        Mean vision tokens per decoder layer and image with all its views, by the authors' meter; a float is a share of
        the image's patches. Works out how much is merged (unless `merge_to` says it) and what every filter leaves; all
        tokens or more: nothing is done.
    diverse : int or float, optional
        Of the merged tokens only so many of every image enter the decoder, among them the key tokens (not published).
        Default: all.
    entrance : {"difference", "coverage"}
        With `diverse`: those that repeat others least, or those that together stand best for all; see `DiverseTokens`.
    taper : float
        With `retain`: what the last filter leaves of what the first left. Default: as the published thresholds do.
    budget : sequence of int or float, optional
        Instead: tokens of an image that go on after each filter layer; floats are shares of its patches.
    merge_to : int or float, optional
        Tokens of an image that merging leaves. With `budget`, none are merged unless this says so.
    per : {"image", "view"}, optional
        "view": numbers in the vision encoder (merging, key tokens) are those of every tile or frame, instead of an
        image with all of them. Default: image, and view with `compat` "official".
    output_threshold : float, optional
        Drop cached tokens by the output's own attention too (not published; off).
    stages : sequence of {"vision", "prefill", "decode"}
        Which stages are at work.
    compat : {"default", "official"}
        "official" reproduces the authors' code; sets the options below where they are None.
    merge_order, merge_count, positions, decode_positions, score_dtype : str, optional
        The deviations from the authors' code one by one; see `LocalSpatialMerge`, `Reducer`, `DualAttentionFilter`.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """

    thresholds: ClassVar[Mapping[str, float]] = {"global_threshold": 0.011, "individual_threshold": 0.01}

    global_threshold: float = 0.011
    individual_threshold: float = 0.01
    window: int = 3
    similarity_threshold: float = 0.8
    merge_block: int = 0
    key_rate: float = 0.08
    key_block: int = -1
    filter_layers: Sequence[int | float] | None = None
    cache_from: int | float | None = None
    retain: int | float | None = None
    diverse: int | float | None = None
    taper: float = TAPER
    budget: Sequence[int | float] | None = None
    merge_to: int | float | None = None
    output_threshold: float | None = None
    stages: Sequence[str] = STAGES
    compat: str = "default"
    merge_order: str | None = None
    merge_count: str | None = None
    positions: str | None = None
    decode_positions: str | None = None
    score_dtype: str | None = None
    per: str | None = None
    entrance: str = "difference"

    diverse_times: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        usual = self.compat == "default" and self.filter_layers is None
        for option, choices in _COMPAT.items():
            if getattr(self, option) is None:
                setattr(self, option, choices[self.compat == "official"])
        for stage in self.stages:
            one_of("stages", stage, STAGES)
        require(0 < len(set(self.stages)) == len(self.stages), "stages", self.stages, "some stages, each once")
        one_of("positions", self.positions, ("original", "renumber"))
        one_of("decode_positions", self.decode_positions, ("continue", "cache_length"))
        check_retain(self.retain)
        check_per(self.per)
        require(len(self.filter_layers) > 0, "filter_layers", self.filter_layers, "at least one layer")
        of_stage = {"retain": "prefill", "budget": "prefill", "merge_to": "vision", "diverse": "vision"}
        for field, stage in of_stage.items():
            given = getattr(self, field)
            require(given is None or stage in self.stages, field, given, f"left out without the {stage} stage")
        target = self._target()
        merge = LocalSpatialMerge(
            window=self.window,
            similarity_threshold=self.similarity_threshold,
            block=self.merge_block,
            order=self.merge_order,
            count=self.merge_count,
            merge_to=target.merge_to,
            per=self.per,
            target=target,
        )
        keys = KeyTokens(rate=self.key_rate, block=self.key_block, per=self.per, target=target)
        filters = DualAttentionFilter(
            global_threshold=self.global_threshold,
            individual_threshold=self.individual_threshold,
            layers=None if usual else self.filter_layers,
            score_dtype=self.score_dtype,
            target=target,
        )
        first = self.filter_layers[0] if self.cache_from is None else self.cache_from
        cache = OutputAwareCache(first_layer=first, output_threshold=self.output_threshold)
        fewer = target.diverse is not None or target.diverse_times is not None
        diverse = [DiverseTokens(self.diverse, target, self.entrance)] if fewer else []
        parts = {"vision": [merge, keys, *diverse], "prefill": [filters], "decode": [cache]}
        super().__init__(
            [part for stage in STAGES if stage in self.stages for part in parts[stage]],
            self.positions,
            self.decode_positions,
        )
        self.tile_order = "flat" if self.compat == "official" else "model"

    def _target(self) -> Target:
        """The numbers that all stages work to."""
        given = None if self.budget is None else tuple(self.budget)
        return Target(
            window=self.window,
            key_rate=self.key_rate,
            merge_to=1.0 if given is not None and self.merge_to is None else self.merge_to,
            retain=self.retain,
            diverse=self.diverse,
            diverse_times=self.diverse_times if self.diverse is None and "vision" in self.stages else None,
            budget=given,
            taper=self.taper,
        )

    def check_tower(self, tower: Tower) -> None:
        if "vision" in self.stages:
            merging, keys = (part.touches(tower) for part in self.parts[:2])
            chosen, merged = max(keys.reads | keys.reads_next, default=tower.run), max(merging.changes, default=-1)
            right = f"below {chosen}, the block after which key_block {self.key_block} chooses among merged tokens"
            require(merged < chosen, "merge_block", self.merge_block, right)
        super().check_tower(tower)
