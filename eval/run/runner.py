"""Running cells through lmms-eval, and writing what came out."""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from pathlib import Path
from statistics import fmean

from eval import provenance
from eval.checkpoints import LOADING
from eval.progress import hide_bars, quiet
from eval.run import rows
from eval.run.cell import Cell, write_json
from eval.run.records import read_answers
from eval.run.samples import write_lines
from eval.statistics import bootstrap_interval

MATCHES = ("exact_match", "containment")
"""The two ways in which an answer to a video question may match; which of them is the score, the task says."""


def evaluate(
    cells: Sequence[Cell], out: Path, *, command: Sequence[str], force: bool = False, verbose: bool = False
) -> Iterator[tuple[Cell, dict]]:
    """Evaluate cells one after the other; neighbours that share a model share its loading.

    A finished cell is not computed again, and one that was interrupted goes on where it stopped.

    Parameters
    ----------
    cells : sequence of Cell
        What to do.
    out : pathlib.Path
        Results folder.
    command : sequence of str
        The command line, for the record.
    force : bool
        Compute finished and interrupted cells anew.
    verbose : bool
        Let lmms-eval log.

    Yields
    ------
    cell, row : Cell, dict
        As soon as each is finished; of a distributed run, only the first process gets them.

    Raises
    ------
    ValueError
        If a model or a task cannot be loaded.
    """
    loaded, tasks = _Loaded(), {}
    for cell in cells:
        if cell.finished(out) and not force:
            yield cell, cell.read(out)
            continue
        cell.check_place(out)
        if not verbose:
            quiet()
        start = time.perf_counter()
        if cell.task not in tasks:
            tasks[cell.task] = _task_manager(cell.task)
        model = loaded.get(cell)
        row = _evaluate(cell, out, model, tasks[cell.task], force, verbose)
        if row is None:
            continue
        found = {"device": provenance.device_name(str(model.device)), "dtype": str(model.dtype).removeprefix("torch.")}
        facts = provenance.provenance(command, **found, seed=cell.seed)
        seconds = round(time.perf_counter() - start, 1)
        write_json(cell.file(out), {"row": row, "identity": cell.identity(), "provenance": facts, "seconds": seconds})
        yield cell, row


class _Loaded:
    """The model that was loaded last."""

    def __init__(self) -> None:
        self.settings: tuple = ()
        self.model = None

    def get(self, cell: Cell):
        """The model of a cell, an ``eval.run.inference.LoadedModel``."""
        from eval.run.inference import LoadedModel

        options = {
            name: getattr(cell, name)
            for name in ("device", "device_map", "dtype", "attn_implementation", "conv_template", *LOADING)
        }
        settings = (cell.model, *options.values())
        if settings != self.settings:
            self.model = None  # the old one's memory first
            gc.unfreeze()
            gc.collect()
            self.model = LoadedModel.load(cell.model, **options)
            self.settings = settings
            gc.freeze()  # what has been imported and loaded stays: no need to look through it again and again
        return self.model


def _task_manager(task: str):
    """lmms-eval's index of tasks, with the data ready; of ours only what is needed, for the whole index takes seconds.

    Raises
    ------
    ValueError
        If the data cannot be had.
    """
    from lmms_eval.tasks import TaskManager

    from eval.tasks import is_local, prepare, stock

    if is_local(task):
        return TaskManager(verbosity="WARNING", include_path=str(prepare(task)), include_defaults=False)
    stock.load(task)
    return stock.manager()


def _evaluate(cell: Cell, out: Path, loaded, manager, force: bool, verbose: bool) -> dict | None:
    """One cell's row, through lmms-eval; None in all processes but the first."""
    from lmms_eval import evaluator
    from lmms_eval.api import task as tasks
    from lmms_eval.models import get_model

    from eval.run import predictions
    from eval.run.answer_file import rank_files
    from eval.tasks import TASKS, is_local, stock

    if not verbose:
        hide_bars(evaluator, tasks)

    samples = cell.file(out).with_suffix(".jsonl")
    model = get_model("llava_mustdrop")(
        method=cell.settings,
        loaded=loaded,
        batch_size=cell.batch_size,
        samples=str(samples),
        pictures=str(out / "pictures"),
        resume=not force,
        skip_unfit=cell.skip_unfit,
        description=f"{cell.task} {cell.label}",
    )
    with stock.in_one_line(cell.task):
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[cell.task],
            task_manager=manager,
            limit=cell.limit,
            batch_size=cell.batch_size,
            bootstrap_iters=0,
            random_seed=cell.seed,
            numpy_random_seed=cell.seed,
            torch_random_seed=cell.seed,
            fewshot_random_seed=cell.seed,
            verbosity="INFO" if verbose else "WARNING",
            # where some tasks leave files for a server to score; ours score without decoding every image again, and
            # others do where an image may be one that cannot be decoded
            cli_args=Namespace(
                output_path=str(out), process_with_media=not is_local(cell.task) and not cell.skip_unfit
            ),
        )
    if results is None:
        return None
    scored = results["samples"][cell.task]
    files = rank_files(samples)
    lines = list({line["doc_id"]: line for file in files for line in read_answers(file)}.values())
    asked = [line for line in lines if "skipped" not in line]
    if not asked:
        raise ValueError(
            f"{cell.task} {cell.label}: no question could be asked; {lines[0]['skipped'] if lines else ''}"
        )
    write_lines(samples, _with_scores(lines, cell.task, scored))
    if TASKS[cell.task].videos:
        predictions.write(predictions.file_of(cell, out), scored)
    for file in set(files) - {samples}:
        file.unlink()
    row = {
        "model": cell.model_name,
        "task": cell.task,
        "benchmark": cell.benchmark,
        "method": cell.method,
        "retain": cell.retain,
        "seed": cell.seed,
        "limit": cell.limit,
        **_scores(cell.task, results["results"][cell.task], scored),
        **rows.measured(asked),
        "skipped": len(lines) - len(asked),
        "beyond_context": sum(_prompt_tokens(line) > loaded.context_len for line in asked),
    }
    if TASKS[cell.task].videos and (frames := rows.tokens_per_view(asked)):
        row["tokens_per_view"] = frames
    if cell.model_base is not None:
        row["model_base"] = Path(cell.model_base).name
    if loaded.bits is not None:
        row["bits"] = loaded.bits
    if cell.retain is None:
        row["retain"] = round(row["mean_tokens"])
    return row


def _prompt_tokens(line: Mapping) -> int:
    """Tokens that enter the language model: text, and what the vision encoder left of the images."""
    return line["text_tokens"] + max(line["vision_tokens"], default=0)


def _scores(task: str, results: Mapping, scored: Sequence[Mapping]) -> dict:
    """The headline score in the units papers print, and the accuracy over questions, each with its interval."""
    from eval.tasks import TASKS, headline, question_scores, statistic

    answers = rows.answered(question_scores(task, scored), [kind(sample["doc"]) for sample in scored])
    score = headline(task, results)
    if isclose(score, 100 * answers["accuracy"]):  # the same thing has the same interval
        interval = [100 * bound for bound in answers["ci95"]]
    else:
        interval = list(bootstrap_interval(*statistic(task, scored)))
    matches = {name: fmean(sample[name] for sample in scored) for name in MATCHES if TASKS[task].videos}
    return {
        **({"matches": matches} if matches else {}),
        "synthetic": TASKS[task].synthetic,
        "metric": " + ".join(TASKS[task].metrics),
        "score": score,
        "score_ci95": interval,
        **answers,
    }


def _with_scores(lines: Sequence[dict], task: str, scored: Sequence[Mapping]) -> Iterator[dict]:
    """The lines of answers with what lmms-eval made of them."""
    from eval.tasks import question_scores

    facts = {
        sample["doc_id"]: {"type": kind(sample["doc"]), "target": str(sample["target"]), "score": score}
        for sample, score in zip(scored, question_scores(task, scored), strict=True)
    }
    for line in lines:
        yield {**line, **facts.get(line["doc_id"], {})}


def kind(document: Mapping) -> str:
    """A question's type: ours, GQA's structural type, a category; ``all`` where there is none."""
    types = document.get("types")
    structural = types.get("structural") if isinstance(types, Mapping) else None
    return document.get("type") or structural or document.get("category") or "all"
