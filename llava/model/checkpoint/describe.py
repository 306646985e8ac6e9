"""One description of every checkpoint that can be loaded, made from the files that are there; names decide nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from llava.model.checkpoint.adapter import ADAPTER_CONFIG, adapter_weights
from llava.model.checkpoint.config import is_hugging_face, translate
from llava.model.checkpoint.files import first_line, float_type_of, read_complete, read_json, read_weights, shape_of
from llava.model.checkpoint.names import PROJECTOR, is_packing, listed, packing_of, translated
from llava.model.checkpoint.places import locate
from llava.model.checkpoint.tower import add_tower

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"


@dataclass
class Checkpoint:
    """What is needed to load one.

    Attributes
    ----------
    path : str
        As the caller gave it, for messages.
    config : PreTrainedConfig
        Our configuration.
    weights : dict
        Tensors, or slices that read theirs when indexed, under our names; a separate vision tower's among them.
    folders : list of Path
        Where a tokenizer and an image processor may lie, the likeliest first.
    adapter : dict
        LoRA matrices to merge into the weights, under our names; empty without an adapter.
    adapter_folder : Path or None
        Where the adapter's settings lie.
    new_projector : bool
        The caller brought a configuration (training): a projector that is wholly absent may start at random.
    hugging_face : bool
        Messages also say how Hugging Face calls a weight.
    """

    path: str
    config: PreTrainedConfig
    weights: dict[str, Any]
    folders: list[Path]
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    adapter_folder: Path | None = None
    new_projector: bool = False
    hugging_face: bool = False

    @property
    def quantised(self) -> bool:
        """Whether weights are stored packed in 4 or 8 bits."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the weights as they are stored."""
        found = [kind for kind in map(float_type_of, self.weights.values()) if kind is not None]
        return max(set(found), key=found.count) if found else torch.float32

    def check(self, expected: Mapping[str, torch.Tensor], tied: set[str]) -> None:
        """Compare the names and shapes of the weights with those of the model; nothing has been loaded yet.

        Parameters
        ----------
        expected : mapping
            The model's `state_dict`, on the meta device.
        tied : set of str
            Names that share another weight's tensor and may be left out.

        Raises
        ------
        ValueError
            If a weight is missing, has no place in the model, or has another shape.
        """
        missing = self._lacking(expected.keys() - self.weights.keys() - tied)
        if missing:
            raise ValueError(f"{self.path}: {len(missing)} weights are missing ({listed(missing, self.hugging_face)})")
        packing = {name for name in self.weights if self.quantised and is_packing(name)}
        if self.quantised and not packing:
            raise ValueError(f"{self.path}: config.json has a quantization_config, but the weights are not packed")
        unknown = self.weights.keys() - expected.keys() - packing
        if unknown:
            raise ValueError(
                f"{self.path}: {len(unknown)} weights have no place in the model of config.json ({listed(unknown)})"
            )
        for name in self.weights.keys() - packing:
            self._check_one(name, tuple(expected[name].shape))

    def _lacking(self, missing: set[str]) -> set[str]:
        """The missing weights that must not be: all, unless the caller starts a new projector."""
        projector = {name for name in missing if name.startswith(PROJECTOR)}
        own = any(name.startswith(PROJECTOR) for name in self.weights)
        if not self.new_projector or not projector or own:
            return missing
        logger.warning("%s: has no projector (%s), a new one starts at random", self.path, listed(projector))
        return missing - projector

    def _check_one(self, name: str, shape: tuple[int, ...]) -> None:
        """The shape of a weight, or what says how it was packed."""
        value = self.weights[name]
        packed = float_type_of(value) is None
        if not self.quantised or not packed:
            if shape_of(value) != shape or packed:
                kind = f"the shape {list(shape_of(value))}" if shape_of(value) != shape else "packed values"
                raise ValueError(f"{self.path}: {name} has {kind}, config.json says {list(shape)}")
            return
        beside = packing_of(name, self.config.quantization_config)
        if beside not in self.weights:
            raise ValueError(f"{self.path}: {name} is packed, but {beside} is missing")


@dataclass
class _Contents:
    """What lies in one folder, before it is known what it belongs to."""

    path: str
    folder: Path
    facts: dict | None
    weights: dict[str, Any]
    projector: bool
    adapter: bool

    @classmethod
    def of(cls, path: str | os.PathLike, name: str = "model_path", **hub) -> _Contents:
        folder = locate(path, name, **hub)
        try:
            return cls._read(str(path), folder)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({first_line(error)})") from None

    @classmethod
    def _read(cls, path: str, folder: Path) -> _Contents:
        facts = read_json(folder / "config.json") if (folder / "config.json").exists() else None
        found = cls(
            path,
            folder,
            facts,
            translated(read_complete(folder), folder),
            (folder / PROJECTOR_FILE).exists(),
            (folder / ADAPTER_CONFIG).exists(),
        )
        if found.weights and found.adapter:
            raise ValueError(f"{found.path}: holds complete weights and an adapter ({ADAPTER_CONFIG}); move one away")
        if found.weights and facts is None:
            raise ValueError(f"{found.path}: holds weights but no config.json")
        if facts is None:
            found.check()
        return found

    def check(self) -> None:
        """ValueError if there are no weights, nor what can be put on those of another folder."""
        if not self.weights and not self.partial:
            raise ValueError(f"{self.path}: {self._instead()}")

    @property
    def partial(self) -> str | None:
        """What a folder holds that needs a language model under it."""
        if self.weights:
            return None
        return "LoRA weights" if self.adapter else "a projector" if self.projector else None

    def _instead(self) -> str:
        """What lies in a folder without weights, and what to do about it."""
        names = sorted(entry.name for entry in self.folder.iterdir())
        shards = [name for name in names if name.startswith("global_step")]
        steps = [name for name in names if name.startswith("checkpoint-")]
        others = [name for name in names if name.endswith((".gguf", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".npz"))]
        if not names:
            return "an empty folder, neither a config.json nor weights"
        if shards:
            return f"holds only DeepSpeed's own shards ({shards[-1]}); collect them with zero_to_fp32.py first"
        if steps:
            return f"holds only training checkpoints ({', '.join(steps[:3])}); name one of them"
        if NON_LORA_FILE in names:
            return f"holds only {NON_LORA_FILE}; the adapter it belongs to ({ADAPTER_CONFIG}) is missing"
        if others:
            return f"holds no weights that can be read ({others[0]}), expected *.safetensors or pytorch_model*.bin"
        what = "neither a folder with a config.json nor weights" if self.facts is None else "holds no weights"
        return f"{what}, expected *.safetensors, pytorch_model*.bin, {PROJECTOR_FILE} or an adapter"

    def beside(self, has_projector: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Whole weights that lie beside those of the language model, and LoRA matrices.

        A complete original checkpoint ships the projector of its first stage beside its own, which is newer.
        """
        whole: dict[str, Any] = {}
        matrices: dict[str, torch.Tensor] = {}
        if self.projector and not has_projector:
            whole |= translated(read_weights(self.folder / PROJECTOR_FILE, mmap=False), PROJECTOR_FILE)
        if self.adapter:
            more, matrices = adapter_weights(self.folder)
            whole |= more
            if (self.folder / NON_LORA_FILE).exists():
                whole |= translated(read_weights(self.folder / NON_LORA_FILE, mmap=False), NON_LORA_FILE)
        return whole, matrices


def describe_checkpoint(
    path: str | os.PathLike,
    config_class: type,
    base: str | os.PathLike | None = None,
    config: PreTrainedConfig | None = None,
    **hub,
) -> Checkpoint:
    """Find out from its files what a folder or a hub id holds.

    Parameters
    ----------
    path : str or path
        Complete weights in the original LLaVA format or Hugging Face's, or only a projector, or only an adapter.
    config_class : type
        Class of our configuration.
    base : str or path, optional
        The language model (or LLaVA) under a projector or an adapter; an adapter's own settings may name it.
    config : PreTrainedConfig, optional
        Takes the place of the checkpoint's (training: a language model that becomes a LLaVA).
    **hub
        As `locate` takes them.

    Raises
    ------
    ValueError
        In one line, if what is there cannot be loaded, belongs to no LLaVA-1.5, or contradicts itself.
    """
    own = _Contents.of(path, **hub)
    made = None if own.facts is None else translate(own.facts, own.path, config_class)
    under = _under(own, base, **hub)
    spare = None if own is under else translate(under.facts, under.path, config_class)
    made = config or made or spare
    packing = getattr(spare, "quantization_config", None)
    if packing is not None:  # it is the base's weights that are packed, whatever an adapter's config.json says
        made.quantization_config = packing
    weights = dict(under.weights)
    whole, matrices = own.beside(has_projector=own is under and any(name.startswith(PROJECTOR) for name in weights))
    weights |= whole
    folders = [own.folder] if under is own else [own.folder, under.folder]
    add_tower(made, weights, folders, spare, **hub)
    own.check()
    adapter_folder = own.folder if matrices else None
    theirs = under.facts is not None and is_hugging_face(under.facts)
    return Checkpoint(str(path), made, weights, folders, matrices, adapter_folder, config is not None, theirs)


def _under(own: _Contents, base: str | os.PathLike | None, **hub) -> _Contents:
    """The contents that hold the language model."""
    if own.partial is None:
        if base is not None:
            raise ValueError(f"model_base is {str(base)!r}: {own.path} holds complete weights and needs no base")
        return own
    if base is None and own.adapter:
        named = read_json(own.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        beside = own.folder / named if isinstance(named, str) and named else own.folder
        base = str(beside) if (beside / "config.json").exists() and beside != own.folder else named
    if not base:
        raise ValueError(f"model_base: {own.path} holds only {own.partial}, name the language model it belongs to")
    under = _Contents.of(base, "model_base", **hub)
    under.check()
    if not under.weights:
        raise ValueError(f"model_base is {under.path!r}: it holds only {under.partial} itself, expected a whole model")
    return under
