"""The benchmarks that can be run, and the local ones made ready for lmms-eval.

A stock benchmark is a task of lmms-eval. A synthetic one is a folder here with a ``documents()`` function and a YAML
template; its data are generated once into a cache folder and then belong to lmms-eval as an ordinary parquet task.
What lmms-eval makes of the answers is read by `question_scores`, `headline` and `statistic`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from string import Template

from eval.provenance import cache_folder, replace_file
from eval.tasks.registry import BENCHMARKS, TASKS, Benchmark, Task, mirrored
from eval.tasks.scores import headline, question_scores, statistic

__all__ = [
    "BENCHMARKS",
    "GROUP",
    "LOCAL",
    "SUITE",
    "TASKS",
    "Benchmark",
    "Task",
    "cache_folder",
    "fingerprint",
    "headline",
    "is_local",
    "mirrored",
    "prepare",
    "question_scores",
    "statistic",
    "training_questions",
]

ROOT = Path(__file__).parent
GENERATOR = ROOT.parents[1] / "llava" / "train" / "mini"
LOCAL = tuple(name for name, task in TASKS.items() if task.synthetic)
SUITE = tuple(name for name in LOCAL if mirrored(name) != name)
"""The synthetic tasks that stand in for benchmarks; the others are for models of a special kind."""
GROUP = "mini"
"""lmms-eval's name for all of `SUITE` at once."""


def is_local(task: str) -> bool:
    """Whether a task, or a group of them, is ours."""
    return task in (*LOCAL, GROUP)


def fingerprint(task: str) -> str:
    """Hash of all that decides a local task's data and scoring: generator, template, libraries that draw."""
    digest = hashlib.sha256()
    if task == GROUP:
        for member in SUITE:
            digest.update(fingerprint(member).encode())
        return digest.hexdigest()[:12]
    generator = [*(GENERATOR / file for file in TASKS[task].generator), ROOT / "existence.py"]
    for path in [*generator, *sorted((ROOT / task).glob("*.py")), ROOT / task / f"{task}.yaml"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for package in ("numpy", "pillow"):
        digest.update(version(package).encode())
    return digest.hexdigest()[:12]


def prepare(task: str) -> Path:
    """Make the data and YAML of a local task, or of the suite, unless the data are there already.

    Parameters
    ----------
    task : str
        One of `LOCAL`, or `GROUP` for all of `SUITE`.

    Returns
    -------
    pathlib.Path
        The folder to give to lmms-eval as ``include_path``.
    """
    folder = _folder(task)
    for member in SUITE if task == GROUP else (task,):
        data = _data(member)
        template = Template((ROOT / member / f"{member}.yaml").read_text(encoding="utf-8"))
        filled = template.substitute(lmms_eval=_stock_tasks(), data=data, cache=data.parent / "datasets")
        replace_file(folder / f"{member}.yaml", filled.encode())
    if task == GROUP:
        replace_file(folder / f"{GROUP}.yaml", f"group: {GROUP}\ntask: [{', '.join(SUITE)}]\n".encode())
    return folder


def training_questions(task: str, count: int) -> list[tuple]:
    """The first ``(PIL image, prompt)`` pairs of a synthetic task's training split, one per picture.

    Its pictures come from the scenes that training drew from, never from the benchmark's.
    """
    documents = importlib.import_module(f"eval.tasks.{task}").documents(max(count, 1), split="train")
    first = {document["scene"]: document for document in reversed(list(documents))}
    pairs = [(document["image"], document.get("prompt", document["question"])) for document in first.values()]
    return pairs[::-1][:count]


def _folder(task: str) -> Path:
    return cache_folder() / f"{task}-{fingerprint(task)}"


def _data(task: str) -> Path:
    """A task's parquet file, generated if it is not there."""
    path = _folder(task) / f"{task}.parquet"
    if not path.is_file():
        _write_parquet(importlib.import_module(f"eval.tasks.{task}").documents(), path, f"{task}: data")
    return path


def _stock_tasks() -> Path:
    """The folder of the installed lmms-eval's tasks, found without importing it."""
    return Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"


def _write_parquet(documents, path: Path, description: str) -> None:
    """Write documents with a PIL ``image`` as parquet; a picture that several questions share is stored once."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    from datasets import Features, Image, List, Value

    from eval.progress import progress

    rows, encoded, last = [], b"", None
    for document in progress(documents, description, unit="question"):
        if document["image"] is not last:
            last = document["image"]
            buffer = BytesIO()
            last.save(buffer, format="PNG", compress_level=0)  # it is read far more often than written
            encoded = buffer.getvalue()
        rows.append({**document, "image": {"bytes": encoded, "path": None}})
    kinds = {int: Value("int64"), str: Value("string"), list: List(Value("string")), dict: Image()}
    features = Features({name: kinds[type(value)] for name, value in rows[0].items()})
    table = arrow.Table.from_pylist(rows, schema=features.arrow_schema)
    buffer = arrow.BufferOutputStream()
    # One dictionary large enough for every picture: repeated pictures become references to it.
    parquet.write_table(table, buffer, use_dictionary=True, dictionary_pagesize_limit=1 << 30, compression="none")
    replace_file(path, buffer.getvalue().to_pybytes())
