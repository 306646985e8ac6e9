"""``mini_mme``: pairs of yes/no questions about held-out synthetic scenes, in MME's format.

Of MME's categories it has those that can be asked in forms the embedded model was trained on: ``existence`` and
``color`` ("Is there a small red ring?") and ``position`` ("Is the red star left of the small ring?"). Counting and
reading it knows only as questions for a number or a word, so ``count`` and ``OCR`` are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SPLIT = "test"
SCENES = 270
SEED = 2
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def existence(rng, scene) -> tuple[str, str]:
    """Questions for an object that is there, and for one of random attributes that is not."""
    from eval.tasks.existence import absent_random, is_there, present

    return is_there(present(rng, scene)), is_there(absent_random(rng, scene))


def color(rng, scene) -> tuple[str, str]:
    """Questions for an object that is there, and for the same in a colour that no such object has."""
    from eval.tasks.existence import absent_changed, is_there, present

    attributes = present(rng, scene, must="color")
    # A scene's objects have at most five of the eight colours, so another one is always to be had.
    return is_there(attributes), is_there(absent_changed(rng, scene, attributes, "color"))


def position(rng, scene) -> tuple[str, str]:
    """Questions for the side on which one object is of another, and for the opposite side."""
    from eval.mini.questions import ask_relation

    while True:
        question = ask_relation(rng, scene)
        if question and question.answer in ("yes", "no"):
            other = re.sub("|".join(OPPOSITE), lambda found: OPPOSITE[found[0]], question.text)
            return (question.text, other) if question.answer == "yes" else (other, question.text)


CATEGORIES = (existence, color, position)


def documents(n_scenes: int | None = None, split: str = SPLIT) -> Iterator[dict]:
    """The benchmark's documents, of all ``SCENES`` or of the first ``n_scenes``: two categories in turn per picture.

    Yields
    ------
    dict
        ``question_id`` (the same for a pair, whose questions are neighbours), ``scene`` (its seed), ``image`` (PIL),
        ``question``, ``answer`` (Yes, then No) and ``category``.
    """
    from eval.tasks.existence import pictures

    for number, (scene, image, rng) in enumerate(pictures(split, n_scenes or SCENES, SEED)):
        left_out = CATEGORIES[number % len(CATEGORIES)]
        for category in CATEGORIES:
            if category is left_out:
                continue
            for question, answer in zip(category(rng, scene), ("Yes", "No"), strict=True):
                yield {
                    "question_id": f"mini_mme-{number:05d}-{category.__name__}",
                    "scene": scene.seed,
                    "image": image,
                    "question": question,
                    "answer": answer,
                    "category": category.__name__,
                }
