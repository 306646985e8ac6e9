"""Every training stage runs for a few steps on tiny models, resumes, and produces what the next stage reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from eval.mini import data, endtoend, evaluate, export, language, option_loss, questions, scenes, vision
from eval.mini.optim import parse_phases
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.train import dataset as conversations
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.train import train
from llava.train.trainer import PROJECTOR_FILE, ModalityLengthSampler

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of every mini stage, and the exported folder, of a model with 32-wide parts."""
    folder = tmp_path_factory.mktemp("stages")
    tokenizer = data.build_tokenizer()
    paths = {name: folder / f"{name}.pt" for name in ("vision", "language", "aligned", "tuned", "choices")}
    tower = vision.vision_config(hidden_size=32, layers=3, heads=1)
    vision.pretrain_vision(paths["vision"], "8:2,24:1", patches_per_step=128, config=tower)
    text = language.language_config(tokenizer, hidden_size=32, layers=3)
    language.pretrain_language(paths["language"], "8:2,24:1", questions_per_step=12, config=text)
    endtoend.align_projector(paths["vision"], paths["language"], paths["aligned"], steps=3)
    endtoend.tune(paths["aligned"], paths["tuned"], "8:1,24:1", questions_per_step=12)
    endtoend.tune(paths["tuned"], paths["choices"], "8:1", choices=0.5, questions_per_step=12)
    paths["folder"] = export.export(paths["tuned"], folder / "model")
    return paths


def test_tokenizer_takes_any_text():
    tokenizer = data.build_tokenizer()
    assert tokenizer("red").input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer) < 400
    for text in ("KAV", "Is it 12.5% (or not)?"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id in tokenizer("wörld 世界").input_ids
    before, after = data.prompt_parts("What color is the small star?")
    assert tokenizer.unk_token_id not in tokenizer(before + after).input_ids
    assert len(tokenizer(before).input_ids) == 1 + len(before.split())


def test_training_words_are_single_tokens():
    tokenizer = data.build_tokenizer()
    for seed in range(20):
        for question in data.ask_scene(scenes.generate_scene(seed), 20):
            words = tokenizer.tokenize(question.text.rstrip("?"))
            assert words == question.text.rstrip("?").split()
            if question.type != "reading":
                assert tokenizer.tokenize(question.answer) == [question.answer]


def test_mentions_end_at_their_noun():
    packer = data.Packer(data.build_tokenizer())
    asked = data.ask_scene(scenes.generate_scene(3), 24)
    text = packer([asked])
    assert len(text.mentions) == sum(len(question.mentions) for question in asked)
    for mention in text.mentions:
        word = packer.tokenizer.convert_ids_to_tokens(int(text.ids[mention.row, mention.token]))
        assert word == mention.meaning.phrase.split()[-1]


def test_choices_pack_like_plain_questions():
    """The same questions with and without options: same phrases meant, one letter as answer, no unknown token."""
    scene = scenes.generate_scene(3)
    plain, choices = (data.ask_scene(scene, 24, choices=share) for share in (0.0, 1.0))
    packer = data.Packer(data.build_tokenizer())
    text = packer([choices])
    assert [mention.meaning for mention in text.mentions] == [item for row in plain for item in row.mentions]
    for mention in text.mentions:
        word = packer.tokenizer.convert_ids_to_tokens(int(text.ids[mention.row, mention.token]))
        assert word == mention.meaning.phrase.split()[-1]
    assert packer.tokenizer.unk_token_id not in text.ids
    for before, after, choice in zip(plain, choices, text.choices, strict=True):
        assert after.text.startswith(f"{before.text}\nA. ") and f"\n{after.answer}. {before.answer}" in after.text
        assert after.type == f"choice {before.type}"
        ids = text.ids[choice.row]
        letters = packer.tokenizer.convert_ids_to_tokens(ids[torch.tensor(choice.options) - 2])
        assert letters == list(questions.LETTERS[: len(letters)])
        assert letters[choice.options.index(choice.right)] == after.answer
        assert ids[choice.right] == packer.tokenizer(before.answer, add_special_tokens=False).input_ids[0]
        assert packer.tokenizer.decode(ids[choice.token : choice.token + 2]) == f"ASSISTANT: {after.answer}"


def test_guidance_sees_the_models_own_attention(stages):
    mini = endtoend.MiniLlava.from_state_dict(torch.load(stages["choices"], weights_only=True))
    mini.model.set_attn_implementation("eager")
    scene = scenes.generate_scene(5, 8)
    text = data.Packer(data.build_tokenizer())([data.ask_scene(scene, 6, choices=1.0)])
    with torch.no_grad():
        vision_tokens = mini.vision_tokens(vision.collate([scene]))
        embed = mini.model.get_input_embeddings()
        embeds = torch.cat((embed(text.prefix)[None], vision_tokens, embed(text.ids)), 1)
        mask, positions = text.attention_mask(64, embeds.dtype), text.positions(64)
        output = mini.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            output_hidden_states=True,
            output_attentions=True,
        )
        rows = torch.tensor([choice.row for choice in text.choices])
        tokens = embeds.shape[1] - text.ids.shape[1] + torch.tensor([choice.token for choice in text.choices])
        scores = option_loss.attention_scores(mini.model, 2, output.hidden_states[2], positions, rows, tokens)
    looked = (scores + mask[rows, 0, tokens]).softmax(-1)
    torch.testing.assert_close(looked, output.attentions[2][rows, option_loss.HEAD, tokens])


def test_bad_phases_are_named():
    with pytest.raises(ValueError, match="8x3"):
        parse_phases("8x3")


def test_window_equals_stock_tower():
    torch.manual_seed(0)
    tower = vision.new_tower(vision.vision_config(hidden_size=32, layers=3, heads=1)).eval()
    batch = vision.collate([scenes.generate_scene(seed) for seed in range(2)])
    with torch.no_grad():
        own = vision.hidden_states(tower, batch.pixels, batch.positions)
        stock = tower(batch.pixels, output_hidden_states=True).hidden_states
    for left, right in zip(own, stock, strict=True):
        torch.testing.assert_close(left, right)


def test_packed_loss_equals_questions_asked_alone(stages):
    mini = endtoend.MiniLlava.from_state_dict(torch.load(stages["tuned"], weights_only=True))
    model = export.to_hugging_face(mini, torch.float32)
    processor = AutoProcessor.from_pretrained(stages["folder"])
    scene = scenes.generate_scene(5)
    asked = data.ask_scene(scene, 4)
    text = data.Packer(data.build_tokenizer())([asked])
    total, count = 0.0, 0
    with torch.no_grad():
        packed, _ = language.answer_loss(mini.model, mini.vision_tokens(vision.collate([scene])), text)
        for question in asked:
            prompt = "<image>".join(data.prompt_parts(question.text)) + f" {question.answer}</s>"
            inputs = processor(images=scenes.render(scene), text=prompt, return_tensors="pt")
            answer = len(processor.tokenizer.tokenize(question.answer)) + 1
            logits = model(**inputs).logits[0, -answer - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, -answer:], reduction="sum").item()
            count += answer
    assert packed.item() == pytest.approx(total / count, rel=1e-3)


def test_stages_resume(stages, tmp_path):
    whole, halves = tmp_path / "whole.pt", tmp_path / "halves.pt"
    settings = {"patches_per_step": 64, "config": vision.vision_config(hidden_size=32, layers=3, heads=1)}
    vision.pretrain_vision(whole, "8:2", save_every=1, **settings)
    before = vision.load_tower(whole)[0].state_dict()
    shutil.copy(whole, halves)
    vision.pretrain_vision(halves, "8:2", **settings)
    after = vision.load_tower(halves)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tuned = shutil.copy(stages["tuned"], tmp_path / "tuned.pt")
    endtoend.tune(stages["aligned"], tuned, "8:1,24:2", questions_per_step=12)
    assert torch.load(tuned, weights_only=True)["step"] == 3


def test_tuning_begins_with_an_exported_folder(stages, tmp_path):
    """Export rounds to half precision; what is read back tunes on without the read-outs, and its tower stays."""
    exported = endtoend.initial_state(stages["folder"])
    torch.save(exported, tmp_path / "again.pt")
    again = export.export(tmp_path / "again.pt", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (stages["folder"] / name).read_bytes()
    for name, value in torch.load(stages["tuned"], weights_only=True)["model"].items():
        assert torch.equal(exported["model"][name], value.half().float())
    tuned = endtoend.tune(stages["folder"], tmp_path / "tuned.pt", "8:1", choices=1.0, questions_per_step=12)
    state = torch.load(tuned, weights_only=True)
    assert "grounding" not in state and "grounding" in torch.load(stages["choices"], weights_only=True)
    assert all(torch.equal(exported["tower"][name], state["tower"][name]) for name in state["tower"])
    assert not torch.equal(exported["projector"]["0.weight"], state["projector"]["0.weight"])


def test_export_is_a_hugging_face_checkpoint(stages):
    folder = stages["folder"]
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for fast in (True, False):
        assert AutoTokenizer.from_pretrained(folder, use_fast=fast)("red").input_ids[0] == 1
    asked = evaluate.held_out_questions("test", 1, 1, 1)
    table = evaluate.summarize(evaluate.answer_all(model.float(), AutoProcessor.from_pretrained(folder), asked))
    assert table["plain"]["n"] == table["choice"]["n"] == 1
    assert set(table) == {"plain", "choice", *(kind for *_, kind, _ in asked)}
    habit = evaluate.answer_from_habit(asked, n_training_scenes=5)
    assert all(item.said in questions.LETTERS for item in habit if item.type.startswith("choice"))


def test_labels_cover_the_answers_alone():
    tokenizer = data.build_tokenizer()
    turns = [
        {"from": "human", "value": "Is there a star?\n<image>"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "What color is the star?"},
        {"from": "gpt", "value": "red"},
    ]
    ids, labels = conversations.encode_conversation(turns, "v1", tokenizer)
    assert ids.count(IMAGE_TOKEN_INDEX) == 1 and ids[0] == tokenizer.bos_token_id
    learned = [label for label in labels if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(learned) == ["yes", "</s>", "red", "</s>"]
    before, after = data.prompt_parts("Is there a star?")
    assert ids[: ids.index(IMAGE_TOKEN_INDEX)] == tokenizer(before).input_ids
    question, answer = data.Packer(tokenizer).encode("Is there a star?", "yes")
    start = ids.index(IMAGE_TOKEN_INDEX) + 1
    assert ids[start : start + len(question)] == question
    assert labels[start : start + len(question)] == answer

    ids, labels = conversations.encode_conversation(turns[:2], "plain", tokenizer)
    assert ids[1] == IMAGE_TOKEN_INDEX and labels[2:] == ids[2:] and labels[:2] == [IGNORE_INDEX] * 2
    with pytest.raises(ValueError, match="alternate"):
        conversations.encode_conversation(turns[1:3], "v1", tokenizer)


def test_modality_batches():
    lengths = [5, -3, 7, 9, -2, 4, 6, -8]
    order = list(ModalityLengthSampler(lengths, 2, seed=0))
    assert sorted(order) == list(range(8))
    for start in range(0, 6, 2):
        assert len({lengths[index] > 0 for index in order[start : start + 2]}) == 1


def arguments(output: Path, **settings) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_steps": 1,
    }
    return TrainingArguments(output_dir=str(output), **defaults | settings)


def write_json(folder: Path) -> DataArguments:
    """A LLaVA JSON file with three pictures and a text-only example."""
    records = []
    for seed in range(3):
        scenes.render(scenes.generate_scene(seed)).save(folder / f"{seed}.png")
        question = data.ask_scene(scenes.generate_scene(seed), 1)[0]
        turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
        records.append({"id": seed, "image": f"{seed}.png", "conversations": turns})
    turns = [{"from": "human", "value": "Is there a star?"}, {"from": "gpt", "value": "no"}]
    records.append({"id": 3, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return DataArguments(data_path=str(folder / "data.json"), image_folder=str(folder))


def test_alignment_then_full_tuning_on_llava_json(stages, tmp_path):
    files = write_json(tmp_path)
    base = str(stages["folder"])
    align = ModelArguments(base, version="plain", tune_mm_mlp_adapter=True)
    aligned = train(align, files, arguments(tmp_path / "align", mm_projector_lr=1e-3))
    adapter = aligned / PROJECTOR_FILE
    assert set(torch.load(adapter, weights_only=True)) == {
        f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    train(align, files, arguments(tmp_path / "align", max_steps=3))
    assert (tmp_path / "align" / "checkpoint-3").is_dir()

    tune = ModelArguments(base, pretrain_mm_mlp_adapter=str(adapter))
    tuned = train(tune, files, arguments(tmp_path / "tune", learning_rate=1e-3, group_by_modality_length=True))
    from llava.model.builder import load_pretrained_model

    _, before, _, _ = load_pretrained_model(base)
    _, after, processor, _ = load_pretrained_model(str(tuned))
    assert processor.crop_size["height"] == 336
    own, other = before.state_dict(), after.state_dict()
    assert own.keys() == other.keys()
    changed = {name for name in own if not torch.equal(own[name], other[name])}
    assert any("mm_projector" in name for name in changed) and any(".layers.0." in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_alignment_from_a_language_model_and_a_tower(stages, tmp_path):
    """The way real LLaVA begins: a LLaMA without a projector, and a CLIP folder."""
    mini = endtoend.MiniLlava.from_state_dict(torch.load(stages["tuned"], weights_only=True))
    mini.model.save_pretrained(tmp_path / "llama")
    data.build_tokenizer().save_pretrained(tmp_path / "llama")
    mini.tower.save_pretrained(tmp_path / "clip")
    export.new_processor(export.to_hugging_face(mini).config).image_processor.save_pretrained(tmp_path / "clip")
    model = ModelArguments(
        str(tmp_path / "llama"), version="plain", vision_tower=str(tmp_path / "clip"), tune_mm_mlp_adapter=True
    )
    output = train(model, DataArguments(mini_scenes=2), arguments(tmp_path / "align", max_steps=1))
    state = torch.load(output / PROJECTOR_FILE, weights_only=True)
    assert state["model.mm_projector.0.weight"].shape == (32, 32)


def test_tuning_on_scenes(stages, tmp_path):
    model = ModelArguments(str(stages["folder"]), freeze_backbone=True)
    assert train(model, DataArguments(mini_scenes=4), arguments(tmp_path / "scenes", max_steps=1)).is_dir()


@pytest.mark.parametrize(
    ("model", "files", "message"),
    [
        ({"version": "v9"}, {"mini_scenes": 1}, "version: 'v9'"),
        ({"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True}, {"mini_scenes": 1}, "at most one"),
        ({}, {}, "data_path"),
        ({}, {"data_path": "nowhere.json"}, "nowhere.json"),
        ({}, {"mini_scenes": 1, "image_aspect_ratio": "wide"}, "image_aspect_ratio: 'wide'"),
    ],
)
def test_bad_arguments_are_named(model, files, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments("base", **model).check()
        DataArguments(**files).check()
