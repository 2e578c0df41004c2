"""`nvmove run`: from its words to a machine, or to a QEMU in our place."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nvmove.block.fault import FaultRules
from nvmove.errors import UserError
from nvmove.vm import command, machine
from nvmove.vm.line import program
from nvmove.vm.line.plan import Plan
from nvmove.vm.line.program import QemuProgram

NVME = ["-drive", "if=none,id=d0,file=/absent/d.raw,format=raw,node-name=n0", "-device", "nvme,serial=S1,drive=d0"]


class FakeMachine:
    made: list[tuple[Plan, FaultRules]]
    ends: BaseException | int = 0

    def __init__(self, plan: Plan, directory: Path, faults: FaultRules) -> None:
        assert directory.is_dir()
        self.made.append((plan, faults))

    async def run(self) -> int:
        if isinstance(self.ends, BaseException):
            raise self.ends
        return self.ends


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeMachine]:
    """The machines that were made; run directories lie in `tmp_path`."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "Machine", FakeMachine)
    monkeypatch.setattr(program, "find", lambda name: QemuProgram(Path("/fake"), (11, 1, 3)))
    monkeypatch.setattr(QemuProgram, "property_types", lambda self, driver: {})
    monkeypatch.setattr(FakeMachine, "made", [], raising=False)
    monkeypatch.setattr(FakeMachine, "ends", 0)
    return FakeMachine


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(words)))


def refused(*words: str) -> UserError:
    with pytest.raises(UserError) as raised:
        run(*words)
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("front", [[], ["--"]])
def test_the_machines_status_is_ours_and_the_run_directory_goes(
    machines: type[FakeMachine], tmp_path: Path, front: list[str]
) -> None:
    machines.ends = 7
    assert run(*front, "qemu", "-M", "q35", *NVME) == 7
    ((plan, faults),) = machines.made
    assert (plan.program, [device.id for device in plan.devices]) == ("/fake", ["nvmove0"])
    assert faults.list() == []
    assert list(tmp_path.iterdir()) == []


def test_what_a_machine_cannot_have_is_its_line(machines: type[FakeMachine], tmp_path: Path) -> None:
    machines.ends = UserError("no image")
    assert (str(refused("qemu", *NVME)), refused("qemu", *NVME).status) == ("no image", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_command_line_is_read_leaves_nothing(
    machines: type[FakeMachine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    def find(name: str) -> None:
        assert list(tmp_path.iterdir()) != []
        os.kill(os.getpid(), number)
        threading.Event().wait(20)

    monkeypatch.setattr(program, "find", find)
    before = signal.signal(number, signal.SIG_DFL)  # a test run under nohup ignores SIGHUP
    try:
        with pytest.raises(SystemExit) as raised:
            run("qemu", *NVME)
        assert raised.value.code == 128 + number
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert machines.made == []


def test_without_a_qemu_it_is_a_usage_error(machines: type[FakeMachine]) -> None:
    for words in ([], ["--"]):
        assert refused(*words).status == 2
    assert machines.made == []


def test_warnings_are_lines_for_the_user(machines: type[FakeMachine], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("qemu", *NVME[:3], "nvme,serial=S1,drive=d0,num_queues=4") == 0
    assert capsys.readouterr().err.startswith("nvmove: warning: -device nvme,")


def test_faults_stand_before_the_qemu_word(machines: type[FakeMachine]) -> None:
    assert run("--fault", "op=read,errno=EIO", "--fault", "delay=1ms,drive=n0", "qemu", *NVME) == 0
    ((_, faults),) = machines.made
    assert [(fault.id, fault.rule.drive) for fault in faults.list()] == [(1, ""), (2, "n0")]


def test_a_fault_that_cannot_be_is_refused_before_anything_starts(machines: type[FakeMachine], tmp_path: Path) -> None:
    said = str(refused("--fault", "errno=EIO,drive=d1", "qemu", *NVME))
    assert said == "--fault errno=EIO,drive=d1: no nvme device uses a drive 'd1'; there is d0, n0"
    said = str(refused("--fault", "errno=EIO", "qemu", "-M", "q35"))
    assert said == "--fault errno=EIO: no -device nvme is there that it could be for"
    assert machines.made == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["-M", "q35"], ["-device", "nvme,help"], ["--version"]])
def test_what_has_nothing_for_us_becomes_qemu_with_its_own_arguments(
    machines: type[FakeMachine], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    became: list[Any] = []

    def execvp(file: str, arguments: list[str]) -> None:
        became.extend([file, arguments])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvp", execvp)
    with pytest.raises(SystemExit):
        run("qemu", *words)
    assert became == ["qemu", ["qemu", *words]]
    assert machines.made == []


def test_a_qemu_that_is_not_there_is_one_line(machines: type[FakeMachine]) -> None:
    assert str(refused("/no/qemu", "--version")) == "cannot run '/no/qemu': No such file or directory"


def test_a_refusal_imports_nothing_that_only_a_vm_needs(tmp_path: Path) -> None:
    """By name: what takes long to import is what a VM needs (`-X importtime`), half a second on a slow machine."""
    fake = tmp_path / "qemu"
    fake.write_text(
        "#!/bin/sh\necho 'QEMU emulator version 11.1.3'; echo '  socket=<SocketAddress>'; echo dbus-vmstate qtest\n"
    )
    fake.chmod(0o755)
    script = f"""
import sys
sys.argv = ["nvmove", "run", {str(fake)!r}, "-device", "nvme,drive=d0"]
from nvmove import cli
assert cli.main() == 1
print(*sys.modules)
"""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    environment.pop("NVMOVE_QEMU", None)
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert ran.stderr == "nvmove: -device nvme,drive=d0: serial property not set\n"
    loaded = set(ran.stdout.split())
    assert "nvmove.vm.line.arguments" in loaded
    late = {"asyncio", "ssl", "ctypes", "importlib.metadata", "dbus_fast", "qemu.qmp", "xml.sax", "nvmove.device"}
    parts = ("nvmove.engine", "nvmove.vfio", "nvmove.pci", "nvmove.vmstate", "nvmove.vm.machine", "nvmove.vm.monitor")
    assert loaded & late == set()
    assert [name for name in loaded if f"{name}.".startswith(tuple(f"{part}." for part in parts))] == []
