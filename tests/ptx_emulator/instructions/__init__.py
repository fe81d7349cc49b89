"""The instructions the emulator knows: importing this package registers them with the Builder."""

from . import arithmetic, control, memory, warp
from .builder import CONTROL, PLAIN, SYNC, Builder

__all__ = ["CONTROL", "PLAIN", "SYNC", "Builder", "arithmetic", "control", "memory", "warp"]
