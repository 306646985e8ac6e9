"""Plain LLaVA: the same numbers as Hugging Face's class, and everything `generate` can do."""

import json

import pytest
import torch
from tiny import SIDE, batch, expand_for_hugging_face, hugging_face, ours, pictures, prompt, run
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from mustdrop import load_reducer

PATCHES = SIDE * SIDE


def greedy(model, **inputs) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist()


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 4, "strategy": "full"}, {"kv_heads": 1, "layers": 3}], ids=str)
@torch.no_grad()
def test_logits_and_greedy_ids_equal_hugging_face(shape, images):
    theirs, mine = hugging_face(**shape), ours(**shape)
    ids, pixels = prompt(5, 7, images), pictures(images) if images else None
    expanded = expand_for_hugging_face(ids, PATCHES + (shape.get("strategy") == "full"))
    inputs = {"input_ids": expanded} | ({"pixel_values": pixels} if images else {})
    expected = theirs(**inputs)
    got = mine(input_ids=ids, images=pixels)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=0)
    ids_theirs = theirs.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert greedy(mine, inputs=ids, images=pixels) == ids_theirs[:, expanded.shape[1] :].tolist()


@torch.no_grad()
def test_loss_equals_hugging_face():
    ids, pixels = prompt(5, 7), pictures(1)
    expanded = expand_for_hugging_face(ids, PATCHES)
    labels = torch.where(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX, ids)
    expanded_labels = torch.where(expanded == 120, IGNORE_INDEX, expanded)
    expected = hugging_face()(input_ids=expanded, pixel_values=pixels, labels=expanded_labels).loss
    torch.testing.assert_close(ours()(input_ids=ids, images=pixels, labels=labels).loss, expected)


def test_the_last_block_of_the_tower_is_never_run(monkeypatch):
    model = ours()
    monkeypatch.setattr(model.get_vision_tower().vision_tower.encoder.layers[-1], "forward", None)
    assert model.encode_images(pictures(1)).shape == (1, PATCHES, 64)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_one_by_one(side):
    prompts = [prompt(2, 9, seed=1), prompt(6, 3, images=2, seed=2), prompt(4, 0, images=0, seed=3)]
    pixels = pictures(3)
    together = greedy(ours(), **batch(prompts, side), images=pixels)
    apart = [
        greedy(ours(), inputs=prompts[0], images=pixels[:1])[0],
        greedy(ours(), inputs=prompts[1], images=pixels[1:])[0],
        greedy(ours(), inputs=prompts[2])[0],
    ]
    assert together == apart


@torch.no_grad()
def test_right_padded_training_batch_equals_one_by_one():
    prompts = [prompt(2, 9, seed=1), prompt(6, 3, seed=2)]
    pixels = pictures(2)
    inputs = batch(prompts, "right")
    logits = ours()(input_ids=inputs["inputs"], attention_mask=inputs["attention_mask"], images=pixels).logits
    for row, ids in enumerate(prompts):
        alone = ours()(input_ids=ids, images=pixels[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row, : len(alone)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", ["list", "tiles"])
def test_images_as_a_list_and_as_tiles(place):
    ids, pixels = prompt(3, 4, images=2), pictures(2)
    expected = greedy(ours(), inputs=ids, images=pixels)
    images = list(pixels) if place == "list" else [image[None] for image in pixels]
    assert greedy(ours(), inputs=ids, images=images) == expected


@pytest.mark.parametrize("method", [{"method": "vanilla"}, {"method": "mustdrop", "global_threshold": 0.05}], ids=str)
def test_questions_about_one_picture_share_its_encoding(method, monkeypatch):
    prompts, (first, second) = [prompt(3, 4, images=n, seed=n) for n in (1, 2, 1)], pictures(2)
    order = [0, 1, 0, 1]
    _, apart, traces = run(ours(), load_reducer(method), **batch(prompts), images=pictures(2)[order])
    encoded, encode = [], type(ours()).encode_images
    monkeypatch.setattr(
        type(ours()),
        "encode_images",
        lambda self, images, *more: encoded.append(len(images)) or encode(self, images, *more),
    )
    shared = [(first, second)[number] for number in order]
    _, together, shared_traces = run(ours(), load_reducer(method), **batch(prompts), images=shared)
    assert encoded == [2]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert [trace.to_dict() for trace in shared_traces] == [trace.to_dict() for trace in traces]


@pytest.mark.parametrize("ids", [torch.tensor([[IMAGE_TOKEN_INDEX, 5]]), torch.tensor([[1, 5, IMAGE_TOKEN_INDEX]])])
def test_image_first_and_image_last(ids):
    expanded = expand_for_hugging_face(ids, PATCHES)
    expected = hugging_face().generate(
        input_ids=expanded, pixel_values=pictures(1), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert greedy(ours(), inputs=ids, images=pictures(1)) == expected[:, expanded.shape[1] :].tolist()


@torch.no_grad()
def test_eager_equals_sdpa_also_with_padding():
    inputs = batch([prompt(2, 9, seed=1), prompt(6, 3, seed=2)], "right")
    arguments = {"input_ids": inputs["inputs"], "attention_mask": inputs["attention_mask"], "images": pictures(2)}
    sdpa, eager = ours()(**arguments).logits, ours(attn_implementation="eager")(**arguments).logits
    real = torch.stack([torch.arange(sdpa.shape[1]) < n + PATCHES - 1 for n in inputs["attention_mask"].sum(-1)])
    torch.testing.assert_close(sdpa[real], eager[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close(dtype):
    ids, pixels = prompt(5, 7), pictures(1)
    exact, half = ours()(input_ids=ids, images=pixels).logits, ours(dtype=dtype)(input_ids=ids, images=pixels).logits
    assert half.dtype == dtype
    assert (half.float() - exact).norm() < 0.1 * exact.norm()


def test_beams_equal_hugging_face():
    ids, pixels = prompt(5, 7), pictures(1)
    expanded = expand_for_hugging_face(ids, PATCHES)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    expected = hugging_face().generate(input_ids=expanded, pixel_values=pixels, **settings)[:, expanded.shape[1] :]
    assert ours().generate(ids, images=pixels, **settings).tolist() == expected.tolist()


def test_sampling_streaming_and_stopping():
    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 3)

    class Streamer(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    arguments = {"images": pictures(1), "do_sample": True, "temperature": 0.7, "max_new_tokens": 8}
    torch.manual_seed(3)
    streamer = Streamer(Tokenizer())
    first = ours().generate(
        prompt(3, 4), **arguments, streamer=streamer, stopping_criteria=StoppingCriteriaList([Stop()])
    )
    assert first.shape[1] <= 3
    assert streamer.text.split() == [str(i) for i in first[0].tolist()]
    torch.manual_seed(3)
    again = ours().generate(prompt(3, 4), **arguments)
    assert again[0, : first.shape[1]].tolist() == first[0].tolist()


@torch.no_grad()
def test_packed_questions_see_the_image_and_themselves_only():
    """Several questions behind one image, as in training, give each question the logits it has alone."""
    model, questions = ours(), [torch.tensor([[11, 12, 13]]), torch.tensor([[21, 22]])]
    ids = prompt(2, 0)
    alone = [model(input_ids=torch.cat([ids, q], 1), images=pictures(1)).logits[:, -q.shape[1] :] for q in questions]
    prefix = model.splice(ids, images=pictures(1)).embeds
    start, length = prefix.shape[1], prefix.shape[1] + 5
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[start + 3 :, start : start + 3] = False
    position = torch.cat([torch.arange(start + 3), torch.arange(start, start + 2)])[None]
    embeds = torch.cat([prefix, model.model.embed_tokens(torch.cat(questions, 1))], 1)
    for implementation in ("sdpa", "eager"):
        packed = ours(attn_implementation=implementation)(
            inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=position
        ).logits
        torch.testing.assert_close(packed[:, start : start + 3], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[:, start + 3 :], alone[1], atol=1e-5, rtol=0)


def test_saved_folder_is_complete_in_itself(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    for (name, weight), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_original_format_with_the_tower_in_a_folder_of_its_own(tmp_path, model_type):
    model = ours()
    tower = model.get_vision_tower().vision_tower
    tower.save_pretrained(tmp_path / "clip")
    state = {key: value.clone() for key, value in model.state_dict().items() if "vision_tower" not in key}
    config = {**model.config.to_dict(), "mm_vision_config": None, "mm_vision_tower": "../clip"}
    model.save_pretrained(tmp_path / "llava", state_dict=state)
    (tmp_path / "llava" / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "llava")
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key]), key


def test_gradients_reach_the_projector_and_the_embeddings():
    model = ours(seed=5)
    ids = prompt(2, 5)
    model(input_ids=ids, images=pictures(1), labels=ids.clamp(min=IGNORE_INDEX)).loss.backward()
    assert model.model.mm_projector[0].weight.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("images", "tokens"), [(0, 1), (2, 1), (1, 2)])
def test_wrong_number_of_images_is_one_clear_line(images, tokens):
    with pytest.raises(ValueError, match=rf"images: got {images}, but the prompts have {tokens} <image> tokens"):
        ours().generate(prompt(2, 2, images=tokens), images=pictures(images) if images else None)


def test_missing_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="tokenizer|model_path") as error:
        load_pretrained_model(str(tmp_path / "nowhere"), None, "llava")
    assert "nowhere" in str(error.value)
    with pytest.raises(ValueError, match="neither a folder with a config.json"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_checkpoint_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path)


def test_missing_tower_is_named(tmp_path):
    LlavaConfig(
        **{**ours().config.to_dict(), "mm_vision_config": None, "mm_vision_tower": "no/such-clip"}
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mm_vision_tower is 'no/such-clip'"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path)
