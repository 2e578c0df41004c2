"""`query-blockstats` and `info blockstats` with the disks of nvmove devices: what their guest has done with them.

QEMU counts where its own devices are. Of a disk that it exports to us it knows no device, and of a raw image of ours
nothing at all. Times are not measured here, and stay 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvmove.block.backend import Operation
from nvmove.nvme.counters import Counters
from nvmove.vm.disks.blockinfo import ServedDrive, unnamed
from nvmove.vm.disks.exports import current_nodes
from nvmove.vm.monitor.facade import Facade

Row = dict[str, Any]
"""QAPI's BlockStats."""

_KINDS = {"rd": Operation.READ, "wr": Operation.WRITE, "unmap": Operation.DISCARD, "flush": Operation.FLUSH}
"""QAPI's BlockDeviceStats name their members by these; "zone_append" is never done."""
_COLUMNS = "                          bytes       operations            total_time_ns     merged"


def stats(counters: Counters, before: Mapping[str, Any] | None = None) -> Row:
    """Return QAPI's BlockDeviceStats; `before` is what QEMU says of its own part of the disk."""
    found: Row = {"wr_highest_offset": 0, "timed_stats": [], "account_invalid": True, "account_failed": True}
    for kind in (*_KINDS, "zone_append"):
        members = ("operations", "total_time_ns", "merged")
        found |= {f"{kind}_{member}": 0 for member in members if (kind, member) != ("flush", "merged")}
        found |= {f"failed_{kind}_operations": 0, f"invalid_{kind}_operations": 0}
        if kind != "flush":
            found[f"{kind}_bytes"] = 0
    found |= before or {}
    for kind, operation in _KINDS.items():
        count = counters[operation]
        found |= {f"{kind}_operations": count.operations, f"failed_{kind}_operations": count.failed}
        if kind != "flush":
            found[f"{kind}_bytes"] = count.bytes
    return found


def complete(answer: Sequence[Row], drives: Sequence[ServedDrive], nodes: Mapping[str, str]) -> list[Row]:
    """Return QEMU's rows with our devices' drives in them; `nodes` are those that exports are on now, by export."""
    named = {drive.name: drive for drive in drives if drive.in_qemu and drive.name}
    rows = []
    for row in answer:
        drive = named.get(row.get("device", ""))
        if drive is not None:
            rows.append({**row, "qdev": drive.qdev, "stats": stats(drive.counters(), row["stats"])})
        else:
            rows.append(row)
    for drive in drives:
        if drive not in named.values():
            node = nodes.get(drive.export, drive.node)
            rows.append(
                {
                    "device": drive.name,
                    **({"node-name": node} if node else {}),
                    "stats": stats(drive.counters()),
                    "qdev": drive.qdev,
                }
            )
    return rows


def text(rows: Sequence[Row]) -> str:
    """Return what HMP `info blockstats` prints."""
    lines: list[str] = []
    for row in rows:
        found = row["stats"]
        lines += [""] if lines else []
        lines += [f"{row.get('device', '')}: idle_time_ns={found.get('idle_time_ns', 0)}", _COLUMNS]
        for title, kind in (("Read", "rd"), ("Write", "wr")):
            lines.append(
                f"{title + ':':<6}{found[f'{kind}_bytes']:>25}{found[f'{kind}_operations']:>17}"
                f"{found[f'{kind}_total_time_ns']:>25}{found[f'{kind}_merged']:>11}"
            )
        lines.append(f"Flush:{found['flush_operations']:>42}{found['flush_total_time_ns']:>25}")
    return "".join(f"{line}\r\n" for line in lines)


class BlockStats:
    """The commands."""

    def __init__(self, facade: Facade, drives: Sequence[ServedDrive]) -> None:
        self._facade = facade
        self._drives = drives

    def register(self) -> None:
        """Put them into the facade."""
        self._facade.handlers["query-blockstats"] = self._qmp
        self._facade.hmp_handlers["info blockstats"] = self._hmp
        self._facade.commands.concurrent |= {"query-blockstats", "info blockstats"}

    async def _qmp(self, facade: Facade, arguments: dict[str, Any]) -> Any:
        answer = await facade.execute("query-blockstats", arguments or None)
        if arguments.get("query-nodes"):  # of nodes, not of devices
            return answer
        return complete(answer, self._drives, await current_nodes(facade) if unnamed(self._drives) else {})

    async def _hmp(self, facade: Facade, arguments: str, _out: Callable[[str], None]) -> str:
        if arguments.strip():
            return await facade.hmp(f"info blockstats {arguments}")  # which takes none: QEMU says so
        return text(await self._qmp(facade, {}))
