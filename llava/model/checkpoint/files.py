"""Weight files: which of a folder belong together, and what is in them, without loading any tensor."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_FORMATS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
_GIT_LFS = b"version https://git-lfs"
_NO_MMAP = "mmap can only be used"  # how torch refuses to map pickles that torch < 1.6 wrote


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError in one line if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, it must be an object")
    return content


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])[:300] if lines else type(error).__name__


def read_complete(folder: Path) -> dict[str, Any]:
    """The weights of a whole model: tensors, or slices that read theirs when they are indexed, by name.

    Returns
    -------
    dict
        Empty if the folder holds no weights of a whole model.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or if there are two sets of weights that differ.
    """
    sets = [files for names in _FORMATS for files in _sets_of_format(folder, *names)]
    if not sets:
        return {}
    first, *others = [(files, read_all(files)) for files in sets]
    for files, weights in others:
        if not _same(first[1], weights):
            raise ValueError(
                f"{folder}: holds two sets of weights that differ, {first[0][0].name} and {files[0].name}; "
                "move one of them away"
            )
    return first[1]


def _sets_of_format(folder: Path, single: str, index: str, shards: str) -> list[list[Path]]:
    """The sets of files, each of which holds a whole model, in one of the two formats."""
    found = [[folder / single]] if (folder / single).exists() else []
    if (folder / index).exists():
        found.append(_indexed(folder / index))
    elif numbered := sorted(folder.glob(shards)):
        found.append(_numbered(folder, numbered))
    return found


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index}: has no weight_map from names of weights to files")
    names = sorted(set(named.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: names {outside[0]!r}, but shards must lie beside their index")
    return _present([index.parent / name for name in names], f"{index.name} names")


def _numbered(folder: Path, shards: list[Path]) -> list[Path]:
    """Shards without an index: their names say how many there must be."""
    stem, total, suffix = re.fullmatch(r"(.*)-\d+-of-(\d+)(\..*)", shards[0].name).groups()
    names = [f"{stem}-{number:05d}-of-{total}{suffix}" for number in range(1, int(total) + 1)]
    return _present([folder / name for name in names], "their names count")


def _present(shards: list[Path], reason: str) -> list[Path]:
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent:
        raise ValueError(
            f"{shards[0].parent}: {len(absent)} of the {len(shards)} weight files that {reason} are missing "
            f"({', '.join(absent[:3])})"
        )
    return shards


def read_all(files: list[Path]) -> dict[str, Any]:
    """The weights of several files, which must not share a name."""
    weights: dict[str, Any] = {}
    for file in files:
        own = read_weights(file)
        if twice := weights.keys() & own.keys():
            raise ValueError(f"{file}: holds {min(twice)} once more, another shard has it already")
        weights |= own
    return weights


def read_weights(path: Path, mmap: bool = True) -> dict[str, Any]:
    """The weights in one file; pickles are read without executing anything in them."""
    try:
        _check_real(path)
        if path.suffix == ".safetensors":
            opened = safe_open(path, framework="pt")
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        weights = _unpickle(path, mmap)
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged, or no file of weights ({first_line(error)})") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path}: holds something else than named tensors")
    return dict(weights)


def _check_real(path: Path) -> None:
    """ValueError for what stands in the place of a file of weights."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, it must be a file of weights")
    with path.open("rb") as file:
        start = file.read(len(_GIT_LFS))
    if not start:
        raise ValueError(f"{path}: is empty")
    if start == _GIT_LFS:
        raise ValueError(f"{path}: is a git-lfs pointer, not the weights; get them with: git lfs pull")


def _unpickle(path: Path, mmap: bool) -> Any:
    settings = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=mmap, **settings)
    except RuntimeError as error:
        if mmap and _NO_MMAP in str(error):
            return torch.load(path, **settings)
        raise


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a tensor or of a slice."""
    return tuple(value.shape if isinstance(value, torch.Tensor) else value.get_shape())


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def float_type_of(value: Any) -> torch.dtype | None:
    """The dtype of a tensor or a slice if it is a float, None for integers (packed weights)."""
    if isinstance(value, torch.Tensor):
        return value.dtype if value.is_floating_point() else None
    return _SAFETENSORS_DTYPES.get(value.get_dtype())


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets have the same names and shapes, and the same first row everywhere: any training shows there."""
    if one.keys() != other.keys() or any(shape_of(one[name]) != shape_of(other[name]) for name in one):
        return False
    return all(torch.equal(_first_row(one[name]), _first_row(other[name])) for name in one)


def _first_row(value: Any) -> torch.Tensor:
    return (value[:1] if shape_of(value) else value[...]).float()
