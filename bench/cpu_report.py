"""Show cpu.json as Markdown tables and as a picture."""

from pathlib import Path
from typing import Any

from bench import facts
from bench.report import paragraph, table
from bench.worker import KEEP_FREED_MEMORY

_READ = "one read"
_KEPT = "freed memory kept"


def markdown(document: dict[str, Any]) -> str:
    """Return the tables: all peers on the main case, then the times on every case."""
    parts = [_main_table(document), _grid_table(document), _caption(document)]
    return "\n\n".join(parts)


def _main_table(document: dict[str, Any]) -> str:
    main, baseline = document["cases"][0], document["baseline"]
    # The second measurement, if there is one, adds a second column of times.
    kept = main.get("freed_memory_kept")
    sizes = f"K={main['n_circuits']}, R={main['n_rows']}, V={main['n_vocabulary']}"
    of = f"{sizes}, {main['dtype']}, {main['divergences']}"
    heading = [of, "ms", *([f"ms, {_KEPT}"] if kept else []), "GB/s", "time / one read"]
    heading += [f"speedup over {baseline}", *([f"speedup, {_KEPT}"] if kept else [])]
    heading += ["memory, MiB", "error, nats", "error, relative"]
    read = main["read"]
    rows = [heading, [_READ, _ms(read["ms"]), *([_ms(kept["read"]["ms"])] if kept else [])]]
    rows[-1] += [f"{read['gb_s']:.1f}", "1.0"]
    for name in document["peers"]:
        entry = main["peers"][name]
        if "ms" not in entry:
            rows.append([name, _outcome(entry)])
            continue
        again = kept and kept["peers"][name]
        rows.append([name, _ms(entry["ms"]), *([_time(again)] if again else [])])
        rows[-1] += [f"{entry['gb_s']:.1f}", f"{entry['times_read']:.1f}"]
        rows[-1] += [_number(e.get("times_faster"), ".1f") for e in (entry, again) if e]
        rows[-1] += [
            "failed" if "peak_failed" in entry else _mebibytes(entry.get("peak_bytes")),
            f"{entry['error_nats']:.1e}",
            f"{entry['error_relative']:.1e}",
        ]
    return table([row + [""] * (len(heading) - len(row)) for row in rows])


def _grid_table(document: dict[str, Any]) -> str:
    names = [name for name in document["peers"] if any(_timed(c, name) for c in document["cases"])]
    rows = [["K, R, V, dtype, divergences", f"{_READ}, ms", *(f"{name}, ms" for name in names)]]
    for case in document["cases"]:
        cells = [_sizes(case), _ms(case["read"]["ms"])]
        for name in names:
            cells.append(_time(case["peers"][name]))
        rows.append(cells)
    return table(rows)


def _caption(document: dict[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    levels = machine["instruction_set"]
    memory = document["memory_missing"] or (
        "the most by which the resident size grows during a call, in a process of its own"
    )
    first, last = document["load_average"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"{levels['torch']} (native: {levels['fastkl native'] or 'not built'}); "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        f"`{document['command']}`, {document['date'][:10]}, commit "
        f"{facts.short_commit(document)}, seed {document['seed']}, load average "
        f"{first} at the start, {last} at the end.",
        "Every function runs in a process of its own; they take turns, each after a pause and some "
        "calls that wake the cores and do not count. On the "
        f"first case each runs in {document['n_processes']} processes, one after the other. Times are "
        "medians; ratios are medians of the ratios within each round. "
        "One read: the fastest way found to read the circuits' logits once; its GB/s counts those. "
        "GB/s otherwise counts every logit once, the reference's too. "
        f"{_settings(document)}Memory beyond the inputs: {memory}. "
        "Errors: the largest of any circuit's mean KL against float64.",
    ]
    return "\n".join(map(paragraph, lines))


def _settings(document: dict[str, Any]) -> str:
    if "freed_memory_kept" not in document["cases"][0]:
        return ""
    variables = " ".join(f"{name}={value}" for name, value in KEEP_FREED_MEMORY.items())
    return f'malloc has its default settings; "{_KEPT}": `{variables}`. '


def _timed(case: dict[str, Any], name: str) -> bool:
    return "ms" in case["peers"][name]


def _time(entry: dict[str, Any]) -> str:
    return _ms(entry["ms"]) if "ms" in entry else _outcome(entry)


def _outcome(entry: dict[str, Any]) -> str:
    bad = [outcome for outcome in ("wrong", "failed") if outcome in entry]
    return bad[0] if bad else entry["skipped"]


def _sizes(case: dict[str, Any]) -> str:
    sizes = (case["n_circuits"], case["n_rows"], case["n_vocabulary"], case["dtype"])
    return ", ".join((*map(str, sizes), case["divergences"]))


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _mebibytes(value: int | None) -> str:
    return _number(None if value is None else value / 2**20, ".1f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw the peers on the main case, and how their times grow with K, R and V."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    main = document["cases"][0]
    names = [name for name in document["peers"] if _timed(main, name)]
    colors = {name: f"C{i}" for i, name in enumerate(names)}

    bars = axes[0, 0]
    times = {_READ: main["read"]} | {name: main["peers"][name] for name in names}
    for name, entry in times.items():
        low, high = entry["quartiles_ms"]
        spread = [[entry["ms"] - low], [high - entry["ms"]]]
        bars.barh(name, entry["ms"], xerr=spread, color=colors.get(name, "0.6"))
        bars.annotate(f" {_ms(entry['ms'])}", (high, name), va="center")
    kept = main.get("freed_memory_kept", {"peers": {}})["peers"]
    marks = [(kept[name]["ms"], name) for name in names if "ms" in kept.get(name, {})]
    if marks:
        bars.plot(*zip(*marks, strict=True), "k|", ms=14, label=_KEPT)
        bars.legend()
    bars.invert_yaxis()
    bars.set_xscale("log")
    bars.margins(x=0.15)
    bars.set_xlabel("ms, median and quartiles")
    bars.set_title(_sizes(main))

    growing = zip(
        axes.flat[1:],
        ("n_circuits", "n_rows", "n_vocabulary"),
        ("circuits K", "rows R", "vocabulary V"),
        strict=True,
    )
    for panel, field, label in growing:
        cases = _along(document["cases"], field)
        for name in names:
            points = [(c[field], c["peers"][name]["ms"]) for c in cases if _timed(c, name)]
            panel.plot(*zip(*points, strict=True), "o-", color=colors[name], ms=4)
            if len(points) == 1:
                continue
            # The main case's time, scaled in proportion to the size.
            ends = [points[0][0], points[-1][0]]
            proportional = [main["peers"][name]["ms"] * end / main[field] for end in ends]
            panel.plot(ends, proportional, ":", color=colors[name], lw=1)
        panel.plot(
            [c[field] for c in cases], [c["read"]["ms"] for c in cases], "s-", color="0.6", ms=4
        )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks([c[field] for c in cases], [str(c[field]) for c in cases], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(f"{label}; dotted: in proportion to it; gray: one read")
        panel.set_ylabel("ms")
        panel.grid(alpha=0.3)
    machine = document["machine"]
    title = (machine["processor"], f"{machine['threads']} threads", document["date"][:10])
    figure.suptitle(", ".join(title))
    figure.savefig(path)


def _along(cases: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """Return the cases that differ from the first one in at most one size, sorted by that size."""
    fields = ("n_circuits", "n_rows", "n_vocabulary", "dtype", "divergences")
    others = [name for name in fields if name != field]
    main = cases[0]
    same = [case for case in cases if all(case[name] == main[name] for name in others)]
    return sorted(same, key=lambda case: case[field])
