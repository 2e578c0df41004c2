from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from nvmove.errors import UserError
from nvmove.vm import qemu
from nvmove.vm.line import program

QEMU_11 = "QEMU emulator version 11.1.3 (Debian)"
VFIO = "echo '  addr=<str>'; echo '  socket=<SocketAddress> - SocketAddress (UNIX sockets only)'"


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVMOVE_QEMU", raising=False)


def fake(
    tmp_path: Path, version: str = "QEMU emulator version 11.1.3 (Debian)", device: str = VFIO, more: str = ""
) -> str:
    """A program that answers as QEMU does to the questions of `find`."""
    path = tmp_path / "qemu-fake"
    path.write_text(
        f"""#!/bin/sh
        case "$1 $2" in
        --version*) echo '{version}';;
        "-device vfio-user-pci,help") {device};;
        "-object help") echo 'List of user creatable objects:'; echo '  {more or "dbus-vmstate"}'; echo '  qtest';;
        esac
        """
    )
    path.chmod(0o755)
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(UserError) as raised:
        program.find(path)
    return str(raised.value)


def test_the_version_is_found(tmp_path: Path) -> None:
    found = program.find(fake(tmp_path))
    assert (found.version, found.version_text) == ((11, 1, 3), "11.1.3")
    assert found.property_types("vfio-user-pci") == {"addr": "str", "socket": "SocketAddress"}


def test_a_machine_types_properties_are_asked_for_by_qmp(tmp_path: Path) -> None:
    """Of two values of one property the later counts."""
    path = tmp_path / "qemu"
    properties = [{"qom-type": "nvme-ns", "property": "eui64-default", "value": value} for value in ("on", "off")]
    machines = [{"name": "none"}, {"name": "pc-q35-6.0", "compat-props": properties}]
    path.write_text(f"#!/bin/sh\ncat >{tmp_path}/said\necho '{{}}'\necho '{json.dumps({'return': machines})}'\n")
    path.chmod(0o755)
    found = program.QemuProgram(path, (11, 1, 3))
    assert found.compat_properties("pc-q35-6.0") == {"nvme-ns": {"eui64-default": "off"}}
    assert '"compat-props": true' in (tmp_path / "said").read_text()
    assert found.compat_properties("pc-q35-6.9") == {}


def test_the_environment_chooses_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVMOVE_QEMU", fake(tmp_path))
    assert program.find("no-such-qemu").path == tmp_path / "qemu-fake"


def test_refusals_say_what_is_needed_and_what_was_found(tmp_path: Path) -> None:
    assert refusal("no-such-qemu") == (
        "'no-such-qemu' not found; nvmove needs QEMU 10.1 or later (set NVMOVE_QEMU to its path)"
    )
    old = fake(tmp_path, "QEMU emulator version 7.2.15")
    assert refusal(old) == (
        f"nvmove needs QEMU 10.1 or later, and '{old}' is QEMU 7.2.15 (NVMOVE_QEMU chooses another)"
    )
    assert "is not a QEMU system emulator" in refusal("/bin/true")
    assert refusal(fake(tmp_path, device=":")).endswith("was built without the device vfio-user-pci")
    assert refusal(fake(tmp_path, more="rng-random")).endswith("was built without the object dbus-vmstate")
    (tmp_path / "broken").write_text("#!/no/such/interpreter\n")
    (tmp_path / "broken").chmod(0o755)
    assert refusal(str(tmp_path / "broken")).startswith(f"cannot run '{tmp_path}/broken': ")


def test_exit_statuses_are_qemus_and_signals_are_128_more() -> None:
    assert [qemu.exit_status(code) for code in (0, 1, -15)] == [0, 1, 143]


def start(*arguments: str) -> int:
    async def run() -> int:
        process = await qemu.start(Path("/bin/sh"), arguments)
        assert process.running
        assert process.pid != os.getpid()
        return await process.wait()

    return asyncio.run(run())


def test_its_exit_status_is_ours() -> None:
    assert start("-c", "exit 3") == 3
    assert start("-c", "kill -9 $$") == 137


def test_its_input_is_empty_and_its_process_group_its_own() -> None:
    assert start("-c", "read line && exit 1; exit 0") == 0
    assert start("-c", "[ $(cut -d' ' -f5 /proc/$$/stat) = $$ ]") == 0


def test_a_program_that_cannot_start_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^cannot run '/no/qemu': No such file or directory$"):
        asyncio.run(qemu.start(Path("/no/qemu"), []))


def test_ending_is_sigterm_and_then_sigkill() -> None:
    async def end(script: str, seconds: float) -> int:
        read, write = os.pipe()
        os.set_inheritable(write, True)
        process = await qemu.start(Path("/bin/sh"), ["-c", script.replace("FD", str(write))])
        os.close(write)
        assert os.read(read, 1) == b"r"  # its trap is set
        os.close(read)
        status = await process.end(seconds)
        assert await process.end() == status, "ending what has ended does nothing"
        return status

    ready_loop = "printf r >/proc/self/fd/FD; while :; do :; done"
    assert asyncio.run(end(f"trap 'exit 5' TERM; {ready_loop}", 60)) == 5
    assert asyncio.run(end(f"trap '' TERM; {ready_loop}", 0.1)) == 137


def test_it_dies_with_us_however_we_die() -> None:
    """The child holds the write end of a pipe: its end of file tells that it is gone."""
    read, write = os.pipe()
    code = """if True:
        import asyncio, pathlib, sys
        from nvmove.vm import qemu
        async def main():
            script = "echo ready; while :; do :; done"
            program = pathlib.Path("/bin/sh")
            await (await qemu.start(program, ["-c", script])).wait()
        asyncio.run(main())
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=write, close_fds=True) as parent:
        os.close(write)
        assert os.read(read, 100) == b"ready\n"
        parent.kill()
        parent.wait()
        ended, _, _ = select.select([read], [], [], 60)
        assert ended and os.read(read, 1) == b""
    os.close(read)
