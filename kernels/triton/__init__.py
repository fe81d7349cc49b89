"""Device code: the fused KL kernels and their launchers. Nothing here imports fastkl."""

from .gradient_launch import launch_gradients
from .launch import INTERPRETED, N_KEPT, launch

__all__ = ["INTERPRETED", "N_KEPT", "launch", "launch_gradients"]
