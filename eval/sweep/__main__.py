"""``mustdrop sweep`` under its old name."""

import sys

from eval.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
