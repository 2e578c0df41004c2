"""The hot loop of a host-side NVMe driver (initiator.pyx)."""

from typing import NotRequired, TypedDict, Unpack

OK: int
STALLED: int
"""No command completed for as long as `stall` says."""
HUNG_UP: int
"""The device has closed the connection."""

class _Job(TypedDict):
    """Commands of `size` bytes, with `depth` buffers, for `seconds`.

    The range is `blocks` blocks of `block` bytes from LBA `first`. `data` and `lists` are offsets in `ram` of `depth`
    buffers (whole pages each) and of `depth` pages for PRPs.
    """

    data: int
    lists: int
    depth: int
    size: int
    block: int
    first: int
    blocks: int
    read_percent: int
    sequential: bool
    seconds: float
    seed: NotRequired[int]
    """Of what is drawn and of the pattern that is written; 1 unless it is said."""
    stall: NotRequired[float]
    """Seconds without a completion after which the device is given up; 10 unless it is said."""

_Outcome = tuple[int, int, int, int, float, int, int, dict[int, int], int]
"""How it ended (OK, …), completions, errors, reads that differ, seconds, doorbell messages, the last status that was
not 0, latencies: the number of commands by bucket (`results.bucket_ns`), and how often the device had nothing to do
(`run`: 0)."""

class Ring:
    """One I/O queue pair in `ram`, whose byte 0 is guest address 0; for one thread at a time, and never two jobs."""

    def __init__(self, ram: memoryview, sq: int, cq: int, entries: int, qid: int, fd: int) -> None:
        """`sq` and `cq` are the rings' offsets in `ram`. Doorbells are posted writes over the vfio-user socket `fd`."""

    def use_cells(self, cells: memoryview, sq: int, cq: int, events: tuple[int, int] | None) -> None:
        """Store doorbells at these offsets in `cells` from now on.

        Without `events` that is all: mapped doorbells. With them, the offsets of the two EventIdx, these are shadow
        doorbells, and a message follows when the device asks for it.
        """

    def stop(self) -> None:
        """Let `run` issue nothing more; from any thread."""

    def run(self, *, count: int = 0, check: bool = False, **job: Unpack[_Job]) -> _Outcome:
        """Keep `depth` commands under way for `seconds` or until `count` were issued (0: no limit); await the last.

        With `check`, writes carry a pattern of `seed` and their LBA, and reads are compared with it.
        Raises ValueError for what does not fit.
        """

    def run_ahead(self, *, interval: float, **job: Unpack[_Job]) -> _Outcome:
        """Fill the whole queue with commands, over `depth` buffers, and give them again and again for `seconds`.

        Every `interval` seconds this looks how many have completed, and sleeps in between, so that it takes next to no
        processor time. Return what `run` does, without latencies, and last how often it found that the device had
        nothing left to do: that time, and what was done in it, does not count. Completions and seconds are those until
        the time was over; errors those of the last completion of each entry. Raises ValueError for what does not fit.
        """
