"""A client's side of guest memory by message: the part that is the same whatever the memory is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from nvmove.nvme.seams import DmaError
from nvmove.vfio.message import Buffer
from nvmove.vfio.writing import Writing

Soon = tuple[Sequence[tuple[int, Buffer]], Callable[[DmaError | None], None]]


class MessageClient(ABC):
    """What need not be answered at once is answered at once, or with `holds` by `answer`."""

    def __init__(self) -> None:
        self.holds = False
        self.waiting: list[Soon] = []
        """What `answer` has to do."""

    @abstractmethod
    def dma_write_all(self, runs: Iterable[tuple[int, Buffer]], writing: Writing | None = None) -> None:
        """Store the runs; raises DmaError for what is refused."""

    def dma_write_soon(
        self,
        runs: Sequence[tuple[int, Buffer]],
        done: Callable[[DmaError | None], None],
        writing: Writing | None = None,
    ) -> None:
        self.waiting.append((runs, done))
        if not self.holds:
            self.answer()

    def answer(self) -> None:
        """Do all that waits."""
        waiting, self.waiting = self.waiting, []
        for runs, done in waiting:
            try:
                self.dma_write_all(runs)
            except DmaError as error:
                done(error)
            else:
                done(None)

    def cancel(self, writing: Writing) -> None:
        raise AssertionError("nothing is under way where memory is unmapped")
