"""``python -m eval.tasks mini``: make a synthetic task, or all, and print the folder for ``--include_path``."""

import argparse

from eval.tasks import GROUP, SUITE, prepare

parser = argparse.ArgumentParser(prog="python -m eval.tasks", description=__doc__)
parser.add_argument("task", choices=[GROUP, *SUITE])
print(prepare(parser.parse_args().task))
