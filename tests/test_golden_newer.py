"""The newer methods' choices against their authors' own functions, on every stored picture and budget."""

import pytest
import torch
from safetensors.torch import load_file

from mustdrop import ops
from mustdrop.methods.divprune import most_diverse
from mustdrop.methods.hiprune import with_neighbours
from mustdrop.methods.holov import as_given, chunk_of, ranks_and_quotas
from mustdrop.methods.mmr import most_relevant
from mustdrop.methods.scope import most_covering
from mustdrop.methods.trevs import both, similarity_to_text, strongest_by_variable_heads, with_farthest
from mustdrop.methods.vispruner import least_repeated
from mustdrop.methods.vscan import best_with, by_rank, nearest_of, window_of

PATCHES, GRID = 576, (24, 24)
PATCH = torch.arange(PATCHES)[None]


def projected(stored):
    return stored["in.hidden"][None, 35:611]


def cls(stored, block=22):
    return stored[f"in.cls_attention_block{block}"].mean(0)[None]


def scope(stored, count):
    return ops.top_count(most_covering(stored["in.features"][None], cls(stored), count), count)


def mmr(stored, count):
    importance = ops.stretched(stored["in.scores_for_mmr"][None])
    return most_relevant(projected(stored), importance, count) > 0


def hiprune(stored, count):
    middle, deep = (stored[f"in.attention_rows_block{block}"].mean((0, 1))[None, 1:] for block in (8, 22))
    first = with_neighbours(middle, [round(0.1 * count / 5)], PATCH, GRID, wraps=True)
    return ops.top_count(deep.masked_fill(first, float("inf")), count)


def holov(stored, count):
    attention = cls(stored)
    rank, quota = ranks_and_quotas(attention, chunk_of((PATCHES,), 16, attention), 16, [count])
    return rank < quota


def vispruner(stored, count):
    kept = least_repeated(stored["in.features"][None], cls(stored), PATCHES, count, count // 2)
    return torch.zeros_like(cls(stored), dtype=torch.bool).scatter(1, kept, True)


def vscan(stored, count):
    local = count // 2 - count // 2 % 16
    first = ops.top_count(by_rank(cls(stored, 5), window_of(PATCH, GRID)), local)
    return best_with(cls(stored), first, [local + count - count // 2])


def trevs(stored, count):
    text = stored["in.hidden"][None, 611:631]
    textual = similarity_to_text(projected(stored), text, torch.ones(1, len(text[0]), dtype=torch.bool))
    score = both(cls(stored), textual, 1.4)
    return ops.top_count(with_farthest(projected(stored), score, [2 * count]), 2 * count)


def divprune(stored, count):
    return most_diverse(projected(stored), count)


CHOICES = {choose.__name__: choose for choose in (scope, mmr, hiprune, holov, vispruner, vscan, trevs, divprune)}


@pytest.fixture(scope="module")
def pictures(golden):
    files = sorted((golden / "newer").glob("picture_*.safetensors"))
    stored = {file.stem: load_file(file) for file in files if not file.stem.endswith("_video_pixels")}
    if not stored:
        pytest.skip("no stored pictures")
    return stored


def outputs(stored, method, what):
    """Budget -> output of the authors' function."""
    names = (name.split(".") for name in stored)
    return {int(name[2]): stored[".".join(name)] for name in names if name[1] == method and name[-1] == what}


@pytest.mark.parametrize("method", CHOICES)
def test_choice(pictures, method):
    checked = 0
    for name, stored in pictures.items():
        for count, kept in outputs(stored, method, "kept").items():
            chosen = CHOICES[method](stored, count)[0].nonzero()[:, 0]
            assert chosen.tolist() == kept[kept >= 0].tolist(), (name, count)
            checked += 1
    assert checked


def test_scope_chooses_in_the_authors_order(pictures):
    for stored in pictures.values():
        for count, order in outputs(stored, "scope", "order").items():
            turn = most_covering(stored["in.features"][None], cls(stored), count)
            assert turn[0].argsort(descending=True)[:count].tolist() == order.tolist()


def test_holov_orders_a_chunk_by_attention(pictures):
    for stored in pictures.values():
        for count, order in outputs(stored, "holov", "order").items():
            attention = cls(stored)
            chunk = chunk_of((PATCHES,), 16, attention)
            rank, quota = ranks_and_quotas(attention, chunk, 16, [count])
            key = as_given(rank, quota, chunk).masked_fill(rank >= quota, 17 * PATCHES)
            expected = order[order >= 0]
            assert key[0].argsort()[: len(expected)].tolist() == expected.tolist()


def test_vscan_merges_the_others_into_the_nearest(pictures):
    for stored in pictures.values():
        for count, output in outputs(stored, "vscan", "output").items():
            stays = vscan(stored, count)
            into = nearest_of(projected(stored), stays)[0]
            sums = torch.zeros_like(projected(stored)[0]).index_add(0, into, projected(stored)[0])
            means = sums / torch.bincount(into, minlength=PATCHES).clamp(min=1)[:, None]
            torch.testing.assert_close(means[stays[0]], output, atol=1e-5, rtol=0)


def test_trevs_second_stage(pictures):
    checked = 0
    for stored in pictures.values():
        attention = stored["in.text_to_vision"][None]
        real = torch.ones(1, attention.shape[2], dtype=torch.bool)
        for kept in outputs(stored, "trevs", "phase_kept").values():
            image = torch.zeros(1, attention.shape[3], dtype=torch.long)
            score = strongest_by_variable_heads(attention, real, image, 1)
            assert ops.top_count(score, len(kept))[0].nonzero()[:, 0].tolist() == kept.tolist()
            checked += 1
    assert checked
