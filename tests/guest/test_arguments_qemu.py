"""What nvmove claims about QEMU's command line, asked of the sysroot's QEMU (no guest runs)."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nvmove.options.properties import OWN, OWN_CONTROLLER, PROPERTIES
from nvmove.vm.line import arguments, argv
from nvmove.vm.line.program import QemuProgram, find
from tests.qemu_messages import BAD_DEVICES, BAD_DRIVES, BAD_NAMESPACES

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def program(sysroot: Path) -> QemuProgram:
    return find(str(sysroot / "bin" / "qemu-system-x86_64"))


@pytest.fixture
def drive(tmp_path: Path) -> str:
    image = tmp_path / "disk.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(1 << 20)
    return f"if=none,id=d0,file={image},format=raw"


def run(program: QemuProgram, words: Sequence[str], commands: str = "") -> subprocess.CompletedProcess[str]:
    qmp = '{"execute":"qmp_capabilities"}' + commands + '{"execute":"quit"}'
    front = [str(program.path), "-display", "none", "-S", "-qmp", "stdio"]
    return subprocess.run([*front, *words], input=qmp, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("driver", ["nvme", "nvme-ns"])
def test_the_property_lists_are_qemus(program: QemuProgram, driver: str) -> None:
    types = program.property_types(driver)
    assert set(types) == set(PROPERTIES[driver]) - {"driver", "id", "bus", *OWN, *OWN_CONTROLLER}
    for name, kind in types.items():
        if kind in ("bool", "size", "OnOffAuto") or re.fullmatch(r"u?int\d+", kind):
            assert PROPERTIES[driver][name].kind.value == kind, name


def test_every_option_that_takes_an_argument_is_known(program: QemuProgram) -> None:
    shown = subprocess.run([program.path, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    first_words = re.findall(r"^-([\w-]+)(?: (\S+)| {2,}|$)", shown, re.MULTILINE)
    with_argument = {name for name, argument in first_words if argument}
    for name in sorted(with_argument):
        answer = run(program, [f"-{name}"])
        needs_one = "requires an argument" in answer.stderr
        assert needs_one == (len(argv.read([f"-{name}", "x"])) == 1), name


@pytest.mark.parametrize(("device", "message"), BAD_DEVICES)
def test_qemu_refuses_a_device_with_our_message(program: QemuProgram, drive: str, device: str, message: str) -> None:
    drives = ["-drive", drive.replace("id=d0", "id=d")]
    answer = run(program, ["-M", "q35", "-nodefaults", *drives, "-device", device])
    assert f"{device}: {message}" in answer.stderr


@pytest.mark.parametrize(("namespace", "message"), BAD_NAMESPACES)
def test_qemu_refuses_a_namespace_with_our_message(
    program: QemuProgram, drive: str, tmp_path: Path, namespace: str, message: str
) -> None:
    second = tmp_path / "second.img"
    second.write_bytes(bytes(1 << 20))
    drives = ["-drive", drive, "-drive", f"if=none,id=x,file={second},format=raw"]
    answer = run(
        program, ["-M", "q35", "-nodefaults", *drives, "-device", "nvme,serial=1,drive=d0", "-device", namespace]
    )
    assert f"{namespace}: {message}" in answer.stderr


@pytest.mark.parametrize(("option", "message"), BAD_DRIVES)
def test_qemu_refuses_a_drive_with_our_message(program: QemuProgram, drive: str, option: str, message: str) -> None:
    answer = run(program, ["-M", "q35", "-nodefaults", "-drive", f"{drive},{option}"])
    assert f"-drive {drive},{option}: {message}" in answer.stderr


def pci_functions(answer: str) -> list[tuple[Any, ...]]:
    """Return (bus, slot, function, vendor, device) of all functions in the answers of a QMP session."""
    found: list[tuple[Any, ...]] = []

    def walk(bus: Any, devices: list[dict[str, Any]]) -> None:
        for device in devices:
            found.append((bus, device["slot"], device["function"], device["id"]["vendor"], device["id"]["device"]))
            if "pci_bridge" in device:
                walk(device["qdev_id"], device["pci_bridge"].get("devices", []))

    for line in answer.splitlines():
        result = json.loads(line).get("return")
        for bus in result if isinstance(result, list) else []:
            walk(bus["bus"], bus["devices"])
    return found


@pytest.mark.parametrize(
    "line",
    [
        "-M q35 -device nvme,serial=1,drive=d0",
        "-M pc -device nvme,serial=1,drive=d0",
        "-M q35 -nodefaults -device virtio-rng-pci -device nvme,serial=1,drive=d0 -device virtio-net-pci "
        "-device nvme,serial=2,addr=9 -device virtio-balloon-pci",
        """-M pc -device '{"driver":"virtio-rng-pci"}' -device nvme,serial=1,drive=d0 -device virtio-net,vectors=3 """
        "-drive if=virtio,file=null-co://,format=raw -device e1000",
        "-M q35 -device pcie-root-port,id=rp,chassis=1 -device nvme,serial=1,drive=d0,bus=rp "
        "-device pcie-root-port,id=rp2,chassis=2,slot=3 -device virtio-scsi-pci,id=s -device scsi-hd,bus=s.0,drive=z "
        "-drive if=none,file=null-co://,format=raw,id=z -device qemu-xhci,id=x -device usb-tablet,bus=x.0",
        "-M q35 -device nvme,serial=1,drive=d0,addr=5.0,multifunction=on -device virtio-rng-pci,addr=5.1",
        """-M q35 -device '{"driver":"nvme","serial":"1","addr":48}' -device virtio-rng-pci""",
    ],
)
def test_every_pci_device_keeps_its_address(program: QemuProgram, drive: str, line: str) -> None:
    """QEMU's own nvme in JSON form stands in for vfio-user-pci, which would want its server."""
    words = ["-drive", drive, *shlex.split(line)]
    lifted = list(arguments.lift(["qemu", *words], Path("/run/x"), program).arguments)
    own = lifted.index("-S")  # nvmove's own chardev and monitor are last
    stand_in = []
    for word in lifted[:own]:
        if '"vfio-user-pci"' in word:
            device = {**json.loads(word), "driver": "nvme", "serial": "1"}
            del device["socket"], device["x-msg-timeout"]
            stand_in.append(json.dumps(device))
        else:
            stand_in.append(word)
    stock, ours = (run(program, one, '{"execute":"query-pci"}') for one in (words, stand_in))
    assert (stock.returncode, ours.returncode) == (0, 0), ours.stderr
    assert pci_functions(stock.stdout) == pci_functions(ours.stdout) != []


def test_qemu_takes_what_it_gets(program: QemuProgram, drive: str, tmp_path: Path) -> None:
    """Shared RAM, the private monitor and a port that shares the user's line; the disk itself is left out."""
    words = ["-M", "q35", "-m", "64M", "-nographic", "-drive", drive, "-device", "nvme,serial=1,drive=d0"]
    lifted = list(arguments.lift(["qemu", *words], tmp_path, program).arguments)
    device = next(at for at, word in enumerate(lifted) if '"vfio-user-pci"' in word)
    del lifted[device - 1 : device + 1]
    with ExitStack() as stack:
        qmp, port, qtest = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3))
        for listener, name in ((qmp, "qmp"), (port, "mux0"), (qtest, "qtest")):
            listener.bind(str(tmp_path / name))
            listener.listen()
            listener.settimeout(60)
        with subprocess.Popen([program.path, *lifted], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                with qmp.accept()[0] as monitor, port.accept()[0], monitor.makefile("rw") as stream:
                    assert "QMP" in json.loads(stream.readline())
                    stream.write('{"execute":"qmp_capabilities"}{"execute":"query-memdev"}{"execute":"quit"}')
                    stream.flush()
                    answers = [json.loads(line) for line in stream]
                assert answers[1]["return"][0]["share"] is True
                assert answers[1]["return"][0]["size"] == 64 << 20
                assert process.stderr is not None
                assert process.stderr.read() == b""
                assert process.wait(60) == 0
            finally:
                process.kill()


def test_qemu_tells_what_a_machine_type_has_of_nvme(program: QemuProgram) -> None:
    assert program.compat_properties("pc-q35-6.1")["nvme-ns"] == {"eui64-default": "on", "shared": "off"}
    assert "nvme-ns" not in program.compat_properties("pc-q35-9.2")
