"""Attention by blocks on CPUs: what torch's fused kernel gives, up to the rounding of scores; elsewhere that kernel."""

import pytest
import torch
import torch.nn.functional as F
from tiny import SIDE, batch, ours, pictures, prompt, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava.model import cpu_attention
from mustdrop import MustDrop, Reducer, load_reducer


@pytest.fixture
def everywhere(monkeypatch):
    """Blocks also where they are not worth it, and small ones: several prompts, heads and rows are cut."""
    monkeypatch.setattr(cpu_attention, "NARROWEST", 1)
    monkeypatch.setattr(cpu_attention, "FEWEST", 1)
    monkeypatch.setattr(cpu_attention, "ROWS", 48)
    monkeypatch.setattr(cpu_attention, "SCORES", 1 << 14)


def states(heads: int, kv_heads: int, rows: int = 150, dtype=torch.bfloat16, width: int = 64):
    torch.manual_seed(0)
    return tuple(torch.randn(2, rows, n, width, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads))


def masks() -> dict:
    padding = (torch.arange(150) >= torch.tensor([[0], [37]]))[:, None, None]
    causal = torch.ones(150, 150, dtype=torch.bool).tril()
    bias = torch.randn(2, 1, 1, 150, dtype=torch.bfloat16)
    return {"none": None, "padded": padding, "padded causal": padding & causal, "bias": bias, "one for all": causal}


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("mask", [*masks(), "causal"])
@torch.inference_mode()
def test_blocks_are_exact_attention(everywhere, monkeypatch, mask, kv_heads):
    """In float32, in which nothing is rounded away; rows that see nothing are not compared, but are numbers."""
    monkeypatch.setattr(cpu_attention, "DTYPE", torch.float32)
    given = states(6, kv_heads, dtype=torch.float32)
    grouped = kv_heads < 6
    how = {"is_causal": True} if mask == "causal" else {"attn_mask": masks()[mask]}
    if mask == "bias":
        how["attn_mask"] = how["attn_mask"].float()
    found = cpu_attention.attention(*given, **how, enable_gqa=grouped, scale=0.3)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*given, **how, enable_gqa=grouped, scale=0.3)
    real = slice(37, None)
    torch.testing.assert_close(found[:, :, real], expected[:, :, real], atol=1e-5, rtol=0)
    assert bool(found.isfinite().all()) and not torch.equal(found, expected)


@pytest.mark.parametrize("causal", [True, False])
@torch.inference_mode()
def test_the_error_is_that_of_rounded_scores(causal):
    """About four times the fused kernel's, and no more than that of transformers' eager attention."""
    query, key, value = states(4, 4, rows=300)
    truth = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=causal)
    scores = (query @ key.transpose(-1, -2)) / 8
    if causal:
        scores = scores.masked_fill(~torch.ones(300, 300, dtype=torch.bool).tril(), float("-inf"))
    eager = scores.softmax(-1, dtype=torch.float32).bfloat16() @ value
    found = cpu_attention.attention(query, key, value, is_causal=causal)
    assert (found - truth).abs().mean() < 1.15 * (eager - truth).abs().mean()
    assert not torch.equal(found, F.scaled_dot_product_attention(query, key, value, is_causal=causal))


@pytest.mark.parametrize(
    "given",
    [
        states(4, 2, dtype=torch.float32),
        states(4, 2, width=32),
        states(4, 2, rows=1),
        (states(4, 2, rows=3)[0], *states(4, 2)[1:]),
    ],
    ids=["float32", "narrow", "one row", "few rows"],
)
def test_elsewhere_it_is_the_fused_kernel(given):
    with torch.inference_mode():
        found = cpu_attention.attention(*given, enable_gqa=True)
        assert torch.equal(found, F.scaled_dot_product_attention(*given, enable_gqa=True))


def test_gradients_go_through_the_fused_kernel():
    given = [part.requires_grad_() for part in states(4, 4)]
    assert cpu_attention.attention(*given, is_causal=True).requires_grad


@pytest.mark.parametrize("reducer", ["vanilla", "thresholds", "budget", "tome", "fastv"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_model_answers_as_with_sdpa(everywhere, monkeypatch, reducer, kv_heads):
    """Tower and decoder, padded prompts, packed rows and decoding: in float32 to the rounding, with all choices."""
    monkeypatch.setattr(cpu_attention, "DTYPE", torch.float32)
    methods = {
        "vanilla": Reducer(),
        "thresholds": MustDrop(global_threshold=1.1 / SIDE**2, individual_threshold=1.0 / SIDE**2),
        "budget": MustDrop(budget=[60, 41, 30, 20], merge_to=104),
        "tome": load_reducer({"method": "tome", "retain": 40}),
        "fastv": load_reducer({"method": "fastv", "retain": 70}),
    }
    given = {**batch([prompt(3, 5), prompt(6, 2, seed=1)]), "images": pictures(2)}
    used, blocks = [], cpu_attention._block
    monkeypatch.setattr(cpu_attention, "_block", lambda *args: used.append(args[0].shape) or blocks(*args))
    with torch.inference_mode():
        found = run(ours("cpu_matmul", kv_heads=kv_heads), methods[reducer], **given)
        assert len(used) > 20
        expected = run(ours(kv_heads=kv_heads), methods[reducer], **given)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=0)
    assert [trace.kept for trace in found[2]] == [trace.kept for trace in expected[2]]


def test_dropout_and_filled_caches_are_left_to_transformers(everywhere):
    module = ours("cpu_matmul").model.layers[0].self_attn
    query, key, value = states(4, 2, rows=20, width=16)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.inference_mode():
        found = cpu_attention.forward(module, query[:, :, -3:], key, value, None, scaling=0.25)[0]
        assert torch.equal(found, sdpa(module, query[:, :, -3:], key, value, None, scaling=0.25)[0])
