"""The decoder loop: prefill and decoding over layers, with the points at which a reducer is asked. Read this first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.compiled import Compiled
from llava.model.language_model.early import last_rows, looked_at
from llava.model.language_model.on_demand import OnDemand
from llava.model.language_model.packed import PackedRows
from llava.model.language_model.stream import Stream
from llava.model.language_model.windows import Windows, place_of, span_of, windows_of
from llava.model.masks import attention_mask, expand_mask
from mustdrop.hooks import Attention, CacheStep, DecoderStep, ForwardState, Keep, LayerPlan, Tokens, gather


@dataclass
class Asked:
    """What the reducer of a forward pass takes part in: nothing else costs anything."""

    plans: bool
    after: Collection[int]
    cuts: bool
    reads: bool
    by_attention: bool

    @classmethod
    def of(cls, state: ForwardState, tokens: Tokens, cache: VisionCache | None, layers: int) -> Asked:
        hooks = "before_decoder_layer", "after_decoder_layer", "after_prefill"
        plans, drops, cuts = (tokens.images > 0 and state.overrides(hook) for hook in hooks)
        cuts = cuts and cache is not None
        after = state.asks_after(layers) if drops else ()
        reads = cuts and state.any("reads_output_attention", ["after_prefill"])
        return cls(plans, after, cuts, reads, state.by_attention())


@dataclass
class Record:
    """What the caller wants to see of the layers; None where it is not asked for.

    `hidden` takes the input of the first and the output of every layer `[batch, length, width]`, before tokens are
    dropped; `attentions` takes their probabilities `[batch, heads, length, keys]`. `rows` is how many of the last
    positions are looked at in the output of the last layer; None for all.
    """

    hidden: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    rows: int | None = None

    @property
    def whole(self) -> bool:
        """Whether every layer has to compute all of its output."""
        return self.hidden is not None or self.attentions is not None

    def note(self, hidden: Tensor) -> None:
        """Take hidden states `[batch, length, width]` if they are asked for."""
        if self.hidden is not None:
            self.hidden.append(hidden)


class DecoderLoop:
    """Mixin of a text model: the loop over its decoder layers.

    It needs what text models of transformers have: `layers`, `rotary_emb`, `norm` and `config`. What is inside a layer
    is known to `projections` alone.

    `prefill` is the place to read first: one pass over the decoder layers in which a reducer may say, after each
    layer, which tokens go on. `decode` is the same loop over caches that may differ in length from layer to layer.
    """

    _compiled: Compiled | None = None
    drops_early: bool = True

    @property
    def compiled(self) -> Compiled | None:
        """The compiled parts, if `compile_model` has made them; none with gradients."""
        return None if torch.is_grad_enabled() else self._compiled

    @compiled.setter
    def compiled(self, compiled: Compiled | None) -> None:
        self._compiled = compiled

    def prefill(
        self,
        hidden: Tensor,
        tokens: Tokens,
        state: ForwardState,
        cache: VisionCache | None = None,
        mask: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Run whole prompts through the decoder.

        Parameters
        ----------
        hidden : `[batch, length, width]`
            Embeddings.
        tokens : Tokens
            What they are.
        state : ForwardState
            The forward pass; its reducer says after each layer which tokens go on.
        cache : VisionCache, optional
            Filled with keys and values, then cut to what the reducer keeps.
        mask : bool or float `[batch, 1, length, length]`, optional
            The caller's own attention mask (packed training); not together with a reducer.
        record : Record, optional
            Where hidden states and attention probabilities go.

        Returns
        -------
        `[batch, kept, width]`
            Hidden states of the tokens that reach the end, padded on the left where prompts keep fewer; or those of
            the last of them alone, at least `record.rows`.
        """
        record = record or Record()
        asked = Asked.of(state, tokens, cache, len(self.layers))
        in_part = self.read_in_part(asked, record)
        if mask is not None and (asked.plans or asked.after):
            raise ValueError("attention_mask: 4-D masks cannot be combined with a reducer, pass [batch, length]")
        record.note(hidden)
        stream = self.stream(hidden, tokens, state, mask)
        stream.weights = record.attentions
        compiled = self.compiled if record.attentions is None else None
        plan: LayerPlan | None = None
        final: Tokens | None = None
        output_rows: list[Attention | None] = []
        last: Stream | None = None
        with state.timed("prefill", hidden.device):
            for index, layer in enumerate(self.layers):
                if asked.plans:
                    plan = self.plan(index, stream, state)
                    if plan is not None and plan.skip:
                        final, stream = stream.tokens, self.without_vision(index, stream, state)
                        asked.plans, asked.after = False, ()
                state.plans.append(plan)
                state.tokens_in.append(stream.tokens)
                entering, whole = stream, index not in in_part or plan is not None or stream.packed is not None
                if whole:
                    stream = entering.with_hidden(layer(entering.hidden, entering, cache, plan, compiled))
                    stream, finished = self.after_layer(index, stream), entering.tokens
                    record.note(stream.hidden)
                    if index in asked.after:
                        stream = self.reduce(index, entering, stream, cache, state)
                elif index in asked.after:
                    stream, finished = self.run_asked(index, entering, cache, state)
                else:
                    finished = last_rows(record.rows)
                    stream = entering.with_hidden(layer(entering.hidden, entering, cache, only=finished))
                state.tokens_out.append(stream.tokens)
                state.finished.append(finished)
                if asked.reads:
                    last = entering.last_row(last)
                    output_rows.append(self.attention(index, last, cache))
                elif asked.cuts:
                    output_rows.append(None)
            if cache is None:
                state.finish_prefill([], [])
            else:
                cache.span = span_of(tokens)
                self.finish_prefill(cache, final or stream.tokens, output_rows, state)
        return stream.hidden

    def after_layer(self, index: int, stream: Stream) -> Stream:
        """What an architecture of its own does between two layers of a prefill, before a reducer is asked: nothing.

        Deepstack models add features of the vision tower here; `tokens.vision_index` says which of a prompt's vision
        tokens each position is. It returns the stream, with other hidden states by `stream.with_hidden`.
        """
        return stream

    def decode(self, hidden: Tensor, cache: VisionCache, record: Record | None = None) -> Tensor:
        """Run newly generated positions `[batch, new, width]` through the decoder, against each layer's own cache."""
        state, record = cache.state, record or Record()
        with state.timed("decode", hidden.device):
            if record == Record() and self._decodes_compiled(hidden, cache):
                hidden = self.compiled.decode(self, hidden, cache)
            else:
                hidden = self._decode(hidden, cache, record)
        cache.generated += hidden.shape[1]
        return hidden

    def _decode(self, hidden: Tensor, cache: VisionCache, record: Record) -> Tensor:
        state, new = cache.state, hidden.shape[1]
        record.note(hidden)
        evicts = state.overrides("after_decode_layer")
        windows = windows_of(self.config, self.layers)
        contexts: dict[tuple, tuple] = {}
        for index, layer in enumerate(self.layers):
            same = id(cache.records[index]), id(cache.next_position[index]), cache.length(index)
            if same not in contexts:
                valid, keys = cache.valid(index, new), cache.length(index) + new
                mask = attention_mask(self.config, hidden, valid=valid, keys=keys, causal=True)
                seen = windows and cache.windows(windows, index, hidden, valid)
                contexts[same] = mask, self.rotary_emb(hidden, cache.positions(index, new)), seen
            mask, rotary, seen = contexts[same]
            entering = Stream(hidden, cache.records[index], mask, rotary, weights=record.attentions, windows=seen)
            hidden = layer(hidden, entering, cache, state.plans[index])
            record.note(hidden)
            if evicts:
                self.evict(index, entering, hidden, cache)
        return hidden

    def _decodes_compiled(self, hidden: Tensor, cache: VisionCache) -> bool:
        """Whether there is a compiled step for this; programs do without forward hooks on layers."""
        compiled = self.compiled
        if compiled is None or any(layer._forward_hooks or layer.self_attn._forward_hooks for layer in self.layers):
            return False
        return windows_of(self.config, self.layers) is None and compiled.decodes(self.config, hidden, cache)

    def stream(
        self,
        hidden: Tensor,
        tokens: Tokens,
        state: ForwardState,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Stream:
        """Hidden states with their masks and rotary tables; the caller's own mask serves all layers."""
        if mask is not None:
            mask, windows = expand_mask(self.config, mask, hidden.dtype), None
        else:
            mask = attention_mask(self.config, hidden, valid=tokens.valid, keys=hidden.shape[1], causal=True)
            windows = self.windows(hidden, tokens, state)
        rotary = self.rotary_emb(hidden, tokens.position) if rotary is None else rotary
        return Stream(hidden, tokens, mask, rotary, windows=windows)

    def windows(self, hidden: Tensor, tokens: Tokens, state: ForwardState) -> Windows | None:
        """What layers with a sliding window see of the tokens; None if all of them see everything before."""
        windows = windows_of(self.config, self.layers)
        if windows is None:
            return None
        place = place_of(tokens, state.reducer.positions == "renumber")
        span = span_of(state.tokens_in[0] if state.tokens_in else tokens)
        return Windows.of(self.config, windows, span, place, hidden, tokens.valid)

    def plan(self, index: int, stream: Stream, state: ForwardState) -> LayerPlan | None:
        """Ask the reducer what a layer shall compute for vision tokens."""
        step = DecoderStep(index, len(self.layers), stream.tokens, stream.hidden)
        with state.timed("selector", stream.hidden.device):
            return LayerPlan.all_of(state.ask("before_decoder_layer", step))

    def without_vision(self, index: int, stream: Stream, state: ForwardState) -> Stream:
        """The text alone: from layer `index` on nothing is computed for vision tokens, protected ones included.

        Nothing was decided against them, so those that got here are the ones that survived the prefill.
        """
        state.pruned_layers.append(index)
        prompts = tuple(prompt.with_tokens([0] * len(prompt.images)) for prompt in stream.tokens.facts())
        indices, tokens = stream.tokens.select(~stream.tokens.vision, prompts=prompts)
        tokens = replace(tokens.renumbered() if state.reducer.positions == "renumber" else tokens, images=0)
        return self.stream(gather(stream.hidden, indices), tokens, state)

    def reduce(
        self, index: int, entering: Stream, stream: Stream, cache: VisionCache | None, state: ForwardState
    ) -> Stream:
        """Ask the reducer which tokens go on after a layer, and compact to them; text and key tokens always do."""
        with state.timed("selector", stream.hidden.device):
            keep = self.ask(index, entering, stream, cache, state)
            if keep is None:
                return stream
            stays, selected = self.chosen(keep, stream.tokens)
            hidden = keep.new_states(stream.hidden, stays)
            if selected is None:
                return stream if hidden is stream.hidden else stream.with_hidden(hidden)
            return self.compacted(stream, gather(hidden, selected[0]), selected, keep, state)

    def run_asked(
        self, index: int, entering: Stream, cache: VisionCache | None, state: ForwardState
    ) -> tuple[Stream, Tokens]:
        """Run a layer, asking the reducer between attention and MLP, which is computed for those alone who go on."""
        keep = selected = None

        def going_on() -> Tensor | None:
            nonlocal keep, selected
            with state.timed("selector", entering.hidden.device):
                keep = self.ask(index, entering, None, cache, state)
                selected = None if keep is None else self.chosen(keep, entering.tokens)[1]
            return selected and selected[0]

        hidden = self.layers[index](entering.hidden, entering, cache, only=going_on)
        if selected is None:
            return entering.with_hidden(hidden), entering.tokens
        with state.timed("selector", hidden.device):
            stream = self.compacted(entering, hidden, selected, keep, state)
        return stream, stream.tokens

    def read_in_part(self, asked: Asked, record: Record) -> set[int]:
        """Layers of whose output not all is read: tokens that go at once, and in the last one all but `record.rows`.

        None where somebody looks at layers: who asks for their output, gradients, hooks around a layer or parts of it,
        and architectures that do something of their own between layers.
        """
        own = type(self).after_layer is not DecoderLoop.after_layer
        if not self.drops_early or own or record.whole or self.compiled or torch.is_grad_enabled():
            return set()
        layers, last = set(asked.after) if asked.by_attention else set(), len(self.layers) - 1
        if record.rows is not None and last not in asked.after and not self.norm._forward_hooks:
            layers.add(last)
        return {index for index in layers if not looked_at(self.layers[index])}

    def ask(
        self, index: int, entering: Stream, stream: Stream | None, cache: VisionCache | None, state: ForwardState
    ) -> Keep | None:
        """What the reducer keeps after a layer that made `stream` of `entering`; None for all.

        Without a `stream`, asked before there is an output, it is shown hidden states without values.
        """
        last = stream is None or index + 1 == len(self.layers)
        tokens = entering.tokens if stream is None else stream.tokens
        step = DecoderStep(
            layer=index,
            layers=len(self.layers),
            tokens=tokens,
            hidden=entering.hidden.to("meta") if stream is None else stream.hidden,
            attention=self.attention(index, entering, cache),
            next_attention=None if last else self.attention(index + 1, stream),
            norm=self.norm,
        )
        keep = Keep.all_of(state.ask("after_decoder_layer", step), tokens)
        if keep is not None:
            if stream is None and (keep.states is not None or keep.weights is not None):
                raise ValueError("Keep: by_attention says that states are not read, but the answer gives new ones")
            state.pruned_layers.append(index)
            if keep.merge_into is not None:
                state.merge_maps[index] = keep.merge_into
        return keep

    def chosen(self, keep: Keep, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, Tokens] | None]:
        """Which positions go on, bool `[batch, length]`, and their columns and record; None where nothing moves."""
        stays, prompts = keep.choose(tokens)
        if prompts == tokens.facts() and keep.order is None:
            return stays, None
        return stays, tokens.select(stays, order=keep.order, prompts=prompts)

    def compacted(
        self, stream: Stream, hidden: Tensor, selected: tuple[Tensor, Tokens], keep: Keep, state: ForwardState
    ) -> Stream:
        """The stream of the tokens that were selected, whose hidden states are `hidden` `[batch, kept, width]`."""
        (indices, tokens), weights = selected, stream.weights
        if state.reducer.positions == "renumber":
            stream = self.stream(hidden, tokens.renumbered(), state)
        else:
            stream = self.stream(hidden, tokens, state, rotary=stream.rotary_of(indices))
        stream.weights = weights
        if keep.mask is not None and weights is None:  # ragged: where numbers were given, prompts are of one length
            stream.packed = PackedRows.of(stream.tokens.valid, stream.rotary, self.config._attn_implementation)
        return stream

    def evict(self, index: int, entering: Stream, hidden: Tensor, cache: VisionCache) -> None:
        """Ask the reducer in a decode step which entries of a layer's cache stay, and cut it to them."""
        state, tokens = cache.state, cache.extended(index)
        attention = self.attention(index, replace(entering, tokens=tokens), cache)
        step = DecoderStep(index, len(self.layers), tokens, hidden, attention)
        keep = Keep.all_of(state.ask("after_decode_layer", step), tokens)
        if keep is not None:
            cache.select(index, *keep.cut(tokens))

    def attention(self, index: int, entering: Stream, cache: VisionCache | None = None) -> Attention:
        """A layer's attention on its input, on demand; keys come from the cache where they are there already."""
        return OnDemand(self.layers[index], entering, cache).attention()

    def finish_prefill(
        self, cache: VisionCache, final: Tokens, output_rows: list[Attention | None], state: ForwardState
    ) -> None:
        """Note positions for decoding, cut the caches, and hand the record of the pass on."""
        cache.start_decoding(state)
        cache.check_filled()
        if output_rows:
            with state.timed("selector", cache.layers[0].keys.device):
                self.cut(cache, final, output_rows, state)
        state.finish_prefill(cache.records, [cache.bytes_per_position(layer) for layer in range(len(cache.layers))])

    def cut(self, cache: VisionCache, final: Tokens, output_rows: list[Attention | None], state: ForwardState) -> None:
        """Ask the reducer what each layer's cache keeps, and cut it to that."""
        cuts: dict[tuple[int, int], tuple[Tensor, Tokens]] = {}
        for layer, attention in enumerate(output_rows):
            tokens = cache.records[layer]
            step = CacheStep(layer, len(output_rows), tokens, final, attention)
            keep = Keep.all_of(state.ask("after_prefill", step), tokens)
            if keep is not None:
                key = id(tokens), id(keep.later)
                columns = cuts.get(key) or keep.cut(tokens)
                if keep.later is not None:  # layers that hold the same tokens and keep the same ones share the work
                    cuts[key] = columns
                cache.select(layer, *columns)
