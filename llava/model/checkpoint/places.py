"""Where a checkpoint lies: a folder, or a hub id, whose files are fetched (or found in the cache) into a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from llava.model.checkpoint.files import first_line

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_READ = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
_PICKLED = "pytorch_model*"


def locate(path: str | os.PathLike, field: str = "model_path", expected: str | None = None, **hub) -> Path:
    """The folder of a checkpoint.

    Parameters
    ----------
    path : str or path
        A folder or a hub id.
    field : str
        What to call it in messages.
    expected : str, optional
        What should have been there, for messages.
    **hub
        `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, as in transformers.

    Raises
    ------
    ValueError
        If there is no such folder and no such model on the hub or in its cache.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{field}: got {path!r}, expected a folder or a hub id")
    folder = Path(path).expanduser()
    if os.path.isdir(folder):
        return folder
    if os.path.lexists(folder):
        raise ValueError(f"{field} is {str(path)!r}: a file, it must be the folder of a checkpoint")
    expected = expected or "neither a folder with a config.json nor a reachable hub model"
    if not _HUB_ID.fullmatch(str(path)):
        raise ValueError(f"{field} is {str(path)!r}: {expected}")
    try:
        return Path(_fetch(str(path), **hub))
    except (OSError, ValueError) as error:
        raise ValueError(f"{field} is {str(path)!r}: {expected} ({first_line(error)})") from None


def _fetch(repository: str, **hub) -> str:
    """Files of a model on the hub; pickles of a whole model only where it has no safetensors."""
    folder = snapshot_download(repository, allow_patterns=_READ, ignore_patterns=[_PICKLED], **hub)
    if not any(Path(folder).glob("*model*.safetensors")):
        snapshot_download(repository, allow_patterns=[_PICKLED], **hub)
    return folder
