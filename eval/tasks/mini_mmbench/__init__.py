"""``mini_mmbench``: multiple-choice questions about held-out synthetic scenes, in MMBench's format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO

SPLIT = "test"
SCENES = 270
PER_SCENE = 4
SEED = 3
NONE = "nan"
"""MMBench's word for a field that a question does not have."""


def documents(n_scenes: int | None = None, split: str = SPLIT) -> Iterator[dict]:
    """The benchmark's documents, of all ``SCENES`` or of the first ``n_scenes``.

    Yields
    ------
    dict
        ``question_id``, ``scene`` (its seed), ``image`` (PIL), ``prompt`` (question and options as in training),
        MMBench's ``index``, ``question``, ``hint``, ``A`` to ``D``, ``answer`` (a letter), ``category``,
        ``L2-category``, ``source`` and ``split``. The category is the type of the question; the five are equally
        likely, unlike in training.
    """
    from eval.mini.questions import LETTERS, TYPES, choice_questions, choice_text

    mix = dict.fromkeys(TYPES, 1 / len(TYPES))
    for index, (image, choice, scene) in enumerate(
        choice_questions(split, n_scenes or SCENES, PER_SCENE, SEED, mix=mix)
    ):
        yield {
            "question_id": f"mini_mmbench-{index:05d}",
            "index": index,
            "scene": scene,
            "image": image,
            "prompt": choice_text(choice.question, choice.options),
            "question": choice.question,
            "hint": NONE,
            **dict.fromkeys(LETTERS, NONE),
            **dict(zip(LETTERS, choice.options, strict=False)),
            "answer": choice.answer,
            "category": choice.type,
            "L2-category": choice.type,
            "source": "synthetic",
            "split": split,
        }


def accuracy(results: Sequence[Mapping]) -> float:
    """MMBench's score by lmms-eval's rules, in percent, without the files and the tables that its own function leaves.

    Parameters
    ----------
    results : sequence of mapping
        What MMBench's ``process_results`` gave for every question.
    """
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    with redirect_stdout(StringIO()):
        return 100 * MMBench_Evaluator().eval_result(results, eval_method="static")[0]
