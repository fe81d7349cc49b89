"""Predict a pair's time from a card's limits, and describe machine code for a JSON document."""

from dataclasses import dataclass

from bench.cards import Card, occupancy
from bench.machine_code import Block, Program

VOCABULARIES = (50257, 151936)
UNITS = ("issue", "fma", "alu", "special")


@dataclass(frozen=True)
class Prediction:
    """The time that each limit of a card imposes on one pair, in picoseconds."""

    card: str
    limits: dict[str, float]

    @property
    def time(self) -> float:
        """Picoseconds per pair, by the limit that binds."""
        return max(self.limits.values())

    @property
    def binds(self) -> str:
        """The limit that imposes the longest time."""
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def fraction_of_peak(self) -> float:
        """Share of the card's peak bandwidth that is reached."""
        return self.limits["memory"] / self.time

    def share(self, unit: str) -> float:
        """A unit's time as a share of the memory's."""
        return self.limits[unit] / self.limits["memory"]

    def as_dict(self) -> dict:
        """Return the entry for the JSON document."""
        return {
            "card": self.card,
            "picoseconds_a_pair": {name: round(value, 4) for name, value in self.limits.items()},
            "binds": self.binds,
            "fraction_of_peak_bandwidth": round(self.fraction_of_peak, 4),
            "share_of_memory_time": {name: round(self.share(name), 4) for name in self.limits},
        }


def predict(card: Card, bytes_a_pair: float, operations: dict[str, float]) -> Prediction:
    """Predict the time of a pair on a card, from its bytes and its operations on each unit."""
    limits = {"memory": bytes_a_pair / card.bandwidth * 1e12}
    for unit, count in operations.items():
        limits[unit] = count / card.per_second(unit) * 1e12
    return Prediction(card.name, limits)


def describe_block(block: Block, pairs: float) -> dict:
    """Return a block's counts, in all and per pair."""
    return {
        "instructions": len(block),
        "instructions_a_pair": round(len(block) / pairs, 3),
        "special_a_pair": round(block.special / pairs, 3),
        "operations_a_pair": {u: round(n / pairs, 3) for u, n in block.occupied.items()},
        "load_widths_bytes": block.load_widths,
        "store_widths_bytes": block.store_widths,
        "bytes_a_pair": round(block.load_bytes / pairs, 3),
        "barriers": block.barriers,
        "shuffles": block.shuffles,
        "shared_accesses": block.shared_accesses,
        "spills": block.spills,
    }


def describe_program(program: Program, target: str) -> dict:
    """Return the resources that a program needs on a processor."""
    return {
        "registers": program.registers,
        "stack_bytes": program.stack,
        "shared_bytes": program.shared,
        "threads": program.threads,
        "occupancy": round(
            occupancy(target, program.registers, program.shared, program.threads), 4
        ),
        "instructions_outside_loops": len(program.outside),
        "spills_outside_loops": program.outside.spills,
    }


def prediction_heading() -> list[str]:
    """Return the headings of the columns that `prediction_cells` fills."""
    heading = ["ps/pair", "binds", "of peak", *(f"{unit}/mem" for unit in UNITS)]
    return heading + [f"of peak, V={n} (binds)" for n in VOCABULARIES]


def prediction_cells(inner: dict, whole: list[dict]) -> list[str]:
    """Return predictions as cells of a table: the inner loop or tile, then whole rows."""
    shares = inner["share_of_memory_time"]
    return [
        f"{max(inner['picoseconds_a_pair'].values()):.2f}",
        inner["binds"],
        f"{inner['fraction_of_peak_bandwidth']:.0%}",
        *(f"{shares[unit]:.2f}" if unit in shares else "-" for unit in UNITS),
        *(f"{w['fraction_of_peak_bandwidth']:.0%} ({w['binds']})" for w in whole),
    ]
