"""``mustdrop plots`` under its old name."""

import sys

from eval.report.plots import main

if __name__ == "__main__":
    sys.exit(main())
