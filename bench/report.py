"""Bring the tables of README.md and bench/README.md up to date: `python -m bench.report`.

What stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` is replaced by what
`bench.NAME.markdown` makes of bench/results/NAME.json; NAME_gpu is NAME measured on a card, and
FOLDER/NAME what another machine's processor measured, in a folder of bench/results. With --check
nothing is written; the exit status is 1 if a page is stale. Needs Triton, for the tables of its kernels.
"""

import argparse
import importlib
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[1]
PAGES = (_ROOT / "README.md", _ROOT / "bench" / "README.md")
RESULTS = _ROOT / "bench" / "results"
_REGION = re.compile(r"(<!-- bench:([\w/]+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:([\w/]+) -->")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; rows of cells, a heading first, all but the first column right."""
    heading, *body = rows
    rule = [":--", *("--:" for _ in heading[1:])]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in (heading, rule, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def paragraph(text: str) -> str:
    """Return a text in lines of the pages' length, broken at spaces alone."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def render(name: str, results: Path = RESULTS) -> str:
    """Return the Markdown of one JSON of results, or that there is none."""
    path = results / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    document = json.loads(path.read_text())
    module = importlib.import_module(f"bench.{path.stem.removesuffix('_gpu')}")
    text: str = module.markdown(document)
    return text


def update(text: str, results: Path = RESULTS) -> str:
    """Return the text with all its regions made anew.

    Raises
    ------
    ValueError
        A marker has no partner.
    """
    names = [match[2] for match in _REGION.finditer(text)]
    markers = [match[1] for match in _MARKER.finditer(text)]
    if markers != [name for name in names for _ in range(2)]:
        raise ValueError(f"markers without a partner: found {markers}, regions {names}")
    return _REGION.sub(lambda m: f"{m[1]}\n{render(m[2], results)}\n\n{m[4]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    any_stale = False
    texts = [page.read_text(encoding="utf-8") for page in options.pages]
    try:
        # Before any page is written, so that an error leaves all of them as they were.
        pages = [update(text, options.results) for text in texts]
    except ModuleNotFoundError as error:
        print(f"nothing written: the tables need {error.name}, which is missing", file=sys.stderr)
        return 2
    for page, text, fresh in zip(options.pages, texts, pages, strict=True):
        if fresh == text:
            print(f"{page} is up to date")
        elif options.check:
            any_stale = True
            print(f"{page} is stale: run python -m bench.report", file=sys.stderr)
        else:
            page.write_text(fresh, encoding="utf-8")
            print(f"{page} rewritten")
    return int(any_stale)


if __name__ == "__main__":
    sys.exit(main())
