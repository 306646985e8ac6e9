"""Where a number comes from: command, code, versions, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from uuid import uuid4

from eval.checkpoints import on_hub

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lmms_eval", "numpy", "pillow", "scipy", "tokenizers")
WEIGHTS = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
NOT_THE_MODEL = (
    "trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin", "all_results.json",
    "train_results.json", "eval_results.json",
)  # fmt: skip
"""What training leaves beside a model."""

POINTERS = {
    "config.json": ("mm_vision_tower", "vision_tower"),
    "adapter_config.json": ("base_model_name_or_path",),
}
"""Fields of configurations that name another checkpoint."""

LARGE = 1 << 24
"""Bytes from which a file's hash is kept."""

NOT_ANSWERING = (
    "__init__.py", "__main__.py", "cell.py", "command.py", "judge.py", "judging.py", "lock.py", "settings.py",
)  # fmt: skip
"""Files of ``eval/run`` that decide no result: what is asked, and what is done with finished ones."""


def digest(value: object) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def code_fingerprint() -> str:
    """Hash of the Python code that decides a result: ``llava``, ``mustdrop`` and the answering part of ``eval``."""
    files = [path for package in ("llava", "mustdrop") for path in (ROOT / package).rglob("*.py")]
    files = [path for path in files if not {"train", "serve"} & set(path.relative_to(ROOT).parts)]
    files += [path for path in (ROOT / "eval" / "run").glob("*.py") if path.name not in NOT_ANSWERING]
    files.append(ROOT / "eval" / "statistics.py")
    hashes = {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return digest(hashes)


def model_fingerprint(model: str) -> str:
    """Hash of what a checkpoint holds, wherever it lies and whatever its folder is called.

    Of a folder, the contents of all files that decide the model, and those of a vision tower or a base model elsewhere
    that its configuration names; of a hub id, the commit, which the hub is asked for if it is not in the cache.

    Large files are read once: their hashes are kept in the user's cache folder until size or time of change differ.
    """
    return digest(_contents(Path(model), ()) if Path(model).is_dir() else ["hub", _hub_commit(model)])


def _contents(folder: Path, above: tuple[Path, ...]) -> dict[str, str]:
    """Hashes of a checkpoint's files by their names inside the folder."""
    facts = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix not in WEIGHTS or path.name in NOT_THE_MODEL or not path.is_file():
            continue
        if any(part.startswith(("checkpoint-", "global_step", ".")) for part in inside.parts[:-1]):
            continue  # other checkpoints of a training run, and what tools keep for themselves
        points = path.name in POINTERS and path.parent == folder
        facts[str(inside)] = _pointing(path, (*above, folder.resolve())) if points else file_hash(path)
    return facts


def _pointing(path: Path, above: tuple[Path, ...]) -> str:
    """Hash of a configuration with what it points to in place of paths; one that cannot be read counts as it is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        named = [name for name in POINTERS[path.name] if isinstance(content.get(name), str)]
    except (OSError, ValueError, AttributeError, RecursionError):
        return file_hash(path)
    content.pop("_name_or_path", None)  # where it was once loaded from
    for name in named:
        elsewhere = next(
            (place for place in (path.parent / content[name], Path(content[name])) if place.is_dir()), None
        )
        if elsewhere is not None and elsewhere.resolve() not in above:
            content[name] = _contents(elsewhere, above)
        elif on_hub(content[name]) and path.name == "adapter_config.json":  # of towers, the name alone is enough
            content[name] = _hub_commit(content[name])
    return digest(content)


def _hub_commit(model: str) -> str:
    """The commit of a model on the hub; its id where neither cache nor hub tell."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent.name
    if constants.HF_HUB_OFFLINE:
        return model
    try:
        return HfApi().model_info(model, timeout=20).sha or model
    except Exception:  # whatever the HTTP library of the day raises
        return model


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents; a large file's is looked up if the file has not changed since it was read."""
    found = path.stat()
    if found.st_size < LARGE:
        return _sha256(path)
    key = digest([str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
    kept = cache_folder() / "hashes" / key
    try:
        known = kept.read_text(encoding="utf-8")
    except (OSError, ValueError):
        known = ""
    if len(known) == 64:
        return known
    known = _sha256(path)
    with suppress(OSError):  # no room or no permission: it will be read once more
        replace_file(kept, known.encode())
    return known


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where what was made once is kept: ``$MUSTDROP_CACHE``, or ``mustdrop`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mustdrop"
    return Path(os.environ.get("MUSTDROP_CACHE") or default).expanduser().absolute()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: it is there whole or not at all, also for runs side by side, and on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}")  # processes of other machines may have our number
    try:
        with naming_file(path):
            temporary.write_bytes(content)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Errors of the machine from inside name a file; those of a full disk name none by themselves."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The checkout's commit, ``-dirty`` if files differ from it; None outside git."""
    described = _git("rev-parse", "HEAD")
    if not described:
        return None
    return described + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def device_name(device: str) -> str:
    """What a device is called; threads included for a CPU, because times depend on them."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def machine() -> dict:
    """How busy the machine is, for whoever reads times: cores, torch's threads, the last minute's load."""
    import torch

    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load}


def provenance(command: Sequence[str], **more) -> dict:
    """The ``provenance`` object of a result file: the command, code, versions, date, and whatever else is given.

    `command` is what follows ``mustdrop``: a command's name and its arguments.
    """
    return {
        "command": shlex.join(["mustdrop", *command]),
        **more,
        "git_commit": git_commit(),
        "code": code_fingerprint(),
        "versions": versions(),
        "machine": machine(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
