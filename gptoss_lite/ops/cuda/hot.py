"""The experts in demand: copies on the device of those that layers with experts on the host use most."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.runtime import Array, Runtime

_DECAY = 0.98  # of a score with each step: what was wanted 50 steps ago counts a third
_MARGIN = 1.0  # by which a score must beat that of the expert it replaces, or they would swap for ever
_COPIES = 4  # experts copied before a step at most: each holds it up by about half a millisecond


Due: TypeAlias = list[Callable[[], npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True, eq=False)
class HostExperts:
    """One layer's matrices of one kind: pinned records (E, nbytes), and the table that kernels look in."""

    records: npt.NDArray[np.uint8]
    addresses: npt.NDArray[np.uint64]  # (E,), what the table says
    table: Array
    slots: Array  # uint8 (slots, nbytes), on the device


class HotExperts:
    """Decides which experts have a copy on the device, from what the router chose in the steps before.

    An expert's score counts the tokens that chose it, old ones less and less. Before a step the best few of
    those without a copy take the places of the worst with one. Kernels read an expert wherever its layer's
    table says, so nothing else changes.
    """

    def __init__(self, runtime: Runtime, slots: int) -> None:
        self._runtime = runtime
        self._slots = slots
        self._kinds: dict[int, list[HostExperts]] = {}
        self._scores: dict[int, npt.NDArray[np.float64]] = {}
        self._fetched: Due = []  # choices that have not been counted yet
        self._residents: dict[int, npt.NDArray[np.int64]] = {}  # expert in each slot, -1 for none

    @property
    def layers(self) -> Sequence[int]:
        """The layers with experts on the host, in order."""
        return sorted(self._kinds)

    def add(self, layer: int, records: npt.NDArray[np.uint8]) -> Array:
        """Take a layer's records of one kind, pinned uint8 (E, nbytes) -> its table uint64 (E,)."""
        experts, nbytes = records.shape
        first = self._runtime.address(records)
        addresses = np.arange(first, first + experts * nbytes, nbytes, dtype=np.uint64)
        table = self._runtime.empty((experts,), np.uint64)
        self._runtime.upload(addresses, table)
        slots = self._runtime.empty((self._slots, nbytes), np.uint8)
        self._kinds.setdefault(layer, []).append(HostExperts(records, addresses, table, slots))
        self._scores.setdefault(layer, np.zeros(experts))
        self._residents.setdefault(layer, np.full(self._slots, -1))
        return table

    def fetch(self, ids: Array) -> Due:
        """Queue the fetching of a step's choices, int32 (layers, T, k) on the device, -1 for none.

        Returns all that will have come when the step is done: these, and earlier ones that nobody noted.
        """
        if self._kinds:
            self._fetched.append(self._runtime.fetch(ids))
        return list(self._fetched)

    def note(self, due: Due) -> None:
        """Count what was chosen, once the step is done or to be waited for."""
        for chosen in due:
            if chosen in self._fetched:
                self._fetched.remove(chosen)
                self._count(chosen())

    def _count(self, ids: npt.NDArray[Any]) -> None:
        for layer, chosen in zip(self.layers, ids, strict=True):
            scores = self._scores[layer]
            scores *= _DECAY
            scores += np.bincount(chosen[chosen >= 0], minlength=len(scores))

    def promote(self) -> None:
        """Queue the copying of the experts most in demand, ahead of the next step's launches."""
        wanted = [
            (self._scores[layer][expert] - self._lowest(layer), layer, expert)
            for layer in self.layers
            if (expert := self._best_absent(layer)) is not None
        ]
        for gain, layer, expert in sorted(wanted, reverse=True)[:_COPIES]:
            if gain > _MARGIN:
                self._give_slot(layer, expert)

    def _best_absent(self, layer: int) -> int | None:
        scores = self._scores[layer].copy()
        scores[self._residents[layer][self._residents[layer] >= 0]] = -1
        best = int(scores.argmax())
        return best if scores[best] > 0 and self._slots else None

    def _slot_scores(self, layer: int) -> npt.NDArray[np.float64]:
        """The score of each slot's expert; an empty slot's is below any other."""
        residents = self._residents[layer]
        return np.where(residents < 0, -_MARGIN - 1, self._scores[layer][residents])

    def _lowest(self, layer: int) -> float:
        return float(self._slot_scores(layer).min())

    def _give_slot(self, layer: int, expert: int) -> None:
        residents = self._residents[layer]
        slot = int(self._slot_scores(layer).argmin())
        leaving, residents[slot] = int(residents[slot]), expert
        for kind in self._kinds[layer]:
            nbytes = kind.records.shape[1]
            self._runtime.copy(kind.records[expert], kind.slots[slot])
            if leaving >= 0:
                home = self._runtime.address(kind.records) + leaving * nbytes
                kind.addresses[leaving] = home
            kind.addresses[expert] = self._runtime.address(kind.slots) + slot * nbytes
            self._runtime.upload(kind.addresses, kind.table)
