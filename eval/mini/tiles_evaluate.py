"""Accuracy of the model with tiles on held-out high-resolution scenes, by kind of question.

Three times the same model and questions: with overview and tiles, with the overview alone, and with noise in place of
the image. What the second loses is what only tiles show; the third is what the questions alone give away.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval.mini import highres, questions
from eval.mini.data import prompt_parts
from eval.mini.evaluate import Asked
from eval.run.cell import write_json
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from mustdrop.command import Parser, command

log = logging.getLogger(__name__)

#: What the model is shown.
SHOWN = ("tiles", "overview", "noise")


@torch.inference_mode()
def answer_scene(
    loaded: tuple, scene: highres.HighResScene, image: Image.Image, asked: list[questions.Question], shown: str
) -> list[Asked]:
    """Greedy answers to the questions about one image; ``loaded`` is what ``load_pretrained_model`` returns."""
    tokenizer, model, processor, _ = loaded
    if shown == "noise":
        noise = np.random.default_rng((scene.seed, 4)).integers(0, 256, (image.height, image.width, 3), np.uint8)
        image = Image.fromarray(noise)
    views = process_images([image], processor, model.config)[0].to(model.device)
    views = views[:1] if shown == "overview" else views
    prompts = [DEFAULT_IMAGE_TOKEN.join(prompt_parts(question.text)) for question in asked]
    ids = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
    padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")
    real = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    output = model.generate(
        padded.to(model.device),
        attention_mask=real.to(model.device),
        images=[views] * len(ids),
        image_sizes=[image.size] * len(ids),
        max_new_tokens=6,
        do_sample=False,
    )
    said = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [
        Asked(scene.seed, question.type, question.text, question.answer, reply.strip())
        for question, reply in zip(asked, said, strict=True)
    ]


def answer_all(loaded: tuple, scenes: Iterator[tuple], shown: str) -> list[Asked]:
    """`answer_scene` of everything that ``highres.split_questions`` yields."""
    found: list[Asked] = []
    for scene, image, asked in tqdm(scenes, desc=shown, mininterval=10):
        found += answer_scene(loaded, scene, image, asked, shown)
    return found


def summarize(results: list[Asked]) -> dict[str, dict[str, float]]:
    """``{type: {accuracy, n, stderr}}``, ``all`` included."""
    table = {}
    for name in (*highres.TYPES, "all"):
        right = [item.right for item in results if name in (item.type, "all")]
        if right:
            mean = float(np.mean(right))
            table[name] = {"accuracy": mean, "n": len(right), "stderr": float(np.sqrt(mean * (1 - mean) / len(right)))}
    return table


def evaluate(folder: Path, split: str, n_scenes: int, per_scene: int, layout: str | None, seed: int) -> dict:
    """Accuracies with tiles, with the overview alone and with noise, and everything needed to repeat them."""
    started = time.time()
    loaded = load_pretrained_model(str(folder), device="cpu", torch_dtype=torch.float32)
    arguments = (split, n_scenes, per_scene, seed, layout)
    results = {shown: summarize(answer_all(loaded, highres.split_questions(*arguments), shown)) for shown in SHOWN}
    named = ("split", "n_scenes", "per_scene", "seed", "layout")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    settings = {**dict(zip(named, arguments, strict=True)), "dtype": "float32"}
    return results | {"settings": settings, "versions": versions, "seconds": round(time.time() - started, 1)}


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, print and write; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = Parser("mini-tiles-evaluate", description=__doc__)
    parser.add_argument("--model_path", type=Path, default=Path("checkpoints/llava-mini-next"))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--n_scenes", type=int, default=150)
    parser.add_argument("--per_scene", type=int, default=10)
    parser.add_argument("--layout", choices=highres.LAYOUTS, help="all of them unless given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    report = evaluate(
        options.model_path, options.split, options.n_scenes, options.per_scene, options.layout, options.seed
    )
    for name, row in report["tiles"].items():
        others = [report[shown][name]["accuracy"] for shown in SHOWN[1:]]
        log.info("%-16s %.3f (n %d, overview alone %.3f, noise %.3f)", name, row["accuracy"], row["n"], *others)
    if options.output:
        write_json(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
