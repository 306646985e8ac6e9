"""A cell: one model, one method at one budget, one task. What it is, what it is called, where its result lies."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from eval import provenance


@dataclass(frozen=True)
class Cell:
    """All that is asked for in one evaluation.

    Attributes
    ----------
    model : str
        Folder or hub id of a checkpoint.
    benchmark, task : str
        A key of ``eval.tasks.BENCHMARKS`` and the task of lmms-eval that is run for it.
    method : str
        Name in tables.
    retain : int or None
        Wanted average number of vision tokens, None where none was asked for.
    settings : dict
        What ``mustdrop.load_reducer`` takes.
    seed : int
        Of everything random.
    limit : int or None
        Only the first questions.
    batch_size : int
        Prompts per batch.
    device, device_map, dtype, attn_implementation, conv_template
        As ``eval.inference.LoadedModel.load`` takes them.
    """

    model: str
    benchmark: str
    task: str
    method: str = "vanilla"
    retain: int | None = None
    settings: dict = field(default_factory=lambda: {"method": "vanilla"})
    seed: int = 0
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    conv_template: str = "vicuna_v1"

    @property
    def model_name(self) -> str:
        """The last part of the model's path or id."""
        return Path(self.model).name

    @property
    def label(self) -> str:
        """The name of its files: ``mustdrop_64``, ``mustdrop_64-seed1``."""
        name = self.method if self.retain is None else f"{self.method}_{self.retain}"
        return f"{name}-seed{self.seed}" if self.seed else name

    def identity(self) -> dict:
        """All that can change the result: the settings, and the contents of the model, the task's data and the code.

        The device is what was asked for, not what was found: a cluster's login node must recognise what its GPU nodes
        have finished. What was found is in the result's provenance.
        """
        facts = asdict(self)
        del facts["method"], facts["retain"], facts["benchmark"]  # names; the settings say what they mean
        return {
            **facts,
            "model": self.model_name,
            "model_files": _model_fingerprint(self.model),
            "task_data": _task_fingerprint(self.task),
            "setting_files": [_file_fingerprint(file) for file in _files(self.settings)],
            "code": _code_fingerprint(),
            "versions": provenance.versions(),
        }

    @property
    def key(self) -> str:
        """Short hash of the identity."""
        return provenance.digest(self.identity())

    def file(self, out: Path) -> Path:
        """Where its result is written once it is finished; its samples lie beside, as ``.jsonl``."""
        return out / "cells" / self.task / f"{self.label}-{self.key}.json"

    def finished(self, out: Path) -> bool:
        """Whether there is a result."""
        return self.file(out).is_file()

    def made_by_other_code(self, out: Path) -> Path | None:
        """The newest result that differs from this cell in the code alone: another commit's; None if there is none."""
        mine, found = _without_code(json.loads(json.dumps(self.identity(), default=str))), []
        for file in self.file(out).parent.glob(f"{self.label}-*.json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            if _without_code(content["identity"]) == mine:
                found.append((content["provenance"]["date"], file))
        return max(found)[1] if found else None

    def read(self, out: Path) -> dict:
        """The row of a finished cell."""
        return json.loads(self.file(out).read_text(encoding="utf-8"))["row"]


# Hashing a checkpoint takes a moment; within one process its files are taken not to change.
_model_fingerprint = cache(provenance.model_fingerprint)
_code_fingerprint = cache(provenance.code_fingerprint)


def _without_code(identity: dict) -> dict:
    return {name: value for name, value in identity.items() if name != "code"}


def _files(settings: object) -> list[str]:
    """Array files that settings name, also those of a composition's parts."""
    if isinstance(settings, (dict, list, tuple)):
        values = settings.values() if isinstance(settings, dict) else settings
        return [file for value in values for file in _files(value)]
    return [settings] if isinstance(settings, str) and settings.endswith(".npy") and Path(settings).is_file() else []


def _file_fingerprint(path: str) -> str:
    return provenance.digest(Path(path).read_bytes().hex())


@cache
def _task_fingerprint(task: str) -> str | None:
    from eval.tasks import fingerprint, is_local

    return fingerprint(task) if is_local(task) else None


def write_json(path: Path, content: object) -> None:
    """Write a JSON file in one step: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
