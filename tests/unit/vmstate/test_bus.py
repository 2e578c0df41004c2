"""The VMState1 service on a real private dbus-daemon, asked as QEMU asks it."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus
from dbus_fast.auth import AuthAnonymous

from nvmove.vmstate.bus import INTERFACE, LIMIT, NAME, PATH, PROPERTIES, VMStateBus, check_size
from nvmove.vmstate.dbus_daemon import BusError, DBusDaemon, bus_address
from nvmove.vmstate.schema import StateError


class Disk:
    """A device with one byte string for a state."""

    def __init__(self, state: bytes = b"state") -> None:
        self.state = state

    def save(self) -> bytes:
        return self.state

    def load(self, data: bytes) -> None:
        if data == b"bad":
            raise StateError("nvme.bar: this is bad")
        if data == b"bug":
            raise ZeroDivisionError
        self.state = data


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), 30)

    asyncio.run(limited())


@asynccontextmanager
async def bus_with(directory: Path, **disks: Disk) -> AsyncIterator[tuple[VMStateBus, MessageBus]]:
    bus = await VMStateBus.start(directory)
    try:
        for ident, disk in disks.items():
            await bus.add(ident, disk)
        client = await MessageBus(bus_address=bus.address, auth=AuthAnonymous()).connect()
        try:
            yield bus, client
        finally:
            client.disconnect()
    finally:
        await bus.close()


async def call(
    client: MessageBus, owner: str, member: str, signature: str = "", *body: object, **where: str
) -> Message:
    message = Message(
        destination=owner,
        path=where.get("path", PATH),
        interface=where.get("interface", INTERFACE),
        member=member,
        signature=signature,
        body=list(body),
    )
    reply = await client.call(message)
    assert reply is not None
    return reply


async def owners(client: MessageBus) -> list[str]:
    of = "org.freedesktop.DBus"
    reply = await call(client, of, "ListQueuedOwners", "s", NAME, path="/org/freedesktop/DBus", interface=of)
    return list(reply.body[0])


def test_every_id_has_an_owner_of_the_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with bus_with(tmp_path, nvme0=Disk(), nvme1=Disk()) as (bus, client):
            ids = []
            for owner in await owners(client):
                reply = await call(client, owner, "GetAll", "s", INTERFACE, interface=PROPERTIES)
                ids.append(reply.body[0]["Id"].value)
                reply = await call(client, owner, "Get", "ss", INTERFACE, "Id", interface=PROPERTIES)
                assert reply.body[0].value == ids[-1]
            assert ids == ["nvme0", "nvme1"]
            assert bus.qemu_object()["id-list"] == "nvme0,nvme1"
            bus.check()

    run(test)


def test_save_and_load_reach_the_device(tmp_path: Path) -> None:
    async def test() -> None:
        disk = Disk(b"before")
        async with bus_with(tmp_path, nvme0=disk) as (_, client):
            assert (await call(client, NAME, "Save")).body == [b"before"]
            reply = await call(client, NAME, "Load", "ay", b"after")
            assert reply.message_type is MessageType.METHOD_RETURN
            assert disk.state == b"after"

    run(test)


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"bad", "nvmove: nvme0: nvme.bar: this is bad"), (b"bug", "nvmove: nvme0: an internal error, see nvmove's log")],
)
def test_a_refused_load_is_an_error_with_its_reason(tmp_path: Path, data: bytes, says: str) -> None:
    async def test() -> None:
        disk = Disk()
        async with bus_with(tmp_path, nvme0=disk) as (_, client):
            reply = await call(client, NAME, "Load", "ay", data)
            assert reply.message_type is MessageType.ERROR
            assert reply.body == [says]
            assert disk.state == b"state"

    run(test)


def test_a_state_beyond_qemus_limit_is_refused(tmp_path: Path) -> None:
    check_size("nvme0", bytes(LIMIT))
    with pytest.raises(StateError, match="the state of nvme0 has 1048577 bytes, QEMU carries at most 1048576"):
        check_size("nvme0", bytes(LIMIT + 1))

    async def test() -> None:
        async with bus_with(tmp_path, nvme0=Disk(bytes(LIMIT + 1))) as (_, client):
            reply = await call(client, NAME, "Save")
            assert reply.message_type is MessageType.ERROR

    run(test)


def test_a_save_that_breaks_is_an_error_and_the_service_lives(tmp_path: Path) -> None:
    class Broken(Disk):
        def save(self) -> bytes:
            raise ZeroDivisionError

    async def test() -> None:
        async with bus_with(tmp_path, nvme0=Broken()) as (_, client):
            assert (await call(client, NAME, "Save")).message_type is MessageType.ERROR
            assert (await call(client, NAME, "Load", "ay", b"x")).message_type is MessageType.METHOD_RETURN

    run(test)


@pytest.mark.parametrize(
    ("member", "signature", "body", "where"),
    [
        ("Destroy", "", [], {}),
        ("Load", "s", ["text"], {}),
        ("Save", "", [], {"path": "/elsewhere"}),
        ("Get", "ss", [INTERFACE, "Name"], {"interface": PROPERTIES}),
    ],
)
def test_what_we_do_not_offer_is_an_error(
    tmp_path: Path, member: str, signature: str, body: list[str], where: dict[str, str]
) -> None:
    async def test() -> None:
        async with bus_with(tmp_path, nvme0=Disk()) as (_, client):
            reply = await call(client, NAME, member, signature, *body, **where)
            assert reply.message_type is MessageType.ERROR

    run(test)


def test_the_object_can_be_introspected(tmp_path: Path) -> None:
    async def test() -> None:
        async with bus_with(tmp_path, nvme0=Disk()) as (_, client):
            node = await client.introspect(NAME, PATH)
            assert [i.name for i in node.interfaces] == [NAME]

    run(test)


@pytest.mark.parametrize("ident", ["", "a,b", "x" * 256])
def test_an_id_that_qemu_cannot_list_is_refused(tmp_path: Path, ident: str) -> None:
    async def test() -> None:
        async with bus_with(tmp_path) as (bus, _):
            with pytest.raises(BusError, match="is no Id"):
                await bus.add(ident, Disk())

    run(test)


def test_an_id_is_used_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with bus_with(tmp_path, nvme0=Disk()) as (bus, _):
            with pytest.raises(BusError, match="the Id 'nvme0' is taken"):
                await bus.add("nvme0", Disk())

    run(test)


def test_a_daemon_that_died_is_noticed_before_the_next_save(tmp_path: Path) -> None:
    async def test() -> None:
        bus = await VMStateBus.start(tmp_path)
        try:
            await bus.add("nvme0", Disk())
            bus.check()
            os.kill(bus.daemon_pid, signal.SIGKILL)
            with pytest.raises(BusError):
                while True:
                    bus.check()
                    await asyncio.sleep(0.01)
            with pytest.raises(BusError, match="does not answer"):
                await bus.add("nvme1", Disk())
        finally:
            await bus.close()

    run(test)


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    async def test() -> int:
        daemon = await DBusDaemon.start(tmp_path)
        assert stat.S_ISSOCK((tmp_path / "bus").stat().st_mode)
        await daemon.close()
        return daemon.pid

    pid = asyncio.run(test())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_missing_daemon_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BusError, match=r"^no-such-daemon was not found: install it"):
        asyncio.run(VMStateBus.start(tmp_path, "no-such-daemon"))


def test_a_daemon_that_cannot_start_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BusError, match=r"^false ended with status 1: it said nothing$"):
        asyncio.run(DBusDaemon.start(tmp_path, "false"))
    assert list(tmp_path.iterdir()) == []


def test_a_socket_path_that_is_too_long_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BusError, match="is longer than 107 bytes: use a shorter run directory"):
        asyncio.run(DBusDaemon.start(tmp_path / ("x" * 100)))


def test_a_path_with_strange_characters_works(tmp_path: Path) -> None:
    assert bus_address("/tmp/a b,c=é") == "unix:path=/tmp/a%20b%2cc%3d%c3%a9"
    strange = tmp_path / "a b,c;<é"
    strange.mkdir()

    async def test() -> None:
        async with bus_with(strange, nvme0=Disk()) as (_, client):
            assert (await call(client, NAME, "Save")).body == [b"state"]

    run(test)


def test_the_daemon_dies_with_us(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, signal
from pathlib import Path
from nvmove.vmstate.dbus_daemon import DBusDaemon
async def main():
    daemon = await DBusDaemon.start(Path({str(tmp_path)!r}))
    print(daemon.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    pid = int(child.stdout)

    async def main() -> None:
        while Path(f"/proc/{pid}").exists():  # gone, or a zombie nobody reaps
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            await asyncio.sleep(0.01)
        daemon = await DBusDaemon.start(tmp_path)  # over the files that the dead one left
        await daemon.close()

    asyncio.run(asyncio.wait_for(main(), 60))
