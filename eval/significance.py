"""``mustdrop significance`` under its old name."""

import sys

from eval.report.significance import main

if __name__ == "__main__":
    sys.exit(main())
