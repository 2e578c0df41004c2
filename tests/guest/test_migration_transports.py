"""Every way that QEMU has to move a VM moves ours: one guest goes round by all of them, under fio."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.migration import ENDED, Traveller, wait_run_state, wait_status
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def capabilities(machine: Machine, *names: str) -> None:
    """Set these and no others: who was a destination keeps what it was set to."""
    listed = [{"capability": name, "state": name in names} for name in ("multifd", "mapped-ram")]
    machine.qmp.execute("migrate-set-capabilities", {"capabilities": listed})


class Tour(Traveller):
    """One hop for each transport."""

    def arrive(self, target: Machine) -> None:
        source = self.machine
        answer = wait_status(source.qmp, *ENDED)
        assert answer["status"] == "completed", answer
        wait_run_state(target.qmp, "running")
        self.machine = target
        assert source.quit() == 0

    def by_command_line(self, incoming: str, outgoing: str) -> None:
        target = self.destination(incoming=incoming)
        wait_status(target.qmp, "setup")
        self.machine.qmp.execute("migrate", {"uri": outgoing})
        self.arrive(target)

    def over_channels(self, address: dict[str, Any], *names: str, tls: bool = False) -> None:
        target = self.destination()
        for machine, end in ((target, "server"), (self.machine, "client")):
            capabilities(machine, *names)
            parameters = {"tls-creds": f"tls-{end}" if tls else "", "multifd-compression": "zstd"}
            machine.qmp.execute("migrate-set-parameters", parameters)
        channels = [{"channel-type": "main", "addr": address}]
        target.qmp.execute("migrate-incoming", {"channels": channels})
        self.machine.qmp.execute("migrate", {"channels": channels})
        self.arrive(target)

    def over_passed_descriptors(self) -> None:
        target = self.destination()
        self.machine.qmp.execute("migrate-set-parameters", {"tls-creds": ""})
        for machine, end in zip((target, self.machine), socket.socketpair(), strict=True):
            machine.qmp.execute("getfd", {"fdname": "way"}, fd=end.fileno())
            end.close()
        target.qmp.execute("migrate-incoming", {"uri": "fd:way"})
        self.machine.qmp.execute("migrate", {"uri": "fd:way"})
        self.arrive(target)

    def by_a_file(self, path: Path, *names: str) -> None:
        """The source has ended before the destination begins."""
        source = self.machine
        capabilities(source, *names)
        source.qmp.execute("migrate", {"uri": f"file:{path}"})
        assert wait_status(source.qmp, *ENDED)["status"] == "completed"
        assert source.qmp.status == "postmigrate"
        assert source.quit() == 0
        if names:
            self.machine = self.destination()
            capabilities(self.machine, *names)
            self.machine.qmp.execute("migrate-incoming", {"uri": f"file:{path}"})
        else:
            self.machine = self.destination(incoming=f"file:{path}")
        wait_run_state(self.machine.qmp, "running")
        path.unlink()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffix", ["qcow2"])
def test_every_transport(machines: MachineFactory, tree: Sysroot, work: Path, suffix: str) -> None:
    key = work / "keys.psk"
    key.write_text(f"nvmove:{os.urandom(32).hex()}\n")
    tls = [
        *("-object", f"tls-creds-psk,id=tls-server,endpoint=server,dir={work}"),
        *("-object", f"tls-creds-psk,id=tls-client,endpoint=client,username=nvmove,dir={work}"),
    ]
    arguments = ["-M", "q35", *tls, *disk(make_image(tree, work / f"d0.{suffix}"))]
    guest = Tour(machines("m0"), arguments, machines)
    guest.boot()
    load = Fio("v", blocks=8192, rate=100)
    load.start(guest.machine.console)
    done = 0
    port = free_port()
    fifo = work / "fifo"
    os.mkfifo(fifo)
    inet = {"transport": "socket", "type": "inet", "host": "127.0.0.1"}
    hops: tuple[Callable[[], None], ...] = (
        lambda: guest.by_command_line(f"tcp:127.0.0.1:{port}", f"tcp:127.0.0.1:{port}"),
        lambda: guest.by_command_line(f"exec:cat {fifo}", f"exec:cat > {fifo}"),
        lambda: guest.over_channels({"transport": "socket", "type": "unix", "path": str(work / "sock")}),
        lambda: guest.over_channels(inet | {"port": str(free_port())}, "multifd"),
        lambda: guest.over_channels(inet | {"port": str(free_port())}, tls=True),
        guest.over_passed_descriptors,
        lambda: guest.by_a_file(work / "vm"),
        lambda: guest.by_a_file(work / "vm", "mapped-ram", "multifd"),
    )
    for hop in hops:
        done = wait_writes(guest.machine.console, done + 50)
        hop()
        assert not load.finished(guest.machine.console)
    load.wait(guest.machine.console)
    assert disk_complaints(guest.machine.console) == []
