"""`nvmove serve`, in this process: what it prints, serves and refuses."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvmove import serve
from nvmove.device import NvmeDevice
from nvmove.errors import UserError
from nvmove.vfio.client import VfioUserClient

DEVICE = "nvme,serial=S1,drive=d0"


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory with an image and a short name; signals are let through again afterwards."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    directory = Path(tempfile.mkdtemp(prefix="nvmove-t-", dir="/tmp"))
    (directory / "d0.raw").write_bytes(bytes(1 << 20))
    try:
        yield directory
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        shutil.rmtree(directory)


def drive(work: Path, more: str = "") -> str:
    return f"id=d0,file={work}/d0.raw,format=raw{more}"


def run(work: Path, *words: str, socket: Path | None = None) -> int:
    """Run it; afterwards nothing of it is there."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    before = set(threading.enumerate())
    descriptors = set(os.listdir("/proc/self/fd"))
    try:
        return serve.run(parser.parse_args(["--socket", str(socket or work / "nvme"), *words]))
    finally:
        assert set(threading.enumerate()) <= before
        assert set(os.listdir("/proc/self/fd")) <= descriptors
        assert [path.name for path in work.iterdir()] == ["d0.raw"]


def refused(work: Path, *words: str, socket: Path | None = None) -> str:
    with pytest.raises(UserError) as raised:
        run(work, *words, socket=socket)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_serves_until_a_signal_and_then_nothing_is_left(
    work: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def sigwait(signals: set[int]) -> int:
        assert number in signals
        said.append(capsys.readouterr().out)
        for _ in range(2):  # a client comes, goes and comes again
            with VfioUserClient.connect(work / "nvme", timeout=20) as client:
                assert client.config(0, 2) == b"\x36\x1b"
        return number

    monkeypatch.setattr(signal, "sigwait", sigwait)
    assert run(work, "--drive", drive(work), "--device", DEVICE + ",addr=5") == 0
    words = shlex.split(said[0].partition("\n")[2].replace("\\\n", ""))
    assert words[:4] == ["-object", "memory-backend-memfd,id=ram,size=SIZE,share=on", "-machine", "memory-backend=ram"]
    assert words[4:] == [
        "-device",
        f'{{"driver": "vfio-user-pci", "socket": {{"type": "unix", "path": "{work}/nvme"}}, '
        '"x-msg-timeout": 2147483647, "addr": "5"}',
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", DEVICE], "-device nvme,serial=S1,drive=d0: Property 'nvme.drive' can't find value 'd0'"),
        (["--drive", "DRIVE"], "serve: one --device nvme,… is wanted, 0 are given"),
        (["--device", DEVICE, "--device", "nvme,serial=S2"], "serve: one --device nvme,… is wanted, 2 are given"),
        (["--drive", "file=x,format=raw", "--device", DEVICE], "serve: --drive file=x,format=raw: every drive needs"),
        (["--drive", "DRIVE", "--drive", "DRIVE", "--device", DEVICE], "serve: --drive id=d0"),
        (
            ["--drive", "DRIVE", "--drive", "id=d1,file=x,format=raw", "--device", DEVICE],
            "serve: the drive 'd1' is used by no --device",
        ),
        (["--drive", "DRIVE,werror=maybe", "--device", DEVICE], "drive 'd0': werror=maybe is not one of"),
        (["--drive", "id=d0,file=x", "--device", DEVICE], "drive 'd0': needs format=raw"),
        (["--drive", "id=d0,file=x,format=qcow2", "--device", DEVICE], "drive 'd0': format=qcow2 needs QEMU"),
        (["--drive", "DRIVE", "--device", DEVICE, "--fault", "op=read"], "--fault op=read: needs errno="),
        (
            ["--drive", "DRIVE", "--device", DEVICE, "--fault", "errno=EIO,drive=n0"],
            "--fault errno=EIO,drive=n0: no nvme device uses a drive 'n0'; there is d0",
        ),
    ],
)
def test_what_cannot_be_served_is_one_line(work: Path, words: list[str], message: str) -> None:
    assert refused(work, *(word.replace("DRIVE", drive(work)) for word in words)).startswith(message)


def test_an_image_that_is_not_there_is_one_line(work: Path) -> None:
    said = refused(work, "--drive", f"id=d0,file={work}/absent,format=raw", "--device", DEVICE)
    assert f"{work}/absent" in said and "No such file or directory" in said


@pytest.mark.parametrize("name", ["absent/nvme", "n" * 120])
def test_a_socket_that_cannot_be_is_one_line(work: Path, name: str) -> None:
    assert name in refused(work, "--drive", drive(work), "--device", DEVICE, socket=work / name)


def test_namespaces_that_cannot_be_together_are_one_line(work: Path) -> None:
    second = ["--device", "nvme-ns,drive=d1,nsid=1", "--drive", f"id=d1,file={work}/d0.raw,format=raw,file.locking=off"]
    said = refused(work, "--drive", drive(work), "--device", DEVICE, *second)
    assert "1" in said


def test_faults_are_in_force_from_the_start(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    device = NvmeDevice

    def make(config: Any, backends: Any, **more: Any) -> Any:
        made.append((backends["d0"], device(config, backends, **more)))
        return made[0][1]

    monkeypatch.setattr(serve, "NvmeDevice", make)
    monkeypatch.setattr(signal, "sigwait", lambda signals: signal.SIGTERM)
    device_words = f"{DEVICE},logical_block_size=4096,physical_block_size=4096"
    words = ["--drive", drive(work), "--device", device_words, "--fault", "lba=3,errno=EIO"]
    assert run(work, *words) == 0
    ((backend, served),) = made
    (namespace,) = served.controller.namespaces
    assert backend.block_size() == 4096
    assert namespace.backend is backend
