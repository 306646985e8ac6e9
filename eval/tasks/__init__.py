"""The benchmarks that can be run, and the local ones made ready for lmms-eval.

A stock benchmark is a task of lmms-eval. A synthetic one is a folder here with a ``documents()`` function and a YAML
template; its data are generated once into a cache folder and then belong to lmms-eval as an ordinary parquet task.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from string import Template

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A benchmark under the name its script uses.

    Attributes
    ----------
    stock : str
        lmms-eval's task, for real checkpoints.
    mini : str
        The synthetic task that stands in for it when the model is the embedded one.
    metric : str
        The per-sample score, 0 or 1, that lmms-eval computes and whose mean is the accuracy.
    gated : bool
        Whether lmms-eval downloads its data only with a Hugging Face token.
    """

    stock: str
    mini: str
    metric: str
    gated: bool = False


BENCHMARKS = {"gqa": Benchmark(stock="gqa", mini="mini_gqa", metric="exact_match", gated=True)}


def cache_folder() -> Path:
    """Where generated data are kept: ``$MUSTDROP_CACHE``, or ``mustdrop`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mustdrop"
    return Path(os.environ.get("MUSTDROP_CACHE") or default).expanduser().absolute()


def is_local(task: str) -> bool:
    """Whether a task is one of ours."""
    return (ROOT / task / f"{task}.yaml").is_file()


def fingerprint(task: str) -> str:
    """Hash of all that decides what a local task's data and scoring are: generator, template, libraries that draw."""
    generator = [ROOT.parents[1] / "llava" / "train" / "mini" / name for name in ("scenes.py", "questions.py")]
    digest = hashlib.sha256()
    for path in [*generator, *sorted((ROOT / task).glob("*.py")), ROOT / task / f"{task}.yaml"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for package in ("numpy", "pillow"):
        digest.update(version(package).encode())
    return digest.hexdigest()[:12]


def prepare(task: str) -> Path:
    """Make a local task's data and YAML, unless they are there already.

    Parameters
    ----------
    task : str
        Name of a folder of ``eval/tasks``.

    Returns
    -------
    pathlib.Path
        The folder to give to lmms-eval as ``include_path``.
    """
    folder = cache_folder() / f"{task}-{fingerprint(task)}"
    data = folder / f"{task}.parquet"
    if not data.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write_parquet(importlib.import_module(f"eval.tasks.{task}").documents(), data, f"{task}: data")
    template = Template((ROOT / task / f"{task}.yaml").read_text(encoding="utf-8"))
    filled = template.substitute(gqa=_stock_yaml("gqa"), data=data, cache=folder / "datasets")
    _replace(folder / f"{task}.yaml", filled.encode())
    return folder


def _stock_yaml(task: str) -> Path:
    """The YAML of a task inside the installed lmms-eval, found without importing it."""
    package = importlib.util.find_spec("lmms_eval")
    return Path(package.submodule_search_locations[0]) / "tasks" / task / f"{task}.yaml"


def _write_parquet(documents, path: Path, description: str) -> None:
    """Write documents with a PIL ``image`` as parquet; a picture that several questions share is stored once."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    from datasets import Features, Image, Value

    from eval.progress import progress

    rows, encoded, last = [], b"", None
    for document in progress(documents, description, unit="question"):
        if document["image"] is not last:
            last = document["image"]
            buffer = BytesIO()
            last.save(buffer, format="PNG", compress_level=1)
            encoded = buffer.getvalue()
        rows.append({**document, "image": {"bytes": encoded, "path": None}})
    kinds = {int: "int64", str: "string"}
    features = Features(
        {name: Image() if name == "image" else Value(kinds[type(value)]) for name, value in rows[0].items()}
    )
    table = arrow.Table.from_pylist(rows, schema=features.arrow_schema)
    buffer = arrow.BufferOutputStream()
    # One dictionary large enough for every picture: repeated pictures become references to it.
    parquet.write_table(table, buffer, use_dictionary=True, dictionary_pagesize_limit=1 << 30, compression="none")
    _replace(path, buffer.getvalue().to_pybytes())


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step, so that runs side by side never see half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
