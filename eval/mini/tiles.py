"""Tuning of a LLaVA-NeXT in miniature: the embedded model's language model learns to read tiles, its tower is frozen.

The tower's views are a quarter of what it was trained on, 168 px a side, so its position table is cropped to the middle
of its own. Views become vision tokens as in LLaVA-NeXT: the overview, then the tiles put together again, without the
canvas's border, a newline after every row. A share of the steps shows the overview alone, so that what a question loses
without tiles is what the overview does not show and not what the model never practised.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eval.mini import highres, language, scenes, vision
from eval.mini.data import Packer, PlacedMention, build_tokenizer
from eval.mini.endtoend import MiniLlava
from eval.mini.export import export_tiles, middle_positions
from eval.mini.grounding import CLASSES, Grounding, facts_of, places_of
from eval.mini.optim import MuonWithAdamW, save_atomically
from eval.mini.questions import mention
from llava.anyres import process_anyres_image
from llava.model.stitched import layouts_of
from mustdrop.command import Parser, command

log = logging.getLogger(__name__)

#: What config.json says of how images are cut and laid out.
LAYOUT = SimpleNamespace(
    mm_patch_merge_type="spatial_unpad",
    image_aspect_ratio="anyres",
    image_grid_pinpoints=highres.PINPOINTS,
    mm_vision_config={"image_size": highres.TILE},
)
#: Layouts that a phase of tuning draws from.
PHASES = {"strips": ("1x2", "2x1"), "mixed": ("1x2", "2x1", "2x2", "2x2"), "squares": ("2x2",)}
#: Share of the steps that show the overview alone.
OVERVIEW_ONLY = 0.12
#: Steps for which the read-outs learn alone, since the embedded model comes without them.
READ_OUTS_FIRST = 40


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's image processor at the size of one tile."""
    side = highres.TILE
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(vision.IMAGE_MEAN),
        image_std=list(vision.IMAGE_STD),
    )


def cropped_tower(tower: CLIPVisionModel) -> CLIPVisionModel:
    """The same tower for views of one tile."""
    config = CLIPVisionConfig.from_dict({**tower.config.to_dict(), "image_size": highres.TILE})
    small = CLIPVisionModel(config)
    state = tower.state_dict()
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    state[name] = middle_positions(tower, highres.TILE_GRID)
    small.load_state_dict(state, strict=False)
    return small.eval().requires_grad_(False)


class TiledMini(nn.Module):
    """Projector, newline and language model; the tower beside them is frozen and no part of the state."""

    def __init__(self, mini: MiniLlava):
        super().__init__()
        self.projector, self.model = mini.projector, mini.model
        self.image_newline = nn.Parameter(torch.randn(self.model.config.hidden_size) * 0.1)
        self.frozen = [cropped_tower(mini.tower)]  # in a list: not a submodule

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of views ``[views, 3, side, side]``: ``[views, patches, width]``."""
        return self.frozen[0](pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def vision_tokens(self, pixels: torch.Tensor, size: tuple[int, int], only_overview: bool = False) -> torch.Tensor:
        """Tokens ``[images, tokens, hidden]`` of images of one size, whose views are ``[images, views, 3, ...]``."""
        pixels = pixels[:, :1] if only_overview else pixels
        projected = self.projector(self.features(pixels.flatten(0, 1))).unflatten(0, pixels.shape[:2])
        return lay_out(projected, size, self.image_newline)


def lay_out(views: torch.Tensor, size: tuple[int, int], newline: torch.Tensor) -> torch.Tensor:
    """LLaVA-NeXT's order of vision tokens.

    Parameters
    ----------
    views : `[images, 1 + tiles, patches, hidden]`
        The overview and, unless it comes alone, the tiles row by row.
    size : tuple of int
        Width and height of the images, pixels; no canvas changes their scale.
    newline : `[hidden]`
        Ends every row of the tiles, or the overview if it comes alone.
    """
    images, count, patches, _ = views.shape
    (layout,) = layouts_of(LAYOUT, highres.TILE_GRID, [(count, size)])
    index = torch.where(layout.shows, layout.view * patches + layout.patch, count * patches)
    return torch.cat((views.flatten(1, 2), newline.to(views.dtype).expand(images, 1, -1)), 1)[:, index]


class HopGrounding(Grounding):
    """Read-outs as in :class:`Grounding`, and two for things that are named by what stands beside them.

    Three layers later than the others, the end of such a question tells what is meant. Early on, the vision tokens of
    an object tell which sign stands on its left.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.early = config.num_hidden_layers * 3 // 16
        self.hop_norm, self.left_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.hop_head, self.left_head = (nn.Linear(config.hidden_size, sum(CLASSES)) for _ in range(2))
        self.alone = False
        self.left: list[PlacedMention] = []

    def look(self, drawn: Sequence[highres.HighResScene], first: int) -> None:
        """Note what the next batch shows; the tiles of its scenes begin at token ``first``."""
        self.left = []
        for number, scene in enumerate(drawn):
            for sign, item in highres.pairs(scene):
                start, meant = first + item.row * (scene.cols + 1), mention(scene, "", [sign])
                _, col0, _, col1 = item.box
                self.left += [PlacedMention(number, start + col, meant) for col in range(col0, col1)]

    def loss(self, states: Sequence[torch.Tensor], mentions: list[PlacedMention], length: int) -> torch.Tensor:
        """Sum of all read-outs' losses; while ``alone`` they do not teach the model."""
        if self.alone:
            states = [state.detach() for state in states]
        hops = [item for item in mentions if item.meaning.phrase.endswith("?")]
        found = super().loss(states, [item for item in mentions if not item.meaning.phrase.endswith("?")], length)
        later = states[self.compare_depth][:, -length:]
        return (
            found
            + self._facts_loss(self.hop_head, self.hop_norm, later, hops)
            + 3 * self._facts_loss(self.left_head, self.left_norm, states[self.early], self.left)
        )

    def _facts_loss(
        self, head: nn.Linear, norm: nn.LayerNorm, hidden: torch.Tensor, placed: list[PlacedMention]
    ) -> torch.Tensor:
        if not placed:
            return hidden.new_zeros((), dtype=torch.float32)
        logits = head(norm(hidden[places_of(placed)])).float()
        facts = torch.tensor([facts_of(item) for item in placed], device=logits.device)
        groups = zip(logits.split(list(CLASSES), -1), facts.T, strict=True)
        return sum(0.3 * F.cross_entropy(group, fact) for group, fact in groups)


@dataclass(frozen=True)
class Batch:
    """Scenes of one size with their views ``[images, views, 3, side, side]`` and questions."""

    scenes: list[highres.HighResScene]
    pixels: torch.Tensor
    asked: list[list[highres.Question]]


def phase_of_steps(text: str) -> list[str]:
    """``"strips:2,mixed:1"`` -> ``["strips", "strips", "mixed"]``; ValueError for anything else."""
    names = []
    for part in text.split(","):
        name, _, steps = part.partition(":")
        if name not in PHASES or not steps.isdigit():
            raise ValueError(f"phases: {part!r} should look like NAME:STEPS, with one of {', '.join(PHASES)}")
        names += [name] * int(steps)
    return names


def training_batch(step: int, phase: str, seed: int, tokens: int) -> Batch:
    """The scenes of a step, all of one size; as many as ``tokens`` vision tokens hold."""
    rng = np.random.default_rng((seed, step, 13))
    layout = str(rng.choice(PHASES[phase]))
    first = seed * 10_000_000 + step * 1000
    drawn: list[highres.HighResScene] = []
    for index in range(1000):
        scene = highres.generate(scenes.scene_seed("train", first + index), layout)
        if not drawn or scene.size == drawn[0].size:
            drawn.append(scene)
        if len(drawn) * (scene.rows * (scene.cols + 1) + highres.TILE_GRID**2) >= tokens:
            break
    processor = image_processor()
    views = [process_anyres_image(highres.draw(scene), processor, highres.PINPOINTS) for scene in drawn]
    count = 24 if layout == "2x2" else 16
    asked = [highres.ask(np.random.default_rng((s.seed, 3)), s, count, highres.TRAINING_MIX) for s in drawn]
    return Batch(drawn, torch.stack(views), asked)


def tune_tiles(
    begin: Path, output: Path, phases: str, *, lr: float = 1e-3, tokens: int = 1500, seed: int = 0, save_every: int = 50
) -> Path:
    """Train projector, newline and language model on high-resolution scenes, or go on where ``output`` stands.

    Parameters
    ----------
    begin : Path
        Exported folder of the embedded model.
    output : Path
        The stage's checkpoint.
    phases : str
        ``strips:500,mixed:100,squares:300``: what each number of steps draws from.
    tokens : int
        Vision tokens of a step, at least.
    """
    names = phase_of_steps(phases)
    torch.manual_seed(seed)
    tiled = TiledMini(MiniLlava.from_hugging_face(begin))
    grounding = HopGrounding(tiled.model.config)
    optimizer = MuonWithAdamW((tiled, grounding), lr, len(names), warmup=0.04)
    start = 0
    if output.exists():
        state = torch.load(output, map_location="cpu", weights_only=True)
        tiled.load_state_dict(state["tiled"])
        grounding.load_state_dict(state["grounding"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    packer, accuracy, blind = Packer(build_tokenizer()), language.RunningAccuracy(), language.RunningAccuracy()
    for step in tqdm(range(start, len(names)), initial=start, total=len(names), desc="tiles", mininterval=30):
        batch = training_batch(step, names[step], seed, tokens)
        only_overview = np.random.default_rng((seed, step, 17)).random() < OVERVIEW_ONLY
        grounding.alone = step < READ_OUTS_FIRST
        text = packer(batch.asked)
        grounding.look([] if only_overview else batch.scenes, len(text.prefix) + highres.TILE_GRID**2)
        with torch.autocast("cpu", torch.bfloat16):
            shown = tiled.vision_tokens(batch.pixels, batch.scenes[0].size, only_overview)
            loss, right = language.answer_loss(tiled.model, shown, text, grounding)
        loss.backward()
        optimizer.step(step)
        hits = language.question_hits(right, text, [[question.type for question in row] for row in batch.asked])
        (blind if only_overview else accuracy).update(hits)
        if (step + 1) % 10 == 0:
            log.info("tiles step %d %s loss %.3f %s", step + 1, names[step], loss.item(), accuracy)
        if (step + 1) % 50 == 0:
            log.info("overview alone: %s", blind)
        if (step + 1) % save_every == 0 or step + 1 == len(names):
            parts = {"tiled": tiled, "grounding": grounding, "optimizer": optimizer}
            state = {name: part.state_dict() for name, part in parts.items()}
            save_atomically(state | {"step": step + 1}, output)
    return output


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, train, write the folder; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = Parser("mini-tiles", description=__doc__)
    parser.add_argument("--init", type=Path, required=True, help="folder of the embedded model to begin with")
    parser.add_argument("--work", type=Path, required=True, help="folder for the stage's checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--phases", required=True, help=f"NAME:STEPS,... of {', '.join(PHASES)}")
    parser.add_argument("--tokens", type=int, default=1500, help="vision tokens of a step, at least")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    checkpoint = options.work / "tiles.pt"
    tune_tiles(options.init, checkpoint, options.phases, lr=options.lr, tokens=options.tokens, seed=options.seed)
    log.info("wrote %s", export_tiles(checkpoint, options.output, options.init))
    return 0


if __name__ == "__main__":
    sys.exit(main())
