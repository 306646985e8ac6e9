"""``mustdrop run`` under its old name."""

import sys

from eval.run.command import main

if __name__ == "__main__":
    sys.exit(main())
