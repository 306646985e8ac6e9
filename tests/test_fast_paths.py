"""Fast paths against the plain one: the same kept tokens, the same logits."""

import copy
import shutil
from functools import cache

import pytest
import torch
from tiny import batch, ours, pictures, prompt, run
from transformers.cache_utils import DynamicLayer

from llava.model import compile_model
from llava.model.language_model.cache import ROOM, GrowingLayer
from mustdrop import MustDrop, Reducer, load_reducer
from mustdrop.hooks import ForwardState, gather
from mustdrop.methods import FastV

BUDGET = {"budget": [60, 41, 30, 20], "merge_to": 104}
SHALLOW = {"budget": [60, 30], "merge_to": 104, "filter_layers": [0, 1]}  # for four layers
THRESHOLDS = {"global_threshold": 0.01, "individual_threshold": 0.03}
REDUCERS = {
    "vanilla": Reducer(),
    "thresholds": MustDrop(**THRESHOLDS),
    "budget": MustDrop(**BUDGET),
    "fastv": FastV(layer=2, drop_ratio=0.7),
}
PROMPTS = [prompt(3, 6, seed=1), prompt(6, 2, seed=2), prompt(2, 9, seed=3)]


@pytest.mark.parametrize("room", [1, 3, ROOM])
def test_growing_layer_holds_what_transformers_layer_does(room):
    """Whatever happens to it: positions appended, beams reordered, some taken back, rows picked and repeated."""
    torch.manual_seed(0)
    layers = GrowingLayer(), DynamicLayer()
    layers[0].room = room
    changes = [lambda layer: None, lambda layer: layer.crop(-2)]
    changes += [lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])), lambda layer: layer.crop(-1)]
    changes += [lambda layer: layer.batch_select_indices(torch.tensor([2, 0, 1]))]
    with torch.inference_mode():
        for new in (7, 1, 1, 2, 1):
            for change in changes:
                keys, values = torch.randn(2, 3, 2, new, 4)
                for layer in layers:
                    layer.update(keys, values)
                    change(layer)
                assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)
    with torch.no_grad():  # buffers made in inference mode are written to outside of it
        assert torch.equal(layers[0].update(keys, values)[0], layers[1].update(keys, values)[0])


def test_growing_layer_writes_in_place_and_grows_when_full():
    layer, state = GrowingLayer(), torch.randn(1, 2, 1, 4)
    layer.room = 2
    layer.update(*torch.randn(2, 1, 2, 5, 4))
    held = []
    for _ in range(5):
        layer.update(state, state)
        held.append((layer.keys.data_ptr(), layer.keys.shape[2], layer.buffers[0].shape[2]))
    assert [used for _, used, _ in held] == [6, 7, 8, 9, 10]
    assert [capacity for *_, capacity in held] == [7, 7, 9, 9, 11]
    assert held[0][0] == held[1][0] != held[2][0] == held[3][0]


def test_keys_can_be_trained_through():
    states = torch.randn(1, 2, 3, 4, requires_grad=True)
    layer = GrowingLayer()
    for _ in range(3):
        keys, _ = layer.update(states, states)
        (keys**2).sum().backward()
    assert states.grad is not None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kept", [0, 1, 5])
def test_gather_picks_rows(batch, kept):
    values = torch.randn(batch, 2, 9, 4).transpose(1, 2)
    indices = torch.randint(0, 9, (batch, kept))
    expected = [values[row, indices[row]] for row in range(batch)]
    assert torch.equal(gather(values, indices), torch.stack(expected))


@cache
def made_of_programs(attention: str = "sdpa", dtype: torch.dtype = torch.float32, backend: str = "eager"):
    """A compiled model; with the backend "eager" what its programs are made of runs as it is."""
    return compile_model(copy.deepcopy(ours(attn_implementation=attention, dtype=dtype)), backend=backend)


@pytest.fixture
def compiled():
    return made_of_programs()


def answers(model, reducer, batched: bool):
    """Logits `[prompts, steps, vocabulary]` and traces."""
    images = pictures(len(PROMPTS))
    if batched:
        return run(model, reducer, **batch(PROMPTS), images=images)[1:]
    alone = [run(model, reducer, inputs=ids, images=images[row, None]) for row, ids in enumerate(PROMPTS)]
    return torch.cat([logits for _, logits, _ in alone]), [trace for *_, (trace,) in alone]


@cache
def expected(name: str, dtype: torch.dtype):
    """`answers` by the plain path: sdpa, prompt by prompt."""
    return answers(ours(dtype=dtype), REDUCERS[name], batched=False)


def agreement(traces, others) -> float:
    """Tokens kept by both over those kept by one, averaged over filter layers and prompts; 1 if nothing is chosen."""
    pairs = [
        (set(patches), set(other.kept["prefill"][layer]))
        for trace, other in zip(traces, others, strict=True)
        for layer, patches in trace.kept["prefill"].items()
    ]
    return sum(len(one & two) / len(one | two) for one, two in pairs) / len(pairs) if pairs else 1.0


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", ["plain", "compiled"])
def test_every_path_keeps_the_same_tokens(path, dtype, attention, batched, name):
    """In bfloat16 kernels round differently, and tokens whose scores nearly tie may change places."""
    model = (
        made_of_programs(attention, dtype) if path == "compiled" else ours(attn_implementation=attention, dtype=dtype)
    )
    (logits, traces), (wanted, known) = answers(model, REDUCERS[name], batched), expected(name, dtype)
    if dtype == torch.float32:
        assert [trace.kept for trace in traces] == [trace.kept for trace in known]
        assert [trace.cache_lengths for trace in traces] == [trace.cache_lengths for trace in known]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    else:
        assert agreement(traces, known) > 0.9
        torch.testing.assert_close(logits[:, 0], wanted[:, 0], atol=0.15, rtol=0)


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_keeps_the_same_tokens(batched, name):
    """Its masks and results; the kernel itself, which takes minutes to compile on a CPU, is torch's."""
    with torch.compiler.set_stance("force_eager"):
        logits, traces = answers(ours(attn_implementation="flex_attention"), REDUCERS[name], batched)
    wanted, known = expected(name, torch.float32)
    assert [trace.kept for trace in traces] == [trace.kept for trace in known]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_keeps_the_same_tokens():
    given = {"inputs": PROMPTS[0], "images": pictures(1)}
    model, reducer = compile_model(copy.deepcopy(ours(layers=4))), MustDrop(**SHALLOW)
    (_, logits, (trace,)), (_, wanted, (known,)) = (run(one, reducer, **given) for one in (model, ours(layers=4)))
    assert trace.kept == known.kept
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_a_whole_decode_step_as_one_program():
    """As on CUDA, where it is replayed as a CUDA graph."""
    model = compile_model(copy.deepcopy(ours(layers=4)), backend="eager", graphs=True)
    given = {**batch(PROMPTS[:2]), "images": pictures(2)}
    for reducer in (Reducer(), MustDrop(**SHALLOW)):
        found, wanted = run(model, reducer, **given)[1], run(ours(layers=4), reducer, **given)[1]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 2}], ids=str)
def test_compiled_generates_the_same(compiled, settings):
    """Padded prompts with an image each; two calls, of which the second takes over the first one's buffers."""
    reducer = MustDrop(**BUDGET)
    for seed in (1, 2):
        given = {**batch(PROMPTS), "images": pictures(3, seed=seed), "max_new_tokens": 6, "do_sample": False}
        ids = []
        for model in (ours(), compiled):
            torch.manual_seed(0)
            with reducer.on(model):
                ids.append(model.generate(**{**given, **settings}))
        assert torch.equal(*ids)


def test_compiled_programs_serve_all_layers_lengths_and_reducers(compiled):
    for reducer in (Reducer(), MustDrop(**BUDGET), MustDrop(**THRESHOLDS)):
        for number, ids in enumerate(PROMPTS):
            run(compiled, reducer, inputs=ids, images=pictures(1, seed=number))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for reducer in (Reducer(), MustDrop(budget=[50, 30, 20, 20], merge_to=112), FastV(layer=3, drop_ratio=0.7)):
        run(compiled, reducer, inputs=prompt(8, 4), images=pictures(1, seed=5), new_tokens=70)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_compiled_buffers_are_not_shared_by_two_caches_in_use(compiled):
    token = torch.tensor([[5]])
    with torch.no_grad():
        prompts = [{"input_ids": ids, "images": pictures(1), "use_cache": True} for ids in PROMPTS[:2]]
        expected = [ours()(token, past_key_values=ours()(**one).past_key_values).logits for one in prompts]
        caches = [compiled(**one).past_key_values for one in prompts]
        for _ in range(2):
            found = [compiled(token, past_key_values=cache).logits for cache in caches]
            for cache in caches:
                cache.crop(-1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert all(cache.allocated_bytes > sum(layer.keys.nbytes * 2 for layer in cache.layers) for cache in caches)


def test_compiled_stands_back_from_what_it_does_not_know(compiled):
    """Cached tokens dropped while decoding, hidden states asked for, gradients."""
    given = {**batch(PROMPTS[:1]), "images": pictures(1)}
    reducer = MustDrop(**BUDGET, output_threshold=0.004)
    torch.testing.assert_close(run(compiled, reducer, **given)[1], run(ours(), reducer, **given)[1], atol=1e-5, rtol=0)
    with torch.enable_grad():
        assert compiled(PROMPTS[0], images=pictures(1), labels=PROMPTS[0]).loss.requires_grad
    hooked = copy.deepcopy(compiled)
    settings = {"max_new_tokens": 3, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    states = [model.generate(**given, **settings).hidden_states for model in (copy.deepcopy(ours()), hooked)]
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=0)


def test_a_model_on_several_devices_is_not_compiled():
    model = copy.deepcopy(ours())
    model.model.layers[3].to("meta")
    with pytest.raises(ValueError, match="compile: the decoder is on cpu, meta, it must be on one device"):
        compile_model(model)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "dart", "mustdrop"])
def test_a_reducer_is_asked_after_the_layers_it_names_and_says_the_same(method, monkeypatch):
    """Being asked after every layer changes nothing but the number of questions."""
    asked, given = [], {**batch(PROMPTS[:2]), "images": pictures(2)}
    settings = THRESHOLDS if method == "mustdrop" else {}
    parts = load_reducer({"method": method, **settings}).asked_at("after_decoder_layer")
    for kind in {type(part) for part in parts}:
        answer = kind.after_decoder_layer
        monkeypatch.setattr(
            kind, "after_decoder_layer", lambda own, step, answer=answer: asked.append(step.layer) or answer(own, step)
        )
    found = run(ours(), load_reducer({"method": method, **settings}), **given)
    named = sorted({layer for part in parts for layer in part.asks_after(8)})
    assert asked == named and 0 < len(named) < 5
    monkeypatch.setattr(ForwardState, "asks_after", lambda own, layers: set(range(layers)))
    everywhere = run(ours(), load_reducer({"method": method, **settings}), **given)
    assert len(asked) == len(named) + 8 and torch.equal(found[1], everywhere[1])
    assert [trace.kept for trace in found[2]] == [trace.kept for trace in everywhere[2]]
