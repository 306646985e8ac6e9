"""What nobody reads of a decoder layer is not computed: the same tokens, the same logits, fewer products."""

import copy

import pytest
import torch
from tiny import LAYERS, SIDE, batch, expand_for_hugging_face, hugging_face, ours, pictures, prompt, run
from torch.utils.flop_counter import FlopCounterMode

from llava.model import drop_early
from llava.model.language_model.early import LEAST_ROWS
from mustdrop import MustDrop, MustDropPlus, Reducer
from mustdrop.compose import Compose
from mustdrop.hooks import Keep
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


@pytest.fixture
def early():
    model = copy.deepcopy(ours())
    return drop_early(model)


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_logits_and_traces_are_those_of_whole_layers(early, name, prompts):
    inputs = {**batch(PROMPTS[prompts]), "images": pictures(len(PROMPTS[prompts]))}
    ids, logits, traces = run(ours(), REDUCERS[name], **inputs)
    found, same_logits, same_traces = run(early, REDUCERS[name], **inputs)
    assert torch.equal(found, ids)
    torch.testing.assert_close(same_logits, logits, atol=1e-5, rtol=0)
    for one, other in zip(same_traces, traces, strict=True):
        assert {**one.to_dict(), "times_ms": None} == {**other.to_dict(), "times_ms": None}


def linear(model, reducer, **inputs) -> list[int]:
    """Multiply-adds of each decoder layer's linear layers in a prefill."""
    with torch.no_grad(), reducer.on(model), FlopCounterMode(display=False) as counter:
        model(images=pictures(1), use_cache=True, **inputs)
    counts = counter.get_flop_counts()
    names = [f"LlavaLlamaForCausalLM.model.layers.{layer}" for layer in range(LAYERS)]
    own = [next(value for key, value in counts.items() if key.endswith(name)) for name in names]
    return [sum(n for op, n in one.items() if "mm" in str(op) and "bmm" not in str(op)) // 2 for one in own]


def test_products_of_dropped_tokens_and_of_the_last_layer_are_left_out(early):
    ids, text, patches = prompt(3, 6, seed=1), 10, SIDE**2
    whole, part = (linear(model, FastV(2, 0.5), input_ids=ids, logits_to_keep=1) for model in (ours(), early))
    second_half = 64 * 64 + 3 * 64 * 96
    saved = [before - after for before, after in zip(whole, part, strict=True)]
    asking = 64 * 64  # the query of the row that asks is computed inside this layer now
    dropped, unread = patches // 2, text + patches // 2 - LEAST_ROWS
    assert saved == [0, dropped * second_half - asking, *[0] * (LAYERS - 3), unread * second_half]
    all_logits = [linear(model, Reducer(), input_ids=ids) for model in (ours(), early)]
    assert all_logits[0] == all_logits[1]


@pytest.mark.parametrize("keep", [0, 1, 3, 6])
def test_as_many_logits_as_are_asked_for(early, keep):
    given = {"input_ids": prompt(3, 6, seed=1), "images": pictures(1), "logits_to_keep": keep}
    with torch.inference_mode():
        logits, found = (model(**given).logits for model in (ours(), early))
    assert found.shape[1] == (keep or SIDE**2 + 10)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


def test_who_looks_at_layers_sees_all_of_their_output(early):
    given = {"input_ids": prompt(3, 6, seed=1), "images": pictures(1), "logits_to_keep": 1}
    shapes = []
    with torch.inference_mode(), FastV(2, 0.5).on(early):
        hidden = early(**given, output_hidden_states=True).hidden_states
        handle = early.get_model().layers[1].register_forward_hook(lambda *args: shapes.append(args[-1].shape[1]))
        early(**given)
        handle.remove()
    full = SIDE**2 + 10
    assert [states.shape[1] for states in hidden[:3]] == [full] * 3 and shapes == [full]
    early(**given).logits.sum().backward()  # with gradients layers are whole, and can be run twice


class ReadsStates(FastV):
    """Says that it goes by attention alone, and does not."""

    def score(self, step):
        return step.hidden.float().norm(dim=-1) + super().score(step)


class GivesStates(FastV):
    def keep(self, step, stages):
        keep = super().keep(step, stages)
        keep.states = torch.zeros(*step.tokens.image.shape, 64)
        return keep


def test_a_reducer_that_breaks_its_word_is_an_error_and_no_wrong_number(early):
    given = {"inputs": prompt(3, 6, seed=1), "images": pictures(1), "max_new_tokens": 1}
    with pytest.raises(RuntimeError, match="meta"), ReadsStates(2, 0.5).on(early):
        early.generate(**given)
    with pytest.raises(ValueError, match="^Keep: by_attention says"), GivesStates(2, 0.5).on(early):
        early.generate(**given)


def test_others_are_asked_after_the_layer(early):
    class Looks(Reducer):
        seen = []

        def after_decoder_layer(self, step):
            self.seen.append(step.hidden.device.type)
            return Keep.where(step.hidden.norm(dim=-1) > 0)

    with Compose([FastV(2, 0.5), Looks()]).on(early):
        early.generate(prompt(3, 6, seed=1), images=pictures(1), max_new_tokens=1)
    assert Looks.seen == ["cpu"] * LAYERS


@pytest.mark.parametrize("name", ["budget", "fastv", "sparsevlm"])
def test_hosted_models_too(name):
    model, ids = copy.deepcopy(hugging_face()), prompt(3, 6, seed=1)
    given = {"input_ids": expand_for_hugging_face(ids, SIDE**2), "pixel_values": pictures(1)}
    logits, counts = [], []
    for on in (False, True):
        drop_early(model, on)
        with torch.no_grad(), REDUCERS[name].on(model), FlopCounterMode(display=False) as counter:
            logits.append(model(**given).logits)
        counts.append(counter.get_total_flops())
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert (counts[0] > counts[1]) == (name != "sparsevlm")
