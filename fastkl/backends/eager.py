"""KL divergence in plain PyTorch: any device, float64 too, no compiler needed.

Rows are taken in blocks that stay in the cache, so that each logit comes from memory once and the
dozen elementwise passes over a block do not leave the chip; the reference's exponentials are
computed once for all circuits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl import state
from fastkl.state import RowState

NAME = "eager"
# Elements a block: three float32 buffers of it and the logits themselves fit in a 4 MiB cache.
_BLOCK_ELEMENTS = 1 << 18


class _Reference(NamedTuple):
    """A block of reference rows and what all circuits share of it."""

    p: Tensor  # logits (R, V)
    a: Tensor  # p - m_p (R, V)
    w: Tensor  # e^a (R, V)
    m_p: Tensor  # max p (R, 1)
    z_p: Tensor  # Σ w (R, 1)


class _Circuit(NamedTuple):
    """A block of circuit rows."""

    q: Tensor  # logits (R, V)
    e: Tensor  # e^(q - m_q) (R, V)
    m_q: Tensor  # max q (R, 1)
    z_q: Tensor  # Σ e (R, 1)


def missing(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return None: PyTorch is always there, and computes on any device in any floating dtype."""
    del device, dtype
    return None


@torch.no_grad()
def kl_rows(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
    """Return KL(reference ‖ circuit) of every row, in nats.

    Parameters
    ----------
    circuits : sequence of K Tensors (R, V)
        Logits of the circuits.
    reference : Tensor (R, V)
        Logits of the full model.

    Returns
    -------
    Tensor (K, R)
        float64 if any input is, else float32.
    """
    dtype = _compute_dtype(circuits, reference)
    divergence = torch.empty(
        (len(circuits), reference.shape[0]), dtype=dtype, device=reference.device
    )
    for rows, ref, buffers in _blocks(reference, dtype):
        for k, circuit in enumerate(circuits):
            divergence[k, rows] = _block_kl(circuit[rows], ref, buffers)
    return divergence


@torch.no_grad()
def row_states(circuits: Sequence[Tensor], reference: Tensor) -> RowState:
    """Return the states of rows that are slices of a vocabulary, each field (K, R) in float64."""
    dtype = _compute_dtype(circuits, reference)
    shape = (len(circuits), reference.shape[0])
    result = RowState(
        *(
            torch.empty(shape, dtype=torch.float64, device=reference.device)
            for _ in RowState._fields
        )
    )
    for rows, ref, (b, e) in _blocks(reference, dtype):
        for k, circuit in enumerate(circuits):
            cir = _exponentials(circuit[rows], b, e)
            for field, value in zip(result, _state(cir, ref), strict=True):
                field[k, rows] = value
    return result


def _compute_dtype(circuits: Sequence[Tensor], reference: Tensor) -> torch.dtype:
    tensors = (reference, *circuits)
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _blocks(
    reference: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, _Reference, tuple[Tensor, Tensor]]]:
    """Yield blocks of rows with the reference's exponentials, and two buffers of their shape."""
    n_rows, n_cols = reference.shape
    size = max(1, min(n_rows, _BLOCK_ELEMENTS // n_cols))
    a, w, b, e = (torch.empty((size, n_cols), dtype=dtype, device=reference.device) for _ in "awbe")
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        n = rows.stop - rows.start
        p = reference[rows].to(dtype)
        m_p = p.amax(-1, keepdim=True)
        torch.sub(p, _finite_or_zero(m_p), out=a[:n])
        torch.exp(a[:n], out=w[:n])
        ref = _Reference(p, a[:n], w[:n], m_p, _row_sums(w[:n])[:, None])
        yield rows, ref, (b[:n], e[:n])


def _exponentials(q: Tensor, b: Tensor, e: Tensor) -> _Circuit:
    """Set b to q - m_q and e to its exponential."""
    q = q.to(b.dtype)
    m_q = q.amax(-1, keepdim=True)
    torch.sub(q, _finite_or_zero(m_q), out=b)
    torch.exp(b, out=e)
    return _Circuit(q, e, m_q, _row_sums(e)[:, None])


def _finite_or_zero(m: Tensor) -> Tensor:
    """Return the maximum to subtract: of a row of nothing but -inf, 0, so that its sum is 0."""
    return m.masked_fill(m == -torch.inf, 0.0)


def _block_kl(circuit: Tensor, ref: _Reference, buffers: tuple[Tensor, Tensor]) -> Tensor:
    b, e = buffers
    cir = _exponentials(circuit, b, e)
    if circuit.device.type != "cpu":
        # Picking rows by their values would wait for the device: all rows get the full treatment.
        return state.finalize(_state(cir, ref))
    # The plain formula at the pivot m_p - m_q: (p - m_p) - (q - m_q) is d, and x loses both maxima.
    torch.sub(ref.a, b, out=b).mul_(ref.w)
    s, z_p, z_q = _row_sums(b).double(), ref.z_p[:, 0].double(), cir.z_q[:, 0].double()
    divergence = s / z_p - torch.log(z_p / z_q)
    # Small ones, NaN and infinities, from whatever cause, are looked at again.
    again = ~((divergence >= state.ACCURATE_BELOW) & (divergence < torch.inf))
    if again.all():
        return state.finalize(_state(cir, ref))
    if again.any():
        picked = again.nonzero()[:, 0]
        subset = _state(_Circuit(*(t[picked] for t in cir)), _Reference(*(t[picked] for t in ref)))
        divergence[picked] = state.finalize(subset)
    return divergence


def _state(cir: _Circuit, ref: _Reference) -> RowState:
    """Return the state of each row, its pivot the slice's own difference of log-sum-exps."""
    m_p, z_p, m_q, z_q = (t[:, 0].double() for t in (ref.m_p, ref.z_p, cir.m_q, cir.z_q))
    c = (m_p - m_q) + torch.log(z_p / z_q)
    # The pivot is the number as it is subtracted, in the logits' own precision.
    c = torch.where(c.isfinite(), c, 0.0).to(ref.w.dtype)
    d = torch.sub(ref.p, cir.q).sub_(c[:, None])
    absent = ref.p == -torch.inf
    infinite = ((d == torch.inf) & ~absent).any(-1)
    # A token without reference mass is far, and its weight is 0.
    d.masked_fill_(absent, 1.0)
    size = d.abs()
    t = d * ref.w
    s = torch.where(infinite, torch.inf, _row_sums(t).double())
    if d.device.type == "cpu" and float(size.max()) < state.NEAR:
        h = _row_sums(_near_terms(t, d))
        g = torch.zeros_like(h)
    else:
        near = size < state.NEAR
        h = _row_sums(torch.where(near, _near_terms(t, d), t - ref.w))
        g = _row_sums(torch.where(near, 0.0, cir.e))
    h, g = h.double(), g.double()
    # At its own pivot s / z_p is the divergence too: where it is small, the better sum says it.
    accurate = h + g * (z_p / z_q)
    s = torch.where(s < state.ACCURATE_BELOW * z_p, accurate, s)
    return RowState(m_p, z_p, m_q, z_q, s, h, g, c.double())


def _near_terms(t: Tensor, d: Tensor) -> Tensor:
    """e^(p - m_p) φ(d) for |d| < NEAR, given t = e^(p - m_p) d."""
    return state.phi_over_square(d).mul_(d).mul_(t)


def _row_sums(x: Tensor) -> Tensor:
    """Σ over the last dimension, whose bits do not depend on how many rows there are.

    PyTorch splits the sum of a single long row over its threads: as one of two it is summed whole.
    """
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)
