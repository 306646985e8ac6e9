"""Evaluate the untouched model and MustDrop at several budgets on one benchmark, through lmms-eval.

    python -m eval.run --task gqa --model checkpoints/llava-mini --retain 192 128 64

The model is loaded once. Every finished row is kept under the results folder and not computed again as long as nothing
that can change it has changed; a row that was interrupted goes on where it stopped. At the end, summary.json and
summary.md hold the table that is also printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from eval.methods import CONFIGS
from eval.progress import quiet
from eval.settings import EMBEDDED, Settings, check


def parser() -> argparse.ArgumentParser:
    """The command line; defaults come from the environment variables that the scripts document."""
    environment = os.environ.get
    new = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Names in capitals may also be set in the environment: MODEL, LIMIT, RETAIN, OUT, BATCH_SIZE.",
    )
    new.add_argument(
        "--task", default="gqa", help="gqa (mini_gqa, synthetic, if the model is the embedded one) or mini_gqa"
    )
    new.add_argument(
        "--model",
        metavar="MODEL",
        default=environment("MODEL") or EMBEDDED,
        help="folder or hub id of a LLaVA checkpoint, such as liuhaotian/llava-v1.5-7b (default: %(default)s)",
    )
    new.add_argument(
        "--retain",
        metavar="RETAIN",
        nargs="+",
        default=environment("RETAIN") or "192 128 64",
        help="average numbers of vision tokens to keep; each needs configs/methods/[MODEL/]METHOD_N.yaml, which "
        "python -m eval.calibrate makes (default: 192 128 64)",
    )
    new.add_argument("--method", default="mustdrop", help="method to compare with the untouched model (%(default)s)")
    new.add_argument(
        "--configs", type=Path, default=CONFIGS, help="folder of the methods' YAML files (configs/methods)"
    )
    new.add_argument("--limit", metavar="LIMIT", default=environment("LIMIT"), help="only the first LIMIT questions")
    new.add_argument(
        "--out", metavar="OUT", default=environment("OUT"), help="results folder (default: results/TASK-MODEL[-limitN])"
    )
    new.add_argument(
        "--batch-size",
        metavar="BATCH_SIZE",
        default=environment("BATCH_SIZE"),
        help="questions per batch (default: 8; 1 gives the latency of a single question)",
    )
    new.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    new.add_argument("--device-map", help="auto spreads a large model over several GPUs")
    new.add_argument(
        "--dtype", default="auto", help="auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16"
    )
    new.add_argument("--attn-implementation", default="sdpa", help="sdpa, eager or flash_attention_2 (%(default)s)")
    new.add_argument("--conv-template", default="vicuna_v1", help="conversation template (%(default)s)")
    new.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    new.add_argument("--force", action="store_true", help="compute finished rows again")
    new.add_argument("--verbose", action="store_true", help="show what lmms-eval logs")
    return new


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        settings = check(args)
        reducers = _checked_reducers(settings)
        _note_borrowed_thresholds(settings)
        print(
            f"{settings.task}: {settings.model}, {len(settings.methods)} rows, results in {settings.out}",
            file=sys.stderr,
        )
        run = Run(settings, reducers, argv, args.force, args.verbose)
        if not all(cell.finished for cell in run.cells):
            run.prepare()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        rows = run.rows()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(run.write(rows, "simple"))
    return 0


def _checked_reducers(settings: Settings) -> list[dict]:
    """Every method's settings as a dictionary that ``mustdrop.load_reducer`` accepts."""
    from eval.methods import read_method
    from mustdrop import load_reducer

    found = []
    for name, _, source in settings.methods:
        method = read_method(str(source) if isinstance(source, Path) else source)
        try:
            load_reducer(method)
        except ValueError as error:
            raise ValueError(f"{source if isinstance(source, Path) else name}: {error}") from None
        found.append(method)
    return found


def _note_borrowed_thresholds(settings: Settings) -> None:
    """Say so if thresholds were not found for this model: they may keep another number of tokens."""
    borrowed = [
        str(retain)
        for _, retain, source in settings.methods
        if isinstance(source, Path) and source.parent.name != settings.model_name
    ]
    if borrowed:
        print(
            f"note: {', '.join(borrowed)} tokens: thresholds published for LLaVA-1.5-7B on TextVQA; here they may keep "
            f"more or fewer. For your own: python -m eval.calibrate --model {settings.model}",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class Cell:
    """A row to be: its method, the file that holds it once it is finished, and whether it is."""

    label: str
    name: str
    retain: int | None
    method: dict
    file: Path
    finished: bool


class Run:
    """One evaluation: knows which rows are finished and computes the others.

    Parameters
    ----------
    settings : Settings
        What to do.
    methods : list of dict
        The settings of every row's reducer.
    argv : list of str
        The command, for the record.
    force : bool
        Compute finished rows again.
    verbose : bool
        Let lmms-eval log.
    """

    def __init__(
        self, settings: Settings, methods: list[dict], argv: list[str], force: bool = False, verbose: bool = False
    ):
        from eval import provenance
        from eval.inference import resolve_device, resolve_dtype
        from eval.tasks import fingerprint, is_local

        self.settings, self.force, self.verbose = settings, force, verbose
        self.device = resolve_device(settings.device)
        self.dtype = str(resolve_dtype(settings.dtype, self.device)).removeprefix("torch.")
        self.batch_size = settings.batch_size or 8
        self.config = {
            "task": settings.task,
            "task_data": fingerprint(settings.task) if is_local(settings.task) else None,
            "model": settings.model_name,
            "model_files": provenance.model_fingerprint(settings.model),
            "limit": settings.limit,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "device": provenance.device_name(self.device),
            "device_map": settings.device_map,
            "attn_implementation": settings.attn_implementation,
            "conv_template": settings.conv_template,
            "seed": settings.seed,
        }
        self.provenance = provenance.provenance(argv, "eval.run", config=self.config, seed=settings.seed)
        self.cells = [
            self._cell(name, retain, method)
            for (name, retain, _), method in zip(settings.methods, methods, strict=True)
        ]
        self._loaded = self._tasks = None

    def identity(self, method: dict) -> dict:
        """All that can change a row."""
        return {
            "method": method,
            **self.config,
            "code": self.provenance["code"],
            "versions": self.provenance["versions"],
        }

    def _cell(self, name: str, retain: int | None, method: dict) -> Cell:
        from eval.provenance import digest

        label = name if retain is None else f"{name}_{retain}"
        file = self.settings.out / "rows" / f"{label}-{digest(self.identity(method))}.json"
        return Cell(label, name, retain, method, file, file.is_file() and not self.force)

    def rows(self) -> list[dict]:
        """The rows, computed where they are not finished; the summary on disk follows along."""
        done = []
        for cell in self.cells:
            if cell.finished:
                print(f"{cell.label}: finished earlier", file=sys.stderr)
                done.append(json.loads(cell.file.read_text(encoding="utf-8"))["row"])
            else:
                start = time.perf_counter()
                done.append(self._evaluate(cell))
                facts = {
                    "row": done[-1],
                    "identity": self.identity(cell.method),
                    "seconds": round(time.perf_counter() - start, 1),
                    "date": self.provenance["date"],
                }
                _write_json(cell.file, facts)
            self.write(done, "github")
        return done

    def write(self, rows: list[dict], style: str) -> str:
        """Write ``summary.json`` and ``summary.md``; returns the table in the given style of tabulate."""
        from eval import summary

        rows = summary.with_shares(rows)
        facts = {
            **self.provenance,
            "device": self.config["device"],
            "dtype": self.dtype,
            "samples": rows[0]["n"],
            "flops_convention": summary.FLOPS_CONVENTION,
            "flops_conventions": {name: summary.CONVENTIONS[name].explanation for name in summary.REPORTED_CONVENTIONS},
            "ci95": "Wilson score interval over questions (scipy.stats.binomtest)",
            "times": f"median over prompts, a batch's time shared by its {self.batch_size} prompts",
        }
        _write_json(self.settings.out / "summary.json", {"rows": rows, "provenance": facts})
        (self.settings.out / "summary.md").write_text(self._text(rows, facts, "github"), encoding="utf-8")
        return self._text(rows, facts, style)

    def _text(self, rows: list[dict], facts: dict, style: str) -> str:
        from eval import summary

        heading = f"# {self.settings.task}, {self.settings.model_name}\n\n" if style == "github" else "\n"
        notes = (
            f"{facts['samples']} questions, {facts['device']}, {self.dtype}, batch {self.batch_size}, "
            f"{facts['date'][:10]}, commit {(facts['git_commit'] or 'none')[:12]}.\n"
            f"tokens: mean per decoder layer; official: the same by the authors' meter.\n"
            f"FLOPs saved: {facts['flops_conventions'][facts['flops_convention']]}.\n"
            f"vision only: {facts['flops_conventions']['vision-only']}.\n"
            f"ms: {facts['times']}."
        )
        parts = [summary.table(rows, style), summary.table_by_type(rows, style), notes]
        return heading + "\n\n".join(part for part in parts if part) + "\n"

    def _evaluate(self, cell: Cell) -> dict:
        """One row, through lmms-eval."""
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.models import get_model

        from eval import summary

        model = get_model("llava_mustdrop")(
            method=cell.method,
            loaded=self._loaded,
            batch_size=self.batch_size,
            samples=str(cell.file.with_suffix(".jsonl")),
            resume=not self.force,
            description=cell.label,
        )
        task, seed = self.settings.task, self.settings.seed
        results = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=self._tasks,
            limit=self.settings.limit,
            batch_size=self.batch_size,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="INFO" if self.verbose else "WARNING",
        )
        answered = results["samples"][task]
        scores = [float(sample[self.settings.metric]) for sample in answered]
        kinds = [_kind(sample["doc"]) for sample in answered]
        shape = summary.shape_of(self._loaded.model.config.to_dict(), self.settings.model_name, self.dtype)
        return summary.row(cell.name, cell.retain, scores, kinds, model.records, shape)

    def prepare(self) -> None:
        """Load what all rows share, the model and the task's data; ValueError if either cannot be."""
        if not self.verbose:
            quiet()
        from lmms_eval.tasks import TaskManager

        from eval.inference import LoadedModel
        from eval.tasks import is_local, prepare

        settings = self.settings
        self._loaded = LoadedModel.load(
            settings.model,
            device=self.device,
            device_map=settings.device_map,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            conv_template=settings.conv_template,
        )
        local = is_local(settings.task)
        folder = str(prepare(settings.task)) if local else None
        self._tasks = TaskManager(verbosity="WARNING", include_path=folder, include_defaults=not local)


def _kind(document: dict) -> str:
    """A question's type: ours, or GQA's structural type; ``all`` where there is none."""
    types = document.get("types")
    return document.get("type") or (types.get("structural") if isinstance(types, dict) else None) or "all"


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
