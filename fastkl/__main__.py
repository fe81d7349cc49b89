"""Run the command line as `python -m fastkl`, which needs no installed script."""

import sys

from fastkl.cli import main

if __name__ == "__main__":
    sys.exit(main())
