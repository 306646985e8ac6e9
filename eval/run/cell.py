"""A cell: one model, one method at one budget, one task. What it is, what it is called, where its result lies."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

from eval import provenance
from eval.run.records import BadRecord, read_record


@dataclass(frozen=True)
class Cell:
    """All that is asked for in one evaluation.

    Attributes
    ----------
    model : str
        Folder or hub id of a checkpoint.
    model_base, load_4bit, load_8bit, protocol
        As ``llava.model.builder.load_pretrained_model`` takes them.
    benchmark, task : str
        A key of ``eval.tasks.BENCHMARKS`` and the task of lmms-eval that is run for it.
    method : str
        Name in tables.
    retain : int, float or None
        Wanted average number of vision tokens, or share of an image's, None where none was asked for.
    settings : dict
        What ``mustdrop.load_reducer`` takes.
    seed : int
        Of everything random.
    limit : int or None
        Only the first questions.
    batch_size : int
        Prompts per batch.
    device, device_map, dtype, attn_implementation, conv_template
        As ``eval.run.inference.LoadedModel.load`` takes them.
    skip_unfit : bool
        Whether questions that cannot be asked are skipped and counted, or end the evaluation.
    """

    model: str
    benchmark: str
    task: str
    method: str = "vanilla"
    retain: int | float | None = None
    settings: dict = field(default_factory=lambda: {"method": "vanilla"})
    seed: int = 0
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    conv_template: str = "vicuna_v1"
    skip_unfit: bool = False
    model_base: str | None = None
    load_4bit: bool = False
    load_8bit: bool = False
    protocol: str | None = None

    @property
    def model_name(self) -> str:
        """The last part of the model's path or id; quantised on the way in, or on other tiles, it is another model."""
        bits = "-4bit" if self.load_4bit else "-8bit" if self.load_8bit else ""
        return Path(self.model).name + bits + ("-flat" if self.protocol == "flat" else "")

    @property
    def label(self) -> str:
        """The name of its files: ``mustdrop_64``, ``mustdrop_64-seed1``."""
        name = self.method if self.retain is None else f"{self.method}_{self.retain}"
        return f"{name}-seed{self.seed}" if self.seed else name

    def identity(self) -> dict:
        """All that can change the result: the settings, and the contents of the model, the task's data and the code.

        No name and no path is among them: a model's folder, a method's YAML file or an array may be moved and renamed.
        The device is what was asked for, not what was found: a cluster's login node must recognise what its GPU nodes
        have finished. What was found is in the result's provenance.
        """
        facts = asdict(self)
        names = ["model", "model_base", "method", "retain", "benchmark"]  # contents and settings say what they mean
        usual = {"load_4bit": (False,), "load_8bit": (False,), "protocol": (None, "model")}
        for name in [*names, *(name for name, values in usual.items() if facts[name] in values)]:
            del facts[name]
        return {
            **facts,
            "settings": _by_contents(self.settings),
            "model_files": self._model_files(),
            "task_data": _task_fingerprint(self.task),
            "code": _code_fingerprint(),
            "versions": provenance.versions(),
        }

    def _model_files(self) -> str:
        own = _model_fingerprint(self.model)
        return own if self.model_base is None else provenance.digest([own, _model_fingerprint(self.model_base)])

    @property
    def key(self) -> str:
        """Short hash of the identity."""
        return provenance.digest(self.identity())

    def file(self, out: Path) -> Path:
        """Where its result is written once it is finished; its samples lie beside, as ``.jsonl``."""
        return out / "cells" / self.task / f"{self.label}-{self.key}.json"

    def finished(self, out: Path) -> bool:
        """Whether there is a result: complete, and of this very cell."""
        return self.file(out).is_file() and self.defect(out) is None

    def defect(self, out: Path) -> str | None:
        """Why what lies in the result's place is none, in one line; None if it is one, or nothing is there."""
        file = self.file(out)
        if not os.path.lexists(file):
            return None
        try:
            found = read_record(file)
        except BadRecord as error:
            return str(error)
        if found["identity"] != _as_read(self.identity()) or found["row"]["task"] != self.task:
            return f"results: {str(file)!r} is the result of something else"
        return None

    def check_place(self, out: Path) -> None:
        """Raise ValueError if the result could not be written: a folder is in its way, or a file in its folder's."""
        file, pictures = self.file(out), out / "pictures"
        for path in (file, file.with_suffix(".jsonl"), out / "summary.json", out / "summary.md"):
            if path.is_dir():
                raise ValueError(f"OUT: {str(path)!r} is a folder, where a result is to be written; move it away")
        for folder in (file.parent.parent, file.parent, pictures, pictures / self.task):
            if os.path.lexists(folder) and not folder.is_dir():
                raise ValueError(f"OUT: {str(folder)!r} is no folder, where results are to be written; move it away")

    def made_by_other_code(self, out: Path) -> Path | None:
        """The newest result that differs from this cell in the code alone: another commit's; None if there is none."""
        mine, found = _without_code(_as_read(self.identity())), []
        for file in self.file(out).parent.glob(f"{glob.escape(self.label)}-*.json"):
            with suppress(BadRecord):
                content = read_record(file)
                if _without_code(content["identity"]) == mine and content["row"]["task"] == self.task:
                    found.append((content["provenance"].get("date", ""), file))
        return max(found)[1] if found else None

    def read(self, out: Path) -> dict:
        """The row of a finished cell, under the model's present name; BadRecord if there is none."""
        return {**read_record(self.file(out))["row"], "model": self.model_name}


# Hashing a checkpoint takes a moment; within one process its files are taken not to change.
_model_fingerprint = cache(provenance.model_fingerprint)
_code_fingerprint = cache(provenance.code_fingerprint)


def expand(
    common: Mapping, tasks: Iterable[tuple[str, str]], seeds: Iterable[int], methods: Sequence[Mapping]
) -> list[Cell]:
    """What a run and a sweep consist of: per task and seed the untouched model, then every method at its budget.

    Parameters
    ----------
    common : mapping
        Fields of every cell: checkpoint, limit, batch size, how the model is loaded.
    tasks : iterable of (benchmark, task)
        As `eval.run.settings.check_tasks` gives them.
    seeds : iterable of int
        Of everything random.
    methods : sequence of mapping
        ``method``, ``retain`` and ``settings`` of each.
    """
    return [
        Cell(**common, benchmark=benchmark, task=task, seed=seed, **method)
        for (benchmark, task), seed in product(tasks, seeds)
        for method in ({}, *methods)
    ]


def _without_code(identity: dict) -> dict:
    return {name: value for name, value in identity.items() if name != "code"}


def _as_read(identity: dict) -> dict:
    """An identity as it comes back from its JSON file."""
    return json.loads(json.dumps(identity, default=str))


def _by_contents(settings: object) -> object:
    """Settings with the contents of the files that they name, arrays and the YAML files of parts, instead of paths."""
    if isinstance(settings, Mapping):
        return {name: _by_contents(value) for name, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [_by_contents(value) for value in settings]
    if (
        not isinstance(settings, str)
        or not settings.endswith((".npy", ".yaml", ".yml"))
        or not Path(settings).is_file()
    ):
        return settings
    if settings.endswith(".npy"):
        return provenance.file_hash(Path(settings))
    from mustdrop.config import read_settings  # imports torch, which a wrong argument should not wait for

    return _by_contents(read_settings(Path(settings)))


@cache
def _task_fingerprint(task: str) -> str | None:
    from eval.tasks import fingerprint, is_local

    return fingerprint(task) if is_local(task) else None


def write_json(path: Path, content: object) -> None:
    """Write a JSON file in one step: it is there whole or not at all."""
    provenance.replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
