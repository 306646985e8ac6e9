"""What the tests of the trainer share: a small base model, records with images, and short runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from llava.model.builder import load_pretrained_model
from llava.train.arguments import TrainingArguments

QUICK = {"per_device_train_batch_size": 2, "max_steps": 2, "save_steps": 1, "use_cpu": True, "disable_tqdm": True}


def llava_base(folder: Path, checkpoint: Path) -> Path:
    """The small random checkpoint in LLaVA's own format."""
    tokenizer, model, *_ = load_pretrained_model(str(checkpoint))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(checkpoint / "preprocessor_config.json", folder)
    return folder


def arguments(output: Path, **settings) -> TrainingArguments:
    """Two quick steps on the CPU that save after each."""
    return TrainingArguments(output_dir=str(output), **QUICK | settings)


def flags(**settings) -> list[str]:
    """The same settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def turns(*texts: str, first: str = "human") -> list[dict[str, str]]:
    """A conversation in which human and gpt take turns."""
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[place % 2], "value": text} for place, text in enumerate(texts)]


def sample_records(folder: Path) -> list[dict]:
    """Three examples with an image below `folder`, and a text-only one that speaks of `<image>`."""
    records = []
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
        conversation = turns("<image>\nWhich color?", color)
        records.append({"id": f"color-{number}", "image": f"{color}.png", "conversations": conversation})
    records.append({"id": "html", "conversations": turns("What does <image> mean in HTML?", "nothing")})
    return records


def write_records(folder: Path, records: list[dict] | None = None) -> Path:
    """A LLaVA JSON file in `folder`."""
    file = folder / "data.json"
    file.write_text(json.dumps(sample_records(folder) if records is None else records))
    return file
