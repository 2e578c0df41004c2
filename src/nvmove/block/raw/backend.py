"""Raw images: regular files and block devices, read and written in the caller's thread.

An inline preadv into guest memory is the fastest way for a file in the page cache (docs/design, measurements), so
`submit` finishes each request before it returns.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable

import msgspec

from nvmove.block import linux
from nvmove.block.backend import BackendError, Operation, Request, refusal
from nvmove.block.config import OpenOptions
from nvmove.block.gate import Gate
from nvmove.block.lend import LentFile, Loan
from nvmove.block.raw.direct import DirectTransfer
from nvmove.block.raw.locks import ImageLock
from nvmove.block.raw.space import DeviceSpace, FileSpace
from nvmove.block.transfer import FileTransfer
from nvmove.block.zeroes import detect_zeroes

_log = logging.getLogger(__name__)


class RawBackend:
    """An open raw image. Any number of threads may submit at once."""

    def __init__(self, fd: int, path: str, options: OpenOptions, *, active: bool = True) -> None:
        """Take over `fd`, opened as `options` say; raises BackendError (the image is locked) and OSError."""
        self._fd = fd
        self._path = path
        self._options = options
        self._transfer = DirectTransfer(fd) if options.direct else FileTransfer(fd)
        space = DeviceSpace if stat.S_ISBLK(os.fstat(fd).st_mode) else FileSpace
        self._space = space(fd, self._transfer, options.unmap)
        self._lock = ImageLock(fd, path, read_only=options.read_only, share_rw=options.share_rw)
        self._size = self._space.size()
        self._gate = Gate(errno.EPERM)
        self._lost = 0
        """The errno of a sync through the page cache that failed. Linux tells of lost pages once and then takes them
        for clean: what earlier writes left behind nobody knows, so no flush succeeds any more, as in QEMU."""
        if active:
            self._take()
            self._gate.open()

    @property
    def size(self) -> int:
        """Length in bytes. While another host has the image it may change it, so it is looked at each time."""
        return self.refresh_size() if self._gate.refusal == errno.EPERM else self._size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused (with EROFS)."""
        return self._options.read_only

    @property
    def supports_discard(self) -> bool:
        """Whether DISCARD gives space back."""
        return self._space.supports_discard and not self.read_only

    @property
    def request_alignment(self) -> int:
        """What O_DIRECT demands of offsets and memory to avoid a copy; 1 through the page cache."""
        return self._transfer.alignment

    def submit(self, request: Request) -> None:
        """Do `request`, then call its `done`."""
        error = self._gate.enter()
        if not error:
            try:
                error = refusal(request, self._size, self._options.read_only)
                if not error:
                    alignment = self._transfer.alignment
                    self._perform(detect_zeroes(request, self._options))
                    if self._transfer.alignment != alignment:
                        self._gate.revoke()
            except OSError as failure:
                error = failure.errno or errno.EIO
            finally:
                self._gate.leave()
        request.done(error)

    def lend(self, revoke: Callable[[], None]) -> LentFile | None:
        """Lend the file, as `LendsFile`, unless it is read and written in a special way."""
        options = self._options
        if options.detect_zeroes != "off" or self._lost or self._gate.stay(revoke):
            return None
        return Loan(
            self._fd,
            lambda: self._gate.depart(revoke),
            writable=not options.read_only,
            syncs=not (options.no_flush or options.read_only),
            durable=not options.writeback,
            space=self._space.lent,
            alignment=self._transfer.alignment,
        )

    def sync_failed(self, code: int) -> None:
        """A borrower's sync failed: from now on nothing is lent, and flushes fail."""
        self._lose(OSError(code, os.strerror(code)))
        self._gate.revoke()

    def refresh_size(self) -> int:
        """Look at the size again and return it; the old one stays when it cannot be read."""
        before = self._size
        try:
            self._size = self._space.size()
        except OSError as error:
            _log.warning("size of '%s' cannot be read: %s", self._path, error.strerror)
        if self._size != before:
            self._gate.revoke()
        return self._size

    def recover(self) -> None:
        """A file has no connection to lose; what its filesystem lacks, others mend."""

    def resize(self, size: int) -> None:
        """Change the length to `size` bytes, as QEMU's `block_resize` does; raises BackendError in its words."""
        if self._options.read_only:
            raise BackendError("Image is read-only")
        if isinstance(self._space, DeviceSpace):
            if size > self._space.size():
                raise BackendError("Cannot grow device files")
            return  # a device keeps its size
        try:
            os.ftruncate(self._fd, size)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else os.strerror(errno.EFBIG)
            raise BackendError(f"Could not resize file: {reason}") from None

    def inactivate(self) -> None:
        """Hand the image over: finish what is under way, flush, drop the locks. Requests are refused with EPERM.

        Raises BackendError when it cannot be flushed, with the image still ours: whoever takes it next would miss
        writes that the guest was told of.
        """
        self._gate.shut(errno.EPERM)
        try:
            self._flush()
        except OSError as error:
            self._gate.open()
            raise BackendError(f"'{self._path}' cannot be flushed, and not be handed over: {error.strerror}") from None
        self._lock.release()

    def activate(self) -> None:
        """Take the image: its locks, its size, and requests again; raises BackendError when another has it."""
        if self._gate.refusal:
            self._take()
            self._forget_cache()
            self._gate.open()

    def _take(self) -> None:
        if self._options.locking:
            self._lock.take()
        self.refresh_size()

    def _forget_cache(self) -> None:
        """Drop what the page cache has of the image: on a network filesystem it may be older than what is there."""
        try:
            self._sync()  # only clean pages go
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            _log.warning("the page cache of '%s' cannot be dropped: %s", self._path, error.strerror)

    def close(self) -> None:
        """Finish what is under way, flush, drop the locks and close the image. Requests are refused with ESHUTDOWN."""
        self._gate.shut()
        if self._fd < 0:
            return
        try:
            self._flush()
        except OSError as error:
            _log.error("'%s' cannot be flushed: %s", self._path, error.strerror)
        self._lock.release()
        os.close(self._fd)
        self._fd = -1

    def _perform(self, request: Request) -> None:
        """Do a request that was checked; raises OSError."""
        fua = (request.fua or not self._options.writeback) and not self._options.no_flush
        offset, length = request.offset, request.length
        match request.operation:
            case Operation.READ:
                self._transfer.read(request.buffers, offset, length)
            case Operation.WRITE:
                self._write(request, fua)
            case Operation.FLUSH:
                self._flush()
            case Operation.WRITE_ZEROES if length:
                self._space.write_zeroes(offset, length, request.may_unmap)
                if fua:
                    self._sync()
            case Operation.DISCARD if length:
                self._space.discard(offset, length)

    def _write(self, request: Request, fua: bool) -> None:
        try:
            self._transfer.write(request.buffers, request.offset, request.length, fua)
        except OSError as error:
            if fua and error.errno == errno.EIO:  # the write's own sync may have been told of others' pages
                self._lose(error)
            raise

    def _flush(self) -> None:
        if not (self._options.no_flush or self._options.read_only):
            self._sync()

    def _sync(self) -> None:
        """Bring what was written to stable storage; raises OSError, and once it has, always."""
        if self._lost:
            raise OSError(self._lost, os.strerror(self._lost))
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lose(error)
            raise

    def _lose(self, error: OSError) -> None:
        if self._options.direct or self._lost:  # O_DIRECT leaves nothing in the page cache
            return
        self._lost = error.errno or errno.EIO
        _log.error(
            "'%s': a flush failed (%s), and what was written before may be lost: flushes fail until it is opened anew",
            self._path,
            error.strerror,
        )


def open_raw(filename: str, *, options: OpenOptions | None = None, active: bool = True) -> RawBackend:
    """Open a raw image; raises BackendError, one line.

    With `active` off the image is looked at but not locked, and every request is refused until `activate`: the
    destination of a migration.
    """
    options = options or OpenOptions()
    path = filename.removeprefix("file:").removeprefix("host_device:")
    try:
        _check_kind(path)
        try:
            fd = _open(path, options)
        except OSError as error:
            if not options.auto_read_only or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            options = _read_only(options)
            fd = _open(path, options)
    except OSError as error:
        raise BackendError(f"Could not open '{path}': {error.strerror}{_hint(error, options)}") from None
    try:
        return RawBackend(fd, path, options, active=active)
    except OSError as error:
        os.close(fd)
        raise BackendError(f"Could not use '{path}': {error.strerror}") from None
    except BackendError:
        os.close(fd)
        raise


def _check_kind(path: str) -> None:
    """Raise BackendError for what cannot be a disk image, OSError for what is not there."""
    if "\0" in path:
        raise BackendError(f"Could not open {path!r}: a file name has no NUL in it")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise BackendError(f"Could not open '{path}': it is a directory, not a disk image")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BackendError(f"Could not open '{path}': it is neither a regular file nor a block device")


def _open(path: str, options: OpenOptions) -> int:
    """Open an image and return its descriptor; raises OSError."""
    access = os.O_RDONLY if options.read_only else os.O_RDWR
    fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if options.direct else 0))
    try:
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        if is_device and not options.read_only and linux.block_device_is_read_only(fd):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))  # Linux opens it all the same; QEMU refuses too
    except OSError:
        os.close(fd)
        raise
    return fd


def _read_only(options: OpenOptions) -> OpenOptions:
    return msgspec.structs.replace(options, read_only=True)


def _hint(error: OSError, options: OpenOptions) -> str:
    match error.errno:
        case errno.ENOENT:
            return " (qemu-img create makes an image)"
        case errno.EACCES | errno.EPERM | errno.EROFS if not options.read_only:
            return " (readonly=on needs no right to write)"
        case errno.EINVAL if options.direct:
            return " (its filesystem has no O_DIRECT: use cache=writeback)"
    return ""
