"""The user's NBD server, where QEMU's own is nvmove's: its commands, and its exports among ours in QEMU.

QEMU has one NBD server. nvmove has it listen on a private socket, and listens at the user's address itself while the
user's server runs (vm/disks/nbdproxy.py). What the user's server is to offer is QEMU's to export, as always.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nvmove.errors import UserError
from nvmove.vm.disks.blockinfo import ServedDrive
from nvmove.vm.disks.exports import Export, current_node, remove_export
from nvmove.vm.disks.nbdproxy import NbdProxy
from nvmove.vm.line.endpoints import TcpAddress, UnixAddress
from nvmove.vm.monitor.facade import Facade, QmpError
from nvmove.vm.monitor.listener import Listener

Out = Callable[[str], None]

NOT_RUNNING, RUNNING = "NBD server not running", "NBD server already running"
"""QEMU's words."""
_MAX_CONNECTIONS, _HANDSHAKE_SECONDS = 100, 10
"""QEMU's defaults."""
_UNIX = frozenset({"path", "abstract", "tight"})
_INET = frozenset({"host", "port", "to", "ipv4", "ipv6"})


class NbdServer:
    """One VM's; for when QEMU exports `drives` to us, each by the export beside it."""

    def __init__(self, facade: Facade, drives: Sequence[tuple[ServedDrive, Export]], socket: Path) -> None:
        self._facade = facade
        self._drives = drives
        self._socket = socket
        self._ours = frozenset(export.name for _, export in drives)
        self._proxy: NbdProxy | None = None

    def register(self) -> None:
        """Put the commands into the facade."""
        facade = self._facade
        facade.handlers |= {
            "nbd-server-start": self._start,
            "nbd-server-stop": self._stop,
            "nbd-server-add": self._server_add,
            "nbd-server-remove": self._server_remove,
            "block-export-add": self._export_add,
            "block-export-del": self._export_del,
            "query-block-exports": self._query,
        }
        facade.hmp_handlers |= {
            "nbd_server_start": self._hmp_start,
            "nbd_server_stop": self._hmp_stop,
            "nbd_server_add": self._hmp_add,
            "nbd_server_remove": self._hmp_remove,
        }
        facade.commands.concurrent |= {"query-block-exports"}
        facade.filters.append(self._without_ours)

    async def close(self) -> None:
        """Hang up on the clients."""
        proxy, self._proxy = self._proxy, None
        if proxy is not None:
            await proxy.close()

    def _is_hidden(self, name: bytes) -> bool:
        return name.decode(errors="replace") in self._ours

    def _without_ours(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Drop the events of exports that the user knows nothing of."""
        hidden = event["event"] == "BLOCK_EXPORT_DELETED" and event.get("data", {}).get("id") in self._ours
        return [] if hidden else [event]

    # --- the server --------------------------------------------------------------------------------------------------

    async def _start(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        try:
            await facade.execute("nbd-server-start", arguments)  # its server runs: it says what is wrong, or just that
        except QmpError as error:
            if error.desc != RUNNING or self._proxy is not None:
                raise
        await self._listen(
            address(arguments["addr"]),
            max_connections=int(arguments.get("max-connections", _MAX_CONNECTIONS)),
            seconds=int(arguments.get("handshake-max-seconds", _HANDSHAKE_SECONDS)),
            refused=next((name for name in ("tls-creds", "tls-authz") if name in arguments), ""),
        )
        return {}

    async def _listen(
        self, where: UnixAddress | TcpAddress, *, max_connections: int, seconds: int, refused: str = ""
    ) -> None:
        if refused:
            raise QmpError(
                "GenericError",
                f"{refused} is not supported: QEMU's NBD server is nvmove's, which passes clients on and speaks no TLS",
            )
        proxy = NbdProxy(
            Listener(where),
            self._socket,
            self._is_hidden,
            max_connections=max_connections,
            handshake_seconds=seconds,
        )
        try:
            await proxy.open()
        except UserError as error:
            raise QmpError("GenericError", str(error)) from None
        self._proxy = proxy

    async def _stop(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        if arguments:
            raise QmpError("GenericError", f"Parameter '{next(iter(arguments))}' is unexpected")
        self._check_running()
        await self.close()
        for export in await facade.execute("query-block-exports"):
            if export["type"] == "nbd" and export["id"] not in self._ours:
                await remove_export(facade, export["id"])
        return {}

    def _check_running(self) -> None:
        if self._proxy is None:
            raise QmpError("GenericError", NOT_RUNNING)

    # --- exports -----------------------------------------------------------------------------------------------------

    async def _export_add(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        if arguments.get("type") == "nbd":
            self._check_running()
        if arguments.get("writable") is True:
            await self._check_writable(arguments.get("node-name"))
        return await facade.execute("block-export-add", arguments)

    async def _server_add(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        self._check_running()
        if arguments.get("writable") is True:
            await self._check_writable(arguments.get("device"))
        return await facade.execute("nbd-server-add", arguments)

    async def _check_writable(self, name: object) -> None:
        """Refuse a second writer where QEMU would, were the device its own: not before an incoming migration's end."""
        if (await self._facade.execute("query-status"))["status"] == "inmigrate":
            return
        for drive, export in self._drives:
            shares = drive.config.options.share_rw or not export.writable
            if not shares and name in {drive.name, drive.node, await current_node(self._facade, export)} - {""}:
                raise QmpError(
                    "GenericError",
                    f"Permission conflict on node '{name}': the device '{drive.qdev}' writes to it, and its guest "
                    "would not know of another writer (share-rw=on allows it)",
                )

    async def _export_del(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        self._check_users(arguments.get("id"))
        return await facade.execute("block-export-del", arguments)

    async def _server_remove(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        self._check_users(arguments.get("name"))
        return await facade.execute("nbd-server-remove", arguments)

    def _check_users(self, ident: object) -> None:
        if ident in self._ours:
            raise QmpError("GenericError", f"Export '{ident}' is not found")

    async def _query(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        found = await facade.execute("query-block-exports", arguments or None)
        return [export for export in found if export["id"] not in self._ours]

    # --- HMP ---------------------------------------------------------------------------------------------------------

    async def _hmp_start(self, facade: Facade, arguments: str, _out: Out) -> str:
        said = await facade.hmp(f"nbd_server_start {arguments}".strip())
        if said.strip() != f"Error: {RUNNING}" or self._proxy is not None:
            return said  # what is wrong with the line
        every, writable, where = _hmp_words(arguments)
        await self._listen(hmp_address(where), max_connections=_MAX_CONNECTIONS, seconds=_HANDSHAKE_SECONDS)
        if every:
            try:
                await self._add_all(facade, writable)
            except QmpError:
                await self._stop(facade, {})
                raise
        return ""

    async def _add_all(self, facade: Facade, writable: bool) -> None:
        for info in await facade.dispatch("query-block"):
            if "inserted" in info:
                name = info["device"]
                if not name:  # a -blockdev: QEMU's own words
                    raise QmpError("GenericError", "Cannot find device='' nor node-name=''")
                what = {"type": "nbd", "id": name, "node-name": info["inserted"]["node-name"], "name": name}
                await facade.dispatch("block-export-add", {**what, "writable": writable})

    async def _hmp_stop(self, facade: Facade, arguments: str, _out: Out) -> str:
        if arguments:
            return await facade.hmp(f"nbd_server_stop {arguments}")  # which takes none: QEMU says so
        await self._stop(facade, {})
        return ""

    async def _hmp_add(self, facade: Facade, arguments: str, _out: Out) -> str:
        words = arguments.split()
        plain = [word for word in words if word != "-w"]
        if plain:
            self._check_running()
            if "-w" in words:
                await self._check_writable(plain[0])
        return await facade.hmp(f"nbd_server_add {arguments}".strip())

    async def _hmp_remove(self, facade: Facade, arguments: str, _out: Out) -> str:
        for word in arguments.split():
            self._check_users(word)
        return await facade.hmp(f"nbd_server_remove {arguments}".strip())


def address(given: dict[str, Any]) -> UnixAddress | TcpAddress:
    """Return QMP's SocketAddressLegacy, which QEMU has found well-formed; raise QmpError for what is not supported."""
    kind, data = given["type"], given["data"]
    known = {"unix": _UNIX, "inet": _INET}.get(kind)
    if known is None:
        raise _unsupported(f"address type '{kind}'")
    for name in data:
        if name not in known:
            raise _unsupported(f"'{name}' of an address")
    if kind == "unix":
        return UnixAddress(data["path"], abstract=data.get("abstract", False), tight=data.get("tight", True))
    return TcpAddress(data["host"], data["port"], data.get("to"), data.get("ipv4"), data.get("ipv6"))


def hmp_address(text: str) -> UnixAddress | TcpAddress:
    """Return an address as HMP has it (`unix:PATH`, `[tcp:]HOST:PORT[,to=…][,ipv4][,ipv6]`), which QEMU took as one."""
    for prefix in ("fd:", "vsock:"):
        if text.startswith(prefix):
            raise _unsupported(f"address type '{prefix[:-1]}'")
    if text.startswith("unix:"):
        return UnixAddress(text.removeprefix("unix:"))
    first, *options = text.removeprefix("tcp:").split(",")
    host, _, port = first.rpartition(":")
    values: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name == "to":
            values["to"] = int(value)
        elif name in ("ipv4", "ipv6"):
            values[name] = value in ("on", "") if equals else True
        else:
            raise _unsupported(f"'{name}' of an address")
    return TcpAddress(host.strip("[]"), port, **values)


def _unsupported(what: str) -> QmpError:
    return QmpError(
        "GenericError",
        f"{what} is not supported: QEMU's NBD server is nvmove's, which listens for it on unix and inet sockets only",
    )


def _hmp_words(arguments: str) -> tuple[bool, bool, str]:
    """Return (-a, -w, address) of a line that QEMU has found well-formed."""
    found = re.fullmatch(r"(-a\b)?\s*(-w\b)?\s*(.*)", arguments.strip(), re.DOTALL)
    assert found is not None
    where = found[3]
    if where.startswith('"'):
        where = re.sub(r"\\(.)", r"\1", where.strip('"'))
    return bool(found[1]), bool(found[2]), where
