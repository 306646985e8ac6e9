"""Answers to held-out questions of the embedded model's world, by our own code or by vLLM with the same settings.

    python scripts/serve_answers.py --engine vllm --settings '{"method": "divprune", "retain": 64}'

Prints a JSON object for each settings: how many are right, the answers, and the longest prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCENES, EACH = 12, 10


def questions(scenes: int) -> list[tuple]:
    """Image, question, answer of held-out scenes."""
    sys.path.insert(0, str(ROOT))
    from eval.mini.questions import scene_questions

    return [(image, text, answer) for image, text, answer, *_ in scene_questions("test", scenes, EACH, 0)]


def by_vllm(model: str, settings: dict | None, asked: list[tuple]) -> list[dict]:
    """Answers of vLLM's engine in this process."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    overrides = {"mustdrop": settings} if settings else {}
    engine = LLM(
        model, dtype="float32", max_model_len=1024, enforce_eager=True, hf_overrides=overrides, max_num_seqs=16, seed=0
    )
    prompts = [{"prompt": prompt_of(text), "multi_modal_data": {"image": image}} for image, text, _ in asked]
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    found = [{"said": output.outputs[0].text.strip(), "prompt": len(output.prompt_token_ids)} for output in outputs]
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    return found


def by_us(model: str, settings: dict | None, asked: list[tuple]) -> list[dict]:
    """Answers of our own code; of `mustdrop_plus` the half that vLLM runs, too."""
    import torch

    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.serve.exact import read_settings
    from mustdrop import Reducer

    tokenizer, net, processor, _ = load_pretrained_model(model, None, "llava", device="cpu", torch_dtype=torch.float32)
    parsed = read_settings(settings) if settings else None
    reducer = Reducer() if parsed is None else parsed.reducer
    reducer.positions = "renumber" if parsed is not None and parsed.positions == "renumber" else "original"
    found = []
    with torch.inference_mode(), reducer.on(net, keep=1) as run:
        for image, text, _ in asked:
            ids = tokenizer_image_token(prompt_of(text), tokenizer, return_tensors="pt")[None]
            pixels = process_images([image], processor, net.config)
            out = net.generate(ids, images=pixels, max_new_tokens=8, do_sample=False)
            said = tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()
            trace = run.traces[-1]
            found.append({"said": said, "prompt": trace.text_tokens + trace.vision_tokens[0]})
    return found


def prompt_of(question: str) -> str:
    """LLaVA's prompt about one image."""
    from eval.mini.data import prompt_parts

    return "<image>".join(prompt_parts(question))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "ours"), default="vllm")
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "llava-mini"))
    meaning = "JSON, any number; nothing is reduced without, or by null"
    parser.add_argument("--settings", nargs="+", type=json.loads, default=[None], help=meaning)
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"each with {EACH} questions")
    args = parser.parse_args()
    asked = questions(args.scenes)
    for settings in args.settings:
        start = time.perf_counter()
        answers = (by_vllm if args.engine == "vllm" else by_us)(args.model, settings, asked)
        right = sum(one["said"].lower() == answer.lower() for one, (_, _, answer) in zip(answers, asked, strict=True))
        facts = {"engine": args.engine, "settings": settings, "questions": len(asked), "right": right}
        facts |= {"prompt_tokens": max(one["prompt"] for one in answers)}
        facts |= {"seconds": round(time.perf_counter() - start, 1), "answers": [one["said"] for one in answers]}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
