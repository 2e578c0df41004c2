"""Registers, enable and disable, doorbells, interrupts, shutdown, reset, fatal status."""

from __future__ import annotations

import pytest

from nvmove.block.backend import Operation
from nvmove.nvme.commands.command import Command
from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.spec import (
    CSTS_CFS,
    CSTS_RDY,
    CSTS_SHST_COMPLETE,
    CSTS_SHST_OCCURRING,
    DOORBELLS,
    Admin,
    Log,
    Nvm,
    Register,
    Status,
)
from tests.disk import Disk
from tests.lines import Lines
from tests.nvme_host import CC, CONFIG, DATA, Completion, Host, sqe
from tests.ram import Ram


def enabled(**arguments: object) -> Host:
    host = Host(**arguments)  # type: ignore[arg-type]
    host.enable()
    return host


def ready(**arguments: object) -> Host:
    host = enabled(**arguments)
    host.create()
    return host


def events(host: Host) -> list[int]:
    """Results of the AERs that completed."""
    host.drain()
    return [completion.result for completion in host.reap(0)]


# --- registers -------------------------------------------------------------------------------------------------------


def test_cap_is_qemus_and_ready_with_media() -> None:
    host = Host()
    assert host.get(Register.CAP, 8) == 0x0840_0820_0F01_07FF
    assert host.get(Register.CAP + 4) == 0x0840_0820
    assert host.get(Register.VS) == 0x0002_0000
    assert host.get(Register.CRTO) == 0xF
    assert Host(config=ControllerConfig(serial="S", mqes=65535)).get(Register.CAP) & 0xFFFF == 65535


def test_what_no_register_covers_reads_as_zero_and_takes_no_write() -> None:
    host = Host()
    for offset in (0x18, 0x38, 0x40, 0x800, 0xFFC, DOORBELLS, 0x3000):
        host.set(offset, 0xFFFF_FFFF)
        assert host.get(offset) == 0
    host.set(Register.CAP, 0, 8)
    host.set(Register.NSSR, 0x4E56_4D65)
    assert host.get(Register.CAP) != 0
    assert host.csts == 0


def test_asq_and_acq_are_written_whole_or_in_halves_and_read_back_while_enabled() -> None:
    host = Host()
    host.set(Register.ASQ, 0x1234_5FFF)
    host.set(Register.ASQ + 4, 0xAB)
    host.set(Register.ACQ, 0xCD_1234_5678, 8)
    assert host.get(Register.ASQ, 8) == 0xAB_1234_5000
    assert host.get(Register.ACQ, 8) == 0xCD_1234_5000
    host.enable()
    host.set(Register.AQA, 0)
    host.set(Register.ASQ, 0, 8)
    assert host.get(Register.AQA) == 0x1F_001F
    assert (host.get(Register.ASQ, 8), host.get(Register.ACQ, 8)) == (0x1000, 0x2000)


def test_enable_makes_ready_and_an_admin_command_runs() -> None:
    host = enabled()
    assert host.csts == CSTS_RDY
    assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS
    assert host.ram.data[DATA + 4 : DATA + 6] == b"S1"


@pytest.mark.parametrize(
    ("aqa", "cc"),
    [(0x1F_0000, CC), (0x0000_001F, CC), (0x1F_001F, CC | 5 << 7), (0x1F_001F, CC & ~0x70 | 1 << 4)],
)
def test_a_bad_admin_queue_configuration_is_fatal_and_a_reset_mends_it(aqa: int, cc: int) -> None:
    host = Host()
    host.set(Register.AQA, aqa)
    host.set(Register.CC, cc | 1)
    assert host.csts == CSTS_CFS
    host.disable()
    assert host.csts == 0
    host.enable()
    assert host.csts == CSTS_RDY


def test_an_admin_queue_that_is_not_aligned_to_the_page_size_is_fatal() -> None:
    host = Host()
    host.enable(cc=CC | 1 << 7)
    assert host.csts == CSTS_CFS
    assert "ASQ" in str(host.controller.registers.enable_fault())


# --- disable and reset -----------------------------------------------------------------------------------------------


def test_rdy_falls_when_nothing_in_flight_can_touch_memory() -> None:
    disk = Disk(hold=True)
    host = ready(disk=disk)
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    host.disable()
    assert host.csts == CSTS_RDY
    host.ring_sq(1)  # ignored: no event, no command
    disk.finish()
    assert host.csts == 0
    assert host.peek(1) is None


def test_enabled_again_before_rdy_fell_it_starts_when_it_may() -> None:
    disk = Disk(hold=True)
    host = ready(disk=disk)
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    host.disable()
    host.set(Register.CC, CC | 1)
    assert not host.controller.sqs
    disk.finish()
    assert host.csts == CSTS_RDY
    assert list(host.controller.sqs) == [0]


def test_a_disable_drops_queues_events_and_masks() -> None:
    lines = Lines(msix=False)
    host = ready(lines=lines)
    host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    host.set(Register.INTMS, 2)
    assert lines.up()
    host.disable()
    assert not lines.up()
    assert host.get(Register.INTMS) == 0
    assert not host.controller.events.outstanding
    host.enable()
    assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS
    host.create()
    assert host.command(1, Nvm.READ, nsid=1).status == Status.SUCCESS


def test_commands_fetched_but_not_begun_are_dropped_by_a_disable() -> None:
    host = ready()
    for _ in range(3):
        host.submit(1, Nvm.READ, nsid=1)
    submit = host.disk.submit

    def disable_at_the_first(request: object) -> None:
        host.disable()
        submit(request)  # type: ignore[arg-type]

    host.disk.submit = disable_at_the_first  # type: ignore[method-assign]
    host.drain()
    assert host.disk.operations == [Operation.READ]
    assert host.csts == 0


def test_a_function_reset_waits_for_what_is_in_flight() -> None:
    disk = Disk(hold=True)
    host = ready(disk=disk)
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    done: list[bool] = []
    host.controller.reset(lambda: done.append(True))
    assert done == []
    disk.finish()
    assert done == [True]
    assert (host.csts, host.get(Register.CC), host.get(Register.ASQ, 8)) == (0, 0, 0)
    host.controller.reset(lambda: done.append(True))
    assert done == [True, True]


def test_reset_calls_back_without_the_lock() -> None:
    host = enabled()
    owned: list[bool] = []
    host.controller.reset(lambda: owned.append(host.controller.lock._is_owned()))  # type: ignore[attr-defined]
    assert owned == [False]


# --- doorbells -------------------------------------------------------------------------------------------------------


def test_doorbells_before_enable_are_ignored() -> None:
    host = Host()
    host.set(DOORBELLS, 5)
    host.enable()
    assert host.controller.sqs[0].tail == 0


@pytest.mark.parametrize(
    ("offset", "value", "size", "info"),
    [
        (DOORBELLS + 8 * 9, 0, 4, 0),
        (DOORBELLS + 8 * 9 + 4, 0, 4, 0),
        (DOORBELLS + 0xFF8, 0, 4, 0),
        (DOORBELLS + 8 + 2, 1, 4, 0),
        (DOORBELLS + 8, 1, 2, 0),
        (DOORBELLS + 8, 16, 4, 1),
        (DOORBELLS + 8, 0xFFFF_FFFF, 4, 1),
        (DOORBELLS + 8 + 4, 16, 4, 1),
        (DOORBELLS + 8 + 4, 1, 4, 1),
    ],
)
def test_an_invalid_doorbell_is_an_error_event_and_nothing_else(offset: int, value: int, size: int, info: int) -> None:
    host = ready()
    host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.drain()
    host.set(offset, value, size)
    assert events(host) == [Log.ERROR_INFORMATION << 16 | info << 8]
    assert host.csts == CSTS_RDY
    assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_an_sq_doorbell_that_overruns_the_ring_is_an_error_event() -> None:
    host = ready(disk=Disk())
    host.controller.pause(0)
    host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    host.set(DOORBELLS + 8, 5)
    host.set(DOORBELLS + 8, 4)
    host.controller.resume()
    assert events(host) == [0x1_0100]


# --- completion queues: permits --------------------------------------------------------------------------------------


def test_full_cq_stops_the_sq_and_its_doorbell_starts_it_again() -> None:
    host = enabled()
    host.create(cq_size=3)
    for _ in range(5):
        host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert host.controller.sqs[1].waiting == 3
    assert [c.sq_head for c in host.reap(1, doorbell=False)] == [2, 2]
    host.drain()
    assert host.controller.sqs[1].waiting == 3
    host.ring_cq(1)
    host.drain()
    assert len(host.reap(1)) == 2
    host.drain()
    assert len(host.reap(1)) == 1
    assert host.csts == CSTS_RDY


def test_a_command_in_flight_holds_its_slot_against_the_other_queue() -> None:
    disk = Disk(hold=True)
    host = enabled(disk=disk)
    host.create(1, cq_size=3)
    host.create(2, cqid=1)
    for _ in range(2):
        host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    host.submit(2, Nvm.READ, nsid=1)
    host.drain()
    assert host.controller.sqs[2].waiting == 1
    disk.finish()
    assert [c.sqid for c in host.reap(1)] == [1, 1]
    host.drain()
    disk.finish()
    assert [c.sqid for c in host.reap(1)] == [2]


def test_phase_tags_turn_over_with_every_wrap() -> None:
    host = enabled()
    host.create(sq_size=4, cq_size=3)
    for _ in range(20):
        assert host.command(1, Nvm.FLUSH, nsid=1).status == Status.SUCCESS


def test_a_queue_of_65536_entries() -> None:
    host = enabled(config=ControllerConfig(serial="S", mqes=65535))
    assert host.create_cq(1, 65536).status == Status.SUCCESS
    assert host.create_sq(1, 1, 65536).status == Status.SUCCESS
    assert host.controller.sqs[1].size == 65536


def test_entries_are_fetched_many_at_a_time_but_not_across_the_end_of_the_ring() -> None:
    host = ready()
    for _ in range(14):
        host.command(1, Nvm.FLUSH, nsid=1)
    host.ram.reads.clear()
    for _ in range(5):
        host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert [length for _, length in host.ram.reads] == [2 * 64, 3 * 64]


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_the_entry_is_in_memory_before_the_interrupt() -> None:
    host = enabled()
    host.create(vector=1)
    seen: list[Completion | None] = []
    host.lines.signal = lambda vector: seen.append(host.peek(1))  # type: ignore[method-assign]
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert [completion is not None for completion in seen] == [True]


def test_msix_messages_follow_the_completion_queues_vector() -> None:
    host = enabled()
    host.create(1, vector=5)
    host.lines.signals.clear()
    host.command(1, Nvm.FLUSH, nsid=1)
    assert host.lines.signals == [5]


def test_a_cq_without_interrupts_sends_none() -> None:
    host = enabled()
    host.create_cq(1, flags=1)
    host.lines.signals.clear()
    host.controller.notify(host.controller.cqs[1])
    assert host.lines.signals == []


def test_the_pin_follows_completions_and_masks() -> None:
    lines = Lines(msix=False)
    host = ready(lines=lines)
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert lines.up()
    host.set(Register.INTMS, 1)
    assert not lines.up()
    assert host.get(Register.INTMC) == 1
    host.set(Register.INTMC, 1)
    assert lines.up()
    host.reap(1)
    assert not lines.up()


def test_the_pin_stays_up_while_any_queue_has_completions() -> None:
    lines = Lines(msix=False)
    host = ready(lines=lines)
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.submit(0, Admin.IDENTIFY, cdw10=1)
    host.drain()
    host.reap(1)
    assert lines.up()
    host.reap(0)
    assert not lines.up()


def test_intms_means_nothing_with_msix() -> None:
    host = enabled()
    host.set(Register.INTMS, 1)
    assert host.get(Register.INTMS) == 0


# --- shutdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notification", [1, 2])
def test_shutdown_is_complete_when_the_disks_are_flushed(notification: int) -> None:
    disk = Disk()
    host = ready(disk=disk)
    disk.hold = True
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    host.set(Register.CC, CC | 1 | notification << 14)
    assert host.csts == CSTS_RDY | CSTS_SHST_OCCURRING
    host.drain()
    assert disk.operations == [Operation.READ]
    disk.finish()
    host.drain()
    assert disk.operations == [Operation.READ, Operation.FLUSH]
    assert host.csts == CSTS_RDY | CSTS_SHST_OCCURRING
    disk.finish()
    assert host.csts == CSTS_RDY | CSTS_SHST_COMPLETE
    host.disable()
    assert host.csts == 0


def test_nothing_is_fetched_after_a_shutdown_until_the_notification_is_taken_back() -> None:
    host = ready()
    host.set(Register.CC, CC | 1 | 1 << 14)
    host.drain()
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    assert host.peek(1) is None
    host.set(Register.CC, CC | 1)
    host.drain()
    assert host.csts == CSTS_RDY
    assert len(host.reap(1)) == 1


def test_a_shutdown_of_a_disabled_controller_is_complete_at_once() -> None:
    host = Host()
    host.set(Register.CC, CC | 1 << 14)
    assert host.csts == CSTS_SHST_COMPLETE


def test_a_shutdown_that_a_reset_overtakes_leaves_no_trace() -> None:
    disk = Disk()
    host = ready(disk=disk)
    disk.hold = True
    host.set(Register.CC, CC | 1 | 1 << 14)
    host.drain()
    host.disable()
    assert host.csts & CSTS_RDY
    disk.finish()
    assert host.csts == 0


# --- fatal status ----------------------------------------------------------------------------------------------------


def test_a_submission_queue_outside_guest_memory_is_fatal() -> None:
    host = ready()
    host.ram.holes = [range(0x9_0000, 0xA_0000)]
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert host.csts == CSTS_RDY | CSTS_CFS
    assert host.controller.activity.count == 0
    host.submit(0, Admin.IDENTIFY, cdw10=1)
    host.drain()
    assert host.peek(0) is None
    host.disable()
    assert host.csts == 0


def test_a_completion_queue_outside_guest_memory_is_fatal_and_no_later_one_is_posted() -> None:
    disk = Disk(hold=True)
    host = ready(disk=disk)
    host.create(2)
    host.submit(1, Nvm.READ, nsid=1)
    host.submit(2, Nvm.READ, nsid=1)
    host.drain()
    host.ram.holes = [range(0x3_0000, 0x4_0000)]
    disk.finish()
    assert host.csts == CSTS_RDY | CSTS_CFS
    assert host.peek(2) is None
    assert host.controller.pause(0)


def test_a_guest_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    host = Host()
    for _ in range(50):
        host.set(Register.CC, CC | 1)
        host.disable()
    assert len(caplog.records) == 10
    host.now += 60
    host.set(Register.CC, CC | 1)
    assert len(caplog.records) == 11


def test_data_outside_guest_memory_is_a_data_transfer_error() -> None:
    host = ready()
    completion = host.command(1, Nvm.READ, nsid=1, prp1=1 << 40)
    assert completion.status == Status.DATA_TRANSFER_ERROR
    assert host.admin(Admin.IDENTIFY, cdw10=1, prp1=1 << 40).status == Status.DATA_TRANSFER_ERROR
    assert host.csts == CSTS_RDY


def test_a_handler_that_breaks_is_an_internal_error_to_the_guest(caplog: pytest.LogCaptureFixture) -> None:
    host = ready()
    host.controller.namespaces = None  # type: ignore[assignment]
    assert host.command(1, Nvm.READ, nsid=1).status == Status.INTERNAL_ERROR
    assert "failed inside nvmove" in caplog.text


def test_a_command_completes_once(caplog: pytest.LogCaptureFixture) -> None:
    host = ready()
    sq = host.controller.sqs[1]
    command = Command(host.controller, sq, sqe(Nvm.FLUSH, cid=7))
    sq.cq.reserve()
    host.controller.activity.enter(sq)
    command.complete()
    command.complete()
    assert "completed twice" in caplog.text
    assert [c.cid for c in host.reap(1)] == [7]
    assert host.controller.activity.count == 0


# --- pause -----------------------------------------------------------------------------------------------------------


def test_pause_waits_for_what_is_in_flight_and_fetches_nothing_more() -> None:
    disk = Disk(hold=True)
    host = ready(disk=disk)
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    assert not host.controller.pause(0)
    host.submit(1, Nvm.READ, nsid=1)
    host.drain()
    disk.finish()
    assert host.controller.pause(0)
    assert len(host.reap(1)) == 1
    host.controller.resume()
    host.drain()
    disk.finish()
    assert len(host.reap(1)) == 1


def test_entries_read_while_a_pause_begins_are_fetched_again_after_it() -> None:
    host = ready()
    read = host.ram.read

    def pause_while_reading(address: int, length: int) -> bytes:
        host.ram.read = read  # type: ignore[method-assign]
        host.controller.pause(0)
        return read(address, length)

    host.ram.read = pause_while_reading  # type: ignore[method-assign]
    host.submit(1, Nvm.FLUSH, nsid=1)
    host.drain()
    assert (host.controller.sqs[1].head, host.controller.cqs[1].reserved) == (0, 0)
    assert host.controller.pause(0)
    host.controller.resume()
    host.drain()
    assert len(host.reap(1)) == 1


def test_resume_of_a_running_controller_does_nothing() -> None:
    host = ready()
    host.lines.signals.clear()
    host.controller.resume()
    assert host.lines.signals == []


def test_a_controller_can_have_no_namespace() -> None:
    host = enabled(config=ControllerConfig(serial="S"))
    assert host.admin(Admin.IDENTIFY, cdw10=1).status == Status.SUCCESS
    assert CONFIG.serial == "S1"


class Watched(Ram):
    """Guest memory with a host that polls: it consumes a completion the moment that it is there."""

    host: Host | None = None

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        super().write(address, data)
        if self.host is not None:
            self.host.reap(1)


def test_a_host_may_consume_a_completion_before_it_is_signalled() -> None:
    """The doorbell comes while the writing thread has not gone on: it is right, and leaves the INTx pin low."""
    ram, lines = Watched(), Lines(msix=False)
    host = ready(ram=ram, lines=lines)
    ram.host = host
    for _ in range(40):
        host.submit(1, Nvm.FLUSH, nsid=1)
        host.drain()
        assert not lines.up()
        assert host.controller.cqs[1].is_empty
    ram.host = None
    host.submit(0, Admin.ASYNC_EVENT_REQUEST)
    assert events(host) == []


def test_the_entry_sizes_may_be_set_after_enabling_as_long_as_there_is_no_io_queue() -> None:
    """Base 3.1.3.5: they are required before the first I/O queue is created."""
    host = Host()
    host.enable(cc=CC & 0x70)
    assert host.create_cq(1).status == Status.INVALID_QUEUE_SIZE
    host.set(Register.CC, CC | 1)
    assert host.get(Register.CC) == CC | 1
    assert host.create_cq(1).status == Status.SUCCESS
    host.set(Register.CC, CC & 0x70 | 1)
    assert host.get(Register.CC) == CC | 1
