"""Names of weights: what LLaVA, Hugging Face and PEFT call them, and what we do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."

# Wrappers leave their own prefixes: DistributedDataParallel, torch.compile, PEFT.
_WRAPPERS = r"^(?:module\.|_orig_mod\.|base_model\.model\.)+"
# Theirs -> ours. transformers has saved its LLaVA under several names over the years; ours are LLaVA's.
_OURS = {
    r"^model\.model\.": "model.",
    r"^(model\.)?language_model\.lm_head": "lm_head",
    r"^(model\.)?language_model\.(model\.)?": "model.",
    r"^(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?": TOWER,
    r"^(model\.)?multi_modal_projector\.linear_1": PROJECTOR + "0",
    r"^(model\.)?multi_modal_projector\.linear_2": PROJECTOR + "2",
    r"^mm_projector\.": PROJECTOR,
    r"\.base_layer\.": ".",
}
# Buffers that older releases of transformers saved and that are worked out anew.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
# What bitsandbytes keeps beside a packed weight.
_PACKING = re.compile(r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)$|\.(SCB|weight_format)$")


def ours(name: str) -> str:
    """Our name of a weight or a module, whatever format it comes from."""
    name = re.sub(_WRAPPERS, "", name)
    for theirs, replacement in _OURS.items():
        name = re.sub(theirs, replacement, name)
    return name


def hugging_face(name: str) -> str:
    """How Hugging Face calls a weight of the projector, for messages; other names as they are."""
    match = re.fullmatch(re.escape(PROJECTOR) + r"([02])\.(\w+)", name)
    return f"multi_modal_projector.linear_{1 + int(match[1]) // 2}.{match[2]}" if match else name


def translated(weights: Mapping[str, Any], place: object) -> dict[str, Any]:
    """Weights under our names, without those that carry nothing; ValueError if two would get the same."""
    result: dict[str, Any] = {}
    for name, value in weights.items():
        if _HARMLESS.search(name):
            continue
        if ours(name) in result:
            raise ValueError(f"{place}: holds {ours(name)} twice, once as {name}")
        result[ours(name)] = value
    return result


def is_packing(name: str) -> bool:
    """Whether something in a quantised checkpoint only says how a weight was packed."""
    return _PACKING.search(name) is not None


def packing_of(name: str, quantization: Mapping[str, Any]) -> str:
    """The name of what must lie beside a packed weight, by a configuration's `quantization_config`."""
    return f"{name}.absmax" if quantization.get("load_in_4bit") else f"{name.removesuffix('.weight')}.SCB"


def listed(names: Iterable[str], also_theirs: bool = False) -> str:
    """The first few of some names, for a message."""
    names = sorted(names)
    if also_theirs:
        names = [name if hugging_face(name) == name else f"{name} = {hugging_face(name)}" for name in names]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
