"""From a description to a model: weights are compared with it first, then loaded, adapted and quantised."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llava.model.checkpoint.adapter import merge_adapter
from llava.model.checkpoint.describe import Checkpoint
from llava.model.checkpoint.files import first_line
from llava.model.checkpoint.names import listed

logger = logging.getLogger(__name__)

PLAIN = ("lm_head", "model.mm_projector", "model.vision_tower")
"""Modules that quantisation leaves alone."""


def check_weights(model_class: type[PreTrainedModel], checkpoint: Checkpoint) -> None:
    """Compare a description's weights with the model that its configuration describes; nothing is loaded.

    Raises
    ------
    ValueError
        In one line, if the weights are not exactly those of the model.
    """
    try:
        with torch.device("meta"):
            empty = model_class(checkpoint.config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{checkpoint.path}: config.json describes no model ({first_line(error)})") from None
    tied = set(empty._tied_weights_keys or ()) if checkpoint.config.tie_word_embeddings else set()
    checkpoint.check(empty.state_dict(), tied)


def load_weights(model_class: type[PreTrainedModel], checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """A model with the weights that a description holds, which `check_weights` has looked over.

    Parameters
    ----------
    model_class : type
        Its `from_pretrained` is transformers' in the end.
    checkpoint : Checkpoint
        From `describe_checkpoint`.
    **kwargs
        As transformers' `from_pretrained` takes them.

    Raises
    ------
    ValueError
        If a weight could not be loaded.
    """
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or dtype or "auto"
    kwargs["dtype"] = _stored_dtype(checkpoint) if dtype == "auto" else dtype
    wants_info = kwargs.pop("output_loading_info", False)
    quantise = kwargs.pop("quantization_config", None)
    if quantise is not None or checkpoint.quantised:
        _say_once("bitsandbytes.autograd._functions")
    if quantise is not None and checkpoint.quantised:
        quantise = None  # asked for once more; `load_pretrained_model` has compared the two
    if checkpoint.adapter and quantise is not None:
        _merge_before_packing(model_class, checkpoint, **kwargs)
    model, info = _load(model_class, checkpoint, **({} if quantise is None else _packed(quantise)), **kwargs)
    if checkpoint.adapter:
        model = merge_adapter(model, checkpoint.adapter_folder, checkpoint.adapter)
    model.name_or_path = model.config._name_or_path = checkpoint.path
    return (model, info) if wants_info else model


def _say_once(name: str) -> None:
    """Let a logger give every message once: bitsandbytes says for every layer and token that 8 bits cast to float16."""
    said: set[str] = set()
    logging.getLogger(name).addFilter(lambda record: record.msg not in said and not said.add(record.msg))


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    stated = getattr(checkpoint.config, "dtype", None)
    return stated if isinstance(stated, torch.dtype) and stated.is_floating_point else checkpoint.dtype


def _packed(quantise: Any) -> dict:
    """Arguments for quantisation on the way in, which leaves tower, projector and head alone."""
    quantise.llm_int8_skip_modules = sorted({*PLAIN, *(quantise.llm_int8_skip_modules or [])})
    return {"quantization_config": quantise}


def _load(model_class: type[PreTrainedModel], checkpoint: Checkpoint, **kwargs: Any) -> tuple[PreTrainedModel, dict]:
    weights = checkpoint.weights
    if is_deepspeed_zero3_enabled():
        weights = {name: value[...] for name, value in weights.items()}
    inherited = PreTrainedModel.from_pretrained.__func__  # ours, which got here, overrides it
    model, info = inherited(
        model_class, None, config=checkpoint.config, state_dict=weights, output_loading_info=True, **kwargs
    )
    random = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    if random and not (checkpoint.new_projector and all("mm_projector" in name for name in random)):
        raise ValueError(f"{checkpoint.path}: {len(random)} weights could not be loaded ({listed(random)})")
    _read_generation_config(model, checkpoint)
    return model, info


def _merge_before_packing(model_class: type[PreTrainedModel], checkpoint: Checkpoint, **kwargs: Any) -> None:
    """Merge an adapter while the weights are whole: merging into packed ones would round twice."""
    model, _ = _load(model_class, checkpoint, **{**kwargs, "device_map": None})
    merged = merge_adapter(model, checkpoint.adapter_folder, checkpoint.adapter)
    checkpoint.weights, checkpoint.adapter = dict(merged.state_dict()), {}


def _read_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    for folder in checkpoint.folders:
        if (folder / "generation_config.json").is_file():
            try:
                model.generation_config = GenerationConfig.from_pretrained(str(folder))
            except (OSError, ValueError, TypeError, AttributeError) as error:
                place = folder / "generation_config.json"
                raise ValueError(f"{place}: cannot be read ({first_line(error)})") from None
            return


@contextmanager
def valid_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Leave out, while a model is saved, sampling settings of a model that does not sample.

    Vicuna ships some; transformers ignores them in `generate` and refuses to save them.
    """
    before, cleaned = model.generation_config, GenerationConfig.from_dict(model.generation_config.to_dict())
    if not cleaned.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(cleaned, name, None)
    model.generation_config = cleaned
    try:
        yield
    finally:
        model.generation_config = before
