"""Calls of PyTorch's functions that must come before threads call them.

oneMKL chooses the code for a function when it is first called. If two threads call it at once, then one
may get code that is off by 1e-4, for its share of that one call: seen in 8 of 65 processes, in KL
as 2.6e-4 of itself. One number, in one thread, is enough to have chosen [1]_.

References
----------
.. [1] https://github.com/pytorch/pytorch/issues/188792
"""

import torch

# What is called on tensors of logits on the CPU.
_FUNCTIONS = (torch.exp, torch.exp2, torch.expm1, torch.log, torch.log1p)


def _call() -> None:
    for dtype in (torch.float32, torch.float64):
        for function in _FUNCTIONS:
            function(torch.ones(1, dtype=dtype, device="cpu"))


_call()
