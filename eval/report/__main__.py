"""``python -m eval.report``: see ``mustdrop report``."""

import sys

from eval.report.html import main

if __name__ == "__main__":
    sys.exit(main())
