"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch.

Its Python part registers kernels for two operators that its compiled part declares, which cannot be loaded without
CUDA's libraries. They are declared here instead, just before torchvision is imported; nobody here calls them.
`scripts/serve.sh` copies this file into its environment and has Python import it at start, where it is needed.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Declaring(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is looked for, once."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                self.library.define(schema)
            _KEPT.append(self.library)
        return None


_KEPT: list = []  # a library's declarations go when it does
sys.meta_path.insert(0, Declaring())
