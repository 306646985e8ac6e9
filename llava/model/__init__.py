"""LLaVA's models."""

from llava.model.language_model.compiled import compile_model
from llava.model.language_model.early import drop_early
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM", "compile_model", "drop_early"]
