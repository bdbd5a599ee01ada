"""Shared memory of a group of CTAs, with what may be read when, and cp.async.

Between two barriers of its CTA a warp may touch what it alone touches, and read what others only read: all else is a
race. Bookkeeping is per granule, the smallest access of the kernel, of which all others are aligned multiples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import MemoryFault, RaceFault, UnwrittenRead

_MAX_WARPS = 32
_NEVER_WRITTEN, _IN_FLIGHT = -1, -2


@dataclass
class _Copy:
    """cp.async of some lanes, on its way: what lands where once the lane has waited for its group."""

    lane: np.ndarray
    group: np.ndarray
    cta: np.ndarray
    warp: np.ndarray
    where: np.ndarray
    rows: np.ndarray


class SharedMemory:
    """
    Args:
        ctas: CTAs in the group; each has its own.
        size: bytes a CTA.
        threads: a CTA's.
        granule: bytes, a power of two up to 16.
    """

    def __init__(self, ctas: int, size: int, threads: int, granule: int = 1) -> None:
        self.size = size
        self._granule = granule
        self._stride = (size + 15) // 16 * 16
        self._data = np.full(ctas * self._stride, 0xFF, np.uint8)
        granules = ctas * self._stride // granule
        # who wrote a granule when: barriers the CTA had passed, times _MAX_WARPS, plus the warp
        self._written = np.full(granules, _NEVER_WRITTEN, np.int32)
        # when each warp read a granule last: barriers the CTA had passed
        self._read = np.full(((threads + 31) // 32, granules), -1, np.int32)
        self._barriers = np.zeros(ctas, np.int32)
        self._copies: list[_Copy] = []
        self._committed = np.zeros(ctas * threads, np.int32)

    def load(self, cta: np.ndarray, warp: np.ndarray, address: np.ndarray, nbytes: int) -> np.ndarray:
        """-> uint8 [lanes, nbytes]; ``cta``, ``warp``, ``address``: [lanes], of the group, the CTA, in bytes"""
        where = self._locate(cta, address, nbytes, "load")
        written = np.take(self._granules(self._written, nbytes), where, axis=0)  # [lanes, granules]
        if written.min(initial=0) < 0:
            raise UnwrittenRead(
                "load of shared memory whose cp.async has not been waited for"
                if (written == _IN_FLIGHT).any()
                else "load of shared memory that was never written"
            )
        if self._stored_by_another(written, cta, warp).any():
            raise RaceFault("load of what another warp stored, with no barrier in between")
        self._granules(self._read, nbytes)[warp, where] = self._barriers[cta][:, None]
        return np.take(_words(self._data, nbytes), where, axis=0).view(np.uint8)

    def store(self, cta: np.ndarray, warp: np.ndarray, address: np.ndarray, rows: np.ndarray) -> None:
        """``rows``: uint8 [lanes, nbytes]"""
        nbytes = rows.shape[1]
        where = self._locate(cta, address, nbytes, "store")
        race = self._race(cta, warp, where, nbytes)
        # storing the bytes that are there harms nobody
        if race.any() and (_words(self._data, nbytes)[where[race]] != _words(rows[race], nbytes)).any():
            raise RaceFault("store to what another warp touched, with no barrier in between")
        self._put(cta, warp, where, rows)

    def barrier(self, ctas: np.ndarray) -> None:
        self._barriers[ctas] += 1

    def start_copy(
        self, lane: np.ndarray, cta: np.ndarray, warp: np.ndarray, address: np.ndarray, rows: np.ndarray
    ) -> None:
        """cp.async: the destination is unreadable until the lane waits for the group that it commits next.

        Args:
            lane: [lanes], of the group of CTAs.
        """
        nbytes = rows.shape[1]
        where = self._locate(cta, address, nbytes, "cp.async")
        if self._race(cta, warp, where, nbytes).any():
            raise RaceFault("cp.async to what another warp touched, with no barrier in between")
        self._granules(self._written, nbytes)[where] = _IN_FLIGHT
        self._copies.append(_Copy(lane, self._committed[lane], cta, warp, where, rows))

    def commit_copies(self, lane: np.ndarray) -> None:
        self._committed[lane] += 1

    def wait_for_copies(self, lane: np.ndarray, pending: int) -> None:
        """All but the lane's ``pending`` last groups land."""
        waits = np.zeros(len(self._committed), bool)
        waits[lane] = True
        remaining = []
        for copy in self._copies:
            lands = waits[copy.lane] & (copy.group < self._committed[copy.lane] - pending)
            for part, chosen in ((self._land, lands), (remaining.append, ~lands)):
                if chosen.all():
                    part(copy)
                elif chosen.any():
                    part(_Copy(*(getattr(copy, name)[chosen] for name in copy.__dataclass_fields__)))
        self._copies = remaining

    def _land(self, copy: _Copy) -> None:
        self._put(copy.cta, copy.warp, copy.where, copy.rows)

    def _put(self, cta: np.ndarray, warp: np.ndarray, where: np.ndarray, rows: np.ndarray) -> None:
        """Stores values; among lanes of one warp the last one's stays.

        PTX leaves open which, and Triton stores sums that the lanes hold in common, but for the last bit.
        """
        nbytes = rows.shape[1]
        data, values = _words(self._data, nbytes), _words(rows, nbytes)
        written, stamp = self._granules(self._written, nbytes), self._barriers[cta] * _MAX_WARPS + warp
        data[where], written[where] = values, stamp[:, None]
        lost = written[where, 0] != stamp
        if lost.any() and (data[where[lost]] != values[lost]).any():
            raise RaceFault("two warps store different values in the same place")

    def _race(self, cta: np.ndarray, warp: np.ndarray, where: np.ndarray, nbytes: int) -> np.ndarray:
        """-> [lanes], whether the place was touched by another warp since the last barrier

        Raises:
            RaceFault: a cp.async is still to write there.
        """
        written = self._granules(self._written, nbytes)[where]
        if (written == _IN_FLIGHT).any():
            raise RaceFault("store to shared memory that a cp.async is still to write")
        race = self._stored_by_another(written, cta, warp)
        read_now = self._granules(self._read, nbytes)[:, where] == self._barriers[cta][:, None]
        if read_now.any():  # [warps, lanes, granules]
            read_now[warp, np.arange(len(warp))] = False
            race = race | read_now.any(axis=(0, 2))
        return race

    def _stored_by_another(self, written: np.ndarray, cta: np.ndarray, warp: np.ndarray) -> np.ndarray:
        """[lanes, granules] -> [lanes], since the last barrier"""
        now = (self._barriers[cta] * _MAX_WARPS)[:, None]
        stored_now = written >= now
        if not stored_now.any():
            return np.zeros(len(now), bool)
        return (stored_now & (written != now + warp[:, None])).any(axis=1)

    def _locate(self, cta: np.ndarray, address: np.ndarray, nbytes: int, what: str) -> np.ndarray:
        """-> index into the group's memory in units of nbytes"""
        if (address & (nbytes - 1)).any():
            raise MemoryFault(f"misaligned {what} of {nbytes} bytes in shared memory")
        if len(address) and (address.min() < 0 or address.max() + nbytes > self.size):
            outside = (address < 0) | (address + nbytes > self.size)
            raise MemoryFault(
                f"{what} of {nbytes} bytes at byte {address[outside][0]} of shared memory, which holds {self.size}"
            )
        return (cta * self._stride + address) // nbytes

    def _granules(self, array: np.ndarray, nbytes: int) -> np.ndarray:
        """[..., granules] as [..., places, granules of a place], for accesses of nbytes"""
        return array.reshape(*array.shape[:-1], -1, nbytes // self._granule)


def _words(data: np.ndarray, nbytes: int) -> np.ndarray:
    """Bytes as [places, words of a place], of words as wide as possible."""
    word = min(nbytes, 8)
    return data.reshape(-1).view(f"u{word}").reshape(-1, nbytes // word)
