"""``mini_highres``: synthetic scenes too fine for one view; half the questions ask for small text or small things."""

from __future__ import annotations

from collections.abc import Iterator

SPLIT = "test"
SCENES = 250
PER_SCENE = 4
SEED = 7


def documents(n_scenes: int | None = None, split: str = SPLIT) -> Iterator[dict]:
    """The benchmark's documents, of all ``SCENES`` or of the first ``n_scenes``; every image is cut into 2x2 tiles.

    Yields
    ------
    dict
        ``question_id``, ``scene`` (its seed), ``image`` (PIL), ``question``, ``answer`` and ``type``, one of
        `eval.mini.highres.TYPES`. A third of the questions are about
        what a sign says.
    """
    from eval.mini.highres import split_questions

    number = 0
    for scene, image, asked in split_questions(split, n_scenes or SCENES, PER_SCENE, SEED, "2x2"):
        for question in asked:
            yield {
                "question_id": f"mini_highres-{number:05d}",
                "scene": scene.seed,
                "image": image,
                "question": question.text,
                "answer": question.answer,
                "type": question.type,
            }
            number += 1
