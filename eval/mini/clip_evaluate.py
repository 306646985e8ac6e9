"""Accuracy of the embedded video model on held-out clips, per question type, beside baselines that see less.

    mustdrop mini-clips-evaluate --model_path checkpoints/llava-mini-video --output accuracy.json

Baselines: the clip's last frame eight times in place of the clip (every object is in it), noise in place of the frames,
and always the commonest training answer to questions of the same form. Answers are single words, so questions about a
clip are asked together, each blind to the others, and an answer is right if the word and the end after it are what
greedy decoding gives.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from eval.mini import language, scenes
from eval.mini.clip_questions import TYPES, clip_questions
from eval.mini.clip_scenes import MOMENTS, Clip, draw_clip
from eval.mini.data import Packer
from eval.mini.evaluate import question_form
from eval.mini.questions import Question
from eval.run.cell import write_json
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from mustdrop.command import Parser, command

log = logging.getLogger(__name__)

VIEWS = ("frames", "last_frame", "noise")
#: Clips of the training split from which the commonest answers are counted.
HABIT_CLIPS = 400


@dataclass
class ClipModel:
    """A model of clips that answers many questions about a clip in one pass, in float32."""

    whole: LlavaLlamaForCausalLM
    text: LlamaForCausalLM
    packer: Packer
    image_processor: object

    @classmethod
    def load(cls, folder: str | Path) -> ClipModel:
        """The model of a folder, its language model also as transformers' own class."""
        tokenizer, whole, image_processor, _ = load_pretrained_model(folder, device="cpu", torch_dtype="float32")
        names = LlamaConfig().to_dict()
        text = LlamaForCausalLM(
            LlamaConfig(**{key: value for key, value in whole.config.to_dict().items() if key in names})
        )
        text.load_state_dict({name: value for name, value in whole.state_dict().items() if name in text.state_dict()})
        text.set_attn_implementation("mini_packed")
        return cls(whole, text.eval(), Packer(tokenizer), image_processor)

    @torch.inference_mode()
    def right(self, frames: np.ndarray, asked: list[Question]) -> list[bool]:
        """Whether the questions about frames ``uint8 [frames, side, side, 3]`` are answered right."""
        images = [Image.fromarray(frame) for frame in frames]
        features = self.whole.encode_images(process_images(images, self.image_processor, self.whole.config))
        text = self.packer([asked])
        _, right = language.answer_loss(self.text, features.flatten(0, 1)[None], text)
        hits = language.question_hits(right, text, [list(range(len(asked)))])
        return [bool(hits[number][0]) for number in range(len(asked))]


def seen(clip: Clip, view: str) -> np.ndarray:
    """The eight frames that a model is shown of a clip."""
    frames = draw_clip(clip)
    if view == "last_frame":
        return np.repeat(frames[-1:], MOMENTS, 0)
    if view == "noise":
        return np.random.default_rng((clip.seed, 12)).integers(0, 256, frames.shape, np.uint8)
    return frames


def habits(n_clips: int = HABIT_CLIPS) -> dict[str, str]:
    """The commonest training answer to questions of each form."""
    counts: dict[str, Counter] = {}
    for _, asked in clip_questions("train", n_clips, 20):
        for question in asked:
            counts.setdefault(question_form(question.text), Counter())[question.answer] += 1
    return {form: answers.most_common(1)[0][0] for form, answers in counts.items()}


def summarize(right: dict[str, list[bool]]) -> dict[str, dict[str, float]]:
    """``{type: {accuracy, n, stderr}}``, all types together at the end."""
    table = {}
    for name, answers in (right | {"all": sum(right.values(), [])}).items():
        mean = float(np.mean(answers)) if answers else float("nan")
        table[name] = {
            "accuracy": mean,
            "n": len(answers),
            "stderr": float(np.sqrt(mean * (1 - mean) / max(1, len(answers)))),
        }
    return table


def evaluate(folder: str | Path, split: str, n_clips: int, per_clip: int, seed: int = 0, views=VIEWS) -> dict:
    """Accuracies with each view of the clips and from habit, and everything needed to repeat them."""
    started, model, common = time.time(), ClipModel.load(folder), habits()
    right = {view: {name: [] for name in TYPES} for view in (*views, "commonest_answer")}
    for clip, asked in tqdm(
        clip_questions(split, n_clips, per_clip, seed), total=n_clips, desc="clips", mininterval=10
    ):
        answers = {view: model.right(seen(clip, view), asked) for view in views if asked}
        answers["commonest_answer"] = [common.get(question_form(item.text)) == item.answer for item in asked]
        for view, row in answers.items():
            for question, one in zip(asked, row, strict=True):
                right[view][question.type].append(one)
    settings = {"split": split, "n_clips": n_clips, "per_clip": per_clip, "seed": seed, "dtype": "float32"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    results = {view: summarize(answers) for view, answers in right.items()}
    return results | {"settings": settings, "versions": versions, "seconds": round(time.time() - started, 1)}


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, and say the accuracies; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = Parser("mini-clips-evaluate", description=__doc__)
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--split", default="test", choices=tuple(scenes.SPLITS))
    parser.add_argument("--n_clips", type=int, default=150)
    parser.add_argument("--per_clip", type=int, default=10, help="questions about a clip, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    report = evaluate(options.model_path, options.split, options.n_clips, options.per_clip, options.seed)
    for name, row in report["frames"].items():
        others = ", ".join(f"{view} {report[view][name]['accuracy']:.3f}" for view in (*VIEWS[1:], "commonest_answer"))
        log.info("%-10s %.3f (n %d; %s)", name, row["accuracy"], row["n"], others)
    if options.output:
        write_json(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
