"""Hosted models in threads, wrappers, other precisions, spread, trained; and left as they were."""

import copy
import subprocess
import sys
import threading

import pytest
import stock
import torch
from hosted import FAMILIES, KeepAll, attributes, reducer_of
from stock import alone, generate, inputs

import llava  # noqa: F401  (it hosts stock models)
from mustdrop import Reducer, load_reducer
from mustdrop.hooks import hooked_model


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_outside_of_the_block_the_model_is_what_it_was(family, text):
    model = stock.stock(family, text)
    given = inputs(family, model)
    logits = model(**given).logits
    before, kind, weights = attributes(model), type(model), {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("mustdrop", "yopo"):
        with reducer_of(name).on(model):
            generate(model, given)
    with pytest.raises(RuntimeError, match="on purpose"), reducer_of("mustdrop").on(model):
        raise RuntimeError("on purpose")
    assert type(model) is kind and attributes(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**given).logits, logits)


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_bfloat16(family, text):
    model = copy.deepcopy(stock.stock(family, text)).bfloat16()
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(family, model).items()}
    logits = generate(model, given)[1]
    with KeepAll().on(model):
        assert torch.equal(generate(model, given)[1], logits)
    with reducer_of("mustdrop").on(model):
        assert generate(model, given)[1].dtype == torch.float32 or generate(model, given)[1].isfinite().all()


@pytest.mark.parametrize("family", ["next", "qwen3", "internvl"])
def test_threads_with_two_reducers_and_one_with_none_on_one_model(family):
    model = stock.stock(family)
    given = inputs(family, model)
    plain = generate(model, given)[1]
    names = "mustdrop", "divprune", None
    alone_, found, barrier = {None: plain}, {}, threading.Barrier(len(names))
    for name in names[:2]:
        with reducer_of(name).on(model):
            alone_[name] = generate(model, given)[1]

    def work(name):
        barrier.wait()
        with torch.no_grad():
            for _ in range(3):
                if name is None:
                    found.setdefault(name, []).append(generate(model, given)[1])
                else:
                    with reducer_of(name).on(model):
                        found.setdefault(name, []).append(generate(model, given)[1])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, alone_[name]) for name in names for one in found[name])
    assert len(found) == 3 and "forward" not in vars(model.model)


@pytest.mark.parametrize("spread", ["hooks", "offloaded"])
@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_models_that_accelerate_has_spread(family, text, spread):
    from accelerate import cpu_offload, dispatch_model

    whole = stock.stock(family, text)
    model = copy.deepcopy(whole)
    given = inputs(family, model)
    if spread == "hooks":
        parts = {"model.language_model.layers.0": "cpu", "": "cpu"}
        model = dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    else:
        model = cpu_offload(model, execution_device="cpu")
    before = attributes(model)
    for name in ("mustdrop", "divprune and fastv", "yopo") if spread == "hooks" else ("divprune and fastv",):
        with reducer_of(name).on(whole):
            expected = whole(**given).logits, generate(whole, given)[1]
        with reducer_of(name).on(model):
            assert torch.equal(model(**given).logits, expected[0])
            if spread == "hooks" or not hasattr(model.model, "image_newline"):  # else stock cannot, either
                assert torch.equal(generate(model, given)[1], expected[1])
    assert attributes(model) == before


def test_hidden_states_attentions_and_labels():
    model = stock.stock("llava")
    given = alone(inputs("llava", model), 0)
    labels = given["input_ids"].masked_fill(given["input_ids"] == stock.IMAGE, -100)
    expected = model(**given, labels=labels, output_hidden_states=True)
    with KeepAll().on(model):
        found = model(**given, labels=labels, output_hidden_states=True)
        assert torch.equal(found.loss, expected.loss)
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
        assert torch.equal(model(**given, labels=labels, return_dict=False)[0], expected.loss)
        with pytest.raises(ValueError, match="output_attentions: sdpa attention makes no probabilities"):
            model(**given, output_attentions=True)
    with reducer_of("fastv").on(model):
        found = model(**given, labels=labels)
    own = labels[labels != -100]
    left = found.logits.shape[1]
    assert left < labels.shape[1]
    rows = torch.cat([found.logits[0, :3], found.logits[0, -(len(own) - 3) :]])  # text before the image, and after it
    expected = torch.nn.functional.cross_entropy(
        torch.cat([rows[:2], rows[3:-1]]), torch.cat([own[1:3], own[4:]]), reduction="sum"
    )
    row_before_text = found.logits[0, left - (len(own) - 3) - 1]
    expected += torch.nn.functional.cross_entropy(row_before_text[None], own[3:4], reduction="sum")
    torch.testing.assert_close(found.loss, expected / (len(own) - 1))


def test_what_a_stock_model_cannot_do_is_refused_when_the_block_begins():
    model = stock.stock("llava")
    for method, match in (
        ({"method": "smallimage", "retain": 9}, "method: smallimage makes images smaller"),
        ({"method": "visionzip", "retain": 9, "compat": "official"}, "compat: got 'official', expected 'default'"),
        ({"method": "fastv", "layer": 40, "retain": 9}, "layer"),
        ({"method": "compose", "parts": [{"method": "smallimage"}, {"method": "yopo"}]}, "method: smallimage"),
    ):
        with pytest.raises(ValueError, match=match) as error, load_reducer(method).on(model):
            pass
        assert "\n" not in str(error.value) and "forward" not in vars(model.model)
    gemma = stock.stock("llava", "gemma")
    with pytest.raises(ValueError, match="text_config.model_type is 'gemma'"), reducer_of("fastv").on(gemma):
        pass
    several = stock.stock("llava", "llama", vision_feature_layer=(-2, -3))
    with pytest.raises(ValueError, match="vision_feature_layer"), reducer_of("mustdrop").on(several):
        pass
    given = inputs("llava", several)
    logits = several(**given).logits
    with KeepDecoder().on(several):
        valid = given["attention_mask"].bool()
        torch.testing.assert_close(several(**given).logits[valid], logits[valid], atol=2e-6, rtol=0)


class KeepDecoder(Reducer):
    def after_decoder_layer(self, step):
        return None


def test_eager_attention_and_its_probabilities():
    model = copy.deepcopy(stock.stock("next"))
    model.set_attn_implementation("eager")
    given = alone(inputs("next", model), 0)
    expected = model(**given, output_attentions=True)
    with KeepAll().on(model):
        found = model(**given, output_attentions=True)
    assert torch.equal(found.logits, expected.logits)
    assert all(map(torch.equal, found.attentions, expected.attentions))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["next", "qwen2.5", "qwen3", "internvl"])
def test_training_steps_reach_tower_and_decoder(family, checkpointing):
    model = copy.deepcopy(stock.stock(family)).train()
    given = inputs(family, model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.enable_grad(), reducer_of("mustdrop").on(model):
        model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] == stock.IMAGE, -100)).loss.backward()
    tower = getattr(model.model, "visual" if family.startswith("qwen") else "vision_tower")
    patches = next(part for part in tower.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d))
    parts = patches, model.model.language_model.layers[0].self_attn.q_proj
    assert all(part.weight.grad.abs().sum() > 0 for part in parts)


def in_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [in_peft, compiled])
def test_wrappers(wrap):
    bare = stock.stock("llava")
    given = inputs("llava", bare)
    plain = bare(**given).logits
    with reducer_of("fastv").on(bare):
        expected = bare(**given).logits
    model = copy.deepcopy(bare)
    wrapped = wrap(model)
    torch.testing.assert_close(wrapped(**given).logits, plain, atol=1e-5, rtol=0)
    assert hooked_model(wrapped) is model
    with reducer_of("fastv").on(wrapped) as run:
        torch.testing.assert_close(wrapped(**given).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(wrapped(**given).logits, plain, atol=1e-5, rtol=0)
    assert len(run.traces) == 2


def test_a_copy_made_inside_a_block_is_a_model_of_its_own():
    model = stock.stock("llava")
    given = inputs("llava", model)
    logits = model(**given).logits
    with reducer_of("fastv").on(model) as run:
        twin = copy.deepcopy(model)
        for weight in twin.parameters():
            weight.mul_(1.0)
        assert torch.equal(twin(**given).logits, logits) and not run.traces


def test_without_anybody_who_hosts_it_a_stock_model_is_refused_in_one_line():
    code = """
import sys
sys.path.insert(0, "tests")
import mustdrop.hosts as hosts
hosts._installed = lambda: NAMES
import stock
from mustdrop import load_reducer
try:
    with load_reducer({"method": "fastv", "layer": 2, "drop_ratio": 0.5}).on(stock.stock("llava")):
        print("hosted")
except TypeError as error:
    print(error)
"""
    said = {}
    for names in ((), ("llava.model.hosted",)):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("NAMES", repr(names))], capture_output=True, text=True, check=True
        )
        said[len(names)] = done.stdout.strip().splitlines()[-1]
    assert said[0].startswith("LlavaForConditionalGeneration has no hook points") and "need llava imported" in said[0]
    assert said[1] == "hosted"
