"""`python -m dilax`: the command line."""

import sys

from dilax.cli import main

if __name__ == "__main__":
    sys.exit(main())
