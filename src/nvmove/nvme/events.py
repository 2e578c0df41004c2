"""Asynchronous events: what happened, until an Asynchronous Event Request (AER) carries it to the guest.

An event waits in the queue until an AER is outstanding and its type is not masked. Delivery masks the type until the
guest reads the event's log page without Retain Asynchronous Event. Every method of `EventQueue` wants the controller's
lock held: they only move entries about. The admin queue's worker posts what `deliver` hands it.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from nvmove.nvme.spec import (
    ASYNC_CONFIG_NAMESPACE,
    ASYNC_CONFIG_SMART,
    EVENT_NOTICE_NAMESPACE,
    EVENT_SMART_RELIABILITY,
    EVENT_SMART_SPARE,
    EVENT_SMART_TEMPERATURE,
    EVENT_TRANSIENT_INTERNAL_ERROR,
    WARNING_SPARE,
    WARNING_TEMPERATURE,
    EventType,
    Log,
)
from nvmove.nvme.state import saved as state


class Event(NamedTuple):
    """One asynchronous event, as its completion describes it (Base 5.2)."""

    kind: int
    info: int
    log: int


TRANSIENT_INTERNAL_ERROR = Event(EventType.ERROR, EVENT_TRANSIENT_INTERNAL_ERROR, Log.ERROR_INFORMATION)
RELIABILITY = Event(EventType.SMART, EVENT_SMART_RELIABILITY, Log.SMART)
TEMPERATURE_THRESHOLD = Event(EventType.SMART, EVENT_SMART_TEMPERATURE, Log.SMART)
SPARE_BELOW_THRESHOLD = Event(EventType.SMART, EVENT_SMART_SPARE, Log.SMART)
NAMESPACE_CHANGED = Event(EventType.NOTICE, EVENT_NOTICE_NAMESPACE, Log.CHANGED_NAMESPACES)

_SMART_ENABLE: dict[Event, int] = {
    SPARE_BELOW_THRESHOLD: WARNING_SPARE,
    TEMPERATURE_THRESHOLD: WARNING_TEMPERATURE,
    RELIABILITY: ASYNC_CONFIG_SMART & ~(WARNING_SPARE | WARNING_TEMPERATURE),
}
"""The critical warnings behind each SMART event; the same bits of Asynchronous Event Configuration enable it."""

_TYPE_OF_LOG: dict[int, int] = {
    Log.ERROR_INFORMATION: EventType.ERROR,
    Log.SMART: EventType.SMART,
    Log.CHANGED_NAMESPACES: EventType.NOTICE,
}


class EventQueue:
    """Outstanding AERs, events that wait, and the types masked.

    `limit` AERs may be outstanding (AERL + 1); `max_queued` events wait at most, later ones are dropped.
    """

    def __init__(self, limit: int, max_queued: int) -> None:
        self.limit = limit
        self.max_queued = max_queued
        self.outstanding: deque[int] = deque()
        """Command ids, oldest first."""
        self.queued: deque[Event] = deque()
        self.masked: set[int] = set()

    def request(self, cid: int) -> bool:
        """Keep an AER until there is an event for it; return False beyond the limit."""
        if len(self.outstanding) >= self.limit:
            return False
        self.outstanding.append(cid)
        return True

    def add(self, kind: int, info: int, log: int) -> bool:
        """Queue an event; return whether it was kept. What already waits says the same and is not repeated."""
        event = Event(kind, info, log)
        if event in self.queued or len(self.queued) >= self.max_queued:
            return False
        self.queued.append(event)
        return True

    @property
    def deliverable(self) -> bool:
        """Whether `deliver` would find an AER and an event of a type that is not masked."""
        return bool(self.outstanding) and any(event.kind not in self.masked for event in self.queued)

    def deliver(self) -> tuple[int, Event]:
        """Take the oldest AER and the oldest event that is not masked, and mask its type."""
        event = next(event for event in self.queued if event.kind not in self.masked)
        self.queued.remove(event)
        self.masked.add(event.kind)
        return self.outstanding.popleft(), event

    def acknowledge(self, log: int) -> bool:
        """The guest has read `log` without RAE: its type is masked no more. Returns whether that lets events go."""
        self.masked.discard(_TYPE_OF_LOG.get(log, -1))
        return self.deliverable

    def abort(self, cid: int) -> bool:
        """Take the AER with command id `cid` out; return whether there was one."""
        if cid not in self.outstanding:
            return False
        self.outstanding.remove(cid)
        return True

    def reset(self) -> None:
        """Forget everything, without completions: a controller level reset."""
        self.outstanding.clear()
        self.queued.clear()
        self.masked.clear()

    def save(self) -> state.EventsState:
        """Return all of it as plain data."""
        return state.EventsState(
            outstanding=list(self.outstanding),
            queued=[state.EventState(*event) for event in self.queued],
            masked=sorted(self.masked),
        )

    def load(self, saved: state.EventsState) -> None:
        """Replace everything by `saved`, which was checked."""
        self.outstanding = deque(saved.outstanding)
        self.queued = deque(Event(event.kind, event.info, event.log) for event in saved.queued)
        self.masked = set(saved.masked)


def critical(appeared: int, configuration: int) -> list[Event]:
    """Return the events of critical warning bits `appeared` that Asynchronous Event Configuration lets through.

    Base figure 207.
    """
    return [event for event, bits in _SMART_ENABLE.items() if appeared & bits & configuration]


def is_enabled(event: Event, configuration: int) -> bool:
    """Whether Asynchronous Event Configuration `configuration` lets `event` through; errors always (Base 5.27.1.8)."""
    if event.kind == EventType.NOTICE:
        return bool(configuration & ASYNC_CONFIG_NAMESPACE)
    if event.kind == EventType.SMART:
        return bool(configuration & _SMART_ENABLE[event])
    return True
