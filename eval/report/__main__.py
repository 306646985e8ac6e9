"""``mustdrop report`` under its old name."""

import sys

from eval.report.html import main

if __name__ == "__main__":
    sys.exit(main())
