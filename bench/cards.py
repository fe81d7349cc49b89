"""What the cards can do, according to their makers.

Rates count operations of single threads, per clock and multiprocessor. NVIDIA's are from the CUDA
C++ Programming Guide, section "Arithmetic Instructions", table "Throughput of Native Arithmetic
Instructions", by compute capability: `fma` from its row of 32-bit floating-point add, multiply and
multiply-add; `alu` from compare, minimum, maximum and bitwise operations; `special` from
reciprocal, exp2 and log2. `issue` assumes four schedulers that each issue one warp instruction per
clock (section "Hardware Multithreading" and the architecture white papers). For compute capability
12.0 the guide lists a higher rate for integer addition than `alu`; no kernel here comes near it.

AMD's rates are from the CDNA 3 white paper: four SIMDs of 16 lanes per compute unit. They assume
that a transcendental takes four times as long as an addition, which is true of GCN and CDNA so far.

Clocks are the makers' boost clocks, with two exceptions. The B200's is the one that its driver
reports. Hopper's SXM cards have a maximum of 1.98 GHz, but 1.755 GHz is assumed, since a card does
not hold the maximum under load. Bandwidths are the datasheets', which no copy reaches. Power limits
are not taken into account.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """What one multiprocessor (SM, compute unit) of a target can hold, and can do per clock."""

    rates: dict[str, int]
    registers: int
    warps: int
    blocks: int
    shared: int
    # Registers per thread are allocated in multiples of this.
    granule: int = 8
    # Bytes of shared memory that every block costs in addition to its own.
    reserved: int = 1024
    warp_size: int = 32


@dataclass(frozen=True)
class Card:
    """A card: target, bytes per second, multiprocessors, clock in Hz, and the source of these."""

    name: str
    target: str
    bandwidth: float
    multiprocessors: int
    clock: float
    source: str

    def per_second(self, unit: str) -> float:
        """Return how many operations of a unit the whole card performs per second."""
        return PROCESSORS[self.target].rates[unit] * self.multiprocessors * self.clock


def _nvidia(fma: int = 128) -> dict[str, int]:
    return {"issue": 128, "fma": fma, "alu": 64, "special": 16}


KIB = 1024
# Residency limits: the Programming Guide's table "Technical Specifications per Compute Capability".
PROCESSORS = {
    "sm_80": Processor(_nvidia(fma=64), 65536, 64, 32, 164 * KIB),
    "sm_86": Processor(_nvidia(), 65536, 48, 16, 100 * KIB),
    "sm_90": Processor(_nvidia(), 65536, 64, 32, 228 * KIB),
    "sm_100": Processor(_nvidia(), 65536, 64, 32, 228 * KIB),
    "sm_120": Processor(_nvidia(), 65536, 48, 24, 100 * KIB),
    # 4 SIMDs, each with 512 vector registers of 64 lanes and 8 wavefronts (CDNA 3 ISA guide).
    "gfx942": Processor(
        {"issue": 64, "special": 16}, 4 * 512 * 64, 32, 32, 64 * KIB, reserved=0, warp_size=64
    ),
}

CARDS = (
    Card("A100 SXM 80GB", "sm_80", 2.039e12, 108, 1.410e9, "A100 datasheet and white paper"),
    Card("RTX 3090", "sm_86", 0.936e12, 82, 1.695e9, "GA102 white paper"),
    Card("H100 SXM", "sm_90", 3.35e12, 132, 1.755e9, "H100 datasheet; clock: see above"),
    Card("H200", "sm_90", 4.8e12, 132, 1.755e9, "H200 datasheet; clock: see above"),
    Card(
        "B200",
        "sm_100",
        8.0e12,
        148,
        1.965e9,
        "DGX B200 datasheet; clock and SMs as its driver says",
    ),
    Card("RTX 5090", "sm_120", 1.792e12, 170, 2.407e9, "RTX Blackwell white paper"),
    Card("MI300X", "gfx942", 5.3e12, 304, 2.100e9, "MI300X datasheet and CDNA 3 white paper"),
)


def occupancy(target: str, registers: int, shared: int, threads: int) -> float:
    """Return the share of a multiprocessor's warps that can be resident."""
    limits = PROCESSORS[target]
    warps = -(-threads // limits.warp_size)
    granted = -(-max(registers, 1) // limits.granule) * limits.granule
    by_registers = limits.registers // (granted * limits.warp_size) // warps
    if target.startswith("gfx"):
        # A SIMD's registers serve only its own wavefronts.
        by_registers = 4 * (512 // granted) // warps
    by_shared = (
        limits.shared // (shared + limits.reserved) if shared + limits.reserved else limits.blocks
    )
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps
