"""Eventfds, pending vectors and the INTx level."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Iterator

import pytest

from nvmove.pci.interrupts import InterruptLines
from nvmove.vfio.device import INTX, MSIX, IrqAction, IrqWhat

FIRE = (True,)


class Wires:
    """Interrupt lines and the client's ends of their eventfds."""

    def __init__(self) -> None:
        self.lines = InterruptLines(4, lambda: False)
        self.ends: list[int] = []

    def connect(self, index: int, start: int = 0, count: int = 1, what: IrqWhat = IrqWhat.TRIGGER) -> list[int]:
        ends = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.ends += ends
        fds = tuple(os.dup(end) for end in ends)
        self.lines.set_irqs(index, start, count, IrqAction(what, eventfds=True, fds=fds))
        return ends

    def intx(self, what: IrqWhat) -> None:
        self.lines.set_irqs(INTX, 0, 1, IrqAction(what, fire=FIRE))


@pytest.fixture
def wires() -> Iterator[Wires]:
    wires = Wires()
    yield wires
    wires.lines.disconnect()
    for end in wires.ends:
        os.close(end)


def fired(end: int) -> int:
    try:
        return os.eventfd_read(end)
    except BlockingIOError:
        return 0


def test_a_signalled_vector_writes_its_own_eventfd(wires: Wires) -> None:
    first, second = wires.connect(MSIX, 1, 2)
    wires.lines.signal(2)
    assert (fired(first), fired(second)) == (0, 1)
    assert wires.lines.pending == ()


def test_a_vector_without_an_eventfd_stays_pending_until_it_gets_one(wires: Wires) -> None:
    wires.lines.signal(3)
    assert wires.lines.pending_bits() == (8).to_bytes(8, "little")
    wires.connect(MSIX, 0, 3)
    assert wires.lines.pending == (3,)
    (end,) = wires.connect(MSIX, 3)
    assert fired(end) == 1
    assert wires.lines.pending_bits() == bytes(8)


@pytest.mark.parametrize("disable", [True, False])
def test_vectors_that_lost_their_eventfd_are_pending_again(wires: Wires, disable: bool) -> None:
    wires.connect(MSIX, 0, 4)
    action = IrqAction(IrqWhat.TRIGGER, eventfds=True, disable=disable)
    wires.lines.set_irqs(MSIX, 0, 0 if disable else 4, action)
    wires.lines.signal(0)
    assert wires.lines.pending == (0,)
    assert not wires.lines.msix_enabled


def test_msix_is_enabled_by_an_eventfd_or_by_the_config_bit() -> None:
    bit: list[bool] = []
    lines = InterruptLines(1, lambda: bool(bit))
    seen = [lines.msix_enabled]
    bit.append(True)
    seen.append(lines.msix_enabled)
    bit.clear()
    lines.set_irqs(MSIX, 0, 1, IrqAction(IrqWhat.TRIGGER, eventfds=True, fds=(os.eventfd(0),)))
    seen.append(lines.msix_enabled)
    lines.disconnect()
    assert [*seen, lines.msix_enabled] == [False, True, True, False]


def test_the_client_can_trigger_a_vector_itself(wires: Wires) -> None:
    ends = wires.connect(MSIX, 0, 2)
    wires.lines.set_irqs(MSIX, 0, 2, IrqAction(IrqWhat.TRIGGER, fire=(False, True)))
    assert [fired(end) for end in ends] == [0, 1]


def test_intx_fires_once_until_it_is_unmasked(wires: Wires) -> None:
    (end,) = wires.connect(INTX)
    wires.lines.set_level(True)
    wires.lines.set_level(False)
    wires.lines.set_level(True)
    assert fired(end) == 1
    wires.intx(IrqWhat.UNMASK)
    assert fired(end) == 1
    wires.lines.set_level(False)
    wires.intx(IrqWhat.UNMASK)
    assert fired(end) == 0


def test_masked_intx_fires_when_unmasked(wires: Wires) -> None:
    (end,) = wires.connect(INTX)
    wires.intx(IrqWhat.MASK)
    wires.lines.set_level(True)
    assert fired(end) == 0
    wires.intx(IrqWhat.UNMASK)
    assert fired(end) == 1


def test_intx_that_was_up_before_its_eventfd_fires_then(wires: Wires) -> None:
    wires.lines.set_level(True)
    (end,) = wires.connect(INTX)
    assert fired(end) == 1


def test_intx_can_be_triggered_by_the_client(wires: Wires) -> None:
    wires.intx(IrqWhat.TRIGGER)
    (end,) = wires.connect(INTX)
    wires.intx(IrqWhat.TRIGGER)
    assert fired(end) == 1


def test_an_unmask_eventfd_unmasks_intx(wires: Wires) -> None:
    (trigger,) = wires.connect(INTX)
    (unmask,) = wires.connect(INTX, what=IrqWhat.UNMASK)
    wires.lines.set_level(True)
    assert fired(trigger) == 1
    os.eventfd_write(unmask, 1)
    poll = select.poll()
    poll.register(trigger, select.POLLIN)
    assert poll.poll(5000), "INTx did not fire again after the unmask eventfd"
    wires.lines.set_irqs(INTX, 0, 1, IrqAction(IrqWhat.UNMASK, eventfds=True))
    assert fired(trigger) == 1


def test_an_unmask_eventfd_that_waits_does_not_keep_its_client_from_leaving(
    wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has made it one that waits, and reads it between our look and our read."""
    reads = threading.Event()

    def read(fd: int) -> int:
        os.set_blocking(fd, True)
        really_read(fd)
        reads.set()
        return really_read(fd)

    really_read = os.eventfd_read
    monkeypatch.setattr(os, "eventfd_read", read)
    (unmask,) = wires.connect(INTX, what=IrqWhat.UNMASK)
    os.eventfd_write(unmask, 1)
    assert reads.wait(5)
    leaving = threading.Thread(target=wires.lines.disconnect, daemon=True)
    leaving.start()
    leaving.join(5)
    assert not leaving.is_alive()


def test_an_unmask_eventfd_without_a_thread_is_refused_and_closed(
    wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="can't start new thread"):
        wires.connect(INTX, what=IrqWhat.UNMASK)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1  # the client's own end


def test_disabling_intx_takes_all_its_eventfds(wires: Wires) -> None:
    (trigger,) = wires.connect(INTX)
    wires.connect(INTX, what=IrqWhat.UNMASK)
    wires.lines.set_irqs(INTX, 0, 0, IrqAction(IrqWhat.TRIGGER, eventfds=True, disable=True))
    wires.lines.set_level(True)
    assert fired(trigger) == 0
    assert wires.lines.level


def test_a_full_eventfd_neither_blocks_nor_fails(wires: Wires) -> None:
    (end,) = wires.connect(MSIX)
    os.eventfd_write(end, 2**64 - 2)
    wires.lines.signal(0)
    assert fired(end) == 2**64 - 2


def test_reset_forgets_what_is_pending_and_keeps_the_eventfds(wires: Wires) -> None:
    (end,) = wires.connect(INTX)
    wires.lines.signal(1)
    wires.lines.set_level(True)
    assert fired(end) == 1
    wires.lines.reset()
    assert (wires.lines.pending, wires.lines.level) == ((), False)
    wires.lines.set_level(True)
    assert fired(end) == 1


def test_disabling_msix_in_config_space_forgets_what_is_pending(wires: Wires) -> None:
    wires.lines.signal(1)
    wires.lines.forget_pending()
    assert wires.lines.pending == ()


def test_loaded_pending_vectors_fire_when_they_can(wires: Wires) -> None:
    (end,) = wires.connect(MSIX, 2)
    (intx,) = wires.connect(INTX)
    wires.lines.load((0, 2), True)
    assert (fired(end), fired(intx)) == (1, 1)
    assert wires.lines.pending == (0,)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("index", "start", "count", "what", "code"),
    [
        (MSIX, 4, 1, IrqWhat.TRIGGER, errno.EINVAL),
        (MSIX, 0, 1, IrqWhat.MASK, errno.EINVAL),
        (INTX, 0, 1, IrqWhat.MASK, errno.ENOTSUP),
        (1, 0, 1, IrqWhat.TRIGGER, errno.EINVAL),
    ],
)
def test_what_is_refused_leaves_no_descriptor(
    wires: Wires, index: int, start: int, count: int, what: IrqWhat, code: int
) -> None:
    before = open_fds()
    with pytest.raises(OSError, match=r".") as refusal:
        wires.lines.set_irqs(index, start, count, IrqAction(what, eventfds=True, fds=(os.eventfd(0),)))
    assert refusal.value.errno == code
    assert before == open_fds()


def test_a_descriptor_that_is_no_eventfd_is_refused(wires: Wires) -> None:
    before = open_fds()
    with pytest.raises(OSError, match="no eventfd"):
        wires.lines.set_irqs(
            MSIX, 0, 1, IrqAction(IrqWhat.TRIGGER, eventfds=True, fds=(os.open("/dev/null", os.O_RDWR),))
        )
    assert before == open_fds()


def test_replaced_and_disconnected_eventfds_are_closed(wires: Wires) -> None:
    before = open_fds()
    wires.connect(MSIX, 0, 4)
    wires.connect(MSIX, 0, 4)
    wires.connect(INTX)
    wires.connect(INTX, what=IrqWhat.UNMASK)
    wires.lines.disconnect()
    for end in wires.ends:
        os.close(end)
    wires.ends.clear()
    assert before == open_fds()


def test_quiet_intx_fires_only_when_it_resumes(wires: Wires) -> None:
    """The client lowers its own pin while the device is paused (an unmask); the level stays up for later."""
    (end,) = wires.connect(INTX)
    wires.lines.set_level(True)
    assert fired(end) == 1
    wires.lines.quieten()
    wires.intx(IrqWhat.UNMASK)
    assert (fired(end), wires.lines.level) == (0, True)
    wires.lines.resume()
    assert fired(end) == 1


def test_quiet_intx_that_was_loaded_down_does_not_fire(wires: Wires) -> None:
    (end,) = wires.connect(INTX)
    wires.lines.quieten()
    wires.lines.load((), False)
    wires.lines.resume()
    assert fired(end) == 0


def test_the_pin_is_used_when_somebody_listens_and_msix_is_off() -> None:
    enabled = [False]
    lines = InterruptLines(4, lambda: enabled[0])
    used = [lines.uses_pin]
    lines.set_irqs(INTX, 0, 1, IrqAction(IrqWhat.TRIGGER, eventfds=True, fds=(os.eventfd(0),)))
    used.append(lines.uses_pin)
    enabled[0] = True
    used.append(lines.uses_pin)
    enabled[0] = False
    lines.disconnect()
    used.append(lines.uses_pin)
    assert used == [False, True, False, False]


@pytest.mark.parametrize("index", [MSIX, INTX])
def test_a_full_eventfd_that_the_client_lets_wait_holds_nobody_up(wires: Wires, index: int) -> None:
    """O_NONBLOCK is the open file's, which is the client's, too."""
    (end,) = wires.connect(index)
    os.eventfd_write(end, (1 << 64) - 2)
    os.set_blocking(end, True)
    signalling = threading.Thread(
        target=lambda: wires.lines.signal(0) if index == MSIX else wires.lines.set_level(True), daemon=True
    )
    signalling.start()
    signalling.join(20)
    was_held_up = signalling.is_alive()
    os.set_blocking(end, False)
    assert os.eventfd_read(end) == (1 << 64) - 2
    assert not was_held_up
