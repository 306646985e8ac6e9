"""A page to try methods on: an image, a question, a method and a budget; both answers, what was kept, what it cost.

    mustdrop demo
    mustdrop demo --model liuhaotian/llava-v1.5-7b --port 7861

Needs gradio (pip install '.[demo]') and no network: the embedded model is asked about scenes that are drawn for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from typing import Any

from PIL import Image

from mustdrop.command import Parser, command, needed_number, text

SCENES = (7, 11, 23, 42)
"""Seeds of the example scenes."""

FEWEST, MOST, USUAL = 16, 256, 64
LARGEST_PORT = 65535


@dataclass
class Demo:
    """What the page does, without the page.

    Attributes
    ----------
    loaded : AskedModel
        The model.
    model : str
        Its folder or hub id, by which methods are calibrated.
    """

    loaded: Any
    model: str
    _one_at_a_time: Lock = field(default_factory=Lock, repr=False)

    def methods(self) -> list[str]:
        """Methods that have settings for any budget of this model."""
        from eval.methods import VANILLA, method_at
        from mustdrop import available_methods

        found = []
        for name in available_methods():
            try:
                method_at(self.model, name, USUAL)
            except ValueError:  # calibrated to other budgets, or to none
                continue
            found.append(name)
        return [name for name in found if name != VANILLA]

    def compare(
        self, image: Image.Image | None, question: str, method: str, budget: float
    ) -> tuple[str, str, list[list[str]], Image.Image | None]:
        """Both answers, the rows of the table of costs, and the drawing.

        Raises
        ------
        ValueError
            With one line, if there is nothing to ask, or the method cannot keep so few tokens.
        """
        from eval.ask.compare import BASELINE, compare, table_rows
        from eval.ask.overlay import sheet
        from eval.methods import method_at
        from eval.run.visuals import open_visual
        from mustdrop import Reducer, load_reducer

        if image is None:
            raise ValueError("image: there is none yet, choose an example or upload one")
        if not question.strip():
            raise ValueError("question: there is none yet")
        visuals = [open_visual(image)]
        settings, _ = method_at(self.model, method, int(budget))
        label = f"{method} {int(budget)}"
        with self._one_at_a_time:
            baseline, reduced = compare(
                self.loaded, question, visuals, {BASELINE: Reducer(), label: load_reducer(settings)}, repeats=3
            )
            drawn = sheet(self.loaded, visuals, reduced.trace, baseline.trace, label)
        return baseline.answer, reduced.answer, table_rows([baseline, reduced]), drawn


def examples(seeds: Sequence[int] = SCENES) -> list[tuple[Image.Image, str]]:
    """Drawn scenes, each with a question about it."""
    from eval.ask.command import asked_scene

    found = []
    for seed in seeds:
        (image,), question, _ = asked_scene(seed)
        found.append((image, question))
    return found


def page(demo: Demo) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio

    def run(*given: Any) -> tuple:
        try:
            return demo.compare(*given)
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    scenes = examples()
    with gradio.Blocks(title="MustDrop", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# MustDrop\nFewer vision tokens for {demo.model}: the baseline and a method, side by side.")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(value=scenes[0][0], type="pil", label="image", height=336)
                question = gradio.Textbox(value=scenes[0][1], label="question")
                gradio.Examples([list(scene) for scene in scenes], [image, question], label="scenes")
            with gradio.Column():
                names = demo.methods()
                usual = "mustdrop_plus" if "mustdrop_plus" in names else names[0]
                method = gradio.Dropdown(names, value=usual, label="method")
                budget = gradio.Slider(FEWEST, MOST, USUAL, step=8, label="vision tokens per layer, mean")
                button = gradio.Button("ask", variant="primary")
                baseline = gradio.Textbox(label="baseline", interactive=False)
                reduced = gradio.Textbox(label="method", interactive=False)
                costs = gradio.Dataframe(headers=["", "baseline", "method"], label="costs", interactive=False)
        drawn = gradio.Image(label="what each stage kept and merged", interactive=False, format="png")
        given, shown = [image, question, method, budget], [baseline, reduced, costs, drawn]
        button.click(run, given, shown, api_name="compare")
        # Dragged, typed or moved by keys: of what comes while a question is being asked, the last one counts.
        budget.change(run, given, shown, api_name=False, trigger_mode="always_last")
        method.input(run, given, shown, api_name=False)
    return blocks


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from eval import checkpoints

    new = Parser("demo", __doc__)
    new.add_argument(
        "--model", type=text, default=checkpoints.EMBEDDED, help="folder or hub id of a checkpoint (%(default)s)"
    )
    checkpoints.add_options(new)
    new.add_argument("--device", type=text, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    new.add_argument("--host", type=text, default="127.0.0.1", help="address to listen at (%(default)s)")
    new.add_argument("--port", default=7860, help="its port (%(default)s)")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument, 130 interrupted."""
    args = parser().parse_args(argv)
    port = needed_number("port", args.port, most=LARGEST_PORT)
    if find_spec("gradio") is None:
        raise ValueError("gradio: it is not installed here; pip install '.[demo]'")
    from eval import checkpoints
    from eval.run.inference import LoadedModel

    checkpoints.check_arguments(args)
    options = {name: getattr(args, name) for name in ("device", *checkpoints.LOADING)}
    demo = Demo(LoadedModel.load(args.model, **options), args.model)
    page(demo).queue().launch(server_name=args.host, server_port=port, show_error=True, quiet=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
