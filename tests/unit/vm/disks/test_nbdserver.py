"""The user's NBD server as a monitor's clients have it, with a fake QEMU whose own server is nvmove's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nvmove.block.config import DriveConfig, OpenOptions
from nvmove.vm.disks import exports as exports_module
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.exports import Export, current_node, remove_export
from nvmove.vm.disks.nbdserver import NbdServer, address, hmp_address
from nvmove.vm.line.endpoints import TcpAddress, UnixAddress
from nvmove.vm.monitor.facade import Facade, QmpError
from tests.disk import Disk
from tests.fake_qemu import FakeQemu, facade_on_fake

OURS = "nvmove-secret"
RUNNING = "NBD server already running"


class Bench:
    """A facade with the server's commands; QEMU exports the disk `d0` (node `n0`) to us, as `OURS`."""

    def __init__(self, facade: Facade, qemu: FakeQemu, directory: Path, share_rw: bool) -> None:
        self.facade = facade
        self.qemu = qemu
        self.path = directory / "user"
        self.exports = [{"id": OURS, "node-name": "n0", "type": "nbd", "shutting-down": False}]
        self.status = "running"
        self.seen: list[dict[str, Any]] = []
        facade.subscribe(self, self.seen.append)
        config = DriveConfig(id="d0", node_name="n0", file="a.qcow2", options=OpenOptions(share_rw=share_rw))
        drive = ServedDrive("d0", "n0", "nv0", config, Disk(), in_qemu=True)
        self.server = NbdServer(facade, [(drive, Export("d0", "n0", True, OURS))], directory / "private")
        self.server.register()
        qemu.answers |= {
            "nbd-server-start": RuntimeError(RUNNING),
            "block-export-add": self._add,
            "block-export-del": self._del,
            "nbd-server-add": {},
            "nbd-server-remove": {},
            "query-block-exports": self._query,
            "query-block": self._query_block,
            "query-status": self._query_status,
        }
        qemu.hmp_answers |= {
            f"nbd_server_start {flags}unix:{self.path}": f"Error: {RUNNING}\r\n" for flags in ("", "-a ", "-a -w ")
        }

    async def _add(self, arguments: dict[str, Any]) -> Any:
        self.exports.append({"id": arguments["id"], "node-name": arguments["node-name"], "type": arguments["type"]})
        return {}

    async def _del(self, arguments: dict[str, Any]) -> Any:
        self.exports = [export for export in self.exports if export["id"] != arguments["id"]]
        self.qemu.event("BLOCK_EXPORT_DELETED", id=arguments["id"])
        return {}

    async def _query(self, _arguments: Any) -> Any:
        return self.exports

    async def _query_block(self, _arguments: Any) -> Any:
        return [{"device": "d0", "inserted": {"node-name": "n0"}}, {"device": "cd"}]

    async def _query_status(self, _arguments: Any) -> Any:
        return {"status": self.status}

    @property
    def unix(self) -> dict[str, Any]:
        return {"addr": {"type": "unix", "data": {"path": str(self.path)}}}

    async def start(self, **more: Any) -> None:
        assert await self.facade.dispatch("nbd-server-start", {**self.unix, **more}) == {}

    async def refused(self, name: str, arguments: dict[str, Any] | None = None) -> str:
        with pytest.raises(QmpError) as raised:
            await self.facade.dispatch(name, arguments)
        assert raised.value.class_ == "GenericError"
        return raised.value.desc

    def asked(self, name: str) -> list[Any]:
        """The arguments of the commands `name` that QEMU got."""
        return [request.get("arguments") for request in self.qemu.requests if request["execute"] == name]


def with_bench(directory: Path, test: Callable[[Bench], Awaitable[None]], share_rw: bool = False) -> None:
    async def main() -> None:
        async with facade_on_fake() as (facade, qemu):
            bench = Bench(facade, qemu, directory, share_rw)
            try:
                await test(bench)
            finally:
                await bench.server.close()

    asyncio.run(main())


def test_the_server_is_ours_to_start_and_stop(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        add = {"type": "nbd", "id": "e0", "node-name": "other"}
        for name, arguments in (
            ("nbd-server-stop", {}),
            ("block-export-add", add),
            ("nbd-server-add", {"device": "x"}),
        ):
            assert await bench.refused(name, arguments) == "NBD server not running"
        await bench.start()
        assert bench.path.is_socket()
        assert await bench.refused("nbd-server-start", bench.unix) == RUNNING
        await bench.facade.dispatch("block-export-add", add)
        await bench.facade.dispatch("nbd-server-add", {"device": "x"})
        assert await bench.facade.dispatch("query-block-exports") == [
            {"id": "e0", "node-name": "other", "type": "nbd"},
        ]
        assert await bench.facade.dispatch("nbd-server-stop") == {}
        assert not bench.path.exists()
        assert [export["id"] for export in bench.exports] == [OURS]
        assert await bench.refused("nbd-server-stop") == "NBD server not running"

    with_bench(tmp_path, test)


def test_what_is_wrong_with_the_arguments_is_qemus_to_say(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.qemu.answers["nbd-server-start"] = RuntimeError("Parameter 'addr' is missing")
        assert await bench.refused("nbd-server-start") == "Parameter 'addr' is missing"
        assert await bench.facade.dispatch_hmp("nbd_server_start foo") == "unknown command: 'nbd_server_start foo'\r\n"
        assert await bench.refused("nbd-server-stop", {"x": 1}) == "Parameter 'x' is unexpected"

    with_bench(tmp_path, test)


@pytest.mark.parametrize("option", ["tls-creds", "tls-authz"])
def test_tls_is_refused_by_name(tmp_path: Path, option: str) -> None:
    async def test(bench: Bench) -> None:
        said = await bench.refused("nbd-server-start", {**bench.unix, option: "t"})
        assert said.startswith(f"{option} is not supported:") and "\n" not in said
        assert not bench.path.exists()

    with_bench(tmp_path, test)


def test_an_address_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        where = {"addr": {"type": "unix", "data": {"path": "/no/such"}}}
        said = await bench.refused("nbd-server-start", where)
        assert said == "Failed to bind socket to /no/such: No such file or directory"
        await bench.start()

    with_bench(tmp_path, test)


def test_exports_of_other_kinds_need_no_server_and_outlive_it(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.facade.dispatch("block-export-add", {"type": "fuse", "id": "f", "node-name": "other"})
        await bench.start()
        await bench.facade.dispatch("nbd-server-stop")
        assert [export["id"] for export in bench.exports] == [OURS, "f"]

    with_bench(tmp_path, test)


def test_our_exports_are_not_the_users_to_see_or_remove(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        assert await bench.facade.dispatch("query-block-exports") == []
        assert await bench.refused("block-export-del", {"id": OURS}) == f"Export '{OURS}' is not found"
        assert await bench.refused("nbd-server-remove", {"name": OURS}) == f"Export '{OURS}' is not found"
        assert await bench.facade.dispatch_hmp(f"nbd_server_remove {OURS}") == f"Error: Export '{OURS}' is not found\n"
        bench.qemu.event("BLOCK_EXPORT_DELETED", id=OURS)
        bench.qemu.event("BLOCK_EXPORT_DELETED", id="theirs")
        async with asyncio.timeout(20):
            while not bench.seen:
                await asyncio.sleep(0.001)
        assert [event["data"]["id"] for event in bench.seen] == ["theirs"]

    with_bench(tmp_path, test)


def test_the_users_exports_are_qemus_to_remove(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.facade.dispatch("block-export-del", {"id": "e0", "mode": "hard"})
        await bench.facade.dispatch("nbd-server-remove", {"name": "e1"})
        assert bench.asked("block-export-del") == [{"id": "e0", "mode": "hard"}]
        assert bench.asked("nbd-server-remove") == [{"name": "e1"}]

    with_bench(tmp_path, test)


@pytest.mark.parametrize("name", ["d0", "n0", "overlay"])
def test_a_second_writer_is_refused_while_the_guest_may_write(tmp_path: Path, name: str) -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        if name == "overlay":
            bench.exports[0]["node-name"] = name
        add = {"type": "nbd", "id": "e0", "node-name": name}
        said = await bench.refused("block-export-add", {**add, "writable": True})
        assert said.startswith(f"Permission conflict on node '{name}': the device 'nv0' writes to it")
        assert await bench.refused("nbd-server-add", {"device": name, "writable": True}) == said
        assert await bench.facade.dispatch_hmp(f"nbd_server_add -w {name}") == f"Error: {said}\n"
        await bench.facade.dispatch("block-export-add", add)
        bench.status = "inmigrate"
        await bench.facade.dispatch("block-export-add", {**add, "id": "e1", "writable": True})

    with_bench(tmp_path, test)


def test_a_second_writer_is_welcome_where_the_device_shares(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.start()
        await bench.facade.dispatch("nbd-server-add", {"device": "d0", "writable": True})
        await bench.facade.dispatch("block-export-add", {"type": "nbd", "id": "e", "node-name": "n0", "writable": True})

    with_bench(tmp_path, test, share_rw=True)


def test_hmp_starts_adds_and_stops(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        hmp = bench.facade.dispatch_hmp
        assert await hmp("nbd_server_stop") == "Error: NBD server not running\n"
        assert await hmp("nbd_server_add x") == "Error: NBD server not running\n"
        assert await hmp(f"nbd_server_start unix:{bench.path}") == ""
        assert bench.path.is_socket()
        bench.qemu.hmp_answers["nbd_server_add x y"] = ""
        bench.qemu.hmp_answers["nbd_server_remove -f y"] = ""
        assert await hmp("nbd_server_add x y") == ""
        assert await hmp("nbd_server_remove -f y") == ""
        assert await hmp("nbd_server_stop now") == "unknown command: 'nbd_server_stop now'\r\n"
        assert await hmp("nbd_server_stop") == ""
        assert not bench.path.exists()

    with_bench(tmp_path, test)


def test_hmp_exports_every_drive_or_none(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        hmp = bench.facade.dispatch_hmp
        assert await hmp(f"nbd_server_start -a unix:{bench.path}") == ""
        added = {"type": "nbd", "id": "d0", "node-name": "n0", "name": "d0", "writable": False}
        assert bench.asked("block-export-add") == [added]
        assert await hmp("nbd_server_stop") == ""
        said = await hmp(f"nbd_server_start -a -w unix:{bench.path}")
        assert said.startswith("Error: Permission conflict on node 'n0'")
        assert not bench.path.exists()
        bench.qemu.answers["query-block"] = [{"device": "", "inserted": {"node-name": "n1"}}]
        assert "Cannot find device=''" in await hmp(f"nbd_server_start -a unix:{bench.path}")
        assert [export["id"] for export in bench.exports] == [OURS]

    with_bench(tmp_path, test)


def test_an_export_whose_requests_do_not_end_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports_module, "REMOVE_SECONDS", 0.05)

    async def test(bench: Bench) -> None:
        bench.qemu.answers["block-export-del"] = {}
        with pytest.raises(QmpError, match="The block export does not end"):
            await remove_export(bench.facade, OURS)

    with_bench(tmp_path, test)


def test_an_exports_node_is_the_one_that_it_is_on_now(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        export = Export("d0", "n0", True, OURS)
        bench.exports[0]["node-name"] = "overlay"
        assert await current_node(bench.facade, export) == "overlay"
        bench.exports.clear()
        assert await current_node(bench.facade, export) == "n0"

    with_bench(tmp_path, test)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"type": "unix", "data": {"path": "/a"}}, UnixAddress("/a")),
        (
            {"type": "unix", "data": {"path": "a", "abstract": True, "tight": False}},
            UnixAddress("a", abstract=True, tight=False),
        ),
        ({"type": "inet", "data": {"host": "::1", "port": "10809"}}, TcpAddress("::1", "10809")),
        (
            {"type": "inet", "data": {"host": "h", "port": "1", "to": 9, "ipv4": True, "ipv6": False}},
            TcpAddress("h", "1", 9, True, False),
        ),
    ],
)
def test_qmps_addresses(given: dict[str, Any], meant: object) -> None:
    assert address(given) == meant


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"type": "fd", "data": {"str": "3"}}, "address type 'fd' is not supported"),
        ({"type": "vsock", "data": {"cid": "2", "port": "1"}}, "address type 'vsock' is not supported"),
        ({"type": "inet", "data": {"host": "", "port": "1", "keep-alive": True}}, "'keep-alive' of an address is not"),
    ],
)
def test_addresses_that_are_not_supported_are_named(given: dict[str, Any], what: str) -> None:
    with pytest.raises(QmpError, match=what):
        address(given)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("unix:/a,b", UnixAddress("/a,b")),
        ("localhost:10809", TcpAddress("localhost", "10809")),
        (":10809", TcpAddress("", "10809")),
        ("tcp:[::1]:1,to=9,ipv6,ipv4=off", TcpAddress("::1", "1", 9, False, True)),
    ],
)
def test_hmps_addresses(text: str, meant: object) -> None:
    assert hmp_address(text) == meant


@pytest.mark.parametrize("text", ["fd:x", "vsock:2:1", "h:1,keep-alive=on"])
def test_hmps_addresses_that_are_not_supported_are_named(text: str) -> None:
    with pytest.raises(QmpError, match="is not supported: QEMU's NBD server is nvmove's"):
        hmp_address(text)
