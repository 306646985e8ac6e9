"""What nobody reads of a decoder layer is not computed: the same tokens, the same logits, fewer products."""

import copy

import pytest
import torch
from tiny import LAYERS, SIDE, batch, expand_for_hugging_face, hugging_face, ours, pictures, prompt, run
from torch.utils.flop_counter import FlopCounterMode

from llava.model import drop_early
from mustdrop import MustDrop, MustDropPlus, Reducer
from mustdrop.compose import Compose
from mustdrop.hooks import LEAST_ROWS, Keep
from mustdrop.methods import FastV, PyramidDrop, SparseVLM
from mustdrop.stages import OutputAwareCache

REDUCERS = {
    "vanilla": Reducer(),
    "thresholds": MustDrop(global_threshold=1.1 / SIDE**2, individual_threshold=1.0 / SIDE**2),
    "budget": MustDrop(budget=[60, 41, 30, 20], merge_to=104),
    "official": MustDrop(budget=[60, 41, 30, 20], merge_to=104, compat="official", filter_layers=[1, 2, 4, 5]),
    "plus": MustDropPlus(retain=40),
    "fastv": FastV(layer=2, drop_ratio=0.7),
    "last_layer": FastV(layer=LAYERS - 1, drop_ratio=0.7),
    "cut_by_output": Compose([FastV(layer=2, drop_ratio=0.5), OutputAwareCache(output_threshold=0.005)]),
    "pyramiddrop": PyramidDrop(),
    "sparsevlm": SparseVLM(),
    "both": Compose([FastV(layer=2, drop_ratio=0.5), PyramidDrop()]),
}
PROMPTS = {"one": [prompt(3, 6, seed=1)], "padded": [prompt(3, 6, seed=1), prompt(6, 2, seed=2), prompt(2, 9, seed=3)]}


@pytest.fixture(scope="module")
def whole():
    """The same model in whole layers."""
    return drop_early(copy.deepcopy(ours()), False)


@pytest.fixture
def early():
    return copy.deepcopy(ours())


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_logits_and_traces_are_those_of_whole_layers(whole, name, prompts):
    inputs = {**batch(PROMPTS[prompts]), "images": pictures(len(PROMPTS[prompts]))}
    ids, logits, traces = run(whole, REDUCERS[name], **inputs)
    found, same_logits, same_traces = run(ours(), REDUCERS[name], **inputs)
    assert torch.equal(found, ids)
    torch.testing.assert_close(same_logits, logits, atol=1e-5, rtol=0)
    for one, other in zip(same_traces, traces, strict=True):
        differs = {"times_ms": None, "mlp_lengths": None}
        assert one.to_dict() | differs == other.to_dict() | differs
        assert other.mlp_lengths == [tokens + other.text_tokens for tokens in other.vision_tokens]
        assert sum(one.mlp_lengths) < sum(other.mlp_lengths)  # in the last layer nobody reads all


def linear(model, reducer, **inputs) -> list[int]:
    """Multiply-adds of each decoder layer's linear layers in a prefill."""
    with torch.no_grad(), reducer.on(model), FlopCounterMode(display=False) as counter:
        model(images=pictures(1), use_cache=True, **inputs)
    counts = counter.get_flop_counts()
    names = [f"LlavaLlamaForCausalLM.model.layers.{layer}" for layer in range(LAYERS)]
    own = [next(value for key, value in counts.items() if key.endswith(name)) for name in names]
    return [sum(n for op, n in one.items() if "mm" in str(op) and "bmm" not in str(op)) // 2 for one in own]


def test_products_of_dropped_tokens_and_of_the_last_layer_are_left_out(whole):
    ids, text, patches = prompt(3, 6, seed=1), 10, SIDE**2
    all_of, part = (linear(model, FastV(2, 0.5), input_ids=ids, logits_to_keep=1) for model in (whole, ours()))
    second_half = 64 * 64 + 3 * 64 * 96
    saved = [before - after for before, after in zip(all_of, part, strict=True)]
    asking = 64 * 64  # the query of the row that asks is computed inside this layer now
    dropped, unread = patches // 2, text + patches // 2 - LEAST_ROWS
    assert saved == [0, dropped * second_half - asking, *[0] * (LAYERS - 3), unread * second_half]
    all_logits = [linear(model, Reducer(), input_ids=ids) for model in (whole, ours())]
    assert all_logits[0] == all_logits[1]


@torch.no_grad()
def test_a_trace_says_what_went_through_the_second_half_of_each_layer(whole):
    given, full = {"input_ids": prompt(3, 6, seed=1), "images": pictures(1)}, SIDE**2 + 10
    dropped = full - SIDE**2 // 2
    cases = {1: [full, *[dropped] * (LAYERS - 2), LEAST_ROWS], 6: [full, *[dropped] * (LAYERS - 2), 6]}
    cases[0] = cases[1][:-1] + [dropped]  # all logits are read
    for keep, expected in cases.items():
        with FastV(2, 0.5).on(ours()) as record:
            ours()(**given, logits_to_keep=keep)
        assert record.traces[0].mlp_lengths == expected


@pytest.mark.parametrize("keep", [0, 1, 3, 6])
def test_as_many_logits_as_are_asked_for(whole, keep):
    given = {"input_ids": prompt(3, 6, seed=1), "images": pictures(1), "logits_to_keep": keep}
    with torch.inference_mode():
        logits, found = (model(**given).logits for model in (whole, ours()))
    assert found.shape[1] == (keep or SIDE**2 + 10)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


PARTS = {
    "layer": lambda layer: layer,
    "norm": lambda layer: layer.post_attention_layernorm,
    "o_proj": lambda layer: layer.self_attn.o_proj,
    "mlp": lambda layer: layer.mlp,
    "down_proj": lambda layer: layer.mlp.down_proj,
}


@pytest.mark.parametrize("part", PARTS)
def test_who_looks_at_a_layer_or_a_part_of_it_sees_all_of_its_output(early, part):
    given, seen = {"input_ids": prompt(3, 6, seed=1), "images": pictures(1), "logits_to_keep": 1}, {}
    layers = early.get_model().layers
    for number in (1, LAYERS - 1):
        watch = PARTS[part](layers[number])
        watch.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output.shape[1]}))
    with torch.inference_mode(), FastV(2, 0.5).on(early):
        early(**given)
    assert seen == {1: SIDE**2 + 10, LAYERS - 1: SIDE**2 // 2 + 10}


def test_who_looks_at_the_final_norm_sees_all_positions(early):
    seen = []
    early.get_model().norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with torch.inference_mode():
        early(input_ids=prompt(3, 6, seed=1), images=pictures(1), logits_to_keep=1)
    assert seen == [SIDE**2 + 10]


def test_who_asks_for_hidden_states_or_gradients_has_whole_layers():
    given = {"input_ids": prompt(3, 6, seed=1), "images": pictures(1), "logits_to_keep": 1}
    with torch.inference_mode(), FastV(2, 0.5).on(ours()) as record:
        hidden = ours()(**given, output_hidden_states=True).hidden_states
    full = SIDE**2 + 10
    assert [states.shape[1] for states in hidden[:3]] == [full] * 3
    assert hidden[-1].shape[1] == SIDE**2 // 2 + 10
    with FastV(2, 0.5).on(ours()) as graded:
        ours()(**given).logits.sum().backward()
    ours().zero_grad()
    whole = [tokens + 10 for tokens in record.traces[0].vision_tokens]
    assert record.traces[0].mlp_lengths == graded.traces[0].mlp_lengths == whole


class ReadsStates(FastV):
    """Says that it goes by attention alone, and does not."""

    def score(self, step):
        return step.hidden.float().norm(dim=-1) + super().score(step)


class GivesStates(FastV):
    def keep(self, step, stages):
        keep = super().keep(step, stages)
        keep.states = torch.zeros(*step.tokens.image.shape, 64)
        return keep


def test_a_reducer_that_breaks_its_word_is_an_error_and_no_wrong_number():
    given = {"inputs": prompt(3, 6, seed=1), "images": pictures(1), "max_new_tokens": 1}
    with pytest.raises(RuntimeError, match="meta"), ReadsStates(2, 0.5).on(ours()):
        ours().generate(**given)
    with pytest.raises(ValueError, match="^Keep: by_attention says"), GivesStates(2, 0.5).on(ours()):
        ours().generate(**given)


def test_others_are_asked_after_the_layer():
    class Looks(Reducer):
        seen = []

        def after_decoder_layer(self, step):
            self.seen.append(step.hidden.device.type)
            return Keep.where(step.hidden.norm(dim=-1) > 0)

    with Compose([FastV(2, 0.5), Looks()]).on(ours()):
        ours().generate(prompt(3, 6, seed=1), images=pictures(1), max_new_tokens=1)
    assert Looks.seen == ["cpu"] * LAYERS


@pytest.mark.parametrize("name", ["budget", "fastv", "sparsevlm"])
@pytest.mark.parametrize("by_place", [False, True])
def test_hosted_models_too(name, by_place):
    model, ids = copy.deepcopy(hugging_face()), expand_for_hugging_face(prompt(3, 6, seed=1), SIDE**2)
    logits, traces, counts = [], [], []
    for on in (False, True):
        drop_early(model, on)
        with torch.no_grad(), REDUCERS[name].on(model) as record, FlopCounterMode(display=False) as counter:
            call = model if by_place else lambda ids, pixels, **more: model(input_ids=ids, pixel_values=pixels, **more)
            logits.append(call(ids, pictures(1), logits_to_keep=2).logits)
        counts.append(counter.get_total_flops())
        traces.append(record.traces[0])
    assert logits[1].shape[1] == 2
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert traces[1].mlp_lengths[-1] == LEAST_ROWS < traces[0].mlp_lengths[-1]
    left_out = sum(traces[0].mlp_lengths) - sum(traces[1].mlp_lengths)
    assert counts[0] - counts[1] == 2 * left_out * (64 * 64 + 3 * 64 * 96)


@torch.no_grad()
def test_hosted_models_compute_all_that_is_read():
    model, ids = hugging_face(), expand_for_hugging_face(prompt(3, 6, seed=1), SIDE**2)
    for given in ({}, {"labels": ids, "logits_to_keep": 0}, {"logits_to_keep": torch.tensor([3])}):
        with FastV(2, 0.5).on(model) as record:
            model(input_ids=ids, pixel_values=pictures(1), **given)
        assert record.traces[0].mlp_lengths[-1] == SIDE**2 // 2 + 10
    with FastV(2, 0.5).on(model) as record:
        model.generate(input_ids=ids, pixel_values=pictures(1), max_new_tokens=2)
    assert record.traces[0].mlp_lengths[-1] == LEAST_ROWS
