"""LLaVA on a LLaMA decoder: images and text in, text out; the forward pass and the generate loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from llava.constants import IGNORE_INDEX
from llava.model.checkpoint import describe_checkpoint
from llava.model.checkpoint.load import check_weights, load_weights, valid_generation_config
from llava.model.language_model.cache import VisionCache
from llava.model.language_model.decoder import LlavaConfig, LlavaLlamaModel
from llava.model.llava_arch import LlavaMetaForCausalLM, Prompt, text_prompt
from mustdrop.hooks import Call, Tokens

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
        self.init_seam()
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

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: VisionCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        prompt: Prompt | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when labels are given.

        Parameters
        ----------
        input_ids : int64 `[batch, length]`
            With -200 where an image goes; or new ids when `past_key_values` holds a prompt.
        attention_mask : `[batch, length]`, or `[batch, 1, length, length]` together with `inputs_embeds`
            Zero (False) for padding; a 4-D mask says which key each query sees, for several questions packed into one
            sequence.
        position_ids : int64 `[batch, length]`
            Only read together with `inputs_embeds`.
        inputs_embeds : `[batch, length, width]`
            Embeddings of the caller's own instead of ids; taken as text.
        labels : int64 `[batch, length]`
            -100 where there is nothing to predict.
        images, image_sizes
            As `splice` takes them; LLaVA-1.5 does not use the sizes.
        prompt : Prompt
            Used by `generate`: a prompt that is already spliced.
        logits_to_keep : int
            Compute logits of the last so many positions only; 0 for all.
        """
        if past_key_values is not None and past_key_values.filled:
            inputs_embeds, tokens, call = self.model.embed_tokens(input_ids), None, None
        else:
            if prompt is None and inputs_embeds is None:
                side = getattr(self.config, "tokenizer_padding_side", "right")
                prompt = self.splice(input_ids, attention_mask, labels, images, side)
            elif prompt is None:
                padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
                prompt = text_prompt(inputs_embeds, padding, position_ids, labels, Call(self.reducer, self.run))
            inputs_embeds = prompt.embeds if inputs_embeds is None else inputs_embeds
            tokens, call, labels = prompt.tokens.repeated(len(inputs_embeds)), prompt.call, prompt.labels
        outputs: BaseModelOutputWithPast = self.model(
            inputs_embeds=inputs_embeds,
            tokens=tokens,
            call=call,
            past_key_values=past_key_values,
            attention_mask=attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(
            hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        )
        loss = None
        if labels is not None:
            labels = labels_of(call.left[-1], labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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
            Everything transformers' `generate` takes, except `inputs_embeds`.

        Raises
        ------
        ValueError
            If the images do not fit the prompts, or `inputs_embeds` is given.
        """
        if "inputs_embeds" in kwargs:
            raise ValueError(
                "inputs_embeds: generate() takes ids (inputs=...) and images, it makes the embeddings itself"
            )
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        kwargs.pop("position_ids", None)
        if kwargs.pop("use_cache", True) is False:
            logger.warning_once("use_cache=False is ignored: generate() always decodes from the cache")
        prompt = self.splice(input_ids, kwargs.pop("attention_mask", None), images=images, padding_side="left")
        valid = prompt.tokens.valid
        return super().generate(
            inputs_embeds=prompt.embeds,
            attention_mask=torch.ones_like(prompt.tokens.image) if valid is None else valid.long(),
            prompt=prompt,
            past_key_values=VisionCache(self.config),
            use_cache=True,
            **kwargs,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in transformers; our cache is told how many tokens may come."""
        ours, limit = isinstance(model_kwargs.get("past_key_values"), VisionCache), generation_config.max_new_tokens
        if ours and limit is not None:
            model_kwargs["past_key_values"].expect(limit)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def labels_of(tokens: Tokens, labels: Tensor) -> Tensor:
    """Labels of the tokens that are left, from those of the whole prompt `[batch, length]`."""
    if tokens.source.shape == labels.shape and tokens.valid is None:
        return labels
    left = labels.gather(1, tokens.source)
    return left if tokens.valid is None else left.masked_fill(~tokens.valid, IGNORE_INDEX)


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
