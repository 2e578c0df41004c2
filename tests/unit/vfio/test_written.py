"""What borrowers of memory note of the pages that they write."""

from __future__ import annotations

import threading

from nvmove.vfio.dirty import PAGE, DirtyLog, DirtyTracking
from nvmove.vfio.memory import GuestMemory
from nvmove.vfio.written import WrittenPages
from tests.unit.vfio.test_memory import add, unmapped


def noted(*pages: int, start: int = 0, end: int = 1 << 20) -> WrittenPages:
    written = WrittenPages(start, end)
    for page in pages:
        written.view[page] = 1
    return written


def test_runs_are_told_once() -> None:
    written = noted(0, 1, 3, 255)
    assert list(written.take(0, 1 << 64)) == [(0, 2 * PAGE), (3 * PAGE, PAGE), (255 * PAGE, PAGE)]
    assert list(written.take(0, 1 << 64)) == []


def test_only_what_is_asked_for_is_told() -> None:
    written = noted(0, 1, 3)
    assert list(written.take(PAGE, 2 * PAGE)) == [(PAGE, PAGE)]
    assert list(written.take(2 * PAGE, 3 * PAGE)) == []
    assert list(written.take(1 << 30, 1 << 31)) == []
    assert list(written.take(0, 1 << 20)) == [(0, PAGE), (3 * PAGE, PAGE)]


def test_a_region_need_not_begin_or_end_on_a_page() -> None:
    written = noted(0, 1, start=PAGE + 512, end=2 * PAGE + 512)
    assert len(written.view) == 2
    assert list(written.take(0, 1 << 64)) == [(PAGE + 512, PAGE)]


def test_runs_in_a_large_region_are_found_wherever_they_are() -> None:
    pages = [65535, 65536, 131071, 200000]
    written = noted(*pages, end=1 << 30)
    assert sum(length for _, length in written.take(0, 1 << 64)) == 4 * PAGE


def test_what_is_noted_while_somebody_takes_is_not_lost() -> None:
    written, found, ended = WrittenPages(0, 4096 * PAGE), set[int](), threading.Event()

    def take() -> None:
        for start, length in written.take(0, 1 << 64):
            found.update(range(start // PAGE, (start + length) // PAGE))

    def note() -> None:
        for page in range(4096):
            written.view[page] = 1
        ended.set()

    thread = threading.Thread(target=note)
    thread.start()
    while not ended.is_set():
        take()
    thread.join()
    take()
    assert found == set(range(4096))


def test_notes_go_to_the_log_or_to_the_record_when_asked_for() -> None:
    tracking = DirtyTracking()
    assert tracking.lend("region", 0, 4 * PAGE) is None
    tracking.start_marking()
    view = tracking.lend("region", 0, 4 * PAGE)
    assert view is not None
    view[2] = 1
    tracking.collect()
    assert tracking.recorded.take() == [2]
    tracking.stop_marking()
    log = DirtyLog([range(PAGE, 4 * PAGE)])
    tracking.start_log(log)
    view = tracking.lend("region", 0, 4 * PAGE)
    assert view is not None
    view[0] = view[3] = 1
    assert log.report(0, 4 * PAGE, PAGE)[0] == 1 << 3
    assert log.report(0, 4 * PAGE, PAGE)[0] == 0


def test_notes_of_memory_that_goes_away_are_kept() -> None:
    """A part of it may stay mapped, and a client of a log asks for what it has unmapped too."""
    memory = GuestMemory()
    add(memory, 0, 4 * PAGE)
    memory.dirty.start_marking()
    loan = memory.lend(lambda: None)
    assert loan is not None
    assert loan.marks
    (region,) = loan.regions
    assert region.written is not None
    region.written[0] = region.written[3] = 1
    done = unmapped(memory, 3 * PAGE, PAGE)
    assert done == []
    region.written[1] = 1
    loan.release()
    assert done == [0]
    assert memory.dirty.recorded.take() == [0, 1, 3]


def test_every_loan_of_a_region_notes_in_the_same_place() -> None:
    memory = GuestMemory()
    add(memory, 0, 4 * PAGE)
    memory.dirty.start_log(DirtyLog())
    loans = [memory.lend(lambda: None) for _ in range(2)]
    views = [loan.regions[0].written for loan in loans if loan is not None]
    assert views[0] is not None
    assert views[0] is views[1]
