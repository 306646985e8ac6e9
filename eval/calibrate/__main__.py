"""``mustdrop calibrate`` under its old name."""

import sys

from eval.calibrate.thresholds import main

if __name__ == "__main__":
    sys.exit(main())
