"""What can go wrong without a word in training: each is either done right or said."""

import json

import pytest
import torch
from training import arguments, llava_base, sample_records, turns, write_records
from transformers import PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX
from llava.model.builder import load_pretrained_model
from llava.train import loading
from llava.train.arguments import DataArguments, ModelArguments
from llava.train.dataset import encode_conversation
from llava.train.train import make_records, make_trainer, train

PROJECTOR = "model.mm_projector.0.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory, checkpoint):
    return llava_base(tmp_path_factory.mktemp("base") / "llava", checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return DataArguments(data_path=str(write_records(folder)), image_folder=str(folder))


def trainer_of(base, data, output, model=(), **settings):
    args = ModelArguments(str(base), **dict(model))
    return make_trainer(args, data, arguments(output, **settings), make_records(data, args, 0))


def one_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_checkpointed_layers_are_computed_again(base, data, tmp_path):
    """Gradient checkpointing really happens: every layer runs a second time in the backward pass."""
    trainer = trainer_of(base, data, tmp_path / "out", gradient_checkpointing=True, max_steps=1, save_strategy="no")
    model, calls = trainer.model, []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2 * len(model.model.layers)


def test_checkpointing_changes_no_gradient(base, data, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = trainer_of(base, data, tmp_path / "out", gradient_checkpointing=checkpointing)
        model = trainer.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        model(**batch).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and PROJECTOR in gradients[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name])


@pytest.mark.parametrize(
    ("choice", "learning", "resting"),
    [
        ({"tune_mm_mlp_adapter": True, "version": "plain"}, "mm_projector", ".layers.0"),
        ({"freeze_backbone": True}, "mm_projector", ".layers.0"),
        ({"freeze_mm_mlp_adapter": True}, ".layers.0", "mm_projector"),
        ({}, ".layers.0", "vision_tower"),
    ],
)
def test_frozen_parts_stay(base, data, tmp_path, choice, learning, resting):
    trainer = trainer_of(base, data, tmp_path / "out", choice, learning_rate=1e-2, weight_decay=0.1, save_strategy="no")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(learning in name for name in moved) and not any(resting in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


@pytest.mark.parametrize("lora", [False, True])
def test_projector_has_its_own_rate(base, data, tmp_path, lora):
    trainer = trainer_of(base, data, tmp_path / "out", mm_projector_lr=3e-4, learning_rate=1e-3, lora_enable=lora)
    groups = trainer.create_optimizer().param_groups
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    for group in groups:
        kinds = {"mm_projector" in names[id(value)] for value in group["params"]}
        assert kinds == {group["lr"] == 3e-4}
    counted = [id(value) for group in groups for value in group["params"]]
    assert sorted(counted) == sorted(id(value) for value in trainer.model.parameters() if value.requires_grad)


def test_limit_holds_in_the_model_and_is_written(base, tmp_path):
    """576 of LLaVA's positions are the image's; here 36. What is beyond the limit is neither computed nor counted."""
    sample_records(tmp_path)
    long = [{"image": "red.png", "conversations": turns("<image>\n" + "dog " * 20, "cat " * 60)}] * 2
    data = DataArguments(data_path=str(write_records(tmp_path, long)), image_folder=str(tmp_path))
    trainer = trainer_of(base, data, tmp_path / "out", model_max_length=120)
    output = trainer.model(**one_batch(trainer))
    assert output.logits.shape[1] == 120
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tokenizer_model_max_length"] == 120
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 120
    assert load_pretrained_model(str(tmp_path / "out"))[3] == 120
    with pytest.raises(ValueError, match="model_max_length: got 36, expected more than the 36 tokens of an image"):
        trainer_of(base, data, tmp_path / "out", model_max_length=36)


def test_nothing_left_to_learn_is_counted_and_harms_nothing(base, tmp_path, caplog):
    sample_records(tmp_path)
    long = [{"id": 9, "image": "red.png", "conversations": turns("<image>\n" + "dog " * 60, "cat")}] * 2
    data = DataArguments(data_path=str(write_records(tmp_path, long)), image_folder=str(tmp_path))
    output = train(ModelArguments(str(base)), data, arguments(tmp_path / "out", model_max_length=80, max_steps=1))
    assert "2 examples had no answer within model_max_length" in caplog.text and "id 9" in caplog.text
    _, after, *_ = load_pretrained_model(str(output))
    assert all(value.isfinite().all() for value in after.parameters())


def test_text_only_batches_reach_the_projector(base, data, tmp_path):
    """Its gradient is zero and not missing, so that every process of a distributed run reduces the same."""
    trainer = trainer_of(base, data, tmp_path / "out")
    batch = trainer.data_collator([trainer.train_dataset[3]])
    trainer.model(**batch).loss.backward()
    for value in trainer.model.model.mm_projector.parameters():
        assert value.grad is not None and not value.grad.any()
    alone = trainer.model(**{name: value for name, value in batch.items() if name != "images"}).logits
    torch.testing.assert_close(trainer.model(**batch).logits, alone)


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """One with neither a padding nor an unknown token, as Llama 3 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1} | {letter: 2 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def test_tokenizer_without_padding(base, data, tmp_path, monkeypatch, caplog):
    tokenizer, model, processor, _ = load_pretrained_model(str(base))
    bare = bare_tokenizer()
    assert bare.pad_token_id is None and bare.unk_token_id is None
    monkeypatch.setattr(loading, "load_pretrained_model", lambda *_, **__: (bare, model, processor, 0))
    trainer = trainer_of(base, data, tmp_path / "out", save_strategy="no")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    assert bare.pad_token == bare.eos_token and (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).any()
    trainer.train()
    assert "'v1' ends answers with '</s>', which is no token of this tokenizer" in caplog.text


def test_image_tokens_are_added_as_in_llava(base, data, tmp_path):
    choice = {"mm_use_im_start_end": True}
    trainer = trainer_of(base, data, tmp_path / "out", choice, save_strategy="no")
    weight = trainer.model.get_input_embeddings().weight
    torch.testing.assert_close(weight[-2:], weight[:-2].mean(0).expand(2, -1))
    ids = trainer.train_dataset[0]["input_ids"].tolist()
    start = trainer.processing_class.convert_tokens_to_ids("<im_start>")
    assert ids[ids.index(start) : ids.index(start) + 3] == [start, -200, start + 1]
    trainer.save_model()
    tokenizer, again, *_ = load_pretrained_model(str(tmp_path / "out"))
    assert again.config.vocab_size == len(tokenizer) == 322 and again.config.mm_use_im_start_end
    with pytest.raises(ValueError, match="mm_use_im_start_end: got True with lora_enable"):
        trainer_of(base, data, tmp_path / "out", choice, lora_enable=True)


def test_settings_of_a_checkpoint_are_kept(base, data, tmp_path):
    for name, value in (("mm_projector_type", "linear"), ("mm_vision_select_layer", -1)):
        with pytest.raises(ValueError, match=f"{name}: got {value!r}, expected "):
            trainer_of(base, data, tmp_path / "out", {name: value})
    torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="pretrain_mm_mlp_adapter: .* holds"):
        trainer_of(base, data, tmp_path / "out", {"pretrain_mm_mlp_adapter": str(tmp_path / "mm_projector.bin")})
    (tmp_path / "mm_projector.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        trainer_of(base, data, tmp_path / "out", {"pretrain_mm_mlp_adapter": str(tmp_path / "mm_projector.bin")})


def test_half_precision_and_groups(base, tmp_path):
    """bfloat16 autocast, gradient accumulation, and batches by modality of records with several images."""
    records = sample_records(tmp_path)
    records.append({"image": ["red.png", "blue.png"], "conversations": turns("<image> or <image>?", "both")})
    data = DataArguments(data_path=str(write_records(tmp_path, records)), image_folder=str(tmp_path))
    settings = {"bf16": True, "group_by_modality_length": True, "gradient_accumulation_steps": 2}
    trainer = trainer_of(base, data, tmp_path / "out", **settings, save_strategy="no")
    assert [length > 0 for length in trainer.train_dataset.modality_lengths] == [True, True, True, False, True]
    assert trainer.train().training_loss > 0
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}


def test_accumulated_batches_weigh_every_label_alike(base, data, tmp_path):
    """Two batches of one example give the step of one batch of two, though their answers differ in length."""
    records = sample_records(tmp_path)[:1]
    records.append({"image": "blue.png", "conversations": turns("<image>\nWhich?", "a dark and cold blue sea")})
    files = DataArguments(data_path=str(write_records(tmp_path, records)), image_folder=str(tmp_path))
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "save_strategy": "no"}
    weights = []
    for batch in (1, 2):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2 // batch}
        trainer = trainer_of(base, files, tmp_path / "out", **settings, **sizes)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-6, rtol=1e-5)


def test_labels_skip_images_in_answers(base):
    tokenizer, *_ = load_pretrained_model(str(base))
    ids, labels = encode_conversation(turns("Show one", "<image>\nhere"), "v1", tokenizer, 1)
    place = ids.index(-200)
    assert labels[place] == IGNORE_INDEX and labels[place + 1 :] == ids[place + 1 :]
