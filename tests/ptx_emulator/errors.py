"""What can go wrong in an emulated kernel."""


class PtxError(Exception):
    """No GPU defines what the kernel did, or the kernel did not end."""


class Unsupported(PtxError):
    """An opcode, modifier, operand or directive that the emulator does not model."""


class MemoryFault(PtxError):
    """An access outside every allocation, misaligned, or in conflict with another lane's."""


class LaneFault(MemoryFault):
    """A MemoryFault that does not know yet which instruction of which thread it belongs to."""

    def __init__(self, lane: int, reason: str):
        super().__init__(reason)
        self.lane = lane
        self.reason = reason


class SyncFault(PtxError):
    """A barrier or warp-synchronous instruction that threads never reach, or reach apart."""
