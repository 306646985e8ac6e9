"""How often a second question about the same image is answered right: prefilled again, or from the kept cache.

    python scripts/second_question.py --scenes 20

Prints one JSON object for each way. The first question of a scene is asked and answered, then the second is scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "baseline, prefilled again": ({"method": "vanilla"}, False),
    "mustdrop_plus 64, prefilled again": ({"method": "mustdrop_plus", "retain": 64}, False),
    "mustdrop_plus 64, cache kept": ({"method": "mustdrop_plus", "retain": 64}, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "llava-mini"))
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from eval.mini.questions import scene_questions
    from llava.model.builder import load_pretrained_model
    from llava.serve.chat import Chat
    from mustdrop import load_reducer

    tokenizer, model, processor, _ = load_pretrained_model(
        args.model, None, "llava", device="cpu", torch_dtype=torch.float32
    )
    asked = list(scene_questions("test", args.scenes, 2, 0))
    for way, (settings, kept) in WAYS.items():
        right, read = [0, 0], 0
        for number in range(0, len(asked), 2):
            chat = Chat(model, tokenizer, processor, reducer=load_reducer(settings), keeps_cache=kept)
            chat.show(asked[number][0])
            for turn, (_, question, answer, *_) in enumerate(asked[number : number + 2]):
                said = "".join(chat.ask(question, max_new_tokens=6)).strip()
                right[turn] += said.lower() == answer.lower()
            read += chat.prefilled
        facts = {"way": way, "scenes": args.scenes, "first_right": right[0], "second_right": right[1]}
        print(json.dumps({**facts, "tokens_read_before_second_answer": round(read / args.scenes)}), flush=True)


if __name__ == "__main__":
    main()
