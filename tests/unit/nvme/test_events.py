"""Asynchronous events, from their cause to the guest's completion."""

from __future__ import annotations

import errno

from nvmove.block.backend import Operation
from nvmove.nvme import events
from nvmove.nvme.commands import notices
from nvmove.nvme.events import NAMESPACE_CHANGED, TEMPERATURE_THRESHOLD, EventQueue, is_enabled
from nvmove.nvme.spec import DOORBELLS, Admin, Feature, Log, Status
from tests.nvme_guest import Guest

NOTICE_RESULT = 0x04_0002
TEMPERATURE_RESULT = 0x02_0101
DOORBELL_RESULT = 0x01_0000


def changed(guest: Guest) -> None:
    notices.namespace_changed(guest.controller, 1)
    guest.drain()


def listening() -> Guest:
    guest = Guest()
    guest.must(guest.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 0x1FF))
    return guest


def test_an_event_completes_the_oldest_request() -> None:
    guest = listening()
    first, second = guest.aer(), guest.aer()
    changed(guest)
    assert guest.answer(first).result == NOTICE_RESULT
    assert not guest.has_completed(second)


def test_an_event_waits_for_a_request() -> None:
    guest = listening()
    changed(guest)
    assert guest.answer(guest.aer()).result == NOTICE_RESULT


def test_a_type_is_masked_until_its_log_page_is_read_without_rae() -> None:
    guest = listening()
    first, second = guest.aer(), guest.aer()
    changed(guest)
    assert guest.has_completed(first)
    changed(guest)
    guest.get_log(Log.CHANGED_NAMESPACES, 4096, rae=True)
    guest.get_log(Log.SMART, 512)
    assert not guest.has_completed(second)
    guest.get_log(Log.CHANGED_NAMESPACES, 4096)
    guest.drain()
    assert guest.answer(second).result == NOTICE_RESULT


def test_a_masked_type_does_not_hold_up_another() -> None:
    guest = listening()
    first, second = guest.aer(), guest.aer()
    changed(guest)
    changed(guest)
    guest.controller.write(DOORBELLS + 8 * 40, 4, 1)
    guest.drain()
    assert guest.answer(first).result == NOTICE_RESULT
    assert guest.answer(second).result == DOORBELL_RESULT


def test_more_requests_than_aerl_are_refused() -> None:
    guest = Guest(aerl=1)
    first, second, third = guest.aer(), guest.aer(), guest.aer()
    assert guest.answer(third).status == Status.AER_LIMIT_EXCEEDED
    assert not guest.has_completed(first)
    assert not guest.has_completed(second)


def test_the_queue_is_bounded_and_says_nothing_twice() -> None:
    queue = EventQueue(limit=1, max_queued=2)
    assert [queue.add(0, info, 1) for info in (0, 0, 1, 2)] == [True, False, True, False]


def test_notices_come_only_when_they_are_enabled() -> None:
    guest = Guest()
    request = guest.aer()
    changed(guest)
    assert not guest.has_completed(request)
    assert guest.controller.logs.changed == {1}


def test_each_critical_warning_has_its_enable_bit() -> None:
    assert is_enabled(TEMPERATURE_THRESHOLD, 0x02)
    assert not is_enabled(TEMPERATURE_THRESHOLD, 0xFD)
    assert is_enabled(events.RELIABILITY, 0x04)
    assert is_enabled(events.RELIABILITY, 0x20)
    assert not is_enabled(events.RELIABILITY, 0x03)
    assert is_enabled(events.SPARE_BELOW_THRESHOLD, 0x01)
    assert not is_enabled(NAMESPACE_CHANGED, 0xFF)
    assert is_enabled(events.TRANSIENT_INTERNAL_ERROR, 0)


def test_crossing_a_temperature_threshold_sends_one_event() -> None:
    guest = listening()
    first, second = guest.aer(), guest.aer()
    guest.must(guest.set_feature(Feature.TEMPERATURE_THRESHOLD, 300))
    assert guest.answer(first).result == TEMPERATURE_RESULT
    guest.get_log(Log.SMART, 512)
    guest.must(guest.set_feature(Feature.TEMPERATURE_THRESHOLD, 299))
    assert not guest.has_completed(second)
    guest.must(guest.set_feature(Feature.TEMPERATURE_THRESHOLD, 400))
    guest.must(guest.set_feature(Feature.TEMPERATURE_THRESHOLD, 300))
    assert guest.answer(second).result == TEMPERATURE_RESULT


def test_an_internal_error_is_an_event_too() -> None:
    guest = Guest()
    request = guest.aer()
    guest.disk.fail[Operation.READ] = errno.ENOMEM
    assert guest.read(0, 1).status == Status.INTERNAL_ERROR
    assert guest.answer(request).result == 0x01_0400


def test_abort_takes_a_request_out() -> None:
    guest = Guest()
    first, second = guest.aer(), guest.aer()
    assert guest.must(guest.admin(Admin.ABORT, cdw10=first << 16)).result == 0
    assert guest.answer(first).status == Status.ABORT_REQUESTED
    assert guest.admin(Admin.ABORT, cdw10=first << 16).result == 1
    assert list(guest.controller.events.outstanding) == [second]


def test_a_reset_drops_requests_events_and_masks() -> None:
    guest = listening()
    guest.aer()
    changed(guest)
    changed(guest)
    guest.disable()
    queue = guest.controller.events
    assert (list(queue.outstanding), list(queue.queued), queue.masked) == ([], [], set())


def test_requests_order_queue_and_masks_travel() -> None:
    before = EventQueue(4, 64)
    for cid in (7, 3, 5):
        before.request(cid)
    before.add(*NAMESPACE_CHANGED)
    assert before.deliver() == (7, NAMESPACE_CHANGED)
    before.add(*NAMESPACE_CHANGED)
    before.add(*TEMPERATURE_THRESHOLD)
    after = EventQueue(4, 64)
    after.load(before.save())
    assert after.save() == before.save()
    assert after.deliver() == (3, TEMPERATURE_THRESHOLD)
    assert not after.deliverable
    assert after.acknowledge(Log.CHANGED_NAMESPACES)
    assert after.deliver() == (5, NAMESPACE_CHANGED)
