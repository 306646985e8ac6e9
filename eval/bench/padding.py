"""What padding costs batches in threshold mode, where every prompt keeps a number of its own; run by hand.

After every drop a batch is padded anew to its longest prompt; packed rows compute none of that. Said here, for
calibrated settings on a task's training questions: the share of rows that are padding, per decoder layer and in the
tower; the FLOPs that packing could save at most; and how long the decoder's bare layers take on the very same counts,
padded (sdpa with a mask) and packed (`llava.model.language_model.packed`), in turn.

    mustdrop bench-padding --retain 192 128 64 --batch-size 8 32 --threads 1
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch
from tabulate import tabulate

from eval.calibrate.thresholds import read_samples
from eval.checkpoints import EMBEDDED, check_checkpoint
from eval.methods import method_at
from eval.progress import progress, quiet
from eval.run.inference import LoadedModel
from eval.run.settings import LARGEST_BATCH, check_loading, retained_tokens
from eval.tasks import GROUP, LOCAL
from llava.model.language_model.packed import packed_layer
from llava.model.language_model.projections import whole_layer
from llava.model.masks import attention_mask
from mustdrop import load_reducer
from mustdrop.checks import shown
from mustdrop.command import Parser, command, needed_number
from mustdrop.macs import formula_macs
from mustdrop.shape import ModelShape

COUNTING_BATCH = 8


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    new = Parser("bench-padding", description=__doc__)
    new.add_argument("--model", default=EMBEDDED, help="folder or hub id of a checkpoint (%(default)s)")
    new.add_argument("--task", default="mini", help="whose training questions are asked (%(default)s)")
    new.add_argument("--method", default="mustdrop", help="%(default)s")
    new.add_argument("--retain", nargs="+", default="192 128 64", metavar="N", help="calibrated settings (192 128 64)")
    new.add_argument("--batch-size", nargs="+", default=["8", "32"], metavar="N", help="8 32")
    new.add_argument("--questions", default=160, metavar="N", help="how many (%(default)s)")
    new.add_argument("--repeats", default=3, metavar="N", help="measured rounds over a few batches (%(default)s)")
    new.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (%(default)s)")
    new.add_argument("--threads", metavar="N", help="CPU threads (default: torch's own choice)")
    args = new.parse_args(argv)
    questions, repeats = (needed_number(name, getattr(args, name)) for name in ("questions", "repeats"))
    sizes = [needed_number("batch_size", size, most=LARGEST_BATCH) for size in args.batch_size]
    if questions < max(sizes):
        raise ValueError(f"questions: got {questions}, expected at least one batch of {max(sizes)}")
    if args.task not in (*LOCAL, GROUP):
        raise ValueError(f"task: got {shown(args.task)}, expected one of {', '.join([*LOCAL, GROUP])}")
    check_loading(dtype=args.dtype)
    model = check_checkpoint(args.model)["model"]
    methods = {retain: method_at(model, args.method, retain)[0] for retain in retained_tokens(args.retain, False)}
    if args.threads is not None:
        torch.set_num_threads(needed_number("threads", args.threads, most=1024))
    quiet()
    loaded = LoadedModel.load(model, dtype=args.dtype)
    samples = read_samples(args.task, None, "", questions)
    lines = []
    for retain, settings in methods.items():
        counts, tower = token_counts(loaded, settings, samples, f"{args.method} {retain}")
        lines += [[f"{args.method} {retain}", *line(loaded, counts, tower, size, repeats)] for size in sizes]
    print(tabulate(lines, ["method", "batch", "padding per layer: first, mean, most", "in the tower", "FLOPs to save",
                           "padded ms", "packed ms", "time saved"], disable_numparse=True))  # fmt: skip
    return 0


def token_counts(loaded: LoadedModel, settings: dict, samples: list[tuple], label: str) -> tuple[list, list]:
    """Positions of every prompt entering each decoder layer, and of its picture entering each vision block."""
    reducer, counts, tower = load_reducer(settings), [], []
    for start in progress(range(0, len(samples), COUNTING_BATCH), label, unit="batch", leave=False):
        images, questions = zip(*samples[start : start + COUNTING_BATCH], strict=True)
        prompts = [loaded.prompt(question, 1) for question in questions]
        with reducer.on(loaded.model) as run:
            loaded.answer(prompts, [[image] for image in images], max_new_tokens=1, do_sample=False)
        blocks = loaded.model.get_vision_tower().blocks_run
        for trace in run.traces:
            counts.append([tokens + trace.text_tokens for tokens in trace.vision_tokens])
            (image,) = trace.images
            left = dict(image["blocks"])
            after = [image["patches"]]
            for block in range(blocks):
                after.append(left.get(block, after[-1]))
            tower.append(after[:-1])
    return counts, tower


def line(loaded: LoadedModel, counts: list, tower: list, size: int, repeats: int) -> list:
    """One row of the table: a method's counts in batches of one size."""
    groups = batches(counts, size)
    layers = range(len(counts[0]))
    padding = [padded_share([[one[layer] for one in group] for group in groups]) for layer in layers]
    in_tower = fmean(padded_share([[one[b] for one in g] for g in batches(tower, size)]) for b in range(len(tower[0])))
    shape = ModelShape.from_config(loaded.model.config.to_dict(), "model", "float32")
    padded = sum(size * formula_macs(shape, [max(column) for column in zip(*group, strict=True)]) for group in groups)
    real = sum(formula_macs(shape, one) for group in groups for one in group)
    times = [compare_times(loaded.model.get_model(), group, repeats) for group in groups[:3]]
    before, after, saved = (fmean(column) for column in zip(*times, strict=True))
    shares = f"{padding[0]:.1%}, {fmean(padding):.1%}, {max(padding):.1%}"
    return [
        size,
        shares,
        f"{in_tower:.1%}",
        f"{1 - real / padded:.1%}",
        f"{before:.0f}",
        f"{after:.0f}",
        f"{saved:.1%}",
    ]


def batches(items: Sequence, size: int) -> list:
    """Whole batches of neighbours."""
    return [items[start : start + size] for start in range(0, len(items) - size + 1, size)]


def padded_share(groups: list[list[int]]) -> float:
    """Share of the rows of all batches that are padding, every batch as long as its longest prompt."""
    return 1 - sum(map(sum, groups)) / sum(len(group) * max(group) for group in groups)


def compare_times(decoder, group: list[list[int]], repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of the decoder's bare layers on a batch's counts, padded and packed, and the share saved."""
    runs, times = (padded_run(decoder, group), packed_run(decoder, group)), []
    with torch.inference_mode():
        for number in range(1 + repeats):
            pair = []
            for run in runs:
                start = time.perf_counter()
                run()
                if next(decoder.parameters()).is_cuda:
                    torch.cuda.synchronize()
                pair.append(1000 * (time.perf_counter() - start))
            times += [pair] if number else []
    padded, packed = (median(column) for column in zip(*times, strict=True))
    return padded, packed, 1 - median(packed / padded for padded, packed in times)


def padded_run(decoder, group: list[list[int]]) -> Callable[[], None]:
    """The layers on batches padded on the left to their longest prompt."""
    inputs = []
    for lengths in zip(*group, strict=True):
        longest, weight = max(lengths), decoder.layers[0].input_layernorm.weight
        hidden = torch.randn(len(lengths), longest, len(weight), device=weight.device, dtype=weight.dtype)
        column = torch.arange(longest, device=weight.device).expand(len(lengths), -1)
        valid = column >= longest - torch.tensor(lengths, device=weight.device)[:, None]
        valid = None if min(lengths) == longest else valid
        mask = attention_mask(decoder.config, hidden, valid=valid, keys=longest, causal=True)
        inputs.append((hidden, mask, decoder.rotary_emb(hidden, column)))

    def run() -> None:
        for layer, given in zip(decoder.layers, inputs, strict=True):
            whole_layer(layer, *given)

    return run


def packed_run(decoder, group: list[list[int]]) -> Callable[[], None]:
    """The layers on packed rows, prompt after prompt without padding."""
    inputs = []
    for lengths in zip(*group, strict=True):
        weight = decoder.layers[0].input_layernorm.weight
        hidden = torch.randn(1, sum(lengths), len(weight), device=weight.device, dtype=weight.dtype)
        position = torch.cat([torch.arange(length, device=weight.device) for length in lengths])[None]
        inputs.append((hidden, lengths, decoder.rotary_emb(hidden, position)))

    def run() -> None:
        for layer, (hidden, lengths, rotary) in zip(decoder.layers, inputs, strict=True):
            packed_layer(layer, hidden, lengths, rotary)

    return run


if __name__ == "__main__":
    sys.exit(main())
