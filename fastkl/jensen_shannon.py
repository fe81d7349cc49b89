r"""The generalized Jensen-Shannon divergence and its gradients, in plain PyTorch.

With β the weight of P, u = 1 - β and the mixture M = βP + uQ::

    JS = β KL(P ‖ M) + u KL(Q ‖ M)

Its terms have both signs and cancel where P and Q are close. With w = Q/P - 1 and z = P/Q - 1, the
first-order parts, βuPw + βuQz, sum to 0 for each token. Without them, no term is negative, and each
is of second order, like the divergence itself::

    near    β P r(u w) + u Q r(β z)       r(x) = x - log(1 + x)
    far     for a token likelier in P: -P ((β + u e) log(β + u e) + u e |d|)    e = Q/P = e^(-|d|)
            for a token likelier in Q: the same with P and Q, and β and u, exchanged
    light   the far form for a likelier side of little weight, where terms of order 1 would cancel:
            P (β |d| - e (1 + s) log(1 + s))     s = β (e^|d| - 1) < 1

Each gradient is that of a softmax in which a token's mass is worth log Q/M or log P/M::

    dJS/dq = u Q (log Q/M - Σ Q log Q/M)        dJS/dp = β P (log P/M - Σ P log P/M)

Any constant in a row's log Q/M or log P/M cancels. So does, where P and Q are close, an error
common to all d = log P/Q of the row.

References
----------
.. [1] J. Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on Information
   Theory 37 (1991).
.. [2] R. Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649 (2023).
"""

import math

import torch
from torch import Tensor

from fastkl.rows import Rows, blocks, compute_dtype, log_ratios, read, row_sums

# Up to this |d| the near form is used; beyond it, cancellation costs the far form about one digit.
_NEAR = 0.25
# Smaller weights are replaced by this one, whose inverse float32 can still hold.
_LEAST = 1e-30
# From this x on log(1 + e^x) is x, even in float64, while e^x is still finite in float32.
_EXACT_BEYOND = 40


@torch.no_grad()
def js_rows(circuit: Tensor, reference: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the divergence (R,) of rows (R, V), in nats: float64 if a side is, else float32."""
    beta, dtype = max(beta, _LEAST), compute_dtype(circuit, reference)
    result = torch.empty(circuit.shape[:1], dtype=dtype, device=circuit.device)
    for rows in blocks(reference):
        ref, cir = (read(t[rows], dtype, temperature) for t in (reference, circuit))
        d = _log_ratio(cir, ref, temperature)
        p, q = _masses(ref), _masses(cir)
        inner = d.clamp(-_NEAR, _NEAR)
        near = beta * p * _excess((1 - beta) * torch.expm1(-inner))
        near += (1 - beta) * q * _excess(beta * torch.expm1(inner))
        total = row_sums(torch.where(d.abs() < _NEAR, near, _far(d, p, q, beta)))[:, 0]
        defined = (ref.defined & cir.defined)[:, 0]
        # Rounding may make tiny terms negative.
        result[rows] = torch.where(defined, total.clamp(min=0.0), torch.nan)
    return result


@torch.no_grad()
def js_gradients(
    grad: Tensor,
    circuit: Tensor,
    reference: Tensor,
    beta: float,
    temperature: float,
    wanted: bool,
    reference_wanted: bool,
) -> list[Tensor]:
    """Return the wanted gradients of Σ grad · JS, the circuit's first, each like its logits.

    A logit of -inf has gradient 0; a row without a divergence has gradient NaN; a row whose grad
    (R,) is 0 has gradient 0.
    """
    beta, dtype = max(beta, _LEAST), compute_dtype(circuit, reference)
    wants = (wanted, reference_wanted)
    sides = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else None
        for t, want in zip((circuit, reference), wants, strict=True)
    ]
    for rows in blocks(reference):
        ref, cir = (read(t[rows], dtype, temperature) for t in (reference, circuit))
        d = _log_ratio(cir, ref, temperature)
        scale = torch.where(ref.defined & cir.defined, grad[rows, None].double(), torch.nan)
        scale = scale / temperature
        for out, side, sign, weight, other in (
            (sides[0], cir, -1, 1 - beta, beta),
            (sides[1], ref, 1, beta, 1 - beta),
        ):
            if out is None:
                continue
            mass = _masses(side)
            top = mass.argmax(-1, keepdim=True)
            worth = torch.where(mass == 0, 0.0, _worths(sign * d, weight, other, top))
            # If one token has nearly all mass, the mean is its worth but for the last few digits.
            worth -= worth.gather(-1, top)
            worth -= row_sums(mass * worth).to(dtype)
            t = worth.mul_(mass).mul_((scale * weight).to(dtype))
            t = torch.where(mass == 0, torch.where(scale.isnan(), torch.nan, 0.0).to(dtype), t)
            out[rows] = t.masked_fill_(grad[rows, None] == 0, 0.0).to(out.dtype)
    return [side for side in sides if side is not None]


def _log_ratio(cir: Rows, ref: Rows, temperature: float) -> Tensor:
    """Return d = log P/Q, or 0 where both sides mask the token."""
    d, _ = log_ratios(cir, ref, temperature)
    return d.masked_fill_((ref.logits == -torch.inf) & (cir.logits == -torch.inf), 0.0)


def _masses(side: Rows) -> Tensor:
    return side.weights / side.z.to(side.weights.dtype)


def _far(d: Tensor, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Return the tokens' terms in the far or light form, given masses p and q and d = log p/q."""
    size, likelier = d.abs(), d > 0
    # The weights of the side where the token is likelier, and of the other side.
    of_p, of_q = d.new_full((), beta), d.new_full((), 1 - beta)
    own, other = torch.where(likelier, of_p, of_q), torch.where(likelier, of_q, of_p)
    e = torch.exp(-size)
    mixture = own + other * e
    # Near 1, the logarithm is computed from the mixture's distance from 1.
    log_mixture = torch.log1p(other * torch.expm1(-size))
    log_mixture = torch.where(mixture < 0.5, torch.log(mixture), log_mixture)
    # A token without mass on the other side adds 0, not 0 · inf.
    shift = torch.where(e == 0, 0.0, other * e * size)
    rise = own * torch.expm1(size)
    light = own * size - mixture * torch.log1p(rise)
    far = torch.where((own < 0.5) & (rise < 1), light, -(mixture * log_mixture + shift))
    return far.mul_(torch.where(likelier, p, q))


def _excess(x: Tensor) -> Tensor:
    """Return x - log(1 + x) without cancellation, for -0.25 < x < 0.3.

    It is computed from the series of atanh(x / (2 + x)).
    """
    y = x / (2 + x)
    square = y * y
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11))))
    return y * (x - 2 * square * series)


def _worths(d: Tensor, weight: float, other: float, top: Tensor) -> Tensor:
    """Return log A/M for d = log A/B and M = weight · A + other · B, less a constant of each row.

    A token with nearly all its mass in A is worth about -log(weight). If a row's likeliest token,
    `top` (R, 1), is such a token, only the worths' differences from -log(weight) matter, so
    -log(weight) is subtracted from all of them. In other rows the constant is 0. The constant
    cancels in the gradient.
    """
    limit = math.log(other) - math.log(weight)
    from_zero = d.gather(-1, top) <= max(limit, 1.0)
    worths = _log_of_mixture(d, weight, other)
    # On other devices than the CPU, this test would make the host wait.
    if d.device.type == "cpu" and from_zero.all():
        return worths
    counted = torch.nn.functional.softplus(limit - d, threshold=_EXACT_BEYOND).neg_()
    return torch.where(from_zero, worths, counted)


def _log_of_mixture(d: Tensor, weight: float, other: float) -> Tensor:
    """Return log A/M for d = log A/B and M = weight · A + other · B."""
    # Where M/A is between 1/2 and 2, the logarithm is computed from the distance of M/A from 1.
    rise = other * torch.expm1(-d)
    e = torch.exp(-d.abs())
    far = d.clamp(max=0.0) - torch.log(torch.where(d > 0, weight + other * e, other + weight * e))
    return torch.where((rise - 0.25).abs() < 0.75, -torch.log1p(rise), far)
