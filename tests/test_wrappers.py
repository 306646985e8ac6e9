"""Reducers reach the model that really runs, whatever it is wrapped in, or say that there is none."""

import pytest
import torch
from tiny import ours, pictures, prompt
from torch._dynamo.eval_frame import OptimizedModule

from mustdrop import load_reducer
from mustdrop.hooks import Reducer, hooked_model

METHOD = {"method": "fastv", "layer": 1, "retain": 40}
SHAPE = {"layers": 3, "seed": 11}


def in_peft(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def compiled(model):
    """What `torch.compile(model)` gives, with a compiler that takes no time."""
    return OptimizedModule(model, lambda function: function)


def in_ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def in_accelerate(model):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


def dispatched(model):
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


WRAPPERS = {
    "bare": lambda model: model,
    "peft": in_peft,
    "torch.compile": compiled,
    "DataParallel": torch.nn.DataParallel,
    "DistributedDataParallel": in_ddp,
    "accelerate": in_accelerate,
    "dispatched": dispatched,
    "DDP of PEFT, dispatched": lambda model: in_ddp(in_peft(dispatched(model))),
}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPERS)
@torch.no_grad()
def test_reducer_acts_through_a_wrapper(name):
    pytest.importorskip("peft")
    ids, images = prompt(3, 4), pictures(1)
    bare = ours(**SHAPE)
    with load_reducer(METHOD).on(bare) as expected:
        logits = bare(input_ids=ids, images=images).logits
    model = ours.__wrapped__(**SHAPE)  # wrappers change a model for good
    wrapped = WRAPPERS[name](model)
    with load_reducer(METHOD).on(wrapped) as run:
        got = wrapped(input_ids=ids, images=images).logits
        assert len(run.traces) == 1
        if hasattr(wrapped, "generate"):
            wrapped.generate(inputs=ids, images=images, max_new_tokens=2)
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=0)
    assert len(run.traces) == 1 + hasattr(wrapped, "generate")
    assert all(trace.to_dict() == expected.traces[0].to_dict() for trace in run.traces[:1])
    assert type(hooked_model(wrapped).reducer) is Reducer


def test_what_holds_no_model_or_several_is_refused_in_one_line():
    several = torch.nn.ModuleList([ours(), ours(kv_heads=4, strategy="full")])
    for model, match in (
        (torch.nn.Linear(2, 2), "Linear has no hook points: load it with llava.model.builder"),
        (None, "NoneType has no hook points"),
        ("checkpoints/llava-mini", "str has no hook points"),
        (several, "ModuleList holds 2 models with hook points"),
    ):
        with pytest.raises(TypeError, match=match), load_reducer(METHOD).on(model):
            pass


def test_deepspeed_engine():
    class Engine(torch.nn.Module):
        """What matters of `deepspeed.DeepSpeedEngine`: attributes of the module inside shine through."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    engine = Engine(ours())
    with load_reducer(METHOD).on(engine) as run, torch.no_grad():
        engine(input_ids=prompt(3, 4), images=pictures(1))
    assert len(run.traces) == 1 and "reducer" not in vars(engine)
