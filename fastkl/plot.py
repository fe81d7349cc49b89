"""A plot of circuits' KL divergence against their size."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

_KL_COLOR = "tab:blue"
_AGREEMENT_COLOR = "tab:orange"


def kl_curve(
    sizes: Sequence[int],
    kl: Sequence[float],
    agreement: Sequence[float],
    *,
    added: Sequence[str],
    title: str,
) -> Figure:
    """Draw KL (log axis) and top-1 agreement against circuit size.

    A log axis cannot show an exact 0. It is drawn in a linear strip below the lowest decade, with a
    tick of its own and a hollow marker.

    Parameters
    ----------
    sizes : sequence of int
        Number of parts in each circuit, ascending.
    kl : sequence of float
        KL(full model ‖ circuit) of each circuit, in nats, not negative.
    agreement : sequence of float
        Share of each circuit's predictions whose most probable token is the full model's.
    added : sequence of str
        Name of the part that each circuit adds to the previous one; one element less than `sizes`.
    title : str
        The picture's title.

    Returns
    -------
    Figure
        Ready for `savefig`; it belongs to no window and no pyplot state.
    """
    # No pyplot: a library should leave the user's figures and backend alone.
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    _scale(top, kl)
    top.plot(sizes, kl, color=_KL_COLOR)
    for zero, face in ((False, _KL_COLOR), (True, "white")):
        chosen = [point for point in zip(sizes, kl, strict=True) if (point[1] == 0) == zero]
        x, y = zip(*chosen, strict=True) if chosen else ((), ())
        # Do not clip: half of a marker at 0 lies outside the axes.
        top.plot(x, y, "o", color=_KL_COLOR, markerfacecolor=face, clip_on=False, zorder=3)
        if zero and chosen:
            # Put the label to the left of the line, which falls steeply.
            top.annotate(
                "exactly 0",
                (x[-1], 0),
                (-50, 8),
                textcoords="offset points",
                ha="right",
                arrowprops={"arrowstyle": "->", "color": "0.4", "shrinkB": 6},
            )
    top.set_ylabel("KL(full model ‖ circuit), nats")
    top.set_title(title)
    top.grid(alpha=0.3)

    bottom.plot(sizes, agreement, "s-", color=_AGREEMENT_COLOR, markersize=4)
    bottom.set_ylim(-0.05, 1.05)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bottom.set_ylabel("top-1 agreement")
    names = ("", *(f"+{name}" for name in added))
    bottom.set_xticks(sizes, [f"{size}\n{name}" for size, name in zip(sizes, names, strict=True)])
    bottom.set_xlabel("heads in the circuit, all others ablated; below: the head added last")
    bottom.grid(alpha=0.3)
    return figure


def _scale(axes: Axes, kl: Sequence[float]) -> None:
    """Set a log axis, with a linear strip for 0 below the lowest decade if there is a 0."""
    positive = [value for value in kl if value > 0]
    if not positive:
        return
    if len(positive) == len(kl):
        axes.set_yscale("log")
        return
    top = 1.6 * max(positive)
    lowest, highest = (math.floor(math.log10(value)) for value in (min(positive), top))
    axes.set_yscale("symlog", linthresh=10.0**lowest, linscale=0.5)
    axes.set_yticks([0, *(10.0**decade for decade in range(lowest, highest + 1))])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_ylim(bottom=0, top=top)
    axes.axhspan(0, 10.0**lowest, color="0.94", zorder=0)
