"""The protocol's own migration, version 2: the state machine of a device that its client saves and loads.

Source: linux/vfio.h, enum vfio_device_mig_state, and the vfio-user specification's migration chapter. The arcs that are
taken directly, and what each does:

    RUNNING ──▶ STOP           pause: nothing is in flight from then on
    STOP ──▶ RUNNING           resume
    STOP ──▶ STOP_COPY         save; the client reads the state as a stream
    PRE_COPY ──▶ STOP_COPY     pause and save
    RUNNING ◀─▶ PRE_COPY       nothing: there is no state to read before the device has stopped
    STOP_COPY ──▶ STOP         the stream is dropped
    STOP ──▶ RESUMING          the client writes a state as a stream
    RESUMING ──▶ STOP          load; a state that is refused: ERROR

Every other pair goes along the shortest path of these that has PRE_COPY and STOP_COPY at its ends only. A reset leads
from every state to RUNNING, and is the only way out of ERROR.
"""

from __future__ import annotations

import enum
import errno
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from nvmove.vfio.dirty import DirtyLog
from nvmove.vfio.message import RequestError
from nvmove.vmstate.schema import StateError

log = logging.getLogger(__name__)

MAX_STATE = 64 << 20
"""Bytes that a client may write as a state; the largest real one is far below."""


class State(enum.IntEnum):
    """The states of linux/vfio.h that are offered; the peer-to-peer ones are not."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    PRE_COPY = 6


SAVING = frozenset({State.STOP_COPY, State.PRE_COPY})


class Migrated(Protocol):
    """The device. All of these may wait."""

    def pause(self) -> None:
        """Stop; on return nothing is in flight."""

    def resume(self) -> None:
        """Go on."""

    def save(self) -> bytes:
        """Return the state of the paused device."""

    def load(self, data: bytes) -> None:
        """Take a state over; raise `nvmove.vmstate.schema.StateError` when it cannot."""

    def log_dirty(self, log: DirtyLog | None) -> None:
        """Log from now on what the device writes to guest memory; None: no more."""


class Migration:
    """One device's state machine, for one client after the other.

    Its methods are for the control thread and never wait: what takes long runs on a thread of its own, in the order it
    was asked for.
    """

    def __init__(self, device: Migrated) -> None:
        self._device = device
        self.dirty_log: DirtyLog | None = None
        """What is logged for the client."""
        self._lock = threading.Lock()
        self._state = State.RUNNING
        self._stopped = False
        """Whether the device is paused, by us."""
        self._stream = bytearray()
        self._jobs = _Jobs()

    def get_state(self) -> State:
        """Return the state; during a transition the last one reached."""
        with self._lock:
            return self._state

    def set_state(self, target: State, done: Callable[[int], None]) -> None:
        """Go to `target`; `done(errno)` when it is reached or cannot be, from another thread."""
        self._jobs.add(lambda: done(self._go(target)))

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes of the state; fewer: that was all. Raises RequestError."""
        with self._lock:
            if self._state not in SAVING:
                raise RequestError(errno.EINVAL, f"MIG_DATA_READ in state {self._state.name}")
            data = bytes(self._stream[:size])
            del self._stream[:size]
            return data

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes of a state. Raises RequestError."""
        with self._lock:
            if self._state is not State.RESUMING:
                raise RequestError(errno.EINVAL, f"MIG_DATA_WRITE in state {self._state.name}")
            if len(self._stream) + len(data) > MAX_STATE:
                raise RequestError(errno.EFBIG, f"a device state of more than {MAX_STATE} bytes")
            self._stream += data

    def start_log(self, dirty_log: DirtyLog, done: Callable[[int], None]) -> None:
        """Log what the device writes; `done(errno)` when all from then on will be in it."""

        def run() -> None:
            if self.dirty_log is not None:
                log.warning("DMA_LOGGING_START: it is started already")
                done(errno.EINVAL)
                return
            self._device.log_dirty(dirty_log)
            self.dirty_log = dirty_log
            done(0)

        self._jobs.add(run)

    def stop_log(self, done: Callable[[int], None]) -> None:
        """Log no more, if it was logged; `done(0)` then."""

        def run() -> None:
            self._stop_log()
            done(0)

        self._jobs.add(run)

    def reset(self, done: Callable[[], None]) -> None:
        """The device was reset: go to RUNNING, whatever was. From any thread; `done` on another."""

        def run() -> None:
            self._run_again()
            done()

        self._jobs.add(run)

    def end(self, done: Callable[[], None]) -> None:
        """The client is gone: as after a reset, and nothing is logged. From any thread; `done` on another."""

        def run() -> None:
            self._stop_log()
            self._run_again()
            done()

        self._jobs.add(run)

    def close(self) -> None:
        """End the thread, when what it does is done; nothing waits for that."""
        self._jobs.close()

    # On the thread.

    def _go(self, target: State) -> int:
        start = self.get_state()
        steps = path(start, target)
        if steps is None:
            log.warning("migration: no way from %s to %s", start.name, target.name)
            return errno.EINVAL
        for step in steps:
            try:
                _ARCS[self._state, step](self)
            except StateError as error:
                log.warning("migration: the state was refused: %s", error)
                self._reached(State.ERROR)
                return errno.EINVAL
            except Exception:
                log.exception("migration: %s to %s failed", self._state.name, step.name)
                self._reached(State.ERROR)
                return errno.EIO
            self._reached(step)
        return 0

    def _reached(self, state: State) -> None:
        with self._lock:
            self._state = state

    def _run_again(self) -> None:
        self._drop_stream()
        if self._stopped:
            self._resume()
        self._reached(State.RUNNING)

    def _stop_log(self) -> None:
        if self.dirty_log is not None:
            self._device.log_dirty(None)
            self.dirty_log = None

    def _pause(self) -> None:
        self._stopped = True
        self._device.pause()

    def _resume(self) -> None:
        self._device.resume()
        self._stopped = False

    def _pause_and_save(self) -> None:
        self._pause()
        self._save()

    def _save(self) -> None:
        data = self._device.save()
        with self._lock:
            self._stream[:] = data

    def _load(self) -> None:
        with self._lock:
            data = bytes(self._stream)
            self._stream.clear()
        self._device.load(data)

    def _drop_stream(self) -> None:
        with self._lock:
            self._stream.clear()


_ARCS: dict[tuple[State, State], Callable[[Migration], None]] = {
    (State.RUNNING, State.STOP): Migration._pause,
    (State.STOP, State.RUNNING): Migration._resume,
    (State.STOP, State.STOP_COPY): Migration._save,
    (State.PRE_COPY, State.STOP_COPY): Migration._pause_and_save,
    (State.RUNNING, State.PRE_COPY): Migration._drop_stream,
    (State.PRE_COPY, State.RUNNING): Migration._drop_stream,
    (State.STOP_COPY, State.STOP): Migration._drop_stream,
    (State.STOP, State.RESUMING): Migration._drop_stream,
    (State.RESUMING, State.STOP): Migration._load,
}


def path(start: State, target: State) -> list[State] | None:
    """Return the states to go through, `target` the last; None when there is no way."""
    if start is target:
        return [] if start is not State.ERROR else None
    if (start, target) == (State.STOP_COPY, State.PRE_COPY):  # forbidden, though there is a path
        return None
    paths: deque[list[State]] = deque([[start]])
    while paths:
        so_far = paths.popleft()
        for source, step in _ARCS:
            if source is not so_far[-1] or step in so_far:
                continue
            if step is target:
                return [*so_far[1:], step]
            if step not in SAVING:
                paths.append([*so_far, step])
    return None


class _Jobs:
    """Runs what it is given on one thread, in order. The thread is there from the start: a reset must not lack it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="migration", daemon=True).start()

    def add(self, job: Callable[[], None]) -> None:
        self._queue.put(job)

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("migration")
