r"""The generalized Jensen-Shannon divergence and its gradients, in plain PyTorch.

With β the weight of P, u = 1 - β and the mixture M = βP + uQ::

    JS = β KL(P ‖ M) + u KL(Q ‖ M)

Its terms are of both signs and cancel where P and Q are close. With w = Q/P - 1 and z = P/Q - 1 the
parts of first order, βuPw + βuQz, are 0 token by token; without them no term is negative, and each is of
second order like the divergence itself::

    near    β P r(u w) + u Q r(β z)       r(x) = x - log(1 + x)
    far     where a token is likelier in P: -P ((β + u e) log(β + u e) + u e |d|)    e = Q/P = e^(-|d|)
            where in Q: the same with P and Q, and β and u, the other way round
    light   the far form of a likelier side of little weight, whose terms of order 1 would cancel:
            P (β |d| - e (1 + s) log(1 + s))     s = β (e^|d| - 1) < 1

A gradient is that of a softmax, given what each token's mass is worth, log Q/M or log P/M::

    dJS/dq = u Q (log Q/M - Σ Q log Q/M)        dJS/dp = β P (log P/M - Σ P log P/M)

An error that all d = log P/Q have in common cancels, and so does any constant in a row's log Q/M or log
P/M.

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

# |d| up to which the near form is used; from there on cancellation costs the far form about one digit.
_NEAR = 0.25
# Smaller weights count as this one, whose inverse float32 can still hold.
_LEAST = 1e-30
# From this x on log(1 + e^x) is x, even in float64, while e^x is still finite in float32.
_EXACT_BEYOND = 40


@torch.no_grad()
def js_rows(circuit: Tensor, reference: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the divergence (R,) of rows (R, V), in nats: float64 if any logits are, else float32."""
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
        # Terms that are next to nothing may be rounded to less.
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
    """Return the gradients of Σ grad · JS that are wanted, the circuit's first, each like its logits.

    A logit of -inf has gradient 0; a row without a divergence is NaN; a row whose grad (R,) is 0 is 0.
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
            # Where one token has nearly all mass the mean is its worth, to the last few digits.
            worth -= worth.gather(-1, top)
            worth -= row_sums(mass * worth).to(dtype)
            t = worth.mul_(mass).mul_((scale * weight).to(dtype))
            t = torch.where(mass == 0, torch.where(scale.isnan(), torch.nan, 0.0).to(dtype), t)
            out[rows] = t.masked_fill_(grad[rows, None] == 0, 0.0).to(out.dtype)
    return [side for side in sides if side is not None]


def _log_ratio(cir: Rows, ref: Rows, temperature: float) -> Tensor:
    """Return d = log P/Q; 0 where neither has the token."""
    d, _ = log_ratios(cir, ref, temperature)
    return d.masked_fill_((ref.logits == -torch.inf) & (cir.logits == -torch.inf), 0.0)


def _masses(side: Rows) -> Tensor:
    return side.weights / side.z.to(side.weights.dtype)


def _far(d: Tensor, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Return the far and the light form of terms of tokens, of masses p and q, and d = log p/q."""
    size, likelier = d.abs(), d > 0
    # Of the side where the token is likelier.
    of_p, of_q = d.new_full((), beta), d.new_full((), 1 - beta)
    own, other = torch.where(likelier, of_p, of_q), torch.where(likelier, of_q, of_p)
    e = torch.exp(-size)
    mixture = own + other * e
    # Close to 1 by its distance from it.
    log_mixture = torch.log1p(other * torch.expm1(-size))
    log_mixture = torch.where(mixture < 0.5, torch.log(mixture), log_mixture)
    # Of no mass there is nothing to weigh: not 0 · inf.
    shift = torch.where(e == 0, 0.0, other * e * size)
    rise = own * torch.expm1(size)
    light = own * size - mixture * torch.log1p(rise)
    far = torch.where((own < 0.5) & (rise < 1), light, -(mixture * log_mixture + shift))
    return far.mul_(torch.where(likelier, p, q))


def _excess(x: Tensor) -> Tensor:
    """X - log(1 + x) for -0.25 < x < 0.3, without cancellation: by the series of atanh(x / (2 + x))."""
    y = x / (2 + x)
    square = y * y
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11))))
    return y * (x - 2 * square * series)


def _worths(d: Tensor, weight: float, other: float, top: Tensor) -> Tensor:
    """Return log A/M for d = log A/B and M = weight · A + other · B, less a constant of each row.

    A token that nearly only A has is worth about -log(weight). Where a row's likeliest token (R, 1) is
    one, what counts is how much the worths differ from that, so -log(weight) is left out of all of
    them. In other rows the constant is 0. It cancels in the gradient.
    """
    limit = math.log(other) - math.log(weight)
    from_zero = d.gather(-1, top) <= max(limit, 1.0)
    worths = _log_of_mixture(d, weight, other)
    # Asking another device than the CPU would wait for it.
    if d.device.type == "cpu" and from_zero.all():
        return worths
    counted = torch.nn.functional.softplus(limit - d, threshold=_EXACT_BEYOND).neg_()
    return torch.where(from_zero, worths, counted)


def _log_of_mixture(d: Tensor, weight: float, other: float) -> Tensor:
    """Return log A/M for d = log A/B and M = weight · A + other · B."""
    # By the distance of M/A from 1, unless one side is nearly all of M.
    rise = other * torch.expm1(-d)
    e = torch.exp(-d.abs())
    far = d.clamp(max=0.0) - torch.log(torch.where(d > 0, weight + other * e, other + weight * e))
    return torch.where((rise - 0.25).abs() < 0.75, -torch.log1p(rise), far)
