"""The gradients of KL(P ‖ Q) with respect to both logits, in plain PyTorch.

With p the reference's logits, q the circuit's and d = log(P / Q) = p - q - (lse_p - lse_q)::

    dKL/dq = Q - P = P (e^(-d) - 1)        dKL/dp = P (d - KL)

Small gradients are as accurate, relative to their size, as the divergence. Where P and Q are close,
Q - P is not computed as a difference of two rounded softmaxes but as P expm1(-d). This needs a
small relative error of d, whereas two rounded log-sum-exps are each off by 1e-7, however small d
is. So all sums use a rounded pivot c near lse_p - lse_q, and the pivot's error x follows from
Σ Q = 1::

    d' = p - q - c       t = e^(p - m_p) expm1(-d')       x = lse_p - lse_q - c = -log1p(Σ t / z_p)

Relative to Σ |t|, x is as accurate as any sum. The reference's gradient does not need x, which
cancels in d - KL = d' - Σ P d'. What remains is the rounding error of p - q. It is 0 where p and q
are within a factor of two of each other; where the sides lie far apart, it is added back.

References
----------
.. [1] G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network",
   arXiv:1503.02531 (2015).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkl.rows import Rows, blocks, compute_dtype, log_ratios, masked, read, row_sums

# From this |d| on, Q - P is a plain difference: the larger is then more than twice the smaller.
EXPM1_BELOW = 1.0


@torch.no_grad()
def gradients(
    grad: Tensor,
    circuits: Sequence[Tensor],
    reference: Tensor,
    wanted: Sequence[bool],
    reference_wanted: bool,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the gradients of Σ grad · KL with respect to the logits.

    Parameters
    ----------
    grad : Tensor (K, R)
        The gradient of some loss with respect to each divergence, with any strides.
    circuits : sequence of K Tensors (R, V)
        Logits of the circuits.
    reference : Tensor (R, V)
        Logits of the full model.
    wanted : sequence of K bools
        Which circuits' gradients are wanted.
    reference_wanted : bool
        Whether the reference's gradient is wanted.
    temperature : float
        The divisor of all logits. The gradients are with respect to the logits before the division.
    kept : Tensor (K, R, N_KEPT), optional
        What the same backend's `kl_rows_kept` kept of these rows; unused here.

    Returns
    -------
    list of K Tensors (R, V) or None, and Tensor (R, V) or None
        The wanted gradients, each in its logits' dtype, computed in float64 if any logits are
        float64, else in float32. The gradient of a logit of -inf is 0; that of a token that only
        the reference masks is Q. A row with KL = NaN has gradient NaN. A row with KL = inf has
        Q - P for the circuit, and NaN for the reference, wherever both logits are finite. A row
        whose `grad` is 0 has gradient 0, whatever its logits.
    """
    del kept
    dtype = compute_dtype(reference, *circuits)
    if temperature != 1:
        grad = grad / temperature
    dqs = [
        torch.empty(circuit.shape, dtype=circuit.dtype, device=circuit.device) if want else None
        for circuit, want in zip(circuits, wanted, strict=True)
    ]
    dp = None
    if reference_wanted:
        dp = torch.empty(reference.shape, dtype=reference.dtype, device=reference.device)
    for rows in blocks(reference):
        ref = read(reference[rows], dtype, temperature)
        total = torch.zeros_like(ref.weights) if reference_wanted else None
        for k, (circuit, dq) in enumerate(zip(circuits, dqs, strict=True)):
            if dq is None and total is None:
                continue
            _block(
                grad[k, rows, None],
                read(circuit[rows], dtype, temperature),
                ref,
                None if dq is None else dq[rows],
                total,
                temperature,
            )
        if dp is not None and total is not None:
            dp[rows] = total
    return dqs, dp


def _block(
    grad: Tensor,
    cir: Rows,
    ref: Rows,
    dq: Tensor | None,
    total: Tensor | None,
    temperature: float,
) -> None:
    """Set dq to a block of the circuit's gradient; add this circuit's part of dKL/dp to total."""
    dtype = ref.weights.dtype
    d, c = log_ratios(cir, ref, temperature)
    masked_p, masked_q = (masked(row.logits) for row in (ref, cir))

    # If either side has no distribution, the whole row is NaN.
    scale = torch.where(ref.defined & cir.defined, grad.double(), torch.nan) / ref.z
    scale = torch.where(grad == 0, 0.0, scale)

    if total is not None:
        # If one token has nearly all mass, its d - KL lies in the last few digits of d. So d is
        # measured from the likeliest token's d. Tokens that the reference masks add nothing,
        # whatever their logit in the circuit.
        t = d - d.gather(-1, ref.weights.argmax(-1, keepdim=True))
        if masked_p is not None:
            t.masked_fill_(masked_p, 0.0)
        t *= ref.weights
        mean = row_sums(t) / ref.z
        mean = torch.where(mean.isfinite(), mean, torch.nan)
        t = t.mul_(scale.to(dtype)).addcmul_(ref.weights, (-scale * mean).to(dtype))
        _clear_masked(t, grad, scale, masked_p, masked_q)
        total += t
        del t

    if dq is not None:
        near = d.abs() < EXPM1_BELOW
        t = d.neg_().expm1_().mul_(ref.weights)
        # The same difference in the scale of e^(q - m_q), which cannot overflow.
        ratio = torch.exp((cir.m - ref.m) / temperature + c).to(dtype)
        far = cir.weights.mul_(ratio).sub_(ref.weights)
        t = torch.where(near, t, far, out=t)
        x = -torch.log1p(row_sums(t) / ref.z)
        # With the right pivot the weights e^(-d) are e^x times as large.
        t.mul_((scale * torch.exp(x)).to(dtype))
        t.addcmul_(ref.weights, (scale * torch.expm1(x)).to(dtype))
        _clear_masked(t, grad, scale, masked_q)
        dq.copy_(t)


def _clear_masked(t: Tensor, grad: Tensor, scale: Tensor, *masks: Tensor | None) -> None:
    """Set t to 0 at masked logits (NaN in NaN rows), and in rows with no incoming gradient."""
    for mask in masks:
        if mask is not None:
            torch.where(mask, torch.where(scale.isnan(), torch.nan, 0.0).to(t.dtype), t, out=t)
    unasked = grad == 0
    if t.device.type != "cpu" or unasked.any():
        t.masked_fill_(unasked, 0.0)
