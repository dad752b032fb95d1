"""`python -m bayes_router` is the command `bayes-router`."""

import sys

from bayes_router.cli import main

if __name__ == "__main__":
    sys.exit(main())
