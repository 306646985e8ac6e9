"""``mustdrop bench`` under its old name."""

import sys

from eval.bench.speed import main

if __name__ == "__main__":
    sys.exit(main())
