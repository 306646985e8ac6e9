"""``python -m eval.significance``, as it was called before ``mustdrop significance``."""

import sys

from eval.report.significance import main

if __name__ == "__main__":
    sys.exit(main())
