"""``python -m eval.bench_speed``, as it was called before ``mustdrop bench``."""

import sys

from eval.bench.speed import main

if __name__ == "__main__":
    sys.exit(main())
