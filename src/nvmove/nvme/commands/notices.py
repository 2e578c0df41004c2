"""What the controller tells the guest by itself: asynchronous events (Base 5.2)."""

from __future__ import annotations

from nvmove.nvme.commands.command import Controller
from nvmove.nvme.events import NAMESPACE_CHANGED, Event, critical, is_enabled
from nvmove.nvme.spec import EventType, Log


def notify(controller: Controller, event: Event) -> None:
    """Send `event` to the guest, if it wants such events. From any thread."""
    with controller.lock:
        if is_enabled(event, controller.features.async_event_configuration):
            controller.raise_event(EventType(event.kind), event.info, Log(event.log))


def critical_warnings(controller: Controller, appeared: int) -> None:
    """Send the events of critical warning bits `appeared` (Base figure 207)."""
    for event in critical(appeared, controller.features.async_event_configuration):
        notify(controller, event)


def namespace_changed(controller: Controller, nsid: int) -> None:
    """Namespace `nsid` is not what it was (size, format, attachment): list it, and send the notice."""
    with controller.lock:
        controller.logs.changed.add(nsid)
    notify(controller, NAMESPACE_CHANGED)
