"""Device code: the fused KL kernels and their launchers. Nothing here imports fastkl."""

from .launch import INTERPRETED, launch

__all__ = ["INTERPRETED", "launch"]
