"""LLaVA's training stages on transformers' Trainer: projector alignment, full tuning and LoRA.

Alignment (projector alone, captions)::

    python -m llava.train.train --model_name_or_path vicuna-7b --vision_tower openai/clip-vit-large-patch14-336 \
        --version plain --tune_mm_mlp_adapter True --data_path captions.json --image_folder images --output_dir out

Full tuning (projector and language model, dialogues), or LoRA with ``--lora_enable True``::

    python -m llava.train.train --model_name_or_path vicuna-7b --vision_tower openai/clip-vit-large-patch14-336 \
        --pretrain_mm_mlp_adapter out/mm_projector.bin --version v1 --data_path mix.json --image_folder images \
        --output_dir llava

What LLaVA's own ``pretrain.sh``, ``finetune.sh`` and ``finetune_lora.sh`` pass is understood. ``torchrun`` and
``--deepspeed configs/deepspeed/zero2.json`` work unchanged; a run that was cut off goes on from its newest complete
checkpoint when the same command is given again. ``--mini_scenes N`` trains on synthetic scenes instead of JSON.
"""

from __future__ import annotations

import logging
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.command import Parser, one_line
from llava.train.dataset import Collator, ConversationDataset
from llava.train.loading import load_model
from llava.train.lora import add_lora, load_lora
from llava.train.records import Record, images_of, look_over, read_records
from llava.train.resume import (
    check_same_run,
    chosen_checkpoint,
    describe_run,
    is_finished,
    length_of_run,
    write_run,
)
from llava.train.trainer import LlavaTrainer

log = logging.getLogger(__name__)

SCENES = "eval.mini.records:SceneRecords"


def choose_trainable(model: LlavaLlamaForCausalLM, args: ModelArguments, training: TrainingArguments) -> nn.Module:
    """Freeze what shall stay as it is, and add adapters for LoRA; the vision tower always stays, as in LLaVA."""
    wrapped: nn.Module = model
    if training.lora_enable:
        wrapped = add_lora(model, training)
        model.get_model().mm_projector.float()  # bfloat16 would round small steps away; DeepSpeed casts it itself
    else:
        model.requires_grad_(not (args.freeze_backbone or args.tune_mm_mlp_adapter))
    model.get_vision_tower().requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(not args.freeze_mm_mlp_adapter)
    if training.lora_weight_path:
        load_lora(wrapped, training.lora_weight_path)
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    return wrapped


def make_records(data: DataArguments, model: ModelArguments, seed: int) -> Sequence[Record]:
    """What is learned from; ``ValueError`` names the first record that cannot be."""
    if data.mini_scenes:
        return _scenes()(data.mini_scenes, seed)
    records = read_records(data.data_path)
    look_over(records, model.version, data.image_folder)
    return records


def _scenes() -> Callable[[int, int], Sequence[Record]]:
    """What draws synthetic scenes, asked for by name: the trainer is used without the evaluation, too."""
    try:
        return pkgutil.resolve_name(SCENES)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"mini_scenes: {SCENES} is not there ({error}), expected it beside llava") from None


def make_dataset(
    records: Sequence[Record],
    data: DataArguments,
    version: str,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: object,
    model: LlavaLlamaForCausalLM,
) -> ConversationDataset:
    """The training examples, cut to `limit` positions."""
    tower = model.get_vision_tower()
    tile_tokens = tower.num_patches + (tower.select_feature == "cls_patch")
    if tile_tokens >= limit and any(images_of(record) for record in records):
        raise ValueError(f"model_max_length: got {limit}, expected more than the {tile_tokens} tokens of an image")
    return ConversationDataset(
        records,
        tokenizer,
        image_processor,
        version,
        data.image_folder,
        data.image_aspect_ratio,
        data.pinpoints(),
        start_end=model.config.mm_use_im_start_end,
        limit=limit,
        tile_tokens=tile_tokens,
    )


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Run one stage; returns the folder it wrote.

    Raises
    ------
    ValueError
        With one line for what cannot work; all that can be known then is checked before the model is loaded.
    """
    model_args.check()
    data_args.check()
    training_args.check(model_args)
    output = Path(training_args.output_dir)
    run = describe_run(model_args, data_args, training_args)
    checkpoint = chosen_checkpoint(training_args)
    if checkpoint is not None or is_finished(output, training_args):
        check_same_run(output, run)
    if is_finished(output, training_args):
        log.info("%s holds the finished run, nothing is left to train", output)
        return output
    records = make_records(data_args, model_args, training_args.seed)
    trainer = make_trainer(model_args, data_args, training_args, records)
    if training_args.should_save:
        write_run(output, {"run": run})
    log.info("training goes on from %s" if checkpoint else "training begins%s", checkpoint or "")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.unlearned:
        log.warning("%d examples had no answer within model_max_length and taught nothing", trainer.unlearned)
    trainer.model.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    if training_args.should_save:
        write_run(output, {"run": run, "finished": length_of_run(training_args)})
    return output


def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, records: Sequence[Record]
) -> LlavaTrainer:
    """Load the model and put everything together."""
    transformers.set_seed(training_args.seed)
    tokenizer, model, image_processor = load_model(model_args, training_args)
    limit = training_args.model_max_length
    dataset = make_dataset(records, data_args, model_args.version, limit, tokenizer, image_processor, model)
    model.config.use_cache = False
    model.config.image_aspect_ratio = data_args.image_aspect_ratio
    if data_args.pinpoints():
        model.config.image_grid_pinpoints = data_args.pinpoints()
    image_size = model.get_vision_tower().config.image_size
    if training_args.should_save:
        image_processor.save_pretrained(training_args.output_dir)
    return LlavaTrainer(
        model=choose_trainable(model, model_args, training_args),
        args=training_args,
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id, image_size),
        processing_class=tokenizer,
        projector_only=model_args.tune_mm_mlp_adapter,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; what is wrong is said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    arguments = Parser().read(argv)
    try:
        train(*arguments)
    except (OSError, SafetensorError, ValueError) as error:
        log.debug("training ended early", exc_info=True)
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)  # on a line of its own below a progress bar
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
