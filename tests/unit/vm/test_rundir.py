from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nvmove.errors import UserError
from nvmove.vm.rundir import PREFIX, RunDirectory, base_directory, check_socket_path, remove_stale


def test_it_is_private_and_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with directory as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        (path / "deep").mkdir()
        (path / "deep" / "socket").touch()
    assert list(tmp_path.iterdir()) == []
    directory.close()


def test_the_directory_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    code = "import sys, pathlib; from nvmove.vm.rundir import RunDirectory\n"
    code += "d = RunDirectory(pathlib.Path(sys.argv[1])); print(d.path, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        with RunDirectory(tmp_path) as ours:
            assert left.is_dir(), "its owner lives"
            owner.kill()
            owner.wait()
            remove_stale(tmp_path)
            assert list(tmp_path.iterdir()) == [ours]


def test_a_directory_without_lock_is_left_alone_while_it_is_young(tmp_path: Path) -> None:
    young, old = tmp_path / "nvmove-new-a", tmp_path / "nvmove-new-b"
    young.mkdir()
    old.mkdir()
    os.utime(old, (0, 0))
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_what_is_no_run_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "precious")
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / f"{PREFIX}no-lock").mkdir()
    remove_stale(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    check_socket_path("/" + "x" * 106)
    with pytest.raises(UserError, match=r"is too long: 108 bytes, at most 107 are possible"):
        check_socket_path("/" + "x" * 107)
    with pytest.raises(UserError, match="too long"):
        RunDirectory(tmp_path / ("x" * 100))


def test_a_base_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot make a directory for sockets in '/no-such': No such file"):
        RunDirectory(Path("/no-such"))


def test_the_base_is_the_users_runtime_directory_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert base_directory() == tmp_path
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert base_directory() != tmp_path / "missing"
