"""``mini_gqa``: held-out synthetic scenes with GQA-style questions, made at run time and the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

SPLIT = "test"
SCENES = 350
PER_SCENE = 3
SEED = 0


def documents(n_scenes: int | None = None, split: str = SPLIT) -> Iterator[dict]:
    """The benchmark's documents, of all ``SCENES`` or of the first ``n_scenes``.

    Yields
    ------
    dict
        ``question_id``, ``scene`` (its seed), ``image`` (PIL), ``question``, ``answer`` and ``type``. The five question
        types are equally likely, unlike in training.
    """
    from eval.mini.questions import TYPES, scene_questions

    mix = dict.fromkeys(TYPES, 1 / len(TYPES))
    for index, (image, question, answer, kind, scene) in enumerate(
        scene_questions(split, n_scenes or SCENES, PER_SCENE, SEED, mix=mix)
    ):
        yield {
            "question_id": f"mini_gqa-{index:05d}",
            "scene": scene,
            "image": image,
            "question": question,
            "answer": answer,
            "type": kind,
        }
