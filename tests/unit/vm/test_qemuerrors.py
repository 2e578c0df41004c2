from __future__ import annotations

import fcntl
import os
import select
import threading

from nvmove.vm.qemuerrors import ErrorRelay, Wording

OURS = '-device {"driver":"vfio-user-pci","id":"nvmove0"}'
TYPED = "-device nvme,serial=ä,drive=d0"
WORDING = Wording({OURS: TYPED}, "vfio-user-pci", "nvme")


def read(fd: int, size: int = 1 << 16) -> bytes:
    assert select.select([fd], [], [], 60)[0]
    return os.read(fd, size)


def test_an_option_is_named_as_the_user_typed_it_and_so_is_the_device() -> None:
    line = f"qemu: {OURS}: No 'PCI' bus found for device 'vfio-user-pci'"
    assert WORDING.line(line.encode()).decode() == f"qemu: {TYPED}: No 'PCI' bus found for device 'nvme'"


def test_other_lines_are_as_they_are() -> None:
    for line in (b"vfio-user-pci: x", b"", b"\xff\x00", OURS.encode()):
        assert WORDING.line(line) == line


def test_lines_come_at_once_a_half_one_after_a_moment_and_the_end_with_the_last_word() -> None:
    out, to = os.pipe()
    relay = ErrorRelay(WORDING, to)
    os.write(relay.end, f"first\nqemu: {OURS}".encode())
    assert read(out) == b"first\n"
    os.write(relay.end, b": no\n(half) ")
    assert read(out).decode() == f"qemu: {TYPED}: no\n"
    assert read(out) == b"(half) "
    os.write(relay.end, b"last")
    os.close(relay.end)
    relay.close()
    assert read(out) == b"last"
    os.close(to)
    assert os.read(out, 1) == b""
    os.close(out)


def test_a_child_that_has_kept_the_pipe_is_not_waited_for() -> None:
    out, to = os.pipe()
    relay = ErrorRelay(WORDING, to)
    os.write(relay.end, b"said\n")
    relay.close()  # the end is still open
    assert read(out) == b"said\n"
    for fd in (relay.end, out, to):
        os.close(fd)


def test_a_reader_that_is_slow_loses_nothing_even_where_writing_does_not_wait() -> None:
    out, to = os.pipe()
    fcntl.fcntl(to, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(to, False)
    relay = ErrorRelay(WORDING, to)
    text = b"".join(b"line %d\n" % number for number in range(20000))

    def say() -> None:
        sent = 0
        while sent < len(text):
            sent += os.write(relay.end, text[sent:])
        os.close(relay.end)

    said = threading.Thread(target=say)
    said.start()
    got = b""
    while len(got) < len(text):
        got += read(out)
    said.join()
    relay.close()
    assert got == text
    for fd in (out, to):
        os.close(fd)


def test_nobody_reads_any_more() -> None:
    out, to = os.pipe()
    relay = ErrorRelay(WORDING, to)
    os.close(out)
    os.write(relay.end, b"into nothing\n")
    relay.close()
    for fd in (relay.end, to):
        os.close(fd)
