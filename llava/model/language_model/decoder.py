"""The LLaMA decoder of LLaVA: its own loop over layers, in prefill and in decoding, with their hook points."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.compiled import Compiled
from llava.model.language_model.layers import run_layer, run_new_rows
from llava.model.language_model.packed import PackedRows
from llava.model.llava_arch import LlavaMetaModel
from llava.model.masks import attention_mask as make_mask
from llava.model.masks import expand_mask
from mustdrop.hooks import Attention, CacheStep, Call, DecoderStep, Keep, LayerPlan, SplitRows, Tokens, compact, gather


class LlavaConfig(LlamaConfig):
    """LLaMA's configuration plus LLaVA's `mm_*` fields (original LLaVA names).

    `mm_vision_config` holds the CLIP vision configuration, so that a saved folder is complete in itself.
    """

    model_type = "llava_llama"

    mm_vision_tower: str | None = None
    mm_vision_config: dict | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    image_aspect_ratio: str | None = "pad"


@dataclass
class Stream:
    """Hidden states on their way through the decoder, and all that has to stay in step with them.

    `hidden` `[batch, length, width]`, the record of each position, the attention mask in the form the attention
    implementation wants, the rotary tables `(cos, sin)`, each `[batch, length, head_dim]`, what `split` has found, and
    the real rows if layers are to run on these alone.
    """

    hidden: Tensor
    tokens: Tokens
    mask: Any
    rotary: tuple[Tensor, Tensor]
    splits: dict[tuple, SplitRows | None] = field(default_factory=dict)
    packed: PackedRows | None = None

    def split(self, window: int | None, device: torch.device) -> SplitRows | None:
        """Text and vision rows apart, on a device; worked out once for all layers that see the same tokens."""
        if (window, device) not in self.splits:
            self.splits[window, device] = SplitRows.of(self.tokens.to(device), window)
        return self.splits[window, device]


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Vision tower, projector and LLaMA decoder.

    `prefill` is the place to read first: one pass over the decoder layers in which a reducer may say, after each
    layer, which tokens go on. `decode` is the same loop over caches that may differ in length from layer to layer.
    """

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.build_vision(config)
        self._compiled: Compiled | None = None

    @property
    def compiled(self) -> Compiled | None:
        """The compiled parts, if `compile_model` has made them; none with gradients, nor with hooks on layers.

        Programs do without forward hooks; transformers sets some, for good, when hidden states are first asked for.
        """
        if self._compiled is None or torch.is_grad_enabled():
            return None
        hooked = any(layer._forward_hooks or layer.self_attn._forward_hooks for layer in self.layers)
        return None if hooked else self._compiled

    @compiled.setter
    def compiled(self, compiled: Compiled | None) -> None:
        self._compiled = compiled

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        tokens: Tokens | None = None,
        call: Call | None = None,
        past_key_values: VisionCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run new positions `[batch, length, width]` through the decoder: a prefill, unless the cache is filled.

        `attention_mask` is only for a 4-D mask of the caller's own; padding is part of `tokens`.
        """
        if past_key_values is not None and past_key_values.filled:
            hidden = self.decode(inputs_embeds, past_key_values)
        else:
            if use_cache and past_key_values is None:
                past_key_values = VisionCache(self.config)
            hidden = self.prefill(inputs_embeds, tokens, call, past_key_values if use_cache else None, attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def prefill(
        self, hidden: Tensor, tokens: Tokens, call: Call, cache: VisionCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Run whole prompts through the decoder.

        Parameters
        ----------
        hidden : `[batch, length, width]`
            Embeddings.
        tokens : Tokens
            What they are.
        call : Call
            The forward pass; its reducer says after each layer which tokens go on.
        cache : VisionCache, optional
            Filled with keys and values, then cut to what the reducer keeps.
        mask : bool or float `[batch, 1, length, length]`, optional
            The caller's own attention mask (packed training); not together with a reducer.

        Returns
        -------
        `[batch, kept, width]`
            Hidden states of the tokens that reach the end, padded on the left where prompts keep fewer.
        """
        plans = call.does("before_decoder_layer") and tokens.images > 0
        drops = call.does("after_decoder_layer") and tokens.images > 0
        cuts = call.does("after_prefill") and tokens.images > 0 and cache is not None
        if mask is not None and (plans or drops):
            raise ValueError("attention_mask: 4-D masks cannot be combined with a reducer, pass [batch, length]")
        stream = self.stream(hidden, tokens, mask)
        plan, final, compiled = None, None, self.compiled
        last_rows: list[Attention] = []
        last: Stream | None = None
        with call.timed("prefill", hidden.device):
            for index, layer in enumerate(self.layers):
                plan = self.plan(index, stream, call) if plans else plan
                if plans and plan is not None and plan.skip:
                    final, stream = stream.tokens, self.without_vision(index, stream, call)
                    plans = drops = False
                call.plans.append(plan)
                call.entered.append(stream.tokens)
                entering = stream
                if compiled is not None and plan is None and stream.packed is None:
                    hidden = compiled.layer(layer, stream, cache)
                else:
                    hidden = run_layer(layer, stream, cache, plan)
                stream = replace(stream, hidden=hidden, tokens=stream.tokens.to(hidden.device))
                if drops:
                    with call.timed("selector", hidden.device):
                        stream = self.reduce(index, entering, stream, cache, call)
                call.left.append(stream.tokens)
                if cuts:
                    last = last_row(entering, last)
                    last_rows.append(self.attention(index, last, cache))
            if cache is None:
                call.finish_prefill([], [])
            else:
                self.finish_prefill(cache, final or stream.tokens, last_rows, call)
        return stream.hidden

    def decode(self, hidden: Tensor, cache: VisionCache) -> Tensor:
        """Run newly generated positions `[batch, new, width]` through the decoder, against each layer's own cache."""
        call, new = cache.call, hidden.shape[1]
        compiled = self.compiled
        if compiled is not None and compiled.decodes(self.config, hidden, cache):
            with call.timed("decode", hidden.device):
                hidden = compiled.decode(self, hidden, cache)
            cache.generated += new
            return hidden
        evicts = call.does("after_decode_layer")
        contexts: dict[tuple, tuple] = {}
        with call.timed("decode", hidden.device):
            for index, layer in enumerate(self.layers):
                alike = id(cache.records[index]), id(cache.next_position[index]), cache.length(index)
                if alike not in contexts:
                    valid, keys = cache.valid(index, new), cache.length(index) + new
                    mask = make_mask(self.config, hidden, valid=valid, keys=keys, causal=True)
                    contexts[alike] = mask, self.rotary_emb(hidden, cache.positions(index, new))
                mask, rotary = contexts[alike]
                entering = Stream(hidden, cache.records[index], mask, rotary)
                hidden = run_new_rows(layer, entering, cache, call.plans[index])
                if evicts:
                    tokens = cache.extended(index)
                    attention = self.attention(index, replace(entering, tokens=tokens), cache)
                    step = DecoderStep(index, len(self.layers), tokens, hidden, attention, None, call.state)
                    keep = call.reducer.after_decode_layer(step)
                    if keep is not None:
                        cache.keep(index, keep | ~tokens.vision)
        cache.generated += new
        return hidden

    def stream(self, hidden: Tensor, tokens: Tokens, mask: Tensor | None = None) -> Stream:
        """Hidden states with the mask and rotary tables that belong to them."""
        if mask is None:
            mask = make_mask(self.config, hidden, valid=tokens.valid, keys=hidden.shape[1], causal=True)
        else:
            mask = expand_mask(self.config, mask, hidden.dtype)
        return Stream(hidden, tokens, mask, self.rotary_emb(hidden, tokens.position))

    def plan(self, index: int, stream: Stream, call: Call) -> LayerPlan | None:
        """Ask the reducer what a layer shall compute for vision tokens."""
        step = DecoderStep(index, len(self.layers), stream.tokens, stream.hidden, None, None, call.state)
        return call.reducer.before_decoder_layer(step)

    def without_vision(self, index: int, stream: Stream, call: Call) -> Stream:
        """The text alone: from layer `index` on nothing is computed for vision tokens, protected ones included.

        Nothing was decided against them, so those that got here are the ones that survived the prefill.
        """
        call.decided.append(index)
        indices, tokens = stream.tokens.select(~stream.tokens.vision)
        tokens = replace(tokens.renumbered() if call.reducer.positions == "renumber" else tokens, images=0)
        return self.stream(gather(stream.hidden, indices), tokens)

    def reduce(self, index: int, entering: Stream, stream: Stream, cache: VisionCache | None, call: Call) -> Stream:
        """Ask the reducer which tokens go on after a layer, and compact to them.

        Text and key tokens always do; where the reducer says how many go, it has seen to the key tokens itself.
        """
        last = index + 1 == len(self.layers)
        step = DecoderStep(
            layer=index,
            layers=len(self.layers),
            tokens=stream.tokens,
            hidden=stream.hidden,
            attention=self.attention(index, entering, cache),
            next_attention=None if last else self.attention(index + 1, stream),
            state=call.state,
        )
        keep = call.reducer.after_decoder_layer(step)
        if keep is None:
            return stream
        keep = keep if isinstance(keep, Keep) else Keep(keep)
        call.decided.append(index)
        if keep.into is not None:
            call.merged[index] = keep.into
        before = stream.tokens
        length = None
        if keep.dropped is not None and all(len(images) == before.images for images in call.images):
            length = before.image.shape[1] - keep.dropped
        stays = keep.tokens | ~before.vision
        if length is None:
            stays = stays | before.protected
        if length is None or before.valid is None:
            indices, tokens = before.select(stays, order=keep.order, length=length)
        else:
            indices, tokens = select_with_padding(before, stays, length)
        if before.valid is None and indices.shape[1] == stream.hidden.shape[1]:
            return stream
        if call.reducer.positions == "renumber":
            tokens = tokens.renumbered()
        stream = self.stream(gather(stream.hidden if keep.hidden is None else keep.hidden, indices), tokens)
        if length is None:
            stream.packed = PackedRows.of(stream, self.config._attn_implementation)
        return stream

    def attention(self, index: int, entering: Stream, cache: VisionCache | None = None) -> Attention:
        """A layer's attention on its input, on demand; keys come from the cache where they are there already."""
        layer, tokens = self.layers[index], entering.tokens
        attention = layer.self_attn
        device = layer.input_layernorm.weight.device
        hidden, rotary = entering.hidden.to(device), [table.to(device) for table in entering.rotary]

        def rotated(linear: torch.nn.Linear, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            states = linear(layer.input_layernorm(states))
            states = states.view(*states.shape[:-1], -1, attention.head_dim).transpose(1, 2)
            return apply_rotary_pos_emb(states, states, cos, sin)[0]

        def queries(rows: Tensor) -> Tensor:
            tables = [gather(table.expand(len(rows), -1, -1), rows) for table in rotary]
            return rotated(attention.q_proj, gather(hidden, rows), *tables)

        def keys() -> Tensor:
            return rotated(attention.k_proj, hidden, *rotary) if cache is None else cache.layers[index].keys

        length = hidden.shape[1]
        return Attention(queries, keys, attention.scaling, tokens.valid, first_row=tokens.image.shape[1] - length)

    def finish_prefill(self, cache: VisionCache, final: Tokens, last_rows: list[Attention], call: Call) -> None:
        """Note positions for decoding, ask the reducer what each layer's cache keeps, and cut it."""
        cache.start_decoding(call)
        if last_rows:
            step = CacheStep(list(call.entered), final, last_rows, call.state)
            cuts: dict[tuple[int, int], tuple[Tensor, Tokens]] = {}
            for layer, keep in enumerate(call.reducer.after_prefill(step) or []):
                if keep is not None:
                    record = cache.records[layer]
                    alike = id(record), id(keep)
                    if alike not in cuts:
                        later = isinstance(keep, Tokens)
                        cuts[alike] = columns_of(keep, record) if later else record.select(keep | ~record.vision)
                    cache.select(layer, *cuts[alike])
        call.finish_prefill(cache.records, [cache.bytes_per_position(layer) for layer in range(len(self.layers))])


def select_with_padding(tokens: Tokens, keep: Tensor, length: int) -> tuple[Tensor, Tokens]:
    """`Tokens.select` where every prompt is known to keep `length` columns, its padding among them."""
    indices, _ = compact(keep, length=length)
    return indices, tokens.map(lambda value: value.gather(-1, indices.expand(*value.shape[:-1], -1)))


def columns_of(later: Tokens, tokens: Tokens) -> tuple[Tensor, Tokens]:
    """Where the tokens of a later record stand in an earlier one of the same prompts, int64 `[batch, kept]`.

    And the record of these columns; nothing waits for the device.
    """
    later = later.to(tokens.source.device)
    columns = (tokens.source[:, None] == later.source[..., None]).byte().argmax(-1)
    position = tokens.position.gather(-1, columns.expand(*tokens.position.shape[:-1], -1))
    return columns, replace(later, position=position)


def last_row(stream: Stream, before: Stream | None = None) -> Stream:
    """The part of a stream that belongs to every prompt's last token; the record still describes all positions.

    `before` is that of the layer before: rotary tables are taken over where the tokens are the same.
    """
    rows = stream.tokens.last_row()
    if before is not None and before.tokens is stream.tokens:
        tables = before.rotary
    else:
        tables = tuple(gather(table.expand(len(rows), -1, -1), rows) for table in stream.rotary)
    return replace(stream, hidden=gather(stream.hidden, rows), rotary=tables)
