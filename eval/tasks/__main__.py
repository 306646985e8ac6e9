"""``python -m eval.tasks mini_gqa``: make a synthetic task and print the folder for ``lmms-eval --include_path``."""

import argparse

from eval.tasks import ROOT, is_local, prepare

parser = argparse.ArgumentParser(prog="python -m eval.tasks", description=__doc__)
parser.add_argument("task", choices=sorted(path.name for path in ROOT.iterdir() if is_local(path.name)))
print(prepare(parser.parse_args().task))
