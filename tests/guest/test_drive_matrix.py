"""Drive options × formats × verbs: every row starts, is saved and loaded, and moves, or is refused as QEMU refuses it.

No guest runs. NVMOVE_TEST_STOCK=1 runs the rows with virtio-blk on QEMU alone: where the expectations are from.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nvmove.lab.machine import Machine
from nvmove.lab.migration import move_by_file
from nvmove.lab.processes import Marked
from nvmove.lab.qmp import QmpError
from nvmove.lab.sysroot import Sysroot
from tests.guest.conftest import MachineFactory, make_image
from tests.waiting import wait

STOCK = bool(os.environ.get("NVMOVE_TEST_STOCK"))
DEVICE = "virtio-blk" if STOCK else "nvme"
SECRET = ["-object", "secret,id=key,data=open sesame"]
FORMATS = ["raw", "raw-in-qemu", "qcow2", "backed", "vmdk", "vdi", "vhdx", "luks", "nbd", "null"]
IMMOVABLE = ("vmdk", "vdi", "vhdx")
"""Formats that QEMU neither saves nor migrates, read-only or not."""
OPTIONS = [
    "",
    "readonly=on",
    "readonly=on,discard=unmap",
    "cache=none",
    "cache=none,aio=native",
    "aio=io_uring",
    "cache=writethrough",
    "cache=directsync",
    "cache=unsafe",
    "discard=unmap,detect-zeroes=unmap",
    "snapshot=on",
    "werror=stop,rerror=stop",
    "copy-on-read=on",
]
ROWS = [
    *((kind, options) for kind in FORMATS for options in ("", "readonly=on")),
    *((kind, options) for kind in ("raw", "qcow2") for options in OPTIONS[2:]),
]


def make(tree: Sysroot, work: Path, kind: str) -> str:
    """Make an image; return what -drive says of it."""
    image = work / f"image.{kind}"
    if kind == "null":
        return "driver=null-co,size=8M,read-zeroes=on"
    if kind == "backed":
        make_image(tree, work / "base.qcow2", "8M")
        words = ["-f", "qcow2", "-b", str(work / "base.qcow2"), "-F", "qcow2", str(image)]
    elif kind == "luks":
        words = ["-f", "luks", "--object", SECRET[1], "-o", "key-secret=key,iter-time=10", str(image), "8M"]
    else:
        words = ["-f", "raw" if kind in ("raw-in-qemu", "nbd") else kind, str(image), "8M"]
    subprocess.run([tree.program("qemu-img"), "create", "-q", *words], check=True, timeout=60)
    if kind == "luks":
        return f"driver=luks,key-secret=key,file.filename={image}"
    if kind == "nbd":
        return f"driver=nbd,server.type=unix,server.path={work}/server"
    return f"file={image},format={ {'raw-in-qemu': 'raw', 'backed': 'qcow2'}.get(kind, kind) }"


@contextmanager
def server(tree: Sysroot, work: Path, kind: str) -> Iterator[None]:
    """An NBD server, for the row that needs one."""
    with ExitStack() as cleanup:
        if kind == "nbd":
            words = ["-f", "raw", "-e", "4", "-t", "-k", f"{work}/server", f"{work}/image.nbd"]
            run = Marked.start([tree.program("qemu-nbd"), *words], work / "nbd-said")
            cleanup.callback(run.kill_all)
            wait((work / "server").exists)
        yield


def can_be_saved(kind: str, options: str) -> bool:
    """Whether `savevm` finds a place for the disk: QEMU asks that of every disk that is written to."""
    return "readonly" in options or "snapshot" in options or kind in ("qcow2", "backed")


def arguments(work: Path, kind: str, options: str, drive: str) -> list[str]:
    owner = ",image-owner=qemu" if kind == "raw-in-qemu" and not STOCK else ""
    return [
        *("-M", "q35", "-S", *(SECRET if kind == "luks" else [])),
        *("-drive", f"if=none,id=state,file={work}/state.qcow2,format=qcow2", "-device", "virtio-blk,drive=state"),
        *("-drive", f"if=none,id=d0,{drive}{',' * bool(options)}{options}"),
        *("-device", f"{DEVICE},id=disk,serial=S1,drive=d0{owner}"),
    ]


def row_of_query_block(machine: Machine) -> tuple[bool, str]:
    (found,) = (one for one in machine.qmp.execute("query-block") if one["device"] == "d0")
    return found["inserted"]["ro"], found["inserted"]["detect_zeroes"]


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_every_disk_starts_is_saved_and_moves(
    machines: MachineFactory, tree: Sysroot, work: Path, kind: str, options: str
) -> None:
    drive = make(tree, work, kind)
    make_image(tree, work / "state.qcow2", "8M")
    words = arguments(work, kind, options, drive)
    with server(tree, work, kind):
        source = machines("a", "64M")
        source.start(words)
        shown = ("readonly" in options, "unmap" if "detect-zeroes" in options else "off")
        assert row_of_query_block(source) == shown
        said = source.qmp.hmp("savevm tag")
        if kind in IMMOVABLE:
            assert "does not support live migration" in said
            with pytest.raises(QmpError, match="does not support live migration"):
                source.qmp.execute("migrate", {"uri": f"file:{work}/stream"})
            assert source.quit() == 0
            return
        if can_be_saved(kind, options):
            assert said == ""
            assert source.qmp.hmp("loadvm tag") == ""
        else:
            assert "is writable but does not support snapshots" in said
        destination = machines("b", "64M")
        move_by_file(source, destination, words)
        assert row_of_query_block(destination) == shown
        assert destination.quit() == 0
