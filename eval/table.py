"""``mustdrop table`` under its old name."""

import sys

from eval.report.table import main

if __name__ == "__main__":
    sys.exit(main())
