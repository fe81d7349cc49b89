"""KL divergence in plain PyTorch: any device, float64 too, no compiler needed.

Rows are taken in blocks that stay in the cache, so that a logit comes from memory once, twice in rows
that are measured again, and the dozen elementwise passes over a block do not leave the chip; the
reference's exponentials are computed once for all circuits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl import gradient, jensen_shannon, state
from fastkl.backends.eager_blocks import Layout
from fastkl.backends.eager_formulas import (
    Reference,
    Workspace,
    exponentials,
    on_cpu,
    row_sums,
)
from fastkl.rows import KNOWN, compute_dtype, cool, differences
from fastkl.state import RowState

NAME = "eager"
N_KEPT = 0
# Elements a block where all rows get the full treatment.
_BLOCK_ELEMENTS = 1 << 19


class _Circuit(NamedTuple):
    """A block of circuit rows."""

    q: Tensor  # logits (R, V)
    e: Tensor  # e^(q - m_q) (R, V)
    m_q: Tensor  # max q (R, 1)
    z_q: Tensor  # Σ e (R,), float64


gradients = gradient.gradients
js_rows = jensen_shannon.js_rows
js_gradients = jensen_shannon.js_gradients


def missing(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return None: PyTorch is always there, and computes on any device in any floating dtype."""
    del device, dtype
    return None


@torch.no_grad()
def kl_rows(circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(reference ‖ circuit) of every row, in nats.

    Parameters
    ----------
    circuits : sequence of K Tensors (R, V)
        Logits of the circuits.
    reference : Tensor (R, V)
        Logits of the full model.
    temperature : float
        What all logits are divided by.

    Returns
    -------
    Tensor (K, R)
        float64 if any input is, else float32.
    """
    dtype = compute_dtype(reference, *circuits)
    divergence = torch.empty(
        (len(circuits), reference.shape[0]), dtype=dtype, device=reference.device
    )
    if on_cpu(reference) and dtype == torch.float32:
        _measure_blocks(circuits, reference, temperature, divergence)
        return divergence
    # Choosing by values would wait for the device: all rows get the full treatment.
    for rows, ref, e in _blocks(reference, dtype, temperature):
        for k, circuit in enumerate(circuits):
            cir = _read_circuit(cool(circuit[rows], dtype, temperature), e)
            divergence[k, rows] = _finalize(cir, ref)
    return divergence


@torch.no_grad()
def kl_rows_kept(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return what `kl_rows` does; nothing is kept for `gradients`."""
    divergence = kl_rows(circuits, reference, temperature)
    return divergence, divergence.new_empty((N_KEPT, *divergence.shape))


@torch.no_grad()
def row_states(circuits: Sequence[Tensor], reference: Tensor) -> RowState:
    """Return the states of rows that are slices of a vocabulary, each field (K, R) in float64."""
    dtype = compute_dtype(reference, *circuits)
    shape = (len(circuits), reference.shape[0])
    result = RowState(
        *(
            torch.empty(shape, dtype=torch.float64, device=reference.device)
            for _ in RowState._fields
        )
    )
    for rows, ref, e in _blocks(reference, dtype):
        for k, circuit in enumerate(circuits):
            cir = _read_circuit(circuit[rows], e)
            for field, value in zip(result, _state(cir, ref), strict=True):
                field[k, rows] = value
    return result


def _measure_blocks(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float, divergence: Tensor
) -> None:
    """Set the divergences (K, R) of rows on the CPU."""
    layout = Layout(*reference.shape)
    workspace = Workspace(layout)
    for rows in layout.slices(len(reference)):
        ref = workspace.read(cool(reference[rows], torch.float32, temperature))
        for start in range(0, len(circuits), workspace.n_circuits):
            some = circuits[start : start + workspace.n_circuits]

            def circuit(k: int, rows: slice = rows, some: Sequence[Tensor] = some) -> Tensor:
                return cool(some[k][rows], torch.float32, temperature)

            found, good = workspace.kl(circuit, len(some), ref)
            bad = good.logical_not()
            for k in bad.any(-1).nonzero()[:, 0].tolist():
                far = bad[k].nonzero()[:, 0]
                q = circuit(k)[far]
                found[k, far] = _finalize(_read_circuit(q, torch.empty_like(q)), ref.pick(far))
            divergence[start : start + len(some), rows] = found


def _blocks(
    reference: Tensor, dtype: torch.dtype, temperature: float = 1.0
) -> Iterator[tuple[slice, Reference, Tensor]]:
    """Yield blocks of rows with the reference's exponentials, and a buffer of their shape."""
    n_rows, n_cols = reference.shape
    size = max(1, min(n_rows, _BLOCK_ELEMENTS // n_cols))
    w, e = torch.empty((2, size, n_cols), dtype=dtype, device=reference.device)
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        n = rows.stop - rows.start
        yield rows, Reference.read(cool(reference[rows], dtype, temperature), w[:n]), e[:n]


def _read_circuit(q: Tensor, e: Tensor) -> _Circuit:
    """Return a block of circuit rows, its exponentials written to e."""
    q = q.to(e.dtype)
    m_q = q.amax(-1, keepdim=True)
    exponentials(q, m_q, out=e)
    return _Circuit(q, e, m_q, row_sums(e).double())


def _finalize(cir: _Circuit, ref: Reference) -> Tensor:
    """Return the divergences (R,) of whole rows.

    Where a pivot would not be known even to float64, both sides are counted from their maxima first:
    next to such a pivot no logit of the smaller side is left.
    """
    apart = (ref.m_p.double() - cir.m_q.double()).abs()
    far = (apart >= KNOWN) & apart.isfinite()
    # Asking another device than the CPU would wait for it.
    if not on_cpu(far) or far.any():
        m_p, m_q = (m.where(far, 0.0) for m in (ref.m_p, cir.m_q))
        ref = ref._replace(p=ref.p - m_p, m_p=ref.m_p - m_p)
        cir = cir._replace(q=cir.q - m_q, m_q=cir.m_q - m_q)
    return state.finalize(_state(cir, ref))


def _state(cir: _Circuit, ref: Reference) -> RowState:
    """Return the state of each row, its pivot the slice's own difference of log-sum-exps."""
    m_p, m_q, z_p, z_q = ref.m_p[:, 0].double(), cir.m_q[:, 0].double(), ref.z_p, cir.z_q
    c = (m_p - m_q) + torch.log(z_p / z_q)
    c = torch.where(c.isfinite(), c, 0.0)[:, None]
    d, c = differences(cir.q, ref.p, m_p[:, None], c)
    # NaN and infinities, a masked token's among them, are not below anything.
    largest = max(map(abs, map(float, torch.aminmax(d)))) if on_cpu(d) else torch.inf
    infinite = torch.zeros_like(m_p, dtype=torch.bool)
    if not largest < torch.inf:
        if ref.absent is not None:
            # A token without reference mass is far, and its weight is 0.
            d.masked_fill_(ref.absent, 1.0)
        infinite = (d == torch.inf).any(-1)
    t = d * ref.w
    s = torch.where(infinite, torch.inf, row_sums(t).double())
    if largest < state.NEAR:
        h = row_sums(_near_terms(t, d))
        g = torch.zeros_like(h)
    else:
        near = d.abs() < state.NEAR
        h = row_sums(torch.where(near, _near_terms(t, d), t - ref.w))
        g = row_sums(torch.where(near, 0.0, cir.e))
    h, g = h.double(), g.double()
    # At its own pivot s / z_p is the divergence too: where it is small, the better sum says it.
    accurate = h + g * (z_p / z_q)
    s = torch.where(s < state.ACCURATE_BELOW * z_p, accurate, s)
    return RowState(m_p, z_p, m_q, z_q, s, h, g, c[:, 0])


def _near_terms(t: Tensor, d: Tensor) -> Tensor:
    """e^(p - m_p) φ(d) for |d| < NEAR, given t = e^(p - m_p) d."""
    return state.phi_over_square(d).mul_(d).mul_(t)
