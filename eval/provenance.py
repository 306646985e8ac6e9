"""Where a number comes from: command, code, versions, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lmms_eval", "numpy", "pillow", "scipy", "tokenizers")
WEIGHTS = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")


def digest(value: object) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def code_fingerprint() -> str:
    """Hash of the Python code that decides a result: ``llava``, ``mustdrop`` and the answering part of ``eval``."""
    files = [path for package in ("llava", "mustdrop") for path in (ROOT / package).rglob("*.py")]
    files = [path for path in files if "train" not in path.relative_to(ROOT).parts]
    files += [ROOT / "eval" / name for name in ("inference.py", "lmms.py", "rows.py", "runner.py", "samples.py")]
    hashes = {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return digest(hashes)


def model_fingerprint(model: str) -> str:
    """Hash of a checkpoint folder's contents, of a hub id's cached revision, or of the bare id.

    Weights above 100 MB count by size and time of change, so that a large model is not read twice.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        return digest([model, Path(cached).resolve().name if isinstance(cached, str) else None])
    facts = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in WEIGHTS:
            size = path.stat().st_size
            small = size < 100_000_000
            facts[str(path.relative_to(folder))] = (
                hashlib.sha256(path.read_bytes()).hexdigest() if small else [size, path.stat().st_mtime]
            )
    return digest(facts)


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

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(load, 2)}


def provenance(command: Sequence[str], **more) -> dict:
    """The ``provenance`` object of a result file: the command, code, versions, date, and whatever else is given.

    `command` is what follows ``python -m``: module and arguments.
    """
    return {
        "command": shlex.join(["python", "-m", *command]),
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
