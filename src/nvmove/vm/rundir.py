"""The run directory: private sockets of one VM. What a killed nvmove left behind is removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType

from nvmove.errors import UserError

PREFIX = "nvmove-run-"
_NEW_PREFIX = "nvmove-new-"
_LOCK = "lock"
_ABANDONED = 3600.0
"""Seconds after which a directory that never got its lock belongs to nobody."""
SOCKET_PATH_MAX = 107
"""sockaddr_un.sun_path holds 108 bytes, the last of them zero (unix(7))."""
_LONGEST_NAME = 24


def check_socket_path(path: Path | str) -> None:
    """Raise UserError when `path` is too long for a Unix socket."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_MAX:
        raise UserError(
            f"socket path '{path}' is too long: {length} bytes, at most {SOCKET_PATH_MAX} are possible; "
            "use a shorter directory"
        )


def base_directory() -> Path:
    """Return where run directories are made: $XDG_RUNTIME_DIR, else the directory for temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime)
    return Path(tempfile.gettempdir())


class RunDirectory:
    """A directory of mode 0700 that lives as long as this process; its lock tells that the owner is alive."""

    def __init__(self, base: Path | None = None) -> None:
        """Make it under `base`, after removing those of dead processes there; raises UserError."""
        base = base_directory() if base is None else base
        check_socket_path(base / f"{PREFIX}xxxxxxxx" / ("x" * _LONGEST_NAME))
        try:
            remove_stale(base)
            made = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=base))
            self._lock = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # only now may others see it: without its lock it would look abandoned
            self.path = made.rename(base / made.name.replace(_NEW_PREFIX, PREFIX))
        except OSError as error:
            raise UserError(f"cannot make a directory for sockets in '{base}': {error.strerror}") from None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove it with all that is in it. May be called again."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


def remove_stale(base: Path) -> None:
    """Remove this user's run directories under `base` whose owner is dead; what cannot be removed stays."""
    for path in base.glob("nvmove-*"):
        if path.name.startswith(PREFIX):
            if _is_ours(path):
                _remove_if_unlocked(path)
        elif path.name.startswith(_NEW_PREFIX) and _is_ours(path) and _age(path) > _ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _age(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_if_unlocked(path: Path) -> None:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # its owner is just removing it, or it is not what its name says
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
