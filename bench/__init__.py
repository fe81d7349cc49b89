"""Benchmarks of the installed fastkl, each result checked against float64 before it is timed."""

import sys
from pathlib import Path

# `python -m` puts the current folder first on the path, where fastkl lacks everything that an
# installation builds. Last will do for this package itself.
_root = str(Path(__file__).parents[1])
if _root in sys.path:
    sys.path.remove(_root)
    sys.path.append(_root)
