"""`python -m fastkl`, the command where no script of that name was installed."""

import sys

from fastkl.cli import main

if __name__ == "__main__":
    sys.exit(main())
