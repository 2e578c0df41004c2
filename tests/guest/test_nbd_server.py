"""The user's own NBD server beside nvmove's disks in QEMU: commands, words, clients and exports as on stock QEMU."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.leftovers import Surroundings
from nvmove.lab.machine import Machine
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import assert_nothing_left, disk, make_image


def unix(path: Path) -> dict[str, Any]:
    return {"addr": {"type": "unix", "data": {"path": str(path)}}}


def listed(tree: Sysroot, where: str) -> list[str]:
    """The names of the exports that a client sees."""
    shown = subprocess.run(
        [tree.program("qemu-nbd"), "-L", *where.split()], capture_output=True, text=True, check=False, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    return [line.split("'")[1] for line in shown.stdout.splitlines() if line.startswith(" export:")]


def qemu_io(tree: Sysroot, uri: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    flags = [] if any(command.startswith("write") for command in commands) else ["-r"]
    done = subprocess.run(
        [tree.program("qemu-io"), *flags, "-f", "raw", *words, uri],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout + done.stderr


def says(machine: Machine, command: str, arguments: dict[str, Any] | None = None) -> str:
    """The error of a command that fails."""
    with pytest.raises(QmpError) as raised:
        machine.qmp.execute(command, arguments)
    return str(raised.value)


def free_port() -> int:
    """A TCP port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(machine: Machine, tree: Sysroot, work: Path) -> None:
    """A VM with a qcow2 disk `d0`, and a further image as the node `extra`."""
    extra = make_image(tree, work / "extra.qcow2", "16M")
    machine.start(
        [
            *("-M", "q35", *disk(make_image(tree, work / "d0.qcow2", "16M"))),
            *("-blockdev", f"driver=qcow2,node-name=extra,file.driver=file,file.filename={extra}"),
        ]
    )


def test_the_users_server_offers_the_users_exports_while_it_runs(machine: Machine, tree: Sysroot, work: Path) -> None:
    start(machine, tree, work)
    qmp, path = machine.qmp, work / "s"
    add = {"type": "nbd", "id": "e0", "node-name": "extra", "name": "x", "writable": True}
    assert says(machine, "block-export-add", add) == "NBD server not running"
    assert says(machine, "nbd-server-stop") == "NBD server not running"
    assert qmp.hmp("nbd_server_stop") == "Error: NBD server not running\n"
    assert qmp.execute("query-block-exports") == []
    assert qmp.execute("nbd-server-start", unix(path)) == {}
    assert says(machine, "nbd-server-start", unix(path)) == "NBD server already running"
    assert listed(tree, f"-k {path}") == []
    assert qmp.execute("block-export-add", add) == {}
    assert qmp.execute("nbd-server-add", {"device": "extra", "name": "y"}) == {}
    assert {export["id"] for export in qmp.execute("query-block-exports")} == {"e0", "y"}
    assert sorted(listed(tree, f"-k {path}")) == ["x", "y"]
    wrote = qemu_io(tree, f"nbd+unix:///x?socket={path}", "write -P 0x5a 1M 2M", "read -P 0x5a 1M 2M")
    assert "Pattern verification failed" not in wrote and "wrote 2097152/2097152" in wrote
    assert qmp.execute("nbd-server-remove", {"name": "y"}) == {}
    assert qmp.wait_event("BLOCK_EXPORT_DELETED")["data"] == {"id": "y"}
    assert "not present" in qemu_io(tree, f"nbd+unix:///y?socket={path}", "read 0 512")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert client.recv(8) == b"NBDMAGIC"
        assert qmp.execute("nbd-server-stop") == {}
        while client.recv(64):
            pass
    assert qmp.wait_event("BLOCK_EXPORT_DELETED")["data"] == {"id": "e0"}
    assert not path.exists()
    assert qmp.execute("query-block-exports") == []
    assert qmp.hmp(f"nbd_server_start -a unix:{path}") == ""
    assert listed(tree, f"-k {path}") == ["d0"]
    assert qmp.hmp("nbd_server_stop") == ""
    qmp.events.clear()
    assert qmp.hmp("savevm t1") == "", "ours is as it was"
    assert machine.quit() == 0


def test_the_guest_writes_on_while_clients_come_and_go(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.boot(["-M", "q35", *disk(make_image(tree, work / "d0.qcow2", "64M"))])
    fio = Fio("v", blocks=1200, rate=200)
    fio.start(machine.console)
    wait_writes(machine.console, 100)
    qmp = machine.qmp
    for _ in range(3):
        port = free_port()
        where = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
        qmp.execute("nbd-server-start", {"addr": where})
        qmp.execute("block-export-add", {"type": "nbd", "id": "e0", "node-name": "nvmove-node0", "name": "d0"})
        assert "read 16777216/16777216" in qemu_io(tree, f"nbd://127.0.0.1:{port}/d0", "read 0 16M")
        qmp.execute("nbd-server-stop")
    fio.wait(machine.console)
    assert disk_complaints(machine.console) == []
    assert machine.quit() == 0


def test_a_vm_that_ends_hangs_up_on_clients_and_leaves_nothing(machine: Machine, tree: Sysroot, work: Path) -> None:
    start(machine, tree, work)
    before = Surroundings.look(machine.directory)
    machine.qmp.execute("nbd-server-start", unix(work / "s"))
    machine.qmp.execute("block-export-add", {"type": "nbd", "id": "e0", "node-name": "extra", "writable": True})
    uri = f"nbd+unix:///extra?socket={work / 's'}"
    writing = [tree.program("qemu-img"), "bench", "-f", "raw", "-w", "-c", "100000000", "-d", "16", uri]
    with subprocess.Popen(writing, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client:
        try:
            deadline = time.monotonic() + 60
            while not (work / "extra.qcow2").stat().st_blocks * 512 > 1 << 20:
                assert client.poll() is None and time.monotonic() < deadline, "the client does not write"
                time.sleep(0.05)
            assert machine.quit() == 0
            assert client.wait(60) != 0
        finally:
            client.kill()
    assert_nothing_left(machine, before)


def test_mistakes_are_one_line_and_change_nothing(machine: Machine, tree: Sysroot, work: Path) -> None:
    start(machine, tree, work)
    qmp, path = machine.qmp, work / "s"
    assert says(machine, "nbd-server-start") == "Parameter 'addr' is missing"
    assert says(machine, "nbd-server-start", {**unix(path), "foo": 1}) == "Parameter 'foo' is unexpected"
    assert says(machine, "nbd-server-start", unix(Path("/no/such"))).startswith(
        "Failed to bind socket to /no/such: No "
    )
    assert "tls-creds is not supported" in says(machine, "nbd-server-start", {**unix(path), "tls-creds": "t"})
    fd = {"addr": {"type": "fd", "data": {"str": "q"}}}
    assert "address type 'fd' is not supported" in says(machine, "nbd-server-start", fd)
    for line in ("", " foo", " -w unix:/tmp/x", " vsock:2:1", " fd:q", " 1.2.3.4:5,foo=1"):
        assert qmp.hmp(f"nbd_server_start{line}").count("\n") in (1, 2)
    assert "extraneous" in qmp.hmp("nbd_server_stop x")
    assert not path.exists()
    assert says(machine, "block-export-del", {"id": "zz"}) == "Export 'zz' is not found"
    assert says(machine, "nbd-server-remove", {"name": "zz"}) == "Export 'zz' is not found"
    qmp.execute("nbd-server-start", unix(path))
    writable = {"type": "nbd", "id": "e0", "node-name": "nvmove-node0", "writable": True}
    assert says(machine, "block-export-add", writable).startswith("Permission conflict on node 'nvmove-node0'")
    assert qmp.hmp("nbd_server_add -w d0").startswith("Error: Permission conflict on node 'd0'")
    assert qmp.execute("query-block-exports") == []
    assert qmp.execute("nbd-server-stop") == {}
    assert machine.quit() == 0


def test_where_no_disk_is_in_qemu_its_server_is_the_users(machine: Machine, tree: Sysroot, work: Path) -> None:
    machine.start(["-M", "q35", *disk(make_image(tree, work / "d0.raw", "16M"))])
    qmp, path = machine.qmp, work / "s"
    assert says(machine, "nbd-server-start", {**unix(path), "tls-creds": "t"}) == "No TLS credentials with id 't'"
    assert qmp.execute("nbd-server-start", unix(path)) == {}
    assert listed(tree, f"-k {path}") == []
    assert qmp.execute("nbd-server-stop") == {}
    assert machine.quit() == 0
