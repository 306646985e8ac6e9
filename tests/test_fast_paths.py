"""Fast paths against the plain one: the same kept tokens, the same logits."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from llava.model.language_model.cache import ROOM, GrowingLayer
from mustdrop.hooks import gather


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
