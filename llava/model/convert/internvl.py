"""An InternVL chat checkpoint as transformers' own `InternVLForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase

from llava.model.checkpoint.files import first_line, read_complete, read_json, shape_of
from llava.model.checkpoint.names import listed
from llava.model.convert import internvl_config, internvl_weights
from llava.model.convert.internvl_processor import closing


def original_facts(folder: Path) -> dict[str, Any] | None:
    """What config.json of an InternVL chat checkpoint holds; None for another folder."""
    facts = read_json(folder / "config.json")
    return facts if facts.get("model_type") == internvl_config.ORIGINAL else None


def load_internvl(
    folder: Path,
    config: InternVLConfig,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any],
) -> InternVLForConditionalGeneration:
    """The model with the checkpoint's weights, all of which are looked over before any is read.

    Parameters
    ----------
    folder : Path
        Of the checkpoint.
    config : InternVLConfig
        Translated, with the id of the image placeholder.
    facts : mapping
        What config.json holds.
    tokenizer
        Of the checkpoint, for the token that ends answers.
    arguments : mapping
        For transformers' `from_pretrained`.

    Raises
    ------
    ValueError
        In one line, if weights are missing, have no place or another shape.
    """
    weights = internvl_weights.translated(read_complete(folder), config)
    check_weights(weights, config, folder)
    model, info = InternVLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **arguments
    )
    if random := {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}:
        raise ValueError(f"{folder}: {len(random)} weights could not be loaded ({listed(random)})")
    model.name_or_path = model.config._name_or_path = str(folder)
    model.generation_config = _generation(folder, facts, tokenizer)
    return model


def check_weights(weights: Mapping[str, Any], config: InternVLConfig, folder: Path) -> None:
    """Raise ValueError, in one line, if weights are not exactly those of the model that a configuration describes."""
    with torch.device("meta"):
        wanted = InternVLForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    missing = wanted.keys() - weights.keys()
    missing |= {name for name in wanted.keys() & weights.keys() if shape_of(weights[name]) != wanted[name].shape}
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights are missing or of another shape ({listed(missing)})")
    if unknown := weights.keys() - wanted.keys():
        raise ValueError(f"{folder}: {len(unknown)} weights have no place in the model ({listed(unknown)})")


def _generation(folder: Path, facts: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The folder's settings of `generate()`; an answer ends with its template's token, or the tokenizer's."""
    settings = GenerationConfig()
    if (folder / "generation_config.json").is_file():
        try:
            settings = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'generation_config.json'}: cannot be read ({first_line(error)})") from None
    ends = (tokenizer.convert_tokens_to_ids(closing(facts["template"])), tokenizer.eos_token_id)
    settings.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
    settings.pad_token_id = tokenizer.pad_token_id
    return settings
