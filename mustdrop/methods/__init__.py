"""Other methods over the same hooks, one file each."""

from mustdrop.methods.cdpruner import CDPruner
from mustdrop.methods.controls import AveragePool, Random, Uniform
from mustdrop.methods.dart import DART
from mustdrop.methods.divprune import DivPrune
from mustdrop.methods.evs import EVS
from mustdrop.methods.fastv import FastV
from mustdrop.methods.hiprune import HiPrune
from mustdrop.methods.holov import HoloV
from mustdrop.methods.mmr import MMR
from mustdrop.methods.prumerge import PruMerge
from mustdrop.methods.pyramiddrop import PyramidDrop
from mustdrop.methods.scope import SCOPE
from mustdrop.methods.smallimage import SmallImage
from mustdrop.methods.sparsevlm import SparseVLM
from mustdrop.methods.tome import ToMe
from mustdrop.methods.tops import TOPS
from mustdrop.methods.trevs import TReVS
from mustdrop.methods.vidcom2 import VidCom2
from mustdrop.methods.visionzip import VisionZip
from mustdrop.methods.vispruner import VisPruner
from mustdrop.methods.vscan import VScan
from mustdrop.methods.yopo import YOPO

__all__ = [
    "DART",
    "EVS",
    "MMR",
    "SCOPE",
    "TOPS",
    "YOPO",
    "AveragePool",
    "CDPruner",
    "DivPrune",
    "FastV",
    "HiPrune",
    "HoloV",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "SmallImage",
    "SparseVLM",
    "TReVS",
    "ToMe",
    "Uniform",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
]
