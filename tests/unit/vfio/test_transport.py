"""The listening socket: who may listen, who is served, what is left behind."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from nvmove.vfio.client import VfioUserClient
from nvmove.vfio.transport import ListenError, Server
from tests.vfio_peer import PlainDevice
from tests.waiting import ended, in_thread


def start(path: Path, device: PlainDevice) -> Server:
    server = Server(path, device)
    server.start()
    return server


def test_the_socket_is_the_owners_only_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = start(path, PlainDevice())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.close()
    server.close()
    assert not path.exists()


def test_a_new_client_is_served_after_the_old_one_has_gone(tmp_path: Path) -> None:
    device = PlainDevice()
    server = start(tmp_path / "s", device)
    for _ in range(3):
        with VfioUserClient.connect(tmp_path / "s") as client:
            client.map_ram(0, 4096)
            assert client.config(0, 2) == b"\x36\x1b"
    server.close()
    assert device.memory.ranges() == []


def test_a_second_client_waits_until_the_first_has_gone(tmp_path: Path) -> None:
    server = start(tmp_path / "s", PlainDevice())
    first = VfioUserClient.connect(tmp_path / "s")
    second: list[VfioUserClient] = []
    connecting = in_thread(lambda: second.append(VfioUserClient.connect(tmp_path / "s")))
    for _ in range(100):
        assert first.config(0, 2) == b"\x36\x1b"
    assert not second
    first.close()
    ended(connecting)
    assert second[0].config(0, 2) == b"\x36\x1b"
    server.close()
    assert second[0].closed.wait(5)
    second[0].close()


def test_a_socket_left_by_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(path))
    server = start(path, PlainDevice())
    with VfioUserClient.connect(path) as client:
        assert client.config(0, 2) == b"\x36\x1b"
    server.close()


def test_a_socket_that_is_served_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = start(path, PlainDevice())
    with pytest.raises(ListenError, match="another process serves this socket"):
        start(path, PlainDevice())
    with VfioUserClient.connect(path) as client:
        assert client.config(0, 2) == b"\x36\x1b"
    server.close()


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ListenError, match="is no socket"):
        start(path, PlainDevice())
    assert path.read_text() == "precious"


def test_paths_that_cannot_be_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="107 bytes"):
        start(tmp_path / ("s" * 108), PlainDevice())
    with pytest.raises(ListenError, match="No such file"):
        start(tmp_path / "missing" / "s", PlainDevice())
    with pytest.raises(ListenError, match="Not a directory"):
        (tmp_path / "f").touch()
        start(tmp_path / "f" / "s", PlainDevice())


def test_a_client_that_connects_and_says_nothing_does_not_stop_the_server(tmp_path: Path) -> None:
    server = start(tmp_path / "s", PlainDevice())
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(os.fspath(tmp_path / "s"))
    server.close()
    assert silent.recv(1) == b""
    silent.close()
