"""What comes with an image without showing a patch (CLS, newlines) is neither scored nor counted by any hook."""

import pytest
import tiles
import torch
from tiny import ours, pictures, prompt

from mustdrop.hooks import Keep, Reducer

KEPT = 5
BEFORE = "on_vision_features", "on_projected_features", "on_instruction"
HOOKS = *BEFORE, "after_decoder_layer", "after_prefill", "after_decode_layer"


def with_cls():
    """LLaVA-1.5 that shows CLS beside its patches, and what it is given."""
    return ours(strategy="full"), {"inputs": prompt(3, 6, seed=1), "images": pictures(1)}


def with_newlines():
    """LLaVA-NeXT, a newline after each row of its stitched tiles."""
    size = tiles.SIZES["wide"]
    ids = tiles.prompts([(3, 1, 6)])["input_ids"]
    return tiles.native(), {"inputs": ids, "images": tiles.stacks([size]), "image_sizes": [size]}


class LastOnes(Reducer):
    """Keeps, at one hook, the last few patches of every image, and calls everything else better than these."""

    def __init__(self, hook: str):
        self.hook, self.seen = hook, []
        setattr(self, hook, self.before if hook in BEFORE else self.inside)

    def overrides(self, hook):
        return hook == self.hook

    def before(self, step):
        index = step.tokens.patch_index
        self.seen.append(sum(step.tokens.known_lengths))
        return Keep.top(torch.arange(index.shape[1]).expand_as(index).float(), KEPT)

    def inside(self, step):
        tokens = step.tokens
        self.seen.append(int(tokens.vision.sum()))
        assert sum(image.tokens for image in tokens.facts()[0].images) == self.seen[-1]
        return Keep.top(torch.where(tokens.vision, tokens.vision_index.float(), 1e9), KEPT)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("build", [with_cls, with_newlines])
def test_extras_are_neither_scored_nor_counted(build, hook):
    model, given = build()
    with Reducer().on(model) as plain:
        model.generate(**given, max_new_tokens=2)
    (whole,) = plain.traces
    patches, extras = whole.vision_tokens[0], whole.text_tokens - given["inputs"].shape[1] + 1
    assert patches == sum(image["patches"] for image in whole.images) and extras > 0
    reducer = LastOnes(hook)
    with reducer.on(model) as run:
        cache = model.generate(**given, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    (trace,), cached = run.traces, cache.records[-1]
    if hook == "on_vision_features":  # views one by one, with the rows that stitching cuts off
        views = trace.images[0]["views"]
        assert reducer.seen == [views * whole.tower[0][0][1]]
        assert 0 < trace.vision_tokens[0] <= KEPT * views
        return
    assert reducer.seen[0] == patches
    assert cached.vision_index[cached.vision].sort().values.tolist() == list(
        range(KEPT) if hook in BEFORE else range(patches - KEPT, patches)
    )
    if hook not in BEFORE:
        generated = hook == "after_decode_layer"
        assert int((~cached.vision).sum()) == whole.text_tokens + generated
