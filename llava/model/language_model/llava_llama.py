"""LLaVA on a LLaMA decoder: images and text in, text out; the forward pass and the generate loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from llava.model.checkpoint import describe_checkpoint
from llava.model.checkpoint.load import check_weights, load_weights, valid_generation_config
from llava.model.language_model.arguments import check_generation, new_tokens, one_cache
from llava.model.language_model.cache import CACHE_NAME, VisionCache
from llava.model.language_model.decoder import LlavaConfig, LlavaLlamaModel
from llava.model.language_model.loop import Record
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.masks import labels_of
from llava.model.prompts import Prompt, text_prompt
from mustdrop.hooks import carrying

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM", "LlavaLlamaModel"]

logger = logging.get_logger(__name__)

_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_FOREIGN = ("subfolder", "variant", "gguf_file", "ignore_mismatched_sizes", "key_mapping", "state_dict")


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    """LLaVA-1.5: images and text in, text out.

    `from_pretrained` reads original LLaVA checkpoints (the vision tower inside or in a CLIP folder or hub id of its
    own) and Hugging Face's `LlavaForConditionalGeneration`; `save_pretrained` writes the former, complete in itself.
    """

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_hooks()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, config=None, model_base=None, **kwargs):
        """As in transformers, from the description that `describe_checkpoint` makes of the folder or hub id.

        Parameters
        ----------
        pretrained_model_name_or_path : str or path
            Complete weights of either format, or only a projector, or only an adapter.
        config : LlavaConfig, optional
            By default the checkpoint's own, translated if it is Hugging Face's. With a configuration of the caller's, a
            projector that is wholly absent starts at random (training).
        model_base : str or path, optional
            The language model under a projector or an adapter.
        **kwargs
            As transformers takes them: `dtype`, `device_map`, `attn_implementation`, `revision`, ...

        Raises
        ------
        ValueError
            In one line: nothing is left random, ignored or guessed without a word.
        """
        if foreign := [name for name in _FOREIGN if kwargs.get(name)]:
            raise ValueError(f"{foreign[0]}: not taken here, what a folder holds is found from its files")
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        checkpoint = describe_checkpoint(pretrained_model_name_or_path, LlavaConfig, model_base, config, **hub)
        check_weights(cls, checkpoint)
        return load_weights(cls, checkpoint, **kwargs)

    def save_pretrained(self, save_directory, *, save_original_format: bool = False, **kwargs):
        """As in transformers, under our own names of weights whatever format they were loaded from.

        The image processor that the model was loaded with is saved beside them.
        """
        tower = self.get_vision_tower()
        with valid_generation_config(self):
            super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)
        if tower is not None and tower.image_processor is not None and kwargs.get("is_main_process", True):
            tower.image_processor.save_pretrained(save_directory)

    def get_model(self) -> LlavaLlamaModel:
        """The decoder with its vision tower and projector."""
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: VisionCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        return_dict: bool | None = None,
        *,
        cache: VisionCache | None = None,
        prompt: Prompt | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss when labels are given.

        Parameters
        ----------
        input_ids : int64 `[batch, length]`
            With -200 where an image goes; or new ids when the cache holds a prompt.
        attention_mask : `[batch, length]`, or `[batch, 1, length, length]` together with `inputs_embeds`
            Zero (False) for padding; a 4-D mask says which key each query sees, for several questions packed into one
            sequence.
        position_ids : int64 `[batch, length]`
            Only read together with `inputs_embeds`.
        past_key_values, cache : VisionCache
            Two names for the cache, as transformers has them.
        inputs_embeds : `[batch, length, width]`
            Embeddings of the caller's own instead of ids; taken as text.
        labels : int64 `[batch, length]`
            -100 where there is nothing to predict.
        use_cache, output_attentions, output_hidden_states, return_dict : bool
            As in transformers, with the configuration's as defaults. Attention probabilities need eager attention.
        images, image_sizes
            As `splice` takes them; LLaVA-1.5 does not use the sizes (width, height).
        prompt : Prompt
            Used by `generate`: a prompt that is already spliced; it serves one forward pass.
        logits_to_keep : int
            Compute logits of the last so many positions only; 0 for all.
        num_items_in_batch : int
            What the loss is divided by, see transformers' Trainer.

        Raises
        ------
        ValueError
            If the arguments do not go together; the message names one.
        """
        cache = one_cache(past_key_values, cache)
        record = self._record(output_attentions, output_hidden_states)
        tokens = state = None
        if cache is not None and cache.filled:
            inputs_embeds = self._new_embeds(input_ids, inputs_embeds, images)
        else:
            if prompt is None:
                shown = images, image_sizes
                prompt = self._prompt(input_ids, attention_mask, position_ids, inputs_embeds, labels, *shown)
                self.check_positions(prompt)
            state, labels = prompt.begin(), prompt.labels
            if labels is None and isinstance(logits_to_keep, int):
                record.rows = logits_to_keep or None
            inputs_embeds = prompt.embeds if inputs_embeds is None else inputs_embeds
            tokens = prompt.tokens.repeated(len(inputs_embeds))
            if cache is None and self._caches(use_cache):
                cache = VisionCache(self.config)
        hidden = self.model(
            inputs_embeds,
            tokens,
            state,
            cache,
            attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None,
            record,
        )
        logits = self.lm_head(
            hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        )
        loss = None
        if labels is not None:
            extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            labels = labels_of(state.tokens_out[-1], labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **extra)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=None if record.hidden is None else tuple(record.hidden),
            attentions=None if record.attentions is None else tuple(record.attentions),
            **{CACHE_NAME: cache},
        )
        return output.to_tuple() if return_dict is False else output

    accepts_loss_kwargs = True  # says to transformers' Trainer that forward takes num_items_in_batch

    def _record(self, attentions: bool | None, hidden: bool | None) -> Record:
        """Where the layers leave what the caller asks for."""
        wants = [
            getattr(self.config, name, False) if value is None else value
            for name, value in (("output_attentions", attentions), ("output_hidden_states", hidden))
        ]
        implementation = self.config._attn_implementation
        if wants[0] and implementation != "eager":
            raise ValueError(
                f"output_attentions: {implementation} attention makes no probabilities, load the model with "
                "attn_implementation='eager' (a reducer gets the rows it needs from step.attention)"
            )
        return Record([] if wants[1] else None, [] if wants[0] else None)

    def _caches(self, use_cache: bool | None) -> bool:
        """Whether a prefill keeps keys and values: not where gradient checkpointing will run layers twice."""
        if self.model.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return False
        return self.config.use_cache if use_cache is None else use_cache

    def _new_embeds(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, images) -> Tensor:
        """Embeddings of what follows a cached prompt `[batch, new, width]`."""
        if images is not None and input_ids is not None and input_ids.shape[1] > 1:
            raise ValueError("images: the cache holds a prompt already, images belong to a new one")
        return self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _prompt(self, input_ids, attention_mask, position_ids, inputs_embeds, labels, images, sizes) -> Prompt:
        """The prompt that forward's arguments describe."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give either ids, with images, or inputs_embeds")
        if inputs_embeds is None:
            side = getattr(self.config, "tokenizer_padding_side", "right")
            return self.splice(input_ids, attention_mask, labels, images, side, sizes)
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        return text_prompt(inputs_embeds, padding, position_ids, labels, self.new_state())

    def check_positions(self, prompt: Prompt, new_tokens: int = 0) -> None:
        """Warn if a prompt and what is generated after it need more positions than the model was trained for."""
        limit, needed = position_limit(self.config), prompt.positions + new_tokens
        if needed > limit:
            logger.warning(
                f"the prompt takes {prompt.positions} positions, with {new_tokens} new tokens {needed}, but the model "
                f"has learned {limit} (max_position_embeddings): expect poor answers"
            )

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs) -> dict:
        """What forward needs of what transformers' generate keeps: embeddings at first, then the ids that are new.

        `input_ids` `[batch, generated]` are those generated so far; all else that generate keeps is in the cache.
        """
        cache = kwargs[CACHE_NAME]
        passed = "prompt", "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states"
        inputs = {name: kwargs[name] for name in passed if name in kwargs}
        if cache.filled:
            return {"input_ids": input_ids[:, cache.generated :], "cache": cache, **inputs}
        return {"inputs_embeds": inputs_embeds, "cache": cache, **inputs}

    @carrying
    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' `generate` for prompts with images: returns the new ids only, as in LLaVA.

        Parameters
        ----------
        inputs : int64 `[batch, length]`
            Prompt ids with -200 where an image goes; pad with an `attention_mask`, on either side.
        images, image_sizes
            As in `forward`.
        **kwargs
            What transformers' `generate` takes, an empty `VisionCache` as `past_key_values` or `cache` included, which
            afterwards holds what was cached; what cannot be done here is refused by name.

        Raises
        ------
        ValueError
            If the images do not fit the prompts, or an argument is one of those that are refused.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        check_generation(input_ids, kwargs, self.generation_config)
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None and cache.filled:
            raise ValueError("past_key_values: the cache holds a prompt already, generate() starts with an empty one")
        if kwargs.pop("use_cache", True) is False:
            logger.warning_once("use_cache=False is ignored: generate() always decodes from the cache")
        mask = kwargs.pop("attention_mask", None)
        prompt = self.splice(input_ids, mask, images=images, padding_side="left", image_sizes=image_sizes)
        limit = new_tokens(kwargs, self.generation_config, prompt.embeds.shape[1])
        self.check_positions(prompt, limit or 0)
        cache = VisionCache(self.config) if cache is None else cache
        if limit is not None:
            cache.expect(limit)
        valid = prompt.tokens.valid
        return super().generate(
            inputs_embeds=prompt.embeds,
            attention_mask=torch.ones_like(prompt.tokens.image) if valid is None else valid.long(),
            prompt=prompt,
            use_cache=True,
            **{CACHE_NAME: cache},
            **kwargs,
        )


def position_limit(config: LlavaConfig) -> float:
    """Positions that a model has learned, those that a scaled rotary embedding adds included."""
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = rope.get("rope_type") in ("linear", "dynamic")
    return config.max_position_embeddings * (rope.get("factor") or 1 if stretched else 1)


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
