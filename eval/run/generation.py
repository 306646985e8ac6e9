"""From lmms-eval's generation settings to those of transformers, and continuations that a model is made to give."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

SAMPLING_ONLY = ("temperature", "top_p", "top_k")
NOT_FOR_GENERATE = ("until", "image_aspect_ratio", "max_agentic_steps")


class Teacher(LogitsProcessor):
    """Makes ``generate`` emit given ids, and adds up what the model itself would have thought of them."""

    def __init__(self, forced: list[list[int]], pad: int):
        self.forced, self.pad, self.step = forced, pad, 0
        self.losses, self.greedy = [0.0] * len(forced), [True] * len(forced)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` are the logits ``[batch, vocabulary]`` of the next id; returns zero for it and -inf elsewhere."""
        wanted = [ids[self.step] if self.step < len(ids) else self.pad for ids in self.forced]
        losses = torch.nn.functional.cross_entropy(
            scores.float(), torch.tensor(wanted, device=scores.device), reduction="none"
        ).tolist()
        best = scores.argmax(-1).tolist()
        for row, ids in enumerate(self.forced):
            if self.step < len(ids):
                self.losses[row] += losses[row]
                self.greedy[row] &= best[row] == wanted[row]
        self.step += 1
        only = torch.full_like(scores, float("-inf"))
        only[torch.arange(len(wanted)), wanted] = 0
        return only


def for_transformers(settings: dict) -> dict:
    """lmms-eval's generation settings as transformers takes them."""
    kept = {name: value for name, value in settings.items() if name not in NOT_FOR_GENERATE and value is not None}
    kept.setdefault("max_new_tokens", 1024)
    kept["do_sample"] = bool(kept.get("do_sample", kept.get("temperature", 0) > 0)) and kept.get("temperature", 1) > 0
    if not kept["do_sample"]:
        for name in SAMPLING_ONLY:
            kept.pop(name, None)
    return kept


def cut(text: str, until: str | list[str] | None) -> str:
    """A text up to the first of the given strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text
