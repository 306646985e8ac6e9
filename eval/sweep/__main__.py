"""``python -m eval.sweep``: see ``mustdrop sweep``."""

import sys

from eval.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
