"""Asynchronous events, from their cause to the guest's completion."""

from __future__ import annotations

import errno

from nvmove.block.backend import Operation
from nvmove.nvme import events
from nvmove.nvme.commands import notices
from nvmove.nvme.events import NAMESPACE_CHANGED, TEMPERATURE_THRESHOLD, EventQueue, is_enabled
from nvmove.nvme.spec import DOORBELLS, Admin, Feature, Log, Status
from tests.nvme_commands import CommandHost

NOTICE_RESULT = 0x04_0002
TEMPERATURE_RESULT = 0x02_0101
DOORBELL_RESULT = 0x01_0000


def changed(host: CommandHost) -> None:
    notices.namespace_changed(host.controller, 1)
    host.drain()


def listening() -> CommandHost:
    host = CommandHost()
    host.must(host.set_feature(Feature.ASYNC_EVENT_CONFIGURATION, 0x1FF))
    return host


def test_an_event_completes_the_oldest_request() -> None:
    host = listening()
    first, second = host.aer(), host.aer()
    changed(host)
    assert host.completion(first).result == NOTICE_RESULT
    assert not host.has_completed(second)


def test_an_event_waits_for_a_request() -> None:
    host = listening()
    changed(host)
    assert host.completion(host.aer()).result == NOTICE_RESULT


def test_a_type_is_masked_until_its_log_page_is_read_without_rae() -> None:
    host = listening()
    first, second = host.aer(), host.aer()
    changed(host)
    assert host.has_completed(first)
    changed(host)
    host.get_log(Log.CHANGED_NAMESPACES, 4096, rae=True)
    host.get_log(Log.SMART, 512)
    assert not host.has_completed(second)
    host.get_log(Log.CHANGED_NAMESPACES, 4096)
    host.drain()
    assert host.completion(second).result == NOTICE_RESULT


def test_a_masked_type_does_not_hold_up_another() -> None:
    host = listening()
    first, second = host.aer(), host.aer()
    changed(host)
    changed(host)
    host.controller.write(DOORBELLS + 8 * 40, 4, 1)
    host.drain()
    assert host.completion(first).result == NOTICE_RESULT
    assert host.completion(second).result == DOORBELL_RESULT


def test_more_requests_than_aerl_are_refused() -> None:
    host = CommandHost(aerl=1)
    first, second, third = host.aer(), host.aer(), host.aer()
    assert host.completion(third).status == Status.AER_LIMIT_EXCEEDED
    assert not host.has_completed(first)
    assert not host.has_completed(second)


def test_the_queue_is_bounded_and_says_nothing_twice() -> None:
    queue = EventQueue(limit=1, max_queued=2)
    assert [queue.add(0, info, 1) for info in (0, 0, 1, 2)] == [True, False, True, False]


def test_notices_come_only_when_they_are_enabled() -> None:
    host = CommandHost()
    request = host.aer()
    changed(host)
    assert not host.has_completed(request)
    assert host.controller.logs.changed == {1}


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
    host = listening()
    first, second = host.aer(), host.aer()
    host.must(host.set_feature(Feature.TEMPERATURE_THRESHOLD, 300))
    assert host.completion(first).result == TEMPERATURE_RESULT
    host.get_log(Log.SMART, 512)
    host.must(host.set_feature(Feature.TEMPERATURE_THRESHOLD, 299))
    assert not host.has_completed(second)
    host.must(host.set_feature(Feature.TEMPERATURE_THRESHOLD, 400))
    host.must(host.set_feature(Feature.TEMPERATURE_THRESHOLD, 300))
    assert host.completion(second).result == TEMPERATURE_RESULT


def test_an_internal_error_is_an_event_too() -> None:
    host = CommandHost()
    request = host.aer()
    host.disk.fail[Operation.READ] = errno.ENOMEM
    assert host.read(0, 1).status == Status.INTERNAL_ERROR
    assert host.completion(request).result == 0x01_0400


def test_abort_takes_a_request_out() -> None:
    host = CommandHost()
    first, second = host.aer(), host.aer()
    assert host.must(host.admin(Admin.ABORT, cdw10=first << 16)).result == 0
    assert host.completion(first).status == Status.ABORT_REQUESTED
    assert host.admin(Admin.ABORT, cdw10=first << 16).result == 1
    assert list(host.controller.events.outstanding) == [second]


def test_a_reset_drops_requests_events_and_masks() -> None:
    host = listening()
    host.aer()
    changed(host)
    changed(host)
    host.disable()
    queue = host.controller.events
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
