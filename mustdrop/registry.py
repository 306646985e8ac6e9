"""Names of methods."""

from __future__ import annotations

from mustdrop.hooks import Reducer
from mustdrop.methods import (
    DART,
    EVS,
    MMR,
    SCOPE,
    TOPS,
    YOPO,
    AveragePool,
    CDPruner,
    DivPrune,
    FastV,
    HiPrune,
    HoloV,
    PruMerge,
    PyramidDrop,
    Random,
    SmallImage,
    SparseVLM,
    ToMe,
    TReVS,
    Uniform,
    VidCom2,
    VisionZip,
    VisPruner,
    VScan,
)
from mustdrop.mustdrop import MustDrop
from mustdrop.mustdrop_plus import MustDropPlus

METHODS: dict[str, type[Reducer]] = {
    "vanilla": Reducer,
    "mustdrop": MustDrop,
    "mustdrop_plus": MustDropPlus,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "visionzip": VisionZip,
    "prumerge": PruMerge,
    "dart": DART,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "scope": SCOPE,
    "mmr": MMR,
    "hiprune": HiPrune,
    "holov": HoloV,
    "vispruner": VisPruner,
    "vscan": VScan,
    "trevs": TReVS,
    "tops": TOPS,
    "evs": EVS,
    "vidcom2": VidCom2,
    "tome": ToMe,
    "yopo": YOPO,
    "random": Random,
    "uniform": Uniform,
    "avgpool": AveragePool,
    "smallimage": SmallImage,
}


def available_methods() -> list[str]:
    """Names that `load_reducer` understands."""
    return sorted(METHODS)
