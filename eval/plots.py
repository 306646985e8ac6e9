"""``python -m eval.plots``, as it was called before ``mustdrop plots``."""

import sys

from eval.report.plots import main

if __name__ == "__main__":
    sys.exit(main())
