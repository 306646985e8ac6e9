"""The arguments of `load_pretrained_model`, looked over before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from llava.model.checkpoint.quantised import need_bitsandbytes

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention", "cpu_matmul")
_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_TRANSFORMERS = ("max_memory", "offload_folder", "offload_buffers", "quantization_config")
# LLaVA's and older releases' arguments that change nothing here.
_IGNORED = ("multimodal", "low_cpu_mem_usage")
_READ = ("torch_dtype", "dtype", "attn_implementation", "use_flash_attn", "use_flash_attention_2")
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class LoadSettings:
    """Arguments for transformers' `from_pretrained`, and for the hub."""

    arguments: dict[str, Any]
    hub: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, load_8bit: bool, load_4bit: bool, device_map: Any, device: Any, kwargs: Mapping[str, Any]):
        """Settings from arguments as `load_pretrained_model` takes them.

        Raises
        ------
        TypeError
            If a name is unknown.
        ValueError
            If a value is, or cannot be had on this machine.
        """
        known = (*_READ, *_HUB, *_TRANSFORMERS, *_IGNORED)
        if unknown := [name for name in kwargs if name not in known]:
            known = ", ".join(known)
            raise TypeError(
                f"load_pretrained_model() got an unexpected keyword argument {unknown[0]!r}, known: {known}"
            )
        on_cpu = str(device_map if device is None else device) in ("cpu", "{'': 'cpu'}")
        accelerated = torch.cuda.is_available() and not on_cpu
        dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or (torch.float16 if accelerated else torch.float32)
        arguments = {name: kwargs[name] for name in _TRANSFORMERS if kwargs.get(name) is not None}
        arguments["dtype"] = _dtype(dtype)
        arguments["attn_implementation"] = _attention(kwargs)
        arguments["device_map"] = _device_map(device_map, device, accelerated)
        if load_8bit or load_4bit:
            if "quantization_config" in arguments or (load_8bit and load_4bit):
                raise ValueError("load_8bit, load_4bit, quantization_config: give at most one of them")
            arguments["quantization_config"] = _quantisation(load_8bit, load_4bit, arguments["dtype"])
        return cls(arguments, {name: kwargs[name] for name in _HUB if name in kwargs})


def _quantisation(load_8bit: bool, load_4bit: bool, dtype: Any) -> BitsAndBytesConfig:
    need_bitsandbytes("load_8bit" if load_8bit else "load_4bit")
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float16
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit, load_in_4bit=load_4bit, bnb_4bit_compute_dtype=compute, bnb_4bit_quant_type="nf4"
    )


def _dtype(value: Any) -> torch.dtype | str:
    """A floating dtype, by itself or by name; "auto" is what the checkpoint says."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value == "auto" or (isinstance(found, torch.dtype) and found in (torch.float16, torch.bfloat16, torch.float32)):
        return value if value == "auto" else found
    raise ValueError(f"torch_dtype: got {value!r}, expected auto, float16, bfloat16 or float32")


def _attention(kwargs: Mapping[str, Any]) -> str:
    flash = kwargs.get("use_flash_attn") or kwargs.get("use_flash_attention_2")
    name = "flash_attention_2" if flash else kwargs.get("attn_implementation") or "sdpa"
    if name not in ATTENTION:
        raise ValueError(f"attn_implementation: got {name!r}, expected one of {', '.join(ATTENTION)}")
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        given = "use_flash_attn" if flash else "attn_implementation"
        raise ValueError(f"{given}: flash-attn is not installed or cannot run here; pip install '.[flash]', or sdpa")
    return name


def _device(field: str, value: Any) -> torch.device:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{field}: got {value!r}, expected cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{field}: got {value!r}, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def _device_map(device_map: Any, device: Any, accelerated: bool) -> Any:
    """A device map that can be used here; None for the CPU, where nothing needs to be spread."""
    if device is not None:
        return {"": _device("device", device)}
    if device_map is None or (device_map in _SPREAD and not accelerated):
        return None
    if isinstance(device_map, dict):
        for place in device_map.values():
            if place not in ("disk", "meta"):
                _device("device_map", place)
        return device_map
    return device_map if device_map in _SPREAD else {"": _device("device_map", device_map)}
