"""One client's protocol: commands become calls of the device, their results replies. No sockets in here.

    new ──VERSION──▶ negotiated        (`_BEFORE_VERSION`: all that is allowed in `new`)

A refused command is answered with its errno and changes nothing; a posted one is logged instead. UNMAP, RESET, writes
that ask for a reset, alone or in a batch, and a change of the migration state are answered when the device says that it
is done, from whatever thread it says so.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from nvmove.vfio import deviceinfo, features, message
from nvmove.vfio.device import (
    INTX,
    IRQ_INDEX_COUNT,
    REGION_COUNT,
    Device,
    IrqAction,
    IrqWhat,
    Reset,
)
from nvmove.vfio.dma import DmaChannel
from nvmove.vfio.ends import Ends
from nvmove.vfio.message import Command, Header, RegionAccess, RequestError
from nvmove.vfio.receive import LOST, close_all
from nvmove.vfio.version import PROTOCOL, parse_version, version_payload

log = logging.getLogger(__name__)

_MAX_REFUSALS_LOGGED = 20
"""A client's: a guest can cause some of them."""
_BEFORE_VERSION = frozenset({Command.VERSION})
_WITH_DESCRIPTORS = frozenset({Command.DMA_MAP, Command.DEVICE_SET_IRQS})
_WHAT = {
    message.SET_TRIGGER: IrqWhat.TRIGGER,
    message.SET_MASK: IrqWhat.MASK,
    message.SET_UNMASK: IrqWhat.UNMASK,
}
_IRQ_FLAGS = {INTX: deviceinfo.IRQ_EVENTFD | deviceinfo.IRQ_MASKABLE | deviceinfo.IRQ_AUTOMASKED}


class Send(Protocol):
    """Puts a whole message on the wire, with descriptors, which stay the caller's; from any thread. Raises nothing."""

    def __call__(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send."""


class Session:
    """`send` is the connection's."""

    def __init__(self, device: Device, send: Send) -> None:
        self._device = device
        self._send = send
        self._channel: DmaChannel | None = None
        self._refusals = 0
        self._handlers: dict[int, Callable[[Header, memoryview, list[int]], bytes | None]] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
            Command.DEVICE_RESET: self._reset,
            Command.DEVICE_FEATURE: self._device_feature,
            Command.MIG_DATA_READ: self._migration_read,
            Command.MIG_DATA_WRITE: self._migration_write,
        }

    def handle(self, header: Header, payload: memoryview, fds: list[int]) -> None:
        """Do one message; takes its descriptors over. Raises StreamError when the connection must end."""
        if not header.is_reply:
            self._command(header, payload, fds)
            return
        close_all(fds)
        if self._channel is None:
            raise message.StreamError(f"reply to command {header.command} that was not sent")
        self._channel.answer(header, payload)

    def close(self, done: Callable[[], None]) -> None:
        """The client is gone: fail its DMA, take its memory from the device; `done` when nothing uses it."""
        if self._channel is None:
            done()
            return
        self._channel.refuse("the vfio-user client is gone")
        self._device.detach(done)

    def _command(self, header: Header, payload: memoryview, fds: list[int]) -> None:
        try:
            answer = self._answer(header, payload, fds)
        except (RequestError, OSError) as error:
            self._refuse(header, error.errno or errno.EIO, str(error))
        except Exception:
            # A defect of ours. The guest must not hang for it: the client gets its answer, the log the traceback.
            log.exception("command %d failed", header.command)
            self._refuse(header, errno.EIO, "internal error")
        else:
            if answer is not None and header.wants_reply:
                self._send(message.reply(header, answer))

    def _answer(self, header: Header, payload: memoryview, fds: list[int]) -> bytes | None:
        try:
            handler = self._handlers.get(header.command)
            if handler is None:
                raise RequestError(errno.ENOTSUP, f"command {header.command} is not known")
            if self._channel is None and header.command not in _BEFORE_VERSION:
                raise RequestError(errno.EINVAL, f"{Command(header.command).name} before VERSION")
            if header.command not in _WITH_DESCRIPTORS:
                close_all(fds)  # SPDK's client sends memory's descriptor with DMA_UNMAP too
            elif LOST in fds:
                raise RequestError(errno.EMFILE, "a descriptor was not received: too many open files")
            return handler(header, payload, fds)
        finally:
            close_all(fds)  # what the handler did not take; before the answer, so that a client can rely on it

    def _refuse(self, header: Header, code: int, reason: str) -> None:
        self._refusals += 1
        if self._refusals <= _MAX_REFUSALS_LOGGED:
            log.warning("vfio-user client: %s (errno %d)", reason, code)
        if header.wants_reply:
            self._send(message.error_reply(header, code))

    def _later(self, header: Header, payload: bytes = b"") -> Callable[[int], None]:
        def done(code: int) -> None:
            if header.wants_reply:
                self._send(message.error_reply(header, code) if code else message.reply(header, payload))

        return done

    # One method a command. Each returns the reply's payload, or None when the reply is deferred.

    def _version(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        version = parse_version(payload)
        if self._channel is not None:
            raise RequestError(errno.EINVAL, "VERSION a second time")
        if version.major != PROTOCOL[0]:
            raise RequestError(errno.EINVAL, f"protocol {version.major}.{version.minor}; this server speaks 0.0")
        self._channel = DmaChannel(self._send, min(version.max_data_xfer_size, message.MAX_DATA_XFER_SIZE))
        self._device.attach(self._channel)
        return version_payload(version.write_multiple, version.migration and self._device.migration is not None)

    def _dma_map(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        request = message.parse_dma_map(payload)
        fd = fds.pop(0) if fds else None
        self._device.map_dma(request.address, request.size, fd, request.offset, request.readable, request.writable)
        return b""

    def _dma_unmap(self, header: Header, payload: memoryview, fds: list[int]) -> None:
        request = message.parse_dma_unmap(payload)
        done = self._later(header, message.dma_unmap_payload(request))
        self._device.unmap_dma(request.address, request.size, request.all, done)

    def _device_info(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        deviceinfo.parse_device_info(payload)
        flags = deviceinfo.DEVICE_FLAGS_RESET | deviceinfo.DEVICE_FLAGS_PCI
        return deviceinfo.device_info_payload(flags, REGION_COUNT, IRQ_INDEX_COUNT)

    def _region_info(self, header: Header, payload: memoryview, fds: list[int]) -> bytes | None:
        asked = deviceinfo.parse_region_info(payload)
        if asked.index >= REGION_COUNT:
            raise RequestError(errno.EINVAL, f"region {asked.index}")
        region = self._device.regions[asked.index]
        flags = (deviceinfo.REGION_READ if region.readable else 0) | (deviceinfo.REGION_WRITE if region.writable else 0)
        area = region.mappable
        if area is None:
            return deviceinfo.region_info_payload(asked.index, flags, region.size)
        answer = deviceinfo.region_info_payload(asked.index, flags, region.size, (area.offset, area.size), asked.argsz)
        if len(answer) < deviceinfo.MAPPABLE_REGION_INFO_SIZE or not header.wants_reply:
            return answer
        self._send(message.reply(header, answer), [area.fd])
        return None

    def _region_io_fds(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        index, flags, count = deviceinfo.parse_indexed_info(payload)
        if index >= REGION_COUNT or flags or count:
            raise RequestError(errno.EINVAL, f"REGION_IO_FDS of region {index}, flags {flags:#x}, count {count}")
        return deviceinfo.indexed_info_payload(index)  # none: every access comes by message

    def _irq_info(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        index, _, _ = deviceinfo.parse_indexed_info(payload)
        if index >= IRQ_INDEX_COUNT:
            raise RequestError(errno.EINVAL, f"interrupt index {index}")
        count = self._device.irq_counts[index]
        return deviceinfo.indexed_info_payload(
            index, _IRQ_FLAGS.get(index, deviceinfo.IRQ_EVENTFD) if count else 0, count
        )

    def _set_irqs(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        request = message.parse_irq_set(payload)
        if request.index >= IRQ_INDEX_COUNT or request.start + request.count > self._device.irq_counts[request.index]:
            raise RequestError(
                errno.EINVAL, f"interrupts {request.start}+{request.count} of index {request.index} do not exist"
            )
        action = _irq_action(request, fds)
        self._device.set_irqs(request.index, request.start, request.count, action)
        return b""

    def _region_read(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        access = message.parse_region_read(payload)
        if not self._in_range(access) or not self._device.regions[access.region].readable:
            raise RequestError(errno.EINVAL, f"read of {access.count} at {access.offset:#x}, region {access.region}")
        data = self._device.read(access.region, access.offset, access.count)
        return message.region_access_payload(RegionAccess(access.offset, access.region, access.count, data))

    def _region_write(self, header: Header, payload: memoryview, fds: list[int]) -> bytes | None:
        access = message.parse_region_write(payload)
        self._check_write(access)
        reset = self._device.write(access.region, access.offset, access.data)
        answer = message.region_access_payload(RegionAccess(access.offset, access.region, access.count))
        if reset is None:
            return answer
        answered = self._later(header, answer)
        self._begin(reset, lambda: answered(0))
        return None

    def _region_write_multi(self, header: Header, payload: memoryview, fds: list[int]) -> None:
        writes = list(message.parse_write_multi(payload))
        for access in writes:
            self._check_write(access)
        answer = self._later(header, len(writes).to_bytes(8, "little"))  # the batch, without its writes
        ends = Ends(lambda: answer(0))
        for access in writes:
            if reset := self._device.write(access.region, access.offset, access.data):
                self._begin(reset, ends.one_more())
        ends.no_more()

    def _check_write(self, access: RegionAccess) -> None:
        if not self._in_range(access) or not self._device.regions[access.region].writable:
            raise RequestError(errno.EINVAL, f"write of {access.count} at {access.offset:#x}, region {access.region}")

    def _in_range(self, access: RegionAccess) -> bool:
        return (
            access.region < REGION_COUNT
            and access.count > 0
            and access.offset + access.count <= self._device.regions[access.region].size
        )

    # The protocol's own migration (vfio/features.py).

    def _device_feature(self, header: Header, payload: memoryview, fds: list[int]) -> bytes | None:
        return features.device_feature(self._device.migration, payload, lambda reply: self._later(header, reply))

    def _migration_read(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        return features.migration_read(self._device.migration, payload)

    def _migration_write(self, header: Header, payload: memoryview, fds: list[int]) -> bytes:
        return features.migration_write(self._device.migration, payload)

    def _reset(self, header: Header, payload: memoryview, fds: list[int]) -> None:
        answered = self._later(header)
        self._begin(self._device.reset, lambda: answered(0))

    def _begin(self, reset: Reset, ended: Callable[[], None]) -> None:
        """Begin a reset; the message that asked for it is answered at its end.

        The guest stands still for as long: QEMU waits for the answer, in its main loop or with its lock. That loop
        serves DMA by message.
        """
        assert self._channel is not None  # `_command` lets nothing but VERSION through without it
        channel = self._channel

        def done() -> None:
            channel.admit()
            ended()

        channel.refuse("the device is being reset")
        reset(done)


def _irq_action(request: message.IrqSet, fds: list[int]) -> IrqAction:
    """Translate flags and descriptors; takes the descriptors out of `fds` when they are right."""
    what = _WHAT[request.flags & (message.SET_TRIGGER | message.SET_MASK | message.SET_UNMASK)]
    if request.flags & message.SET_DATA_EVENTFD:
        if len(fds) not in {0, request.count} or not request.count:
            raise RequestError(errno.EINVAL, f"SET_IRQS with {len(fds)} descriptors for {request.count} interrupts")
        taken = tuple(fds)
        fds.clear()
        return IrqAction(what, eventfds=True, fds=taken)
    if fds:
        raise RequestError(errno.EINVAL, "SET_IRQS with descriptors that its flags do not announce")
    if request.flags & message.SET_DATA_NONE and not request.count:
        if what is not IrqWhat.TRIGGER or request.start:
            raise RequestError(errno.EINVAL, f"SET_IRQS {what.value} of no interrupts")
        return IrqAction(what, eventfds=True, disable=True)
    fire = request.fire if request.flags & message.SET_DATA_BOOL else (True,) * request.count
    return IrqAction(what, fire=fire)
