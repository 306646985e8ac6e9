"""Questions about the synthetic scenes as records of LLaVA's trainer, whose option ``--mini_scenes`` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.mini import questions, scenes
from eval.mini.data import ask_scene
from llava.constants import DEFAULT_IMAGE_TOKEN


class SceneRecords(Sequence):
    """Questions about synthetic scenes in LLaVA's format, one scene and one question each, drawn when asked for."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.first = count, 900_000_000 + 1_000_000 * (seed % 90)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = scenes.generate_scene(scenes.scene_seed("train", self.first + index))
        question: questions.Question = ask_scene(scene, 1)[0]
        turns = [
            {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ]
        return {"image": lambda: scenes.render(scene), "conversations": turns}
