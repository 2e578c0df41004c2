"""A VM moves with its disk: the recipe of docs/how-to/storage-migration.md, under fio, with QEMU's mirror over NBD."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.lab.fio import Fio, disk_complaints, wait_writes
from nvmove.lab.machine import Machine
from nvmove.lab.migration import wait_run_state, wait_status
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, disk, make_image


def offer(machine: Machine, where: Path) -> None:
    """At the destination: let the source write into the disk `d0`."""
    machine.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(where)}}})
    machine.qmp.execute(
        "block-export-add", {"type": "nbd", "id": "copy", "node-name": "n0", "name": "d0", "writable": True}
    )


def mirror(machine: Machine, where: Path) -> None:
    """At the source: copy the disk there, and keep it in step from then on."""
    server = {"type": "unix", "path": str(where)}
    machine.qmp.execute("blockdev-add", {"driver": "nbd", "node-name": "copy", "server": server, "export": "d0"})
    machine.qmp.execute("blockdev-mirror", {"job-id": "copy", "device": "n0", "target": "copy", "sync": "full"})
    machine.qmp.wait_event("BLOCK_JOB_READY")


def switch_over(source: Machine, target: Machine, uri: str) -> None:
    """Migrate, and end the mirror while the VM is stopped on its way."""
    pause = [{"capability": "pause-before-switchover", "state": True}, {"capability": "events", "state": True}]
    source.qmp.execute("migrate-set-capabilities", {"capabilities": pause})
    target.qmp.execute("migrate-incoming", {"uri": uri})
    source.qmp.execute("migrate", {"uri": uri})
    wait_status(source.qmp, "pre-switchover")
    source.qmp.execute("block-job-cancel", {"device": "copy"})
    assert "error" not in source.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    source.qmp.execute("blockdev-del", {"node-name": "copy"})
    source.qmp.execute("migrate-continue", {"state": "pre-switchover"})
    wait_status(source.qmp, "completed")


@pytest.mark.parametrize("suffix", ["qcow2", "raw"])
def test_a_guest_under_fio_moves_with_its_disk(
    machines: MachineFactory, tree: Sysroot, work: Path, suffix: str
) -> None:
    source, target = machines("source"), machines("target")
    images = [make_image(tree, machine.directory / f"d0.{suffix}", "128M") for machine in (source, target)]
    owner = "image-owner=qemu" if suffix == "raw" else ""
    here, there = (["-M", "q35", *disk(image, drive="node-name=n0", device=owner)] for image in images)
    source.boot(here)
    Fio("before", blocks=4096, offset=64 << 20).run(source.console)
    fio = Fio("v", blocks=1500, rate=200)
    fio.start(source.console)
    target.start([*target.linux, *there, "-incoming", "defer", "-S"])
    offer(target, work / "nbd")
    mirror(source, work / "nbd")
    wait_writes(source.console, 400)
    switch_over(source, target, f"unix:{work / 'migration'}")
    wait_run_state(target.qmp, "paused")
    assert target.qmp.execute("nbd-server-stop") == {}
    target.qmp.execute("cont")
    source.quit()
    images[0].unlink()
    fio.wait(target.console)
    target.console.check(
        "fio --name=before --filename=/dev/nvme0n1 --rw=randwrite --bs=4096 --offset=64M --size=16M --ioengine=libaio"
        " --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --verify_only"
    )
    assert disk_complaints(target.console) == []
    assert target.quit() == 0


def test_by_hmp_after_a_first_attempt_whose_destination_went_away(
    machines: MachineFactory, tree: Sysroot, work: Path
) -> None:
    source, target = machines("source"), machines("target")
    images = [make_image(tree, machine.directory / "d0.qcow2", "64M") for machine in (source, target)]
    here, there = (["-M", "q35", *disk(image)] for image in images)
    nbd, uri = f"unix:{work / 'nbd'}", f"unix:{work / 'migration'}"
    source.boot(here)
    fio = Fio("v", blocks=1500, rate=150)
    fio.start(source.console)
    target.start([*target.linux, *there, "-incoming", "defer", "-S"])
    assert target.qmp.hmp(f"nbd_server_start -a -w {nbd}") == ""
    assert source.qmp.hmp(f"drive_mirror -n -f d0 nbd:{nbd}:exportname=d0 raw") == ""
    source.qmp.wait_event("BLOCK_JOB_READY")
    assert target.qmp.hmp("nbd_server_stop") == ""
    assert "error" in source.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert source.qmp.status == "running"
    assert target.qmp.hmp(f"nbd_server_start -a -w {nbd}") == ""
    assert source.qmp.hmp(f"drive_mirror -n -f d0 nbd:{nbd}:exportname=d0 raw") == ""
    source.qmp.wait_event("BLOCK_JOB_READY")
    assert source.qmp.hmp("migrate_set_capability pause-before-switchover on") == ""
    assert target.qmp.hmp(f"migrate_incoming {uri}") == ""
    assert source.qmp.hmp(f"migrate -d {uri}") == ""
    wait_status(source.qmp, "pre-switchover")
    assert source.qmp.hmp("block_job_cancel d0") == ""
    assert "error" not in source.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
    assert source.qmp.hmp("migrate_continue pre-switchover") == ""
    wait_status(source.qmp, "completed")
    wait_run_state(target.qmp, "paused")
    assert target.qmp.hmp("nbd_server_stop") == ""
    assert target.qmp.hmp("cont") == ""
    source.quit()
    fio.wait(target.console)
    assert disk_complaints(target.console) == []
    assert target.quit() == 0
