"""Chat with a LLaVA about images, with fewer vision tokens if wanted.

    python -m llava.serve.cli --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg --load-4bit --method mustdrop

Commands while chatting: /image FILE shows another image with the next question, /clear starts anew; an empty line ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mustdrop.command import Parser, command, decimal_number, needed_number, share_of, text

TEMPLATES = {
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "mpt": "mpt",
    "v0": "llava_v0",
}
"""Part of a model's name -> its template, as LLaVA's own command guesses it; of all others vicuna_v1."""


def parser() -> argparse.ArgumentParser:
    """The command line, as LLaVA's users know it."""
    new = Parser("chat", description=__doc__)
    new.add_argument("--model-path", type=text, default="checkpoints/llava-mini", help="folder or hub id (%(default)s)")
    new.add_argument("--model-base", type=text, help="the model under a projector or LoRA weights")
    new.add_argument("--image-file", type=text, nargs="+", default=[], help="images for the first question")
    new.add_argument("--device", type=text, help="cpu, cuda, ... (default: cuda where there is one)")
    new.add_argument("--conv-mode", type=text, help="conversation template (default: by the model's name)")
    new.add_argument("--temperature", default="0.2", help="0 for the likeliest answer (%(default)s)")
    new.add_argument("--max-new-tokens", default="512", help="longest answer (%(default)s)")
    bits = new.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true")
    bits.add_argument("--load-4bit", action="store_true")
    new.add_argument("--method", type=text, default="vanilla", help="a method's name or YAML file (%(default)s)")
    new.add_argument("--retain", help="mean vision tokens per layer, or a share, of a method that is given by name")
    meaning = "go on from the cache of the last turn: faster, but what was dropped for it is gone"
    new.add_argument("--keep-cache", action="store_true", help=meaning)
    new.add_argument("--debug", action="store_true", help="say what every turn took")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument, 130 interrupted."""
    args = parser().parse_args(argv)
    temperature = decimal_number("temperature", args.temperature)
    new_tokens = needed_number("max_new_tokens", args.max_new_tokens)
    from llava.images import load_image

    images = [load_image(file) for file in args.image_file]
    chat = _loaded(args)
    for image in images:
        chat.show(image)
    while True:
        try:
            line = input(f"{chat.conversation.roles[0].strip()}: ").strip()
        except EOFError:
            line = ""
        if not line:
            print("exit...")
            return 0
        if not _is_order(chat, line):
            _answer(chat, line, temperature, new_tokens, args.debug)


def _loaded(args: argparse.Namespace):
    """The chat; everything that can be wrong is looked at before the model is loaded."""
    import torch

    from llava.conversation import conv_templates
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.model.llava_arch import LlavaMetaForCausalLM
    from llava.serve.chat import Chat

    name = get_model_name_from_path(args.model_path)
    template = args.conv_mode or next((TEMPLATES[part] for part in TEMPLATES if part in name.lower()), "vicuna_v1")
    if template not in conv_templates:
        raise ValueError(f"conv_mode: got {template!r}, expected one of {', '.join(sorted(conv_templates))}")
    reducer = _reducer(args.method, args.retain)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.float16
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, args.model_base, name, args.load_8bit, args.load_4bit, device=device, torch_dtype=dtype
    )
    if not isinstance(model, LlavaMetaForCausalLM):
        raise ValueError(
            f"model_path: {args.model_path} is a {type(model).__name__} of transformers, this chat is for LLaVA; "
            "mustdrop ask takes it"
        )
    chat = Chat(model, tokenizer, processor, template, reducer, args.keep_cache)
    with reducer.on(model):  # whether its settings fit
        return chat


def _reducer(method: str, retain: str | None):
    """A method by name, with a budget, or from a file."""
    from mustdrop import load_reducer

    if Path(method).suffix in (".yaml", ".yml"):
        if retain is not None:
            raise ValueError(f"retain: got {retain} beside {method}, expected one of them: a file has its own budget")
        return load_reducer(method)
    settings = {"method": method}
    if retain is not None:
        settings["retain"] = share_of(retain) or needed_number("retain", retain)
    return load_reducer(settings)


def _is_order(chat, line: str) -> bool:
    """Do what a line that begins with / says; whether it was such."""
    order, _, rest = line.partition(" ")
    if order == "/clear":
        chat.clear()
        return True
    if order != "/image":
        return False
    try:
        chat.show(rest.strip())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    return True


def _answer(chat, question: str, temperature: float, new_tokens: int, debug: bool) -> None:
    """Print an answer as it is generated; Ctrl-C breaks it off and leaves the chat as it then is."""
    if chat.goes_on and chat.images:
        print("(the cache is kept: vision tokens dropped for earlier questions are gone)", file=sys.stderr)
    print(f"{chat.conversation.roles[1].strip()}: ", end="", flush=True)
    try:
        for piece in chat.ask(question, max_new_tokens=new_tokens, temperature=temperature):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (interrupted)", end="")
    print()
    if debug:
        print(f"(tokens before the first new one: {chat.prefilled})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
