"""Memory as the kernel sees it: named allocations at addresses, with every access checked.

Global memory is not copied: an allocation is the memory of a NumPy array or CPU tensor, at its real
address. Shared memory and the parameters are allocations too, in separate address spaces.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import LaneFault


@dataclass(frozen=True, eq=False)
class Allocation:
    """Bytes that the kernel may load, and may store if `writable`; `owner` keeps them alive."""

    name: str
    base: int
    data: np.ndarray
    writable: bool = True
    owner: Any = None

    @property
    def end(self) -> int:
        return self.base + self.data.size

    def __str__(self) -> str:
        return f"{self.name} [{self.base:#x}, {self.end:#x}), {self.data.size} bytes"


def address_of(array) -> int:
    """Return the address of the first element of a NumPy array or a tensor."""
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


class Memory:
    """The arrays and CPU tensors a kernel may touch, at their real addresses."""

    def __init__(self, *arrays, **named):
        self.allocations: list[Allocation] = []
        for name, array in [*enumerate(arrays), *named.items()]:
            self.add(array, str(name))

    def add(self, array, name: str, writable: bool = True) -> int:
        """Register exactly the bytes a (possibly strided) array spans; return its address."""
        if str(getattr(array, "device", "cpu")) != "cpu":
            raise ValueError(f"{name} is not in CPU memory but on {array.device}")
        first = address_of(array)
        if 0 in array.shape:
            return first
        if hasattr(array, "strides"):
            strides = array.strides
        else:
            strides = [stride * array.itemsize for stride in array.stride()]
        steps = [(n - 1) * stride for n, stride in zip(array.shape, strides, strict=True)]
        base = first + sum(min(step, 0) for step in steps)
        size = array.itemsize + sum(abs(step) for step in steps)
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)
        self.allocations.append(Allocation(name, base, data, writable, array))
        return first

    def find(self, address: int, size: int) -> Allocation | None:
        """Return the allocation that holds all of [address, address + size), or None."""
        for allocation in self.allocations:
            if allocation.base <= address and address + size <= allocation.end:
                return allocation
        return None

    def access(self, addresses, unit: int, count: int, *, values=None, align: int | None = None):
        """Load `count` words of `unit` bytes for each lane, or store `values`.

        Parameters
        ----------
        addresses : array of uint64, (lanes,)
        values : array of `unit`-byte words, (lanes, count), optional
            What to store; without it, the access is a load.
        align : int, optional
            What the addresses must be multiples of; by default the full width, `unit * count`.

        Returns
        -------
        array of unsigned `unit`-byte words, (lanes, count): the words loaded, or stored.

        Raises
        ------
        LaneFault
            A lane's access is misaligned, is not inside one allocation, or stores to read-only
            memory: then nothing was stored. Or two lanes stored different values to one address.
        """
        size = unit * count
        align = align or size
        for lane in np.flatnonzero(addresses & np.uint64(align - 1))[:1]:
            at = int(addresses[lane])
            raise LaneFault(lane, f"{size}-byte access at {at:#x} is not aligned to {align} bytes")
        plan = self._plan(addresses, size, store=values is not None)
        if values is None:
            words = np.empty((addresses.size, count), f"u{unit}")
            for lanes, data, where in plan:
                words[lanes] = data[where].view(words.dtype)
            return words
        words = np.ascontiguousarray(values)
        for lanes, data, where in plan:
            new = words[lanes].view(np.uint8)
            data[where] = new
            for lane in lanes[(data[where] != new).any(1)][:1]:
                at = int(addresses[lane])
                raise LaneFault(lane, f"another lane stored something else at {at:#x}")
        return words

    def _plan(self, addresses, size: int, store: bool) -> list:
        """Return, per allocation touched: lanes, its bytes, and the (lanes, size) offsets in it."""
        plan = []
        todo = np.arange(addresses.size)
        while todo.size:
            at = int(addresses[todo[0]])
            allocation = self.find(at, size)
            if allocation is None or (store and not allocation.writable):
                raise LaneFault(todo[0], self._why_not(at, size, allocation))
            # An address below the base wraps around to a huge offset.
            offsets = addresses[todo] - np.uint64(allocation.base)
            inside = offsets <= allocation.data.size - size
            places = offsets[inside].astype(np.int64)[:, None] + np.arange(size)
            plan.append((todo[inside], allocation.data, places))
            todo = todo[~inside]
        return plan

    def _why_not(self, at: int, size: int, allocation: Allocation | None) -> str:
        why = "a store to read-only memory" if allocation else "outside every allocation"
        near = allocation or min(
            self.allocations, default=None, key=lambda a: max(a.base - at, at - a.end)
        )
        if near is None:
            where = "there is none"
        elif at < near.base:
            where = f"{near.base - at} bytes before {near}"
        else:
            where = f"offset {at - near.base} of {near}"
        return f"{size}-byte access at {at:#x} is {why}: {where}"
