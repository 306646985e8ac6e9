"""Sliding windows and what else an architecture does in the loop: stock models of transformers as the reference."""

import copy

import pytest
import torch
from tiny import ours, pictures, prompt
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.compiled import Compiled
from llava.model.language_model.layers import StreamLayer
from llava.model.language_model.loop import DecoderLoop
from llava.model.language_model.windows import windows_of
from mustdrop.hooks import ForwardState, Keep, LayerPlan, PromptFacts, Reducer, Tokens
from mustdrop.hooks import ImageFacts as Image

WINDOW, TEXT, IMAGE, LENGTH = 6, 4, 12, 24
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "phi3": Phi3Config(**SHAPE, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
}
WINDOWED = [name for name in FAMILIES if name != "llama"]


def models(name: str, attention: str = "sdpa"):
    """A stock text model, and another on the same weights that runs our loop."""
    torch.manual_seed(0)
    configs = (copy.deepcopy(FAMILIES[name]) for _ in range(2))
    stock, looped = (AutoModelForCausalLM.from_config(one, attn_implementation=attention) for one in configs)
    looped.load_state_dict(stock.state_dict())
    inner = looped.model.eval()
    inner.__class__ = type("Looped", (DecoderLoop, type(inner)), {})
    for layer in inner.layers:
        layer.__class__ = type("Layer", (StreamLayer, type(layer)), {})
    return stock.model.eval(), inner


def prompts(real: tuple[int, ...] = (LENGTH,), side: str = "left") -> Tokens:
    """Records of padded prompts: text, an image of 12 tokens, text."""
    batch, column = len(real), torch.arange(LENGTH)
    position = torch.stack([column - (LENGTH - n if side == "left" else 0) for n in real]).clamp(min=0)
    valid = torch.stack([column >= LENGTH - n if side == "left" else column < n for n in real])
    index = position - TEXT
    vision = valid & (index >= 0) & (index < IMAGE)
    return Tokens(
        position,
        column.repeat(batch, 1),
        torch.where(vision, 0, -1),
        torch.where(vision, index, -1),
        torch.zeros_like(vision),
        valid & (index >= IMAGE),
        None if bool(valid.all()) else valid,
        images=1,
        instruction_tokens=max(real) - TEXT - IMAGE,
        prompts=tuple(PromptFacts(n - IMAGE, n - IMAGE - TEXT, (Image(IMAGE, IMAGE, IMAGE),)) for n in real),
    )


class Half(Reducer):
    """Every second vision token goes after a layer; `seen` is what a text row is told of its attention."""

    def __init__(self, layer: int = 1, by_mask: bool = True):
        self.layer, self.by_mask, self.seen = layer, by_mask, {}

    def after_decoder_layer(self, step):
        rows = torch.full_like(step.tokens.image[:, :1], step.tokens.image.shape[1] - 1)
        self.seen[step.layer] = step.attention.probabilities(rows)
        if step.next_attention is not None:
            self.seen[step.layer, "next"] = step.next_attention.probabilities(rows)
        if step.layer == self.layer:
            even = step.tokens.vision_index % 2 == 0
            return Keep.where(even) if self.by_mask else Keep.top(even.float(), IMAGE // 2)


def state_of(reducer: Reducer, batch: int = 1) -> ForwardState:
    state = ForwardState(reducer)
    state.images = [[] for _ in range(batch)]
    return state


def run_loop(inner, embeds: Tensor, tokens: Tokens, reducer: Reducer, new: Tensor | None = None):
    """Normalised states of a prefill, of decoding `new` `[batch, steps, width]` one by one, and the cache."""
    state, cache = state_of(reducer, len(embeds)), VisionCache(inner.config)
    first = inner.norm(inner.prefill(embeds, tokens, state, cache))
    steps = [] if new is None else [inner.norm(inner.decode(new[:, [n]], cache)) for n in range(new.shape[1])]
    return first, torch.cat(steps, dim=1) if steps else None, cache


def reference(stock, embeds: Tensor, real: int, new: Tensor, hidden_from: int | None, drop: Tensor | None) -> Tensor:
    """The stock layers on one prompt of `real` tokens and what follows it, a window and hidden columns in their masks.

    Columns in `drop` are not seen by later tokens in layers from `hidden_from` on; nothing is removed.
    """
    hidden = torch.cat([embeds[:, :real], new], dim=1)
    length = hidden.shape[1]
    column = torch.arange(length)
    rotary = stock.rotary_emb(hidden, column[None])
    causal = column <= column[:, None]
    windows = windows_of(stock.config, stock.layers) or (None,) * len(stock.layers)
    for number, (layer, window) in enumerate(zip(stock.layers, windows, strict=True)):
        sees = causal if window is None else causal & (column > column[:, None] - window)
        if drop is not None and number >= hidden_from:
            gone = torch.zeros(length, dtype=torch.bool)
            gone[drop] = True
            sees = sees & ~gone | torch.eye(length, dtype=torch.bool)
        hidden = layer(hidden, attention_mask=sees[None, None], position_embeddings=rotary)
    return stock.norm(hidden)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_nothing_dropped_is_the_stock_model(name, attention):
    """Whole prompts by stock forward; then token by token, against the stock model on all of them."""
    stock, inner = models(name, attention)
    embeds, new = torch.randn(1, LENGTH, 64), torch.randn(1, 5, 64)
    first, steps, _ = run_loop(inner, embeds, prompts(), Reducer(), new)
    expected = stock(inputs_embeds=torch.cat([embeds, new], dim=1)).last_hidden_state
    torch.testing.assert_close(first, expected[:, :LENGTH], atol=2e-5, rtol=0)
    torch.testing.assert_close(steps, expected[:, LENGTH:], atol=2e-5, rtol=0)
    if name != "llama":
        inner.config.sliding_window = None
        for layer in inner.layers:
            layer.self_attn.sliding_window = None
        assert (run_loop(inner, embeds, prompts(), Reducer())[0] - first).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("by_mask", [True, False])
@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_half_dropped_is_a_mask_on_the_full_prompt(name, positions, by_mask, side):
    """Padded prompts of three lengths, caches of two; numbering anew moves rotary positions and no window."""
    stock, inner = models(name)
    real, reducer = (LENGTH, 20, 18), Half(by_mask=by_mask)
    embeds, new = torch.randn(3, LENGTH, 64), torch.randn(3, 4, 64)
    tokens = prompts(real, side)
    reducer.positions = positions
    if positions == "renumber":  # with no rotation there is one right answer for any numbering
        for model in (stock, inner):
            model.rotary_emb.inv_freq.zero_()
    first, steps, cache = run_loop(inner, embeds, tokens, reducer, new)
    assert len({cache.length(layer) for layer in range(4)}) == 2
    for row, count in enumerate(real):
        start = LENGTH - count if side == "left" else 0
        drop = torch.arange(TEXT + 1, TEXT + IMAGE, 2)
        expected = reference(stock, embeds[[row], start : start + count], count, new[[row]], 2, drop)
        after = count - TEXT - IMAGE
        torch.testing.assert_close(first[row, -after:], expected[0, count - after : count], atol=2e-5, rtol=0)
        torch.testing.assert_close(steps[row], expected[0, count:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_attention_on_demand_is_that_of_the_layers(name):
    reducer, embeds = Half(), torch.randn(1, LENGTH, 64)
    stock, inner = models(name, "eager")
    run_loop(inner, embeds, prompts(), reducer)
    expected = stock(inputs_embeds=embeds, output_attentions=True).attentions
    for layer in (0, 1):
        torch.testing.assert_close(reducer.seen[layer], expected[layer][:, :, -1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(reducer.seen[0, "next"], expected[1][:, :, -1:], atol=1e-6, rtol=0)
    place = torch.cat([torch.arange(TEXT), TEXT + torch.arange(0, IMAGE, 2), torch.arange(TEXT + IMAGE, LENGTH)])
    windows = windows_of(inner.config, inner.layers)
    far = place <= LENGTH - 1 - WINDOW
    for layer in (2, 3):
        assert bool((reducer.seen[layer][..., far] == 0).all()) and windows[layer] == WINDOW


class Forgets(Reducer):
    """In decoding, a layer's cache loses its first vision token at every step; the attention it saw is kept."""

    def __init__(self):
        self.seen = []

    def after_decode_layer(self, step):
        self.seen.append(step.attention.probabilities(torch.zeros_like(step.tokens.image[:, :1])))
        keep = torch.ones_like(step.tokens.vision)
        keep[:, int(step.tokens.vision[0].nonzero()[0])] = False
        return Keep.where(keep)


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_windows_count_right_where_decoding_forgets(name):
    """The first vision tokens are out of reach of generated ones, so that forgetting them changes nothing."""
    stock, inner = models(name)
    if name == "qwen2":
        for layer in (*stock.layers, *inner.layers):
            layer.self_attn.sliding_window = WINDOW
    embeds, new, reducer = torch.randn(1, LENGTH, 64), torch.randn(1, 4, 64), Forgets()
    _, steps, cache = run_loop(inner, embeds, prompts(), reducer, new)
    assert cache.length(0) == LENGTH
    torch.testing.assert_close(steps, reference(stock, embeds, LENGTH, new, None, None)[:, LENGTH:], atol=2e-5, rtol=0)
    assert all(int((row > 0).sum(-1).max()) == WINDOW for row in reducer.seen)


@torch.no_grad()
def test_compiled_layers_have_the_window():
    stock, inner = models("qwen2")
    inner.compiled = Compiled(backend="eager")
    embeds, new = torch.randn(1, LENGTH, 64), torch.randn(1, 3, 64)
    first, steps, _ = run_loop(inner, embeds, prompts(), Reducer(), new)
    expected = stock(inputs_embeds=torch.cat([embeds, new], dim=1)).last_hidden_state
    torch.testing.assert_close(torch.cat([first, steps], dim=1), expected, atol=2e-5, rtol=0)


class Plan(Reducer):
    def __init__(self, **plan):
        self.of_layer = LayerPlan(**plan)

    def before_decoder_layer(self, step):
        return self.of_layer


@torch.no_grad()
def test_what_has_no_window_is_refused_or_right():
    embeds = torch.randn(1, LENGTH, 64)
    inner = models("mistral")[1]
    with pytest.raises(ValueError, match="^sliding_window: is 6, a prompt of 24 positions is longer") as error:
        run_loop(inner, embeds, prompts(), Plan(heads=0.5))
    assert "\n" not in str(error.value)
    of_mlp = run_loop(inner, embeds, prompts(), Plan(mlp_share=1.0))[0]
    torch.testing.assert_close(of_mlp, run_loop(inner, embeds, prompts(), Reducer())[0], atol=2e-5, rtol=0)
    inner.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="^sliding_window: is 6, a prompt takes 24 positions: flash_attention_2 counts"
    ):
        run_loop(inner, embeds, prompts(), Reducer())


def test_layers_of_an_unknown_kind_are_refused():
    inner = models("qwen2")[1]
    inner.config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(ValueError, match="^layer_types: has chunked_attention, the decoder loop runs full_attention"):
        windows_of(inner.config, inner.layers)
    assert windows_of(ours().config, ours().model.layers) is None


@torch.no_grad()
def test_a_prompt_within_the_window_is_left_to_the_kernel():
    inner = models("mistral")[1]
    inner.config.sliding_window = LENGTH + 1
    assert inner.stream(torch.randn(1, LENGTH, 64), prompts(), state_of(Reducer())).windows is None


class Deep(type(ours().model)):
    """Adds a feature of its own to every vision token after layers 0 to 2, as deepstack models do."""

    def after_layer(self, index, stream):
        if index > 2:
            return stream
        feature = self.features[index][stream.tokens.vision_index.clamp(min=0)]
        return stream.with_hidden(stream.hidden + feature * stream.tokens.vision[..., None])


class Drops(Reducer):
    """Half of the vision tokens after layer 0; notes the states it was shown."""

    def __init__(self):
        self.shown = []

    def after_decoder_layer(self, step):
        self.shown.append(step.hidden)
        return Keep.where(step.tokens.vision_index % 2 == 0) if step.layer == 0 else None


@torch.no_grad()
def test_an_architecture_adds_between_layers_before_the_reducer_is_asked():
    model, reducer = copy.deepcopy(ours()), Drops()
    model.model.__class__ = Deep
    model.model.features = torch.randn(3, 144, 64)
    given = {"input_ids": prompt(3, 5), "images": pictures(1), "output_hidden_states": True}
    with reducer.on(model):
        states = model(**given).hidden_states
    first = ours()(**{**given, "images": pictures(1)}).hidden_states[1]
    vision = slice(4, 4 + 144)
    added = states[1][0, vision] - first[0, vision]
    torch.testing.assert_close(added, model.model.features[0], atol=1e-5, rtol=0)
    assert torch.equal(reducer.shown[0], states[1])  # the reducer sees what has been added
    model.model.features[1:] = 0
    with reducer.on(model):
        without = model(**given).hidden_states
    survivors = states[2][0, 4 : 4 + 72] - without[2][0, 4 : 4 + 72]
    model.model.features = torch.zeros(3, 144, 64)
    assert survivors.abs().max() > 0.1 and len(reducer.shown) == 16
