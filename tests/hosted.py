"""The matrix of hosted models: its rows, its methods, and reducers that look on."""

from __future__ import annotations

from mustdrop import Reducer, available_methods, load_reducer

ROWS = [
    ("llava", "llama"),
    ("llava", "mistral"),
    ("llava", "qwen2"),
    ("llava", "qwen3"),
    ("llava", "phi3"),
    ("next", "llama"),
    ("next", "mistral"),
    ("onevision", "qwen2"),
    ("video", "llama"),
    ("llava", "sliding"),
    ("qwen2", "qwen2"),
    ("qwen2 clips", "qwen2"),
    ("qwen2.5", "qwen2"),
    ("qwen2.5 clips", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3 clips", "qwen3"),
    ("internvl", "qwen2"),
    ("internvl", "qwen3"),
    ("internvl", "llama"),
    ("internvl", "phi3"),
]
QWENS = [("qwen2", "qwen2"), ("qwen2.5", "qwen2"), ("qwen3", "qwen3")]
LLAVAS = [("llava", "llama"), ("next", "llama"), ("onevision", "qwen2"), ("video", "llama")]
FAMILIES = [*LLAVAS, *QWENS, ("internvl", "qwen2")]
METHODS = {
    "vanilla": {"method": "vanilla"},
    "mustdrop": {"filter_layers": [1, 3], "similarity_threshold": 0.2, "global_threshold": 0.01},
    "mustdrop official": {"method": "mustdrop", "compat": "official", "filter_layers": [1, 3]},
    "mustdrop reordered": {"method": "mustdrop", "merge_order": "score", "filter_layers": [1, 3]},
    "mustdrop retain": {"method": "mustdrop", "retain": 24, "filter_layers": [1, 3]},
    "mustdrop diverse": {"method": "mustdrop", "retain": 24, "filter_layers": [1, 3], "diverse": 30},
    "mustdrop_plus": {"retain": 24, "filter_layers": [1, 3]},
    "prumerge": {},
    "prumerge+": {"method": "prumerge", "retain": 12, "plus": True},
    "tome": {"retain": 12, "per": "view"},
    "hiprune": {"retain": 12, "alpha": 0.5, "object_block": 1},
    "holov": {"retain": 12, "chunks": 5},
    "vscan": {"retain": 12, "local_block": 0},
    "trevs": {"retain": 8},
    "tops": {"retain": 8},
    "uniform": {"retain": 9},
    "avgpool": {"retain": 9},
    "fastv": {"layer": 2, "drop_ratio": 0.5},
    "dart": {"layer": 2, "tokens": 12},
    "pyramiddrop": {"layers": [1, 3, 4], "ratios": [0.6, 0.4, 0.2]},
    "sparsevlm": {"layers": [1, 2, 4], "keeps": [0.6, 0.4, 0.2]},
    "sparsevlm 2": {"method": "sparsevlm", "version": 2, "layers": [1, 2, 4], "keeps": [0.6, 0.4, 0.2]},
    "yopo": {"window": 3, "heads": 0.5, "mlp_share": 0.5, "layer_cut": 5},
    "mustdrop and yopo": {
        "method": "compose",
        "parts": [
            {"method": "mustdrop", "retain": 24, "filter_layers": [1, 3]},
            {"method": "yopo", "window": 3, "heads": 0.5},
        ],
    },
    "divprune and fastv": {
        "method": "compose",
        "parts": [{"method": "divprune", "retain": 20}, {"method": "fastv", "layer": 2, "drop_ratio": 0.5}],
    },
}
LEFT_OUT = "evs", "smallimage"  # drops nothing of an image; changes the images' size, which stock classes fix
METHODS |= {name: {"retain": 12} for name in available_methods() if name not in (*METHODS, *LEFT_OUT)}
ON_DEMAND = ["mustdrop", "visionzip", "prumerge", "divprune", "cdpruner", "fastv", "pyramiddrop", "yopo"]


def reducer_of(name: str) -> Reducer:
    return load_reducer({"method": name.split()[0], **METHODS[name]})


class KeepAll(Reducer):
    """Is asked everywhere and leaves everything."""

    def after_vision_block(self, step):
        return None

    def inside_vision_block(self, step):
        return None

    def after_decoder_layer(self, step):
        return None


def facts(run) -> list[dict]:
    return [{name: value for name, value in trace.to_dict().items() if name != "times_ms"} for trace in run.traces]


def attributes(model) -> dict:
    return {name: dict(vars(part)) for name, part in model.named_modules()}
