"""Interrupt lines: the eventfds that the client gave us (SET_IRQS), as `nvmove.nvme.seams.Interrupts`.

INTx is a level, and masks itself when it fires: the client unmasks it when the guest has acknowledged, and if the level
is still up then, it fires again. An MSI-X vector without an eventfd keeps its message pending until it gets one; QEMU
takes all eventfds away and gives them back whenever the guest changes anything about MSI-X.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import threading
from collections.abc import Callable, Iterable

from nvmove.vfio.device import ERROR, INTX, MSIX, IrqAction, IrqWhat


class LentVector:
    """A vector's eventfd lent to somebody who writes to it himself; `nvmove.nvme.seams.LentInterrupt`."""

    def __init__(self, fd: int, revoke: Callable[[], None], release: Callable[[LentVector], None]) -> None:
        self.fd = fd
        self.revoke = revoke
        self._release = release

    def release(self) -> None:
        """Give it back."""
        self._release(self)
        os.close(self.fd)


class InterruptLines:
    """INTx and `vectors` MSI-X vectors. `config_enables_msix` tells whether the guest has set MSI-X Enable."""

    def __init__(self, vectors: int, config_enables_msix: Callable[[], bool]) -> None:
        self._config_enables_msix = config_enables_msix
        self._lock = threading.Lock()
        self._msix: list[int | None] = [None] * vectors
        self._connected = 0
        self._pending: set[int] = set()
        self._intx: int | None = None
        self._asserted = False
        self._masked = False
        self._quiet = False
        self._unmasker: _Unmasker | None = None
        self._lent: list[tuple[int, LentVector]] = []

    # nvme.seams.Interrupts: never waits.

    @property
    def msix_enabled(self) -> bool:
        """Whether the guest chose MSI-X: it set the bit, or its driver in user space connected a vector."""
        return self._connected > 0 or self._config_enables_msix()

    @property
    def uses_pin(self) -> bool:
        """Whether the guest is told by the INTx pin; a host that polls connects nothing to it."""
        return self._intx is not None and not self.msix_enabled

    def signal(self, vector: int) -> None:
        """Send MSI-X message `vector`, now or when it has an eventfd."""
        with self._lock:
            self._fire(vector)

    def lend(self, vector: int, revoke: Callable[[], None]) -> LentVector | None:
        """Lend vector `vector`, as `nvmove.nvme.seams.LendsInterrupts`."""
        with self._lock:
            fd = self._msix[vector]
            if fd is None:
                return None
            lent = LentVector(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0), revoke, self._take_back)
            self._lent.append((vector, lent))
            return lent

    def _take_back(self, lent: LentVector) -> None:
        with self._lock:
            self._lent = [entry for entry in self._lent if entry[1] is not lent]

    def set_level(self, asserted: bool) -> None:
        """Drive the INTx pin."""
        with self._lock:
            self._asserted = asserted
            self._drive()

    # The owner's side.

    def quieten(self) -> None:
        """Keep INTx from the client until `resume`: it can lower its own pin meanwhile, and that stays low."""
        with self._lock:
            self._quiet = True

    def resume(self) -> None:
        """Let INTx through again, and at once if the level is up."""
        with self._lock:
            self._quiet = False
            self._drive()

    # The client's side.

    def set_irqs(self, index: int, start: int, count: int, action: IrqAction) -> None:
        """Do one SET_IRQS; takes the action's fds over. Raises OSError EINVAL or ENOTSUP, with the fds closed."""
        try:
            self._check(index, start, count, action)
        except OSError:
            _close(action.fds)
            raise
        if index == ERROR:
            _close(action.fds)  # no error of ours calls for it: an NVMe controller has CSTS.CFS
        elif index == INTX:
            self._set_intx(action)
        else:
            with self._lock:
                self._set_msix(start, count, action)

    def disconnect(self) -> None:
        """The client is gone: close its eventfds. What is pending stays pending for the next one."""
        with self._lock:
            self._revoke(range(len(self._msix)))
            _close(fd for fd in self._msix if fd is not None)
            self._msix = [None] * len(self._msix)
            self._connected = 0
            self._masked = False
            self._connect_intx(None)
        self._set_unmasker(None)

    # State.

    @property
    def level(self) -> bool:
        """The level of the INTx pin."""
        return self._asserted

    @property
    def pending(self) -> tuple[int, ...]:
        """Vectors whose message has not been sent, in ascending order."""
        with self._lock:
            return tuple(sorted(self._pending))

    def pending_bits(self) -> bytes:
        """Return the Pending Bit Array (PCIe Base 4.0 §7.7.2.4), a bit a vector, in whole quadwords."""
        bits = sum(1 << vector for vector in self.pending)
        return bits.to_bytes(-(-len(self._msix) // 64) * 8, "little")

    def forget_pending(self) -> None:
        """Drop the messages that were not sent: the guest has disabled MSI-X."""
        with self._lock:
            self._pending.clear()

    def reset(self) -> None:
        """Nothing pending, INTx low. The client's eventfds stay."""
        with self._lock:
            self._pending.clear()
            self._asserted = self._masked = False

    def load(self, pending: Iterable[int], asserted: bool) -> None:
        """Take over saved state; what has an eventfd already fires now."""
        with self._lock:
            self._pending = set(pending)
            for vector in sorted(self._pending):
                self._fire(vector)
            self._asserted = asserted
            self._drive()

    def _check(self, index: int, start: int, count: int, action: IrqAction) -> None:
        limit = {INTX: 1, MSIX: len(self._msix), ERROR: 1}.get(index, 0)
        if start + count > limit:
            raise OSError(errno.EINVAL, f"interrupts {start}+{count} of index {index}, which has {limit}")
        if index != INTX and action.what is not IrqWhat.TRIGGER:
            raise OSError(errno.EINVAL, f"{action.what.value} for interrupts that cannot be masked")
        if action.eventfds and action.what is IrqWhat.MASK:
            raise OSError(errno.ENOTSUP, "an eventfd for masking")
        for fd in action.fds:
            if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
                raise OSError(errno.EINVAL, "a descriptor that is no eventfd")

    def _set_msix(self, start: int, count: int, action: IrqAction) -> None:
        if action.disable:
            start, count = 0, len(self._msix)
        if action.eventfds:
            self._revoke(range(start, start + count))
            for vector in range(start, start + count):
                self._connect(vector, action.fds[vector - start] if action.fds else None)
            return
        for vector, fire in zip(range(start, start + count), action.fire, strict=True):
            if fire:
                self._fire(vector)

    def _set_intx(self, action: IrqAction) -> None:
        fd = action.fds[0] if action.fds else None
        if action.eventfds and action.what is IrqWhat.UNMASK:
            self._set_unmasker(None if fd is None else _Unmasker(fd, self._unmask))
            return
        if action.disable:
            self._set_unmasker(None)
        with self._lock:
            if action.eventfds:
                self._masked = False
                self._connect_intx(fd)
                self._drive()
            elif any(action.fire):
                if action.what is IrqWhat.MASK:
                    self._masked = True
                elif action.what is IrqWhat.UNMASK:
                    self._masked = False
                    self._drive()
                elif self._intx is not None:
                    _notify(self._intx)

    def _set_unmasker(self, unmasker: _Unmasker | None) -> None:
        # Outside the lock: the old one's thread may be waiting for it.
        old, self._unmasker = self._unmasker, unmasker
        if old is not None:
            old.close()

    def _unmask(self) -> None:
        with self._lock:
            self._masked = False
            self._drive()

    def _revoke(self, vectors: range) -> None:
        for vector, lent in self._lent:
            if vector in vectors:
                lent.revoke()

    def _connect(self, vector: int, fd: int | None) -> None:
        old = self._msix[vector]
        if old is not None:
            os.close(old)
            self._connected -= 1
        self._msix[vector] = fd
        if fd is not None:
            os.set_blocking(fd, False)
            self._connected += 1
            if vector in self._pending:
                self._fire(vector)

    def _connect_intx(self, fd: int | None) -> None:
        if self._intx is not None:
            os.close(self._intx)
        if fd is not None:
            os.set_blocking(fd, False)
        self._intx = fd

    def _fire(self, vector: int) -> None:
        fd = self._msix[vector]
        if fd is None:
            self._pending.add(vector)
        else:
            self._pending.discard(vector)
            _notify(fd)

    def _drive(self) -> None:
        if self._asserted and not self._masked and not self._quiet and self._intx is not None:
            self._masked = True
            _notify(self._intx)


class _Unmasker:
    """A client that lets the kernel acknowledge INTx (KVM's resamplefd) unmasks by eventfd: a thread waits for it."""

    def __init__(self, fd: int, unmask: Callable[[], None]) -> None:
        """Takes `fd` over. Raises OSError, with it closed: there is no thread to be had, or no descriptor."""
        self._fd = fd
        self._unmask = unmask
        self._thread = threading.Thread(target=self._run, name="intx-unmask", daemon=True)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._stop)
            os.set_blocking(fd, False)
            try:
                self._thread.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from None
            undo.pop_all()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join(0.1)
        while self._thread.is_alive():  # it waits in its read: the client has made that wait, and was there before it
            _notify(self._fd)
            self._thread.join(0.1)
        _close((self._fd, self._stop))

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._stop in ready:
                return
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:  # the client read its own eventfd
                continue
            self._unmask()


def _notify(fd: int) -> None:
    """Signal, unless the counter is full: then the interrupt is signalled and not taken yet, one more says nothing new.

    O_NONBLOCK is the open file's, and the client has that too: it may have taken the flag off.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(0):
        with contextlib.suppress(BlockingIOError):  # it has become full
            os.eventfd_write(fd, 1)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
