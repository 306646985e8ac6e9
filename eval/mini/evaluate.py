"""Accuracy of a LLaVA checkpoint on held-out scenes, per question type, beside question-only baselines.

Two baselines show what the questions alone give away: the same model with noise in the picture's place, and always the
commonest training answer to questions of the same form, or of the options the one that is commonest.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from eval.mini.data import ask_scene, prompt_parts
from eval.mini.questions import TYPES, VALUES, choice_questions, choice_text, plural, scene_questions
from eval.mini.scenes import generate_scene, scene_seed
from eval.run.cell import write_json
from llava.model.language_model.cache import CACHE_NAME
from mustdrop.command import Parser, command

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A question, the right answer, and what the model said."""

    scene: int
    type: str
    question: str
    answer: str
    said: str

    @property
    def right(self) -> bool:
        return self.said.strip().lower() == self.answer.lower()


def load(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model in float32 and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, LlavaProcessor.from_pretrained(folder)


def noise_image(scene: int, side: int = 336) -> Image.Image:
    """Uniform noise, determined by the scene it stands in for."""
    return Image.fromarray(np.random.default_rng((scene, 4)).integers(0, 256, (side, side, 3), np.uint8))


@torch.inference_mode()
def answer_all(model, processor, asked: Iterable, noise: bool = False) -> list[Asked]:
    """Greedy answers to ``(image, question, answer, type, scene)`` tuples; each picture is read once.

    The cache of everything up to the picture's end is shared by a scene's questions, which are padded on the left.
    """
    results = []
    tokenizer, before = processor.tokenizer, prompt_parts("")[0]
    for scene, group in tqdm(
        itertools.groupby(asked, key=lambda item: item[4]), desc="noise" if noise else "pictures", mininterval=5
    ):
        items = list(group)
        image = noise_image(scene, items[0][0].width) if noise else items[0][0]
        shared = processor(images=image, text=f"{before}<image>", return_tensors="pt")
        cache = model(**shared, use_cache=True)[CACHE_NAME]
        cache.batch_repeat_interleave(len(items))
        ends = [prompt_parts(question)[1] for _, question, *_ in items]
        own = tokenizer(ends, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
        joined = {
            name: torch.cat((shared[name].expand(len(items), -1), own[name]), 1)
            for name in ("input_ids", "attention_mask")
        }
        output = model.generate(**joined, **{CACHE_NAME: cache}, max_new_tokens=5, do_sample=False)
        said = processor.batch_decode(output[:, joined["input_ids"].shape[1] :], skip_special_tokens=True)
        results += [
            Asked(scene, kind, question, answer, reply.strip())
            for (_, question, answer, kind, _), reply in zip(items, said, strict=True)
        ]
    return results


def question_form(question: str) -> str:
    """A question without the words that name things: ``What color is the large star?`` -> ``What color is the``."""
    named = {"object", "objects", "sign", *itertools.chain(*VALUES.values()), *map(plural, VALUES["shape"])}
    return " ".join(word for word in question.rstrip("?").split() if word not in named)


def answer_from_habit(asked: Iterable, n_training_scenes: int = 400) -> list[Asked]:
    """The commonest answer in training to questions of the same form, or of the options the commonest one's letter."""
    counts: dict[str, Counter] = {}
    for index in range(n_training_scenes):
        for question in ask_scene(generate_scene(scene_seed("train", index)), 20):
            counts.setdefault(question_form(question.text), Counter())[question.answer] += 1
    results = []
    for _, text, answer, kind, scene in asked:
        question, *lines = text.split("\n")
        known = counts.get(question_form(question), Counter())
        options = {letter: known[option] for letter, option in (line.split(". ") for line in lines)} or known
        results.append(Asked(scene, kind, text, answer, max(options, key=options.get, default="")))
    return results


def held_out_questions(split: str, n_scenes: int, per_scene: int, choices_per_scene: int, seed: int = 0) -> list[tuple]:
    """``(image, question, answer, type, scene)`` of plain and of multiple-choice questions, grouped by scene."""
    asked = list(scene_questions(split, n_scenes, per_scene, seed))
    for image, choice, scene in choice_questions(split, n_scenes, choices_per_scene, seed):
        text = choice_text(choice.question, choice.options)
        asked.append((image, text, choice.answer, f"choice {choice.type}", scene))
    return sorted(asked, key=lambda item: item[4])


def summarize(results: list[Asked]) -> dict[str, dict[str, float]]:
    """``{type: {accuracy, n, stderr}}``; ``plain`` and ``choice`` are all questions without and with options."""
    groups = {name: {name} for name in (*TYPES, *(f"choice {name}" for name in TYPES))}
    groups |= {"plain": set(TYPES), "choice": set(groups) - set(TYPES)}
    table = {}
    for name, types in groups.items():
        right = [item.right for item in results if item.type in types]
        if right:
            mean = float(np.mean(right))
            table[name] = {"accuracy": mean, "n": len(right), "stderr": float(np.sqrt(mean * (1 - mean) / len(right)))}
    return table


def evaluate(folder: Path, split: str, n_scenes: int, per_scene: int, choices_per_scene: int, seed: int) -> dict:
    """Accuracies with pictures and with noise, and everything needed to repeat them."""
    started = time.time()
    model, processor = load(folder)
    questions = held_out_questions(split, n_scenes, per_scene, choices_per_scene, seed)
    results = {
        "accuracy": summarize(answer_all(model, processor, questions)),
        "question_only": summarize(answer_all(model, processor, questions, noise=True)),
        "commonest_answer": summarize(answer_from_habit(questions)),
    }
    settings = {
        "split": split,
        "n_scenes": n_scenes,
        "per_scene": per_scene,
        "choices_per_scene": choices_per_scene,
        "seed": seed,
        "dtype": "float32",
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    return results | {"settings": settings, "versions": versions, "seconds": round(time.time() - started, 1)}


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, print and write; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = Parser("mini-evaluate", description=__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="folder of a Hugging Face LLaVA checkpoint")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--n_scenes", type=int, default=250)
    parser.add_argument("--per_scene", type=int, default=10, help="plain questions per scene")
    parser.add_argument("--choices_per_scene", type=int, default=5, help="multiple-choice questions per scene")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    report = evaluate(
        options.model_path,
        options.split,
        options.n_scenes,
        options.per_scene,
        options.choices_per_scene,
        options.seed,
    )
    for name, row in report["accuracy"].items():
        baseline = report["question_only"][name]["accuracy"]
        habit = report["commonest_answer"][name]["accuracy"]
        text = "%-16s %.3f (n %d, question only %.3f, commonest answer %.3f)"
        log.info(text, name, row["accuracy"], row["n"], baseline, habit)
    if options.output:
        write_json(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
