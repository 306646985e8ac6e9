"""``python -m eval.table``, as it was called before ``mustdrop table``."""

import sys

from eval.report.table import main

if __name__ == "__main__":
    sys.exit(main())
