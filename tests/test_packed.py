"""Layers on the real rows of a padded batch: the tokens and logits of layers on all rows."""

import copy

import pytest
import torch
from tiny import LAYERS, SIDE, batch, ours, pictures, prompt, run

from eval.bench import padding as ragged
from llava.model.language_model import layers, loop
from llava.model.language_model.packed import PackedRows
from mustdrop import MustDrop


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_rows_give_what_padded_rows_give(kv_heads, monkeypatch):
    model = ours(kv_heads=kv_heads)
    inputs = batch([prompt(3, 5), prompt(6, 2, seed=1), prompt(4, 9, seed=2)])
    reducer = MustDrop(global_threshold=1.1 / SIDE**2, individual_threshold=1.0 / SIDE**2)
    used, packed_layer = [], layers._run_packed

    def spy(layer, stream, cache):
        used.append(stream.packed.lengths)
        return packed_layer(layer, stream, cache)

    monkeypatch.setattr(layers, "_run_packed", spy)
    with torch.inference_mode():
        packed = run(model, reducer, images=pictures(3), **inputs)
        assert len(used) > 1 and any(len(set(lengths)) > 1 for lengths in used)
        monkeypatch.setattr(loop.PackedRows, "of", lambda *_: None)
        padded = run(model, reducer, images=pictures(3), **inputs)
    assert torch.equal(packed[0], padded[0])
    torch.testing.assert_close(packed[1], padded[1], atol=1e-4, rtol=0)
    for one, other in zip(packed[2], padded[2], strict=True):
        assert one.kept == other.kept and one.cache_bytes == other.cache_bytes


def test_who_asks_for_hidden_states_gets_those_of_every_layer():
    model, given = copy.deepcopy(ours()), batch([prompt(3, 5), prompt(6, 2, seed=1)])
    prompts = {"input_ids": given["inputs"], "attention_mask": given["attention_mask"]}
    with torch.inference_mode(), MustDrop(global_threshold=1.1 / SIDE**2, individual_threshold=1.0 / SIDE**2).on(model):
        before = model(**prompts, images=pictures(2)).logits
        asked = model(**prompts, images=pictures(2), output_hidden_states=True)
    assert len(asked.hidden_states) == LAYERS + 1
    torch.testing.assert_close(asked.logits[:, -1], before[:, -1], atol=1e-4, rtol=0)


def test_rows_come_back_to_their_places():
    valid = torch.tensor([[False, True, True], [True, True, True]])
    rows = PackedRows(valid.flatten().nonzero()[:, 0], [2, 3], (2, 3))
    states = torch.randn(2, 3, 4)
    assert torch.equal(rows.unpack(rows.pack(states)), states * valid[..., None])


def test_what_padding_costs():
    groups = [[3, 5], [4, 4]]
    assert ragged.padded_share(groups) == pytest.approx(2 / 18)
    assert ragged.batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]
    with torch.inference_mode():
        padded, packed, saved = ragged.compare_times(ours().get_model(), [[30] + [20] * 7, [30] + [9] * 7], repeats=1)
    assert padded > 0 and packed > 0 and saved < 1


def test_ragged_says_what_is_wrong(capsys):
    assert ragged.main(["--questions", "4"]) == 2
    assert capsys.readouterr().err == "error: questions: got 4, expected at least one batch of 32\n"
