"""``mini_pope``: is there such an object in a held-out synthetic scene? In POPE's format and its three settings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

SPLIT = "test"
SCENES = 350
SEED = 1


def documents(n_scenes: int | None = None, split: str = SPLIT) -> Iterator[dict]:
    """The benchmark's documents, of all ``SCENES`` or of the first ``n_scenes``: one of each setting per picture.

    The settings differ in what is asked for where the answer is no: an object of ``random`` attributes, of the most
    ``popular`` ones (`absent_popular`), or, ``adversarial``, one that is there but for one attribute. In every setting
    every other answer is yes.

    Yields
    ------
    dict
        ``question_id``, ``scene`` (its seed), ``image`` (PIL), ``question``, ``answer`` and ``category``, the setting.
    """
    from eval.tasks.existence import absent_adversarial, absent_popular, absent_random, is_there, pictures, present

    settings = {"random": absent_random, "popular": absent_popular, "adversarial": absent_adversarial}
    for number, (scene, image, rng) in enumerate(pictures(split, n_scenes or SCENES, SEED)):
        asked: set[str] = set()
        for place, (category, absent) in enumerate(settings.items()):
            answer = "yes" if (number + place) % 2 == 0 else "no"
            draw = present if answer == "yes" else absent
            question = next(text for _ in count() if (text := is_there(draw(rng, scene))) not in asked)
            asked.add(question)
            yield {
                "question_id": f"mini_pope-{len(settings) * number + place:05d}",
                "scene": scene.seed,
                "image": image,
                "question": question,
                "answer": answer,
                "category": category,
            }
