"""``mini_textvqa``: reading the signs of held-out synthetic scenes, in TextVQA's format."""

from __future__ import annotations

from collections.abc import Iterator

SPLIT = "test"
SCENES = 370
SEED = 4
MOST_SIGNS = 4
ARTICLES = ("AN", "THE")
"""TextVQA's scoring takes articles out of answers, so a sign that says nothing else cannot be asked about."""


def documents(n_scenes: int | None = None, split: str = SPLIT) -> Iterator[dict]:
    """The benchmark's documents, of all ``SCENES`` or of the first ``n_scenes``: one per sign.

    Yields
    ------
    dict
        ``question_id``, ``scene`` (its seed), ``image`` (PIL), ``question``, ``answer`` and, as TextVQA has ten,
        ``answers``.
    """
    from eval.mini.questions import scene_questions

    readings = scene_questions(split, n_scenes or SCENES, MOST_SIGNS, SEED, mix={"reading": 1.0})
    kept = (reading for reading in readings if reading[2] not in ARTICLES)
    for index, (image, question, answer, _, scene) in enumerate(kept):
        yield {
            "question_id": f"mini_textvqa-{index:05d}",
            "scene": scene,
            "image": image,
            "question": question,
            "answer": answer,
            "answers": [answer] * 10,
        }
