"""Score against vision tokens, FLOPs and measured time, one line per method, from any results folder.

    mustdrop plots results --out plots

One picture per task and quantity, and per quantity one for the average share of vanilla over all tasks; PNG and SVG.
"""

from __future__ import annotations

import io
import sys

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from eval.report import published
from eval.report.published import AVERAGE
from eval.report.results import COSTS, VANILLA, load, over_seeds, timing
from eval.run.records import file_name
from eval.run.settings import check_out
from mustdrop.command import Parser, command, path

OURS = "mustdrop"
"""Methods whose names begin so have a stronger line."""

INK = "#1b2028"
"""Text and axes. A report replaces it by its own colour of text."""

# Okabe and Ito's colours, told apart with any kind of colour vision; one marker more, so that pairs repeat late.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6A3D9A")
MARKERS = "osD^vP*X<"
STYLE = {
    "svg.hashsalt": "mustdrop", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25,
    "grid.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.titlecolor": INK, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 200,
}  # fmt: skip
SIZE = (4.8, 3.6)
CROWDED = 6
"""With more methods than this, the legend stands beside the axes."""

FORMATS = ("png", "svg")


QUANTITIES = {cost.axis[0]: (cost.axis[1], column) for column, cost in COSTS.items() if cost.axis}
"""What scores are drawn against: title of the axis, and the frame's column."""

LOGARITHMIC = ("tokens", "time")
"""Drawn so that every doubling takes the same room, as budgets halve from one to the next."""


def task_points(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The points of one task: ``method``, ``x``, ``y``, and ``below`` and ``above`` of the 95 % interval.

    ``frame`` is one that `over_seeds` made; rows without the quantity are left out.
    """
    known = _known(frame, quantity)
    return _points(known.method, known[QUANTITIES[quantity][1]], known.score, known.low, known.high)


def average_points(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Mean share of vanilla in percent over all tasks; a method that lacks a task at a budget is left out there.

    The interval adds up the tasks' own, taken as independent, and takes the untouched model's score as exact.
    """
    known = _known(frame, quantity)
    base = known.task.map(frame[frame.method == VANILLA].set_index("task").score.astype(float))
    known = known[base > 0]
    scaled = known.assign(
        **{name: 100 * known[name] / base for name in ("score", "low", "high")},
        below2=lambda rows: (rows.score - rows.low) ** 2, above2=lambda rows: (rows.high - rows.score) ** 2,
    )  # fmt: skip
    groups = scaled.groupby("label", sort=False)
    whole = groups.size() == frame.task.nunique()
    means = groups[["score", QUANTITIES[quantity][1]]].mean()[whole]
    below, above = (groups[name].sum()[whole] ** 0.5 / groups.size()[whole] for name in ("below2", "above2"))
    x, y = means[QUANTITIES[quantity][1]], means.score
    return _points(groups.method.first()[whole], x, y, y - below, y + above)


def _known(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows with a quantity, their numbers as such and the ends of their intervals."""
    column = QUANTITIES[quantity][1]
    ends = {end: frame.score_ci95.str[place].astype(float) for place, end in enumerate(("low", "high"))}
    numbers = frame.assign(**ends).astype({column: float, "score": float})
    return numbers[numbers[column].notna()]


def _points(*columns: pd.Series) -> pd.DataFrame:
    names = ("method", "x", "y", "below", "above")
    return pd.DataFrame(dict(zip(names, columns, strict=True))).reset_index(drop=True)


def draw(
    points: pd.DataFrame,
    title: str,
    x_title: str,
    y_title: str,
    colours: dict[str, int],
    logarithmic: bool = False,
) -> Figure:
    """One picture: a line per method with error bars, the untouched model as a point and a dashed level.

    The legend names methods from high scores to low.

    Parameters
    ----------
    points : pandas.DataFrame
        What to draw, as `task_points` and `average_points` give it.
    title, x_title, y_title : str
        Texts.
    colours : dict
        Number of every method, so that it looks alike in all pictures.
    logarithmic : bool
        Whether each doubling of x takes the same room.
    """
    with matplotlib.rc_context(STYLE):
        scores = points.groupby("method").y.mean()
        crowded = len(scores) > CROWDED
        figure = Figure(figsize=(1.6 * SIZE[0], 1.3 * SIZE[1]) if crowded else SIZE, layout="constrained")
        axes = figure.add_subplot()
        for method in sorted(scores.index, key=lambda name: (name != VANILLA, -scores[name])):
            mine = points[points.method == method].sort_values("x", kind="stable")
            plain = method == VANILLA
            colour = INK if plain else COLOURS[colours[method] % len(COLOURS)]
            if plain:
                axes.axhline(mine.y.iloc[0], color=INK, linestyle="--", linewidth=0.9, alpha=0.6, zorder=1)
            axes.errorbar(
                mine.x,
                mine.y,
                yerr=[(mine.y - mine[end]).abs() for end in ("below", "above")],
                label=method,
                color=colour,
                marker="h" if plain else MARKERS[colours[method] % len(MARKERS)],
                linestyle="none" if plain else "-",
                linewidth=2.2 if method.startswith(OURS) else 1.3,
                markersize=5.5,
                elinewidth=0.7,
                capsize=2,
            )
        axes.set(title=title, xlabel=x_title, ylabel=y_title)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
        else:
            axes.set_xlim(left=0)
        if crowded:
            figure.legend(loc="outside right upper", fontsize=9)
        else:
            axes.legend(loc="best", fontsize=9)
    return figure


def figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """All pictures by name, ``mini_gqa-tokens`` and so on; with the model's name in front if there are several.

    A quantity that no row has, as times may be, has no picture.
    """
    rows = over_seeds(frame)
    methods = sorted(set(rows.method) - {VANILLA})
    colours = {method: number for number, method in enumerate(methods)}
    found = {}
    for model, mine in rows.groupby("model", sort=False):
        tasks = list(mine.groupby("task", sort=False))
        prefix = f"{file_name(model)}-" if rows.model.nunique() > 1 else ""
        for quantity, (x_title, _) in QUANTITIES.items():
            if quantity == "time":
                x_title += f"\n{timing(frame[frame.model == model])}"
            drawn = [
                (task, _title(model, task, group), _y_title(group), task_points(group, quantity))
                for task, group in tasks
            ]
            if len(tasks) > 1:
                title = _title(model, f"average of {len(tasks)} tasks", mine)
                drawn.insert(0, (AVERAGE, title, "score, % of vanilla", average_points(mine, quantity)))
            for name, title, y_title, points in drawn:
                if not points.empty:
                    figure = draw(points, title, x_title, y_title, colours, quantity in LOGARITHMIC)
                    found[f"{prefix}{name}-{quantity}"] = figure
    return found


def encode(figure: Figure, kind: str) -> bytes:
    """A picture as PNG or SVG; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    dated = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata=dated, transparent=kind == "svg")
    return buffer.getvalue()


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    new = Parser("plots", description=__doc__)
    new.add_argument("results", type=path, nargs="+", help="results folders")
    new.add_argument("--out", type=path, help="folder for the pictures (default: plots in the first results folder)")
    args = new.parse_args(argv)
    frame, notes = load(args.results)
    out = check_out(args.out or args.results[0] / "plots")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(frame).items():
        for kind in FORMATS:
            (out / f"{name}.{kind}").write_bytes(encode(figure, kind))
            print(out / f"{name}.{kind}")
    return 0


def _title(model: str, task: str, rows: pd.DataFrame) -> str:
    """What is drawn; whoever sees only the picture must see that it is synthetic, or only a part."""
    remarks = [name for name, some in (("synthetic", rows.synthetic), ("limited", rows.limit.notna())) if some.any()]
    return f"{task}, {model}" + (f" ({', '.join(remarks)})" if remarks else "")


def _y_title(rows: pd.DataFrame) -> str:
    column = published.columns().get(rows.benchmark.iloc[0])
    return f"{rows.metric.iloc[0]}, {column.unit if column else '%'}"


if __name__ == "__main__":
    sys.exit(main())
