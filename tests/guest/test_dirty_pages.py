"""What the device writes by DMA during pre-copy reaches the destination; without marking it does not (checklist 30).

Two stock QEMUs; their devices are in this process, so that marking can be left out. The guest does not zero the pages
that it allocates (`init_on_alloc=0`), or it would make them dirty itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import random
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nvmove.block.config import OpenOptions
from nvmove.block.raw.backend import open_raw
from nvmove.device import NvmeDevice
from nvmove.lab.fio import Fio
from nvmove.lab.machine import Machine
from nvmove.lab.migration import ENDED, Traveller, wait_run_state, wait_status
from nvmove.lab.sysroot import Sysroot
from nvmove.nvme.config import ControllerConfig, NamespaceConfig
from nvmove.nvme.seams import DmaError
from nvmove.vfio.dirty import DirtyReport
from nvmove.vm.moves.pciaddress import ConfigSpace, ConfigSpaces, find
from nvmove.vm.moves.qtest import QTest
from nvmove.vm.moves.replay import read_msix_table, replay
from nvmove.vmstate.bus import VMStateBus
from tests.guest.conftest import MachineFactory, clean_machine, disk, make_image

T = TypeVar("T")
MIB = 1 << 20
DISK = 48 * MIB
RAM = "512M"
LOW, NOWHERE = 0x600, 1 << 45
"""Memory that Linux leaves to the firmware, and none."""
UNMARKED, MARKED = "unmarked", "marked"


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


class Side:
    """One QEMU, and the device of its disk."""

    def __init__(self, machine: Machine, image: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.machine = machine
        self._loop = loop
        namespace = NamespaceConfig(nsid=1, drive="d0", uuid=uuid.UUID(int=1))
        self.disk = open_raw(str(image), options=OpenOptions(read_only=True))
        self.device = NvmeDevice(ControllerConfig(serial="S1", namespaces=(namespace,)), {"d0": self.disk}, id="nvme0")
        self.device.pause()
        self.device.start(machine.directory / "nvme")
        program = machine.sysroot.program("dbus-daemon")
        self._bus = self.run(VMStateBus.start(machine.directory, program))
        self.run(self._bus.add("nvmove/nvme0", self.device))
        self._cpu = QTest()
        self.run(self._cpu.listen(machine.directory / "qtest"))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        self.machine.kill()
        self.device.close()
        self.run(self._cpu.close())
        self.run(self._bus.close())
        self.disk.close()

    def start(self, *more: str) -> None:
        socket = {"type": "unix", "path": str(self.machine.directory / "nvme")}
        vmstate = ",".join(f"{key}={value}" for key, value in self._bus.qemu_object().items() if key != "qom-type")
        linux = self.machine.linux
        linux[-1] += " init_on_alloc=0"
        self.machine.start(
            [
                *("-M", "q35,memory-backend=ram", "-object", f"memory-backend-memfd,id=ram,size={RAM},share=on"),
                *("-device", json.dumps({"driver": "vfio-user-pci", "id": "nvme0", "socket": socket, "addr": "7"})),
                *("-object", f"dbus-vmstate,{vmstate}", *linux, "-S", *more),
                *("-chardev", f"socket,id=q,path={self.machine.directory / 'qtest'}"),
                *("-object", "qtest,id=q,chardev=q,log=none"),
            ]
        )
        capabilities = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]
        self.machine.qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})

    def cont(self) -> None:
        self.machine.qmp.execute("cont")
        self.device.resume()

    def wait(self, wanted: str) -> None:
        while (status := self.machine.qmp.wait_event("MIGRATION")["data"]["status"]) != wanted:
            assert status not in {"failed", "cancelled"}

    @property
    def _space(self) -> ConfigSpace:
        return ConfigSpace(ConfigSpaces(self._cpu, None), find(self.machine.qmp.execute("query-pci"), "nvme0"))

    def keep_msix_table(self) -> None:
        work = read_msix_table(self._space, self.device.pci_config, self.device.msix_table_offset)
        self.device.keep_msix_table(self.run(work))

    def replay(self) -> None:
        self.run(replay(self._space, self.device))


def migrate(source: Side, target: Side, socket: Path, meanwhile: Callable[[], None], marking: bool) -> DirtyReport:
    """Move the VM; `meanwhile` runs when QEMU has copied all of memory once, and pre-copy goes on after it."""
    qmp = source.machine.qmp
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 100 * MIB, "downtime-limit": 1})
    target.machine.qmp.execute("migrate-incoming", {"uri": f"unix:{socket}"})
    source.device.track_dirty(marking)
    qmp.execute("migrate", {"uri": f"unix:{socket}"})
    while qmp.wait_event("MIGRATION_PASS")["data"]["pass"] < 2:
        pass
    qmp.execute("migrate-set-parameters", {"max-bandwidth": MIB})  # what the guest made dirty takes long enough
    meanwhile()
    assert qmp.execute("query-migrate")["status"] == "active", "pre-copy ended too early for this test"
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 10000})
    source.wait("pre-switchover")
    source.device.pause(60)
    source.keep_msix_table()
    report = source.device.mark_dirty()
    qmp.execute("migrate-continue", {"state": "pre-switchover"})
    source.wait("completed")
    target.wait("completed")
    target.replay()
    target.cont()
    return report


def write_soon(device: NvmeDevice, *addresses: int) -> DmaError | None:
    """Write a byte to each by messages of which the last one only asks for a reply; return what came of them."""
    results: queue.SimpleQueue[DmaError | None] = queue.SimpleQueue()
    assert device._client is not None
    device._client.dma_write_soon([(address, b"\0") for address in addresses], results.put)
    return results.get(timeout=60)


@contextmanager
def pair(tree: Sysroot, work: Path, image: Path) -> Iterator[tuple[Side, Side]]:
    """A running Linux with the image as its disk, and a QEMU that waits for it."""
    with event_loop() as loop, clean_machine(tree, [], work / "a", RAM) as one:
        source = Side(one, image, loop)
        try:
            source.start()
            source.cont()
            one.console.wait_boot()
            with clean_machine(tree, [], work / "b", RAM) as other:
                target = Side(other, image, loop)
                try:
                    target.start("-incoming", "defer")
                    yield source, target
                finally:
                    target.close()
        finally:
            source.close()


@pytest.mark.parametrize("mode", [MARKED, UNMARKED])
def test_a_page_cache_filled_by_dma_during_pre_copy_arrives(tree: Sysroot, work: Path, mode: str) -> None:
    image = work / "d0.raw"
    content = random.Random(30).randbytes(DISK)
    image.write_bytes(content)
    with pair(tree, work, image) as (source, target):
        console = source.machine.console
        # One reply stands for all the messages of a batch, because QEMU tells what it refuses all the same.
        assert write_soon(source.device, LOW, LOW, LOW) is None
        assert "refused DMA_WRITE" in str(write_soon(source.device, LOW, NOWHERE, LOW))
        # Pre-copy must not end before the guest has read its disk: memory that becomes dirty all the time.
        console.check("dd if=/dev/zero of=/tmp/busy bs=1M count=64; (while :; do "
                      "dd if=/dev/zero of=/tmp/busy bs=1M count=64 conv=notrunc; done >/dev/null 2>&1 &)")  # fmt: skip

        def fill() -> None:
            console.check("(exec 3</dev/nvme0n1; sleep 1000) & true")  # or the cache goes with the last close
            console.check("dd if=/dev/nvme0n1 of=/dev/null bs=1M")

        report = migrate(source, target, work / "migration", fill, mode == MARKED)
        console = target.machine.console
        cached = int(console.check("awk '/^Buffers/ {print $2}' /proc/meminfo")) << 10
        assert cached >= DISK, "the guest would read its disk anew"
        found = console.check("md5sum /dev/nvme0n1").split()[0]
        assert (found == hashlib.md5(content).hexdigest()) == (mode == MARKED)
        assert (report.pages > 0) == (mode == MARKED)


def test_a_driver_unbound_during_pre_copy_does_not_stop_the_migration(
    machines: MachineFactory, tree: Sysroot, work: Path
) -> None:
    """Its device may not write to memory any more; what it wrote before, completions at least, must arrive."""
    arguments = ["-M", "q35", *disk(make_image(tree, work / "d0.raw"), device="addr=7")]
    guest = Traveller(machines("m0"), arguments, machines)
    guest.boot()
    source, target = guest.machine, guest.destination()
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4 * MIB})
    target.qmp.execute("migrate-incoming", {"uri": guest.uri(target)})
    source.qmp.execute("migrate", {"uri": guest.uri(target)})
    source.console.check("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct")
    source.console.check("echo 0000:00:07.0 >/sys/bus/pci/drivers/nvme/unbind")
    assert wait_status(source.qmp, "active")["status"] == "active"
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
    assert wait_status(source.qmp, *ENDED)["status"] == "completed"
    assert source.qmp.execute("query-migrate")["nvmove-marking"]["pages"] > 0
    wait_run_state(target.qmp, "running")
    target.console.check("echo 0000:00:07.0 >/sys/bus/pci/drivers/nvme/bind")
    target.console.check("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done")
    Fio("after", blocks=64).run(target.console)
