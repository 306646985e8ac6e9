"""LLaVA's two training stages on transformers' Trainer: projector alignment and full tuning.

Alignment (projector alone, captions)::

    python -m llava.train.train --model_name_or_path vicuna-7b --vision_tower openai/clip-vit-large-patch14-336 \
        --version plain --tune_mm_mlp_adapter True --data_path captions.json --image_folder images --output_dir out

Full tuning (projector and language model, dialogues)::

    python -m llava.train.train --model_name_or_path vicuna-7b --vision_tower openai/clip-vit-large-patch14-336 \
        --pretrain_mm_mlp_adapter out/mm_projector.bin --version v1 --data_path mix.json --image_folder images \
        --output_dir llava

``torchrun`` and ``--deepspeed configs/deepspeed/zero2.json`` work unchanged; a run that was cut off goes on from its
last checkpoint when the same command is given again. ``--mini_scenes N`` trains on synthetic scenes instead of JSON.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from llava.mm_utils import load_image_processor
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.tokenizer import load_tokenizer
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.dataset import Collator, ConversationDataset, SceneRecords
from llava.train.trainer import LlavaTrainer

log = logging.getLogger(__name__)


def load_model(
    args: ModelArguments, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerBase, LlavaLlamaForCausalLM, object]:
    """Tokenizer, model and image processor: of a LLaVA checkpoint, or of a language model and a vision tower."""
    if args.vision_tower is None:
        tokenizer, model, processor, _ = load_pretrained_model(
            args.model_name_or_path, torch_dtype=dtype, device_map=None
        )
        if model.get_vision_tower() is None:
            raise ValueError(f"vision_tower: {args.model_name_or_path} has none, name a CLIP folder or hub id")
    else:
        config = LlavaConfig.from_pretrained(args.model_name_or_path)
        for name in ("vision_tower", "projector_type", "vision_select_layer", "vision_select_feature"):
            value = getattr(args, name if name == "vision_tower" else f"mm_{name}")
            setattr(config, f"mm_{name}", value)
        tokenizer = load_tokenizer(args.model_name_or_path)
        processor = load_image_processor(args.vision_tower)
        model = LlavaLlamaForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype=dtype)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token
    if args.pretrain_mm_mlp_adapter:
        state = torch.load(args.pretrain_mm_mlp_adapter, map_location="cpu", weights_only=True)
        own = {key[key.index("mm_projector.") + len("mm_projector.") :]: value for key, value in state.items()}
        model.get_model().mm_projector.load_state_dict(own)
    return tokenizer, model, processor


def choose_trainable(model: LlavaLlamaForCausalLM, args: ModelArguments) -> None:
    """Freeze what shall stay as it is; the vision tower always does, as in LLaVA."""
    model.requires_grad_(not (args.freeze_backbone or args.tune_mm_mlp_adapter))
    model.get_vision_tower().requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(not args.freeze_mm_mlp_adapter)


def make_dataset(
    data: DataArguments, model: ModelArguments, tokenizer: PreTrainedTokenizerBase, image_processor: object, seed: int
) -> ConversationDataset:
    """The training examples."""
    settings = {
        "version": model.version,
        "image_folder": data.image_folder,
        "image_aspect_ratio": data.image_aspect_ratio,
    }
    if data.mini_scenes:
        return ConversationDataset(SceneRecords(data.mini_scenes, seed), tokenizer, image_processor, **settings)
    return ConversationDataset.from_json(data.data_path, tokenizer, image_processor, **settings)


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Run one stage; returns the folder it wrote."""
    model_args.check()
    data_args.check()
    transformers.set_seed(training_args.seed)
    # Without DeepSpeed's own float32 copy, the weights themselves stay float32 and bf16 is autocast.
    dtype = torch.bfloat16 if training_args.bf16 and training_args.deepspeed else torch.float32
    tokenizer, model, image_processor = load_model(model_args, dtype)
    choose_trainable(model, model_args)
    model.config.use_cache = False
    model.config.image_aspect_ratio = data_args.image_aspect_ratio
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = LlavaTrainer(
        model=model,
        args=training_args,
        train_dataset=make_dataset(data_args, model_args, tokenizer, image_processor, training_args.seed),
        data_collator=Collator(
            tokenizer.pad_token_id, training_args.model_max_length, model.get_vision_tower().config.image_size
        ),
        processing_class=tokenizer,
        projector_only=model_args.tune_mm_mlp_adapter,
    )
    output = Path(training_args.output_dir)
    trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    model.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    if training_args.should_save:
        image_processor.save_pretrained(output)
    return output


def main() -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    train(*parser.parse_args_into_dataclasses())


if __name__ == "__main__":
    main()
