"""Does hard routing save time and memory?

`python -m analysis.speed.kernels [options of bayes-router bench]`.

The benchmark that `bayes-router bench` runs, written to analysis/results.
"""

import sys
from pathlib import Path

from bayes_router.cli import main

RESULTS = Path(__file__).parents[1] / "results"

if __name__ == "__main__":
    sys.exit(main(["bench", "--out", str(RESULTS), *sys.argv[1:]]))
