"""Benchmarks of the installed fastkl, each result checked against float64 before it is timed."""

import sys
from pathlib import Path

# `python -m` puts the current folder first on the path, but the fastkl in it lacks everything that
# an installation builds. Move the folder to the end, where this package itself is still found.
_root = str(Path(__file__).parents[1])
if _root in sys.path:
    sys.path.remove(_root)
    sys.path.append(_root)
