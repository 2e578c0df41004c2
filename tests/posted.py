"""Register writes as vfio-user messages that nobody answers."""

from __future__ import annotations

from nvmove.vfio import message
from nvmove.vfio.device import BAR0_REGION
from nvmove.vfio.message import Command, RegionAccess


def posted(offset: int, value: int, count: int = 4, region: int = BAR0_REGION) -> bytes:
    access = RegionAccess(offset, region, count, value.to_bytes(count, "little"))
    payload = message.region_access_payload(access)
    return message.command(1, Command.REGION_WRITE, payload, message.FLAG_NO_REPLY)
