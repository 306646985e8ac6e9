"""``mustdrop tasks mini``: make a synthetic task, or the suite, and print the folder for ``--include_path``."""

import sys

from eval.tasks import GROUP, LOCAL, prepare
from mustdrop.command import Parser, command


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    new = Parser("tasks", description=__doc__)
    new.add_argument("task", choices=[GROUP, *LOCAL])
    print(prepare(new.parse_args(argv).task))
    return 0


if __name__ == "__main__":
    sys.exit(main())
