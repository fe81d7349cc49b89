"""Measure rows by their states, on any device: possible for all rows, and necessary for some."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl import state
from fastkl.rows import KNOWN, differences, masked, row_sums
from fastkl.state import RowState

# From this |d| on, a token's e^(-d) is the circuit's own exponential. Below it, e^(-d) - 1 + d may
# be small compared with its terms; beyond it, the reference's weight may have underflowed.
_FAR = 4.0


class Circuit(NamedTuple):
    """A block of circuit rows."""

    q: Tensor  # logits (R, V)
    e: Tensor  # e^(q - m_q) (R, V)
    m_q: Tensor  # max q (R, 1)
    z_q: Tensor  # Σ e (R,), float64


class Reference(NamedTuple):
    """A block of reference rows, and what all circuits use of it."""

    p: Tensor  # logits (R, V)
    w: Tensor  # e^(p - m_p) (R, V)
    m_p: Tensor  # max p (R, 1)
    z_p: Tensor  # Σ w (R,), float64
    absent: Tensor | None  # p = -inf (R, V); None if this is known to hold nowhere

    @classmethod
    def read(cls, p: Tensor, w: Tensor) -> "Reference":
        """Return the block of logits p, with its weights written to w."""
        m_p = p.amax(-1, keepdim=True)
        exponentials(p, m_p, out=w)
        return cls(p, w, m_p, row_sums(w)[:, 0], masked(p))


def on_cpu(t: Tensor) -> bool:
    """Return whether values can be read cheaply: for other devices, the host would wait."""
    return t.device.type == "cpu"


def exponentials(logits: Tensor, maximum: Tensor, *, out: Tensor) -> None:
    """Write e^(logits - maximum) to out, or 0 for a row of nothing but -inf."""
    torch.sub(logits, maximum.masked_fill(maximum == -torch.inf, 0.0), out=out).exp_()


def read_circuit(q: Tensor, e: Tensor) -> Circuit:
    """Return a block of circuit rows, with its exponentials written to e."""
    q = q.to(e.dtype)
    m_q = q.amax(-1, keepdim=True)
    exponentials(q, m_q, out=e)
    return Circuit(q, e, m_q, row_sums(e)[:, 0])


def finalize(cir: Circuit, ref: Reference) -> Tensor:
    """Return the divergences (R,) of whole rows.

    If the sides are so far apart that even float64 cannot hold the pivot (KNOWN), each side's
    maximum is subtracted from its logits first: next to such a pivot, the smaller side's logits
    would be rounded away.
    """
    apart = (ref.m_p.double() - cir.m_q.double()).abs()
    far = (apart >= KNOWN) & apart.isfinite()
    # On other devices than the CPU, this test would make the host wait.
    if not on_cpu(far) or far.any():
        m_p, m_q = (m.where(far, 0.0) for m in (ref.m_p, cir.m_q))
        ref = ref._replace(p=ref.p - m_p, m_p=ref.m_p - m_p)
        cir = cir._replace(q=cir.q - m_q, m_q=cir.m_q - m_q)
    return state.finalize(row_state(cir, ref))


def row_state(cir: Circuit, ref: Reference) -> RowState:
    """Return the state of each row, with the slice's own difference of log-sum-exps as pivot."""
    m_p, m_q, z_p, z_q = ref.m_p[:, 0].double(), cir.m_q[:, 0].double(), ref.z_p, cir.z_q
    c = (m_p - m_q) + torch.log(z_p / z_q)
    c = torch.where(c.isfinite(), c, 0.0)[:, None]
    d, c = differences(cir.q, ref.p, c)
    # If d has a NaN or an infinity, such as a masked token's, `largest` fails all comparisons.
    largest = max(map(abs, map(float, torch.aminmax(d)))) if on_cpu(d) else torch.inf
    infinite = torch.zeros_like(m_p, dtype=torch.bool)
    if not largest < torch.inf:
        if ref.absent is not None:
            # A token without reference mass counts as far; its weight is 0.
            d.masked_fill_(ref.absent, _FAR)
        infinite = (d == torch.inf).any(-1)
    t = d * ref.w
    s = torch.where(infinite, torch.inf, row_sums(t)[:, 0])
    if largest < state.NEAR:
        h = row_sums(_near_terms(t, d))[:, 0]
        g = torch.zeros_like(h)
    else:
        size = d.abs()
        known = size < _FAR
        terms = torch.where(known, torch.expm1(-d).add_(d).mul_(ref.w), t - ref.w)
        h = row_sums(torch.where(size < state.NEAR, _near_terms(t, d), terms))[:, 0]
        g = row_sums(torch.where(known, 0.0, cir.e))[:, 0]
    # At its own pivot, s / z_p is the divergence too: if it is small, the more accurate sum
    # replaces s.
    accurate = h + g * (z_p / z_q)
    s = torch.where(s < state.ACCURATE_BELOW * z_p, accurate, s)
    return RowState(m_p, z_p, m_q, z_q, s, h, g, c[:, 0])


def _near_terms(t: Tensor, d: Tensor) -> Tensor:
    """Return e^(p - m_p) φ(d) for |d| < NEAR, given t = e^(p - m_p) d."""
    return state.phi_over_square(d).mul_(d).mul_(t)
