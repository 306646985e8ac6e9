"""Have a language model judge answers to video questions, as published tables do.

    mustdrop judge results/video --model gpt-3.5-turbo-0125
    mustdrop judge results/video --model Qwen/Qwen3-8B --base-url http://localhost:8000/v1

Reads the predictions that an evaluation left (JSON lines of id, question, answer, pred; also those of the authors' own
scripts), asks the judge about each, and prints the share of answers that are right and the mean score from 0 to 5.
Verdicts are appended to a file beside the predictions as they come: the same command again asks only what is missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import fmean

from tabulate import tabulate

from eval.progress import progress
from eval.provenance import digest
from eval.run import predictions
from eval.run.cell import write_json
from eval.run.judging import RUBRIC, Judge, parse
from eval.run.records import file_name
from eval.statistics import share_interval
from mustdrop.command import Parser, command, decimal_number, needed_number, path, text
from mustdrop.read import read_text

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
KEY, ADDRESS = "OPENAI_API_KEY", "OPENAI_BASE_URL"
VERDICTS, SUMMARY = ".judged.jsonl", ".judged.json"
MOST_PARALLEL = 64


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser(
        "judge",
        description=__doc__,
        epilog=f"""\
The key comes from the environment variable {KEY} and is written nowhere; a server of your own may need none.

A judge's name is part of the result: published tables used gpt-3.5-turbo of their day, which is no longer served, and
figures of different judges are not comparable. The rubric is ours; --prompt takes the wording that you want to compare
with, a text with {{question}}, {{answer}} and {{pred}} in it. Replies are JSON with "pred" (yes or no) and "score" (0
to 5); what is no such reply is counted as unparsable, and asked again with --again.""",
    )
    add = new.add_argument
    add("predictions", nargs="+", type=path, help="files of predictions, or results folders that hold some")
    add("--model", type=text, required=True, help="the judge's name at that address, best with its date")
    meaning = f"an OpenAI-compatible address (default: ${ADDRESS}, else {OPENAI})"
    add("--base-url", type=text, default=os.environ.get(ADDRESS) or OPENAI, help=meaning)
    add("--prompt", type=path, help="file with another rubric")
    add("--limit", help="only the first LIMIT predictions of every file")
    add("--parallel", default=4, help="requests at once (%(default)s)")
    add("--tries", default=6, help="requests per question, with growing pauses, before giving up (%(default)s)")
    add("--timeout", default=60, help="seconds per request (%(default)s)")
    add("--again", action="store_true", help="ask again what had no parsable reply")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument or a judge that cannot be had."""
    args = parser().parse_args(argv)
    limit = None if args.limit is None else needed_number("--limit", args.limit)
    parallel = needed_number("--parallel", args.parallel, most=MOST_PARALLEL)
    judge = Judge(
        base_url=args.base_url,
        model=args.model,
        key=os.environ.get(KEY) or None,
        rubric=RUBRIC if args.prompt is None else read_text(args.prompt, 1 << 20),
        tries=needed_number("--tries", args.tries, most=100),
        timeout=decimal_number("--timeout", args.timeout, most=3600, above=True),
    )
    if judge.key is None and judge.base_url.startswith(OPENAI):
        raise ValueError(f"{KEY}: not set; {OPENAI} needs a key, or give another address with --base-url")
    asked = [(file, predictions.read(file)[:limit]) for file in found_files(args.predictions)]
    rows = [judge_file(judge, file, entries, parallel, args.again) for file, entries in asked]
    print(table(rows))
    return 0


def found_files(given: Sequence[Path]) -> list[Path]:
    """Files of predictions: those given, and those below the given folders.

    Raises
    ------
    ValueError
        If there are none.
    """
    found: dict[Path, None] = {}
    for one in given:
        below = one if one.name == "predictions" else one / "predictions"
        files = sorted(below.rglob("*.jsonl")) if one.is_dir() else [one]
        files = [file for file in files if not file.name.endswith(VERDICTS)]
        if not files:
            raise ValueError(f"predictions: {str(below)!r} holds no predictions (*.jsonl)")
        found.update(dict.fromkeys(files))
    return list(found)


def judge_file(judge: Judge, file: Path, entries: Sequence[dict], parallel: int = 4, again: bool = False) -> dict:
    """Judge a file's predictions, those without a verdict, and write the summary beside it; returns that summary.

    Raises
    ------
    JudgeFailed
        If the judge cannot be had; the verdicts so far are kept.
    """
    verdicts = file.with_name(f"{file.stem}.{file_name(judge.model)}{VERDICTS}")
    wanted = {judge.key_of(entry): entry for entry in entries}
    known = {key: line for key, line in read_verdicts(verdicts).items() if key in wanted}
    waiting = [key for key in wanted if key not in known or (again and known[key]["pred"] is None)]
    with progress(description=file.name, total=len(wanted), unit="answer") as bar:
        bar.update(len(wanted) - len(waiting))
        for key, reply, model in _asked(judge, {key: wanted[key] for key in waiting}, parallel):
            known[key] = _line(key, wanted[key]["id"], reply, model)
            append(verdicts, known[key])
            bar.update()
    facts = summary(judge, file, [known[key] for key in wanted])
    write_json(verdicts.with_name(verdicts.name.removesuffix(VERDICTS) + SUMMARY), facts)
    return facts


def summary(judge: Judge, file: Path, lines: Sequence[dict]) -> dict:
    """Accuracy and mean score of some verdicts, over those that have one."""
    judged = [line for line in lines if line["pred"] is not None]
    right = sum(line["pred"] == "yes" for line in judged)
    return {
        "predictions": file.name,
        "judge": judge.model,
        "models": sorted({line["model"] for line in lines}),
        "rubric": digest(judge.rubric),
        "n": len(lines),
        "unparsable": len(lines) - len(judged),
        "accuracy": right / len(judged) if judged else None,
        "ci95": list(share_interval(right, len(judged))) if judged else None,
        "score": fmean(line["score"] for line in judged) if judged else None,
    }


def read_verdicts(file: Path) -> dict[str, dict]:
    """The verdicts of a file by their keys, the last of each; a line that is damaged is said, and left out."""
    found: dict[str, dict] = {}
    if not file.exists():
        return found
    for number, content in enumerate(file.read_bytes().splitlines(), 1):
        line = _verdict(content)
        if line is not None:
            found[line["key"]] = line
        elif content.strip():
            logger.warning("note: %s, line %d is damaged; its question is asked again", file, number)
    return found


def append(file: Path, line: dict) -> None:
    """Append a line in one write, on a line of its own even behind one that was cut off."""
    with file.open("ab+") as lines:
        if lines.tell() and lines.seek(-1, os.SEEK_END) >= 0 and lines.read() != b"\n":
            lines.write(b"\n")
        lines.write(json.dumps(line).encode() + b"\n")


def table(rows: Sequence[dict]) -> str:
    """Summaries as a table for a terminal."""
    headers = ["predictions", "judge", "answers", "right % (95 % CI)", "score 0-5", "unparsable"]
    lines = [
        [row["predictions"], ", ".join(row["models"]), row["n"], _right(row), _mean(row), row["unparsable"]]
        for row in rows
    ]
    unparsable = any(row["unparsable"] for row in rows)
    note = "\nright and score are over the answers with a parsable reply" if unparsable else ""
    return tabulate(lines, headers, disable_numparse=True) + note


def _right(row: dict) -> str:
    if row["accuracy"] is None:
        return "-"
    low, high = row["ci95"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _mean(row: dict) -> str:
    return "-" if row["score"] is None else f"{row['score']:.2f}"


def _asked(judge: Judge, wanted: dict[str, dict], parallel: int) -> Iterator[tuple[str, str, str]]:
    """Key, reply and model's name of every prediction, as replies come; no more requests wait than are sent at once."""
    judge.stopped.clear()
    with ThreadPoolExecutor(parallel, thread_name_prefix="judge") as workers:
        running: dict[Future, str] = {}
        left = iter(wanted.items())
        try:
            while True:
                for key, entry in left:
                    running[workers.submit(judge.ask, entry)] = key
                    if len(running) == parallel:
                        break
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), *done.result()
        finally:
            judge.stopped.set()
            workers.shutdown(wait=False, cancel_futures=True)


def _line(key: str, identifier: str, reply: str, model: str) -> dict:
    verdict = parse(reply)
    said = {"pred": None, "score": None}
    if verdict is not None:
        said = {"pred": "yes" if verdict.right else "no", "score": verdict.score}
    return {"key": key, "id": identifier, **said, "reply": reply, "model": model}


def _verdict(text: bytes) -> dict | None:
    """A line that `_line` made; None if it is damaged."""
    try:
        line = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    texts = ("key", "id", "reply", "model")
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in texts):
        return None
    pred, score = line.get("pred"), line.get("score")
    number = isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 5
    return line if (pred in ("yes", "no") and number) or (pred is None and score is None) else None


if __name__ == "__main__":
    sys.exit(main())
