"""The benchmarks that can be run, and the local ones made ready for lmms-eval.

A stock benchmark is a task of lmms-eval. A synthetic one is a folder here with a ``documents()`` function and a YAML
template; its data are generated once into a cache folder and then belong to lmms-eval as an ordinary parquet task.
Benchmarks about videos are read from folders in their authors' form, see ``video_qa``; so is the synthetic one.
What lmms-eval makes of the answers is read by `question_scores`, `headline` and `statistic`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from string import Template

from eval.provenance import cache_folder, replace_file
from eval.tasks import video_qa
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
GENERATOR = ROOT.with_name("mini")
LOCAL = tuple(name for name, task in TASKS.items() if task.synthetic)
SUITE = tuple(name for name in LOCAL if mirrored(name) != name and not TASKS[name].videos)
"""The synthetic tasks that stand in for benchmarks of images; the others are for models of a special kind."""
GROUP = "mini"
"""lmms-eval's name for all of `SUITE` at once."""

NEW_TOKENS = {True: 8, False: 1024}
"""Longest answer to a question about a video, of a synthetic task and of the others."""


def is_local(task: str) -> bool:
    """Whether a task, or a group of them, is ours."""
    return task in (*LOCAL, GROUP) or (task in TASKS and TASKS[task].videos)


def fingerprint(task: str) -> str:
    """Hash of all that decides a local task's data and scoring: generator, template, libraries that draw."""
    digest = hashlib.sha256()
    if task == GROUP:
        for member in SUITE:
            digest.update(fingerprint(member).encode())
        return digest.hexdigest()[:12]
    if TASKS[task].videos:
        return _video_fingerprint(task)
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
    if task != GROUP and TASKS[task].videos:
        return _prepare_videos(task, folder)
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


def _prepare_videos(task: str, folder: Path) -> Path:
    """Join a video benchmark's questions and answers, and fill in its YAML."""
    source = _video_folder(task)
    data = folder / f"{task}.jsonl"
    lines = (json.dumps(document) for document in video_qa.read(*source))
    replace_file(data, "".join(f"{line}\n" for line in lines).encode())
    template = Template((ROOT / "video_qa" / "video_qa.yaml").read_text(encoding="utf-8"))
    longest = NEW_TOKENS[TASKS[task].synthetic]
    filled = template.substitute(task=task, data=data, cache=folder / "datasets", new_tokens=longest)
    replace_file(folder / f"{task}.yaml", filled.encode())
    return folder


def _video_folder(task: str) -> tuple[Path, str]:
    """A video benchmark's folder, which is made if it is synthetic, and the folder of the videos in it."""
    if video_qa.is_of_files(task):
        return video_qa.folder_of(task), video_qa.SOURCES[task].videos
    made = _folder(task) / "benchmark"
    importlib.import_module(f"eval.tasks.{task}").write(made)
    return made, "videos"


def _video_fingerprint(task: str) -> str:
    """Hash of a video benchmark's questions, answers and the sizes of its videos, or of what generates them."""
    digest = hashlib.sha256()
    files = [*sorted((ROOT / "video_qa").glob("*.py")), ROOT / "video_qa" / "video_qa.yaml"]
    if video_qa.is_of_files(task):
        folder = video_qa.folder_of(task)
        files += [folder / video_qa.QUESTIONS, folder / video_qa.ANSWERS]
        digest.update(repr(video_qa.video_sizes(video_qa.read(*_video_folder(task)))).encode())
    else:
        files += [GENERATOR / "scenes.py", *sorted(GENERATOR.glob("clip*.py")), ROOT / task / "__init__.py"]
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr([version(package) for package in ("numpy", "pillow", "av")]).encode())
    return digest.hexdigest()[:12]


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
