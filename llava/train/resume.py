"""Which checkpoint a run goes on from, and whether it is the same run: both are found from the output folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

log = logging.getLogger(__name__)

RUN_FILE = "llava_run.json"
STATE_FILE = "trainer_state.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "mm_projector.bin")
TRAINING_FIELDS = ("lora_enable", "model_max_length", "group_by_modality_length", "seed", "bits")
LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_weight_path")
UNTOLD_FIELDS = ("data_path", "image_folder", "lazy_preprocess", "is_multimodal")  # data are known by their contents
PACE_FIELDS = (
    "learning_rate",
    "mm_projector_lr",
    "weight_decay",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


def chosen_checkpoint(training: TrainingArguments) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, else the newest complete one of the output folder."""
    if training.resume_from_checkpoint is None:
        return newest_checkpoint(Path(training.output_dir))
    folder = Path(training.resume_from_checkpoint)
    if not folder.is_dir() or (fault := what_is_missing(folder)):
        fault = fault if folder.is_dir() else "no such folder"
        raise ValueError(f"resume_from_checkpoint: {folder} is no complete checkpoint ({fault})")
    return folder


def newest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none; those left out are named in the log."""
    found = [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    for folder in sorted(found, key=_step, reverse=True):
        fault = what_is_missing(folder)
        if fault is None:
            return folder
        log.warning("%s is not complete (%s), an older one is looked for", folder, fault)
    return None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def what_is_missing(folder: Path) -> str | None:
    """What a checkpoint lacks to go on from it, None if it is complete.

    The Trainer writes its state last, so all else is there once the state is; files that were cut later are found by
    their own marks of length.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if re.fullmatch(r"checkpoint-\d+", folder.name) and state["global_step"] != _step(folder):
            return f"{STATE_FILE} is of step {state['global_step']}"
    except FileNotFoundError:
        return f"no {STATE_FILE}"
    except (OSError, ValueError, TypeError, KeyError):
        return f"{STATE_FILE} is damaged"
    return missing_weights(folder) or _missing_optimizer(folder) or _damaged_file(folder)


def missing_weights(folder: Path) -> str | None:
    """Why the weights in a folder cannot be read, None if they can."""
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return "no weights"
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return f"{index.name} is damaged"
        lost = sorted(shard for shard in shards if not (folder / shard).is_file())
        if lost:
            return f"no {lost[0]}"
    if (folder / "adapter_config.json").is_file() and not (folder / "non_lora_trainables.bin").is_file():
        return "no non_lora_trainables.bin"
    damaged = (file for pattern in WEIGHTS for file in folder.glob(pattern) if _is_damaged(file))
    return next((f"{file.name} is damaged" for file in damaged), None)


def _missing_optimizer(folder: Path) -> str | None:
    if not (folder / "latest").is_file():
        return next((f"no {name}" for name in ("optimizer.pt", "scheduler.pt") if not (folder / name).is_file()), None)
    tag = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()  # DeepSpeed's pointer
    return None if tag and any((folder / tag).glob("*.pt")) else f"no states of DeepSpeed in {tag!r}"


def _damaged_file(folder: Path) -> str | None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return next((f"{file.name} is damaged" for file in files if _is_damaged(file)), None)


def _is_damaged(file: Path) -> bool:
    """Whether a file ends too early: by the length in its header, its directory at the end, or as JSON."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return False
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError):
        return True
    return file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file)


def describe_run(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> dict[str, Any]:
    """What a run learns from and how: runs that differ in more than their pace do not go on from each other."""
    facts = dataclasses.asdict(model) | dataclasses.asdict(data)
    facts = {name: value for name, value in facts.items() if name not in UNTOLD_FIELDS}
    for name in ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"):
        if facts[name] and Path(facts[name]).exists():
            facts[name] = str(Path(facts[name]).resolve())
    if data.data_path is not None:
        with open(data.data_path, "rb") as file:
            facts["contents of data_path"] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    names = TRAINING_FIELDS + LORA_FIELDS * training.lora_enable + PACE_FIELDS
    return facts | {name: getattr(training, name) for name in names}


def read_run(output: Path) -> dict[str, Any]:
    """What an earlier run in this folder noted, empty if there is nothing (readable)."""
    try:
        noted = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def write_run(output: Path, facts: dict[str, Any]) -> None:
    """Note what this run is, in one step."""
    output.mkdir(parents=True, exist_ok=True)
    new = output / f"{RUN_FILE}.new"
    new.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    new.replace(output / RUN_FILE)


def check_same_run(output: Path, facts: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the folder holds the work of another run; warn if its pace alone differs."""
    before = read_run(output).get("run", facts)
    for name in (name for name in before if name in facts and before[name] != facts[name]):
        message = f"{name}: got {facts[name]!r}, but {output} holds a run that began with {before[name]!r}"
        if name not in PACE_FIELDS:
            raise ValueError(f"{message}; expected the same, or another output_dir")
        log.warning("%s; optimizer and schedule of its checkpoint go on as they were", message)


def length_of_run(training: TrainingArguments) -> dict[str, float]:
    """How long a run is meant to be."""
    return {"num_train_epochs": training.num_train_epochs, "max_steps": training.max_steps}


def is_finished(output: Path, training: TrainingArguments) -> bool:
    """Whether the folder holds the result of the same run, as long as this one."""
    return read_run(output).get("finished") == length_of_run(training) and missing_weights(output) is None
