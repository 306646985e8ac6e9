"""The module that maps vision features to the width of the language model."""

from __future__ import annotations

import re

from torch import nn


def build_vision_projector(config) -> nn.Module:
    """Projector named by `config.mm_projector_type`: "linear", "mlp{depth}x_gelu" or "identity".

    Raises
    ------
    ValueError
        If the type is none of these.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if match := re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        return nn.Sequential(*layers)
    raise ValueError(f"mm_projector_type is {kind!r}: it must be 'linear', 'identity' or like 'mlp2x_gelu'")
