"""First calls of PyTorch's functions, made before several threads call them at once.

oneMKL chooses the code for a function when the function is first called. If two threads make that
call at once, one of them may compute its share of that one call with an error of 1e-4. This was
seen in 8 of 65 processes, where KL had a relative error of 2.6e-4. A call with one number, in one
thread, is enough to make the choice [1]_.

References
----------
.. [1] https://github.com/pytorch/pytorch/issues/188792
"""

import torch

# The functions that fastkl calls on tensors of logits on the CPU.
_FUNCTIONS = (torch.exp, torch.exp2, torch.expm1, torch.log, torch.log1p)


def _call() -> None:
    for dtype in (torch.float32, torch.float64):
        for function in _FUNCTIONS:
            function(torch.ones(1, dtype=dtype, device="cpu"))


_call()
