"""The D-Bus service through which QEMU's `dbus-vmstate` object saves and loads our devices' state.

QEMU asks every owner of the name `org.qemu.VMState1`, the queued ones too, for its property `Id`, so each device has a
connection of its own. While QEMU calls `Save` or `Load` its main thread waits, monitor included: a service answers
from memory and asks nothing of QEMU. (QEMU's docs/interop/dbus-vmstate.rst.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from dbus_fast import DBusError, Message, MessageType, RequestNameReply, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.auth import AuthAnonymous

from nvmove.vmstate.dbus_daemon import BusError, DBusDaemon
from nvmove.vmstate.schema import StateError

NAME = "org.qemu.VMState1"
PATH = "/org/qemu/VMState1"
INTERFACE = NAME
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
LIMIT = 1 << 20
"""Bytes of one Id's state that QEMU takes (DBUS_VMSTATE_SIZE_LIMIT)."""
ID_MAX = 255
"""Bytes of an Id that QEMU reads back."""

XML = f"""<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
<node><interface name="{INTERFACE}">
<property name="Id" type="s" access="read"/>
<method name="Load"><arg type="ay" name="data" direction="in"/></method>
<method name="Save"><arg type="ay" name="data" direction="out"/></method>
</interface></node>
"""

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A device that has state. Both are called on a thread of their own, one at a time."""

    def save(self) -> bytes:
        """Return the state. It never fails: what can be refused is refused before QEMU is asked."""

    def load(self, data: bytes) -> None:
        """Take the state over; raise StateError, with nothing touched."""


def check_size(ident: str, data: bytes) -> None:
    """Raise StateError when QEMU would not carry `data`; asked before savevm and migrate, QEMU only logs it."""
    if len(data) > LIMIT:
        raise StateError(f"the state of {ident} has {len(data)} bytes, QEMU carries at most {LIMIT}")


class VMStateBus:
    """The private bus and our services on it."""

    def __init__(self, daemon: DBusDaemon) -> None:
        self._daemon = daemon
        self._connections: dict[str, MessageBus] = {}
        self._lock = asyncio.Lock()
        self.refusal = ""
        """Why a service refused a state, the last time that one did."""

    @classmethod
    async def start(cls, run_directory: Path, program: str = "dbus-daemon") -> VMStateBus:
        """Start a bus with its socket in `run_directory`; raise BusError."""
        return cls(await DBusDaemon.start(run_directory, program))

    @property
    def address(self) -> str:
        """The bus's D-Bus address."""
        return self._daemon.address

    @property
    def daemon_pid(self) -> int:
        """The process id of the dbus-daemon."""
        return self._daemon.pid

    def qemu_object(self, object_id: str = "nvmove-vmstate") -> dict[str, str]:
        """Return the properties of QEMU's object, for `-object JSON`: the Ids added so far are mandatory."""
        return {
            "qom-type": "dbus-vmstate",
            "id": object_id,
            "addr": self.address,
            "id-list": ",".join(self._connections),
        }

    async def add(self, ident: str, device: Stateful) -> None:
        """Offer `device` under the Id `ident` (no comma, for QEMU's id-list); raise BusError."""
        if not ident or "," in ident or len(ident.encode()) > ID_MAX:
            raise BusError(f"{ident!r} is no Id: 1 to {ID_MAX} bytes, no comma")
        if ident in self._connections:
            raise BusError(f"the Id {ident!r} is taken")
        connection = MessageBus(bus_address=self.address, auth=AuthAnonymous())
        try:
            await connection.connect()
            connection.add_message_handler(_Service(ident, device, connection, self._lock, self._refused).handle)
            reply = await connection.request_name(NAME)
        except (OSError, EOFError, DBusError) as error:
            connection.disconnect()
            why = str(error) or type(error).__name__
            raise BusError(f"the private D-Bus at {self.address} does not answer: {why}") from None
        if reply not in (RequestNameReply.PRIMARY_OWNER, RequestNameReply.IN_QUEUE):
            connection.disconnect()
            raise BusError(f"the private D-Bus did not give {NAME} away: {reply.name}")
        self._connections[ident] = connection

    def _refused(self, why: str) -> None:
        self.refusal = why

    def check(self) -> None:
        """Raise BusError when QEMU could not reach every service now; to be asked before savevm or migrate."""
        self._daemon.check()
        for ident, connection in self._connections.items():
            if not connection.connected:
                raise BusError(f"the connection of {ident} to the private D-Bus is gone")

    async def close(self) -> None:
        """Leave the bus and end it."""
        for connection in self._connections.values():
            connection.disconnect()
        self._connections.clear()
        await self._daemon.close()


class _Service:
    """The object of one device: answers the calls that reach its connection."""

    def __init__(
        self,
        ident: str,
        device: Stateful,
        connection: MessageBus,
        lock: asyncio.Lock,
        refused: Callable[[str], None],
    ) -> None:
        self._ident = ident
        self._device = device
        self._connection = connection
        self._lock = lock
        self._refused = refused
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, message: Message) -> Message | bool | None:
        """Answer `message` (at once, or later from a task), or return None and leave it to dbus-fast."""
        if message.message_type is not MessageType.METHOD_CALL or message.path != PATH:
            return None
        match message.interface, message.member, message.signature, message.body:
            case (str(i), "Save", "", _) if i == INTERFACE:
                return self._later(partial(self._save, message))
            case (str(i), "Load", "ay", [bytes() | bytearray() as data]) if i == INTERFACE:
                return self._later(partial(self._load, message, bytes(data)))
            case (str(i), "GetAll", "s", [str(of)]) if i == PROPERTIES and of == INTERFACE:
                return Message.new_method_return(message, "a{sv}", [{"Id": Variant("s", self._ident)}])
            case (str(i), "Get", "ss", [str(of), "Id"]) if i == PROPERTIES and of == INTERFACE:
                return Message.new_method_return(message, "v", [Variant("s", self._ident)])
            case (str(i), "Introspect", "", _) if i == INTROSPECTABLE:
                return Message.new_method_return(message, "s", [XML])
        return None

    def _later(self, work: Callable[[], Message]) -> bool:
        async def answer() -> None:
            async with self._lock:
                reply = await asyncio.to_thread(work)
            self._connection.send(reply)

        task = asyncio.get_running_loop().create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def _save(self, message: Message) -> Message:
        try:
            data = self._device.save()
            check_size(self._ident, data)
        except StateError as error:
            return self._refuse(message, str(error))
        except Exception:
            log.exception("%s: Save failed", self._ident)
            return self._refuse(message, "an internal error, see nvmove's log")
        log.info("%s: saved, %d bytes", self._ident, len(data))
        return Message.new_method_return(message, "ay", [data])

    def _load(self, message: Message, data: bytes) -> Message:
        try:
            self._device.load(data)
        except StateError as error:
            return self._refuse(message, str(error))
        except Exception:
            log.exception("%s: Load failed", self._ident)
            return self._refuse(message, "an internal error, see nvmove's log")
        log.info("%s: loaded, %d bytes", self._ident, len(data))
        return Message.new_method_return(message)

    def _refuse(self, message: Message, why: str) -> Message:
        log.info("%s: %s refused: %s", self._ident, message.member, why)  # QEMU tells the user
        self._refused(f"{self._ident}: {why}")
        return Message.new_error(message, f"{INTERFACE}.Refused", f"nvmove: {self._ident}: {why}")
