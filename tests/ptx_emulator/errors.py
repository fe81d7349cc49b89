"""Exceptions for what can go wrong in an emulated kernel."""


class PtxError(Exception):
    """The kernel did something that no GPU defines, or did not end."""


class Unsupported(PtxError):
    """An opcode, modifier, operand or directive that the emulator does not model."""


class MemoryFault(PtxError):
    """An access outside every allocation, misaligned, or in conflict with another lane's."""


class LaneFault(MemoryFault):
    """A MemoryFault whose instruction and thread are not known yet: Machine.access adds them."""

    def __init__(self, lane: int, reason: str):
        super().__init__(reason)
        self.lane = lane
        self.reason = reason


class SyncFault(PtxError):
    """A barrier or warp-synchronous instruction that threads never reach, or reach separately."""
