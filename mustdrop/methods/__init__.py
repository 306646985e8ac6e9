"""Other methods over the same hooks, one file each."""

from mustdrop.methods.cdpruner import CDPruner
from mustdrop.methods.controls import AveragePool, Random, Uniform
from mustdrop.methods.dart import DART
from mustdrop.methods.divprune import DivPrune
from mustdrop.methods.evs import EVS
from mustdrop.methods.fastv import FastV
from mustdrop.methods.prumerge import PruMerge
from mustdrop.methods.pyramiddrop import PyramidDrop
from mustdrop.methods.smallimage import SmallImage
from mustdrop.methods.sparsevlm import SparseVLM
from mustdrop.methods.tome import ToMe
from mustdrop.methods.vidcom2 import VidCom2
from mustdrop.methods.visionzip import VisionZip
from mustdrop.methods.yopo import YOPO

__all__ = [
    "DART",
    "EVS",
    "YOPO",
    "AveragePool",
    "CDPruner",
    "DivPrune",
    "FastV",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "SmallImage",
    "SparseVLM",
    "ToMe",
    "Uniform",
    "VidCom2",
    "VisionZip",
]
