"""One command that was fetched from a submission queue, from its SQE to its completion."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Protocol

from nvmove.block.policy import DriveErrors, ErrorReport
from nvmove.nvme import core
from nvmove.nvme.activity import Callback
from nvmove.nvme.commands import dptr
from nvmove.nvme.errors import CommandError
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.seams import DmaError, Transfer
from nvmove.nvme.spec import SQE_SIZE, Status

_SQE = struct.Struct("<BBHIQQ16sIIIIII")
"""Common command format, Base 3.3.3.1: opcode, flags, CID, NSID, dwords 2-3, MPTR, DPTR, dwords 10 to 15."""
assert _SQE.size == SQE_SIZE


class ShadowDoorbells(Protocol):
    """Doorbells in memory (`nvmove.nvme.doorbells.Doorbells`)."""

    @property
    def offered(self) -> bool:
        """Whether the guest may have them."""

    def clear(self, qid: int, is_cq: bool) -> None:
        """A queue is about to be created: nothing was rung for it; raise CommandError."""

    def configure(self, command: Command, dbs: int, eis: int) -> None:
        """Look at these two buffers from now on; raise CommandError."""


class Controller(core.Controller, Protocol):
    """All that a command may use of its controller."""

    @property
    def doorbells(self) -> ShadowDoorbells:
        """Those in memory."""

    @property
    def errors(self) -> Mapping[str, DriveErrors]:
        """The drives' policies, by drive."""

    @property
    def on_error(self) -> Callable[[ErrorReport], None]:
        """Whom a failure of a disk is told."""

    def delete_cq(self, cq: CompletionQueue) -> None:
        """Remove a completion queue that no submission queue uses."""

    def delete_sq(self, sq: SubmissionQueue, done: Callback) -> list[Callback]:
        """Remove a queue; `done` when nothing of it is in flight. Returns what to call without the lock."""

    def complete(self, command: Command, status: int, result: int, *, dnr: bool, more: bool) -> None:
        """Post a completion; see `Command.complete`."""

    def hold(self, command: Command, announce: Callback) -> None:
        """Keep a command to be tried again."""

    def park(self, command: Command) -> None:
        """Let an Asynchronous Event Request wait."""

    def abort_held(self, sq: SubmissionQueue, cid: int) -> bool:
        """Let a held command complete as aborted; return whether there was one."""

    def abort_event_request(self, cid: int) -> bool:
        """Complete an outstanding Asynchronous Event Request as aborted; return whether there was one."""

    def abort_failed(self, sq: SubmissionQueue) -> None:
        """An Abort did not find its command, which may be at a disk."""


class Command:
    """A fetched submission queue entry together with its permit: a completion queue slot is reserved for it."""

    __slots__ = (
        "cdw10", "cdw11", "cdw12", "cdw13", "cdw14", "cdw15", "cid", "completed", "controller", "dptr", "flags",
        "mptr", "nsid", "opcode", "order", "sq", "sqe",
    )  # fmt: skip

    def __init__(self, controller: Controller, sq: SubmissionQueue, sqe: bytes, order: int = 0) -> None:
        """`order` counts the commands of the queue."""
        self.controller = controller
        self.sq = sq
        self.sqe = sqe
        self.order = order
        self.completed = False
        (
            self.opcode, self.flags, self.cid, self.nsid, _, self.mptr, self.dptr,
            self.cdw10, self.cdw11, self.cdw12, self.cdw13, self.cdw14, self.cdw15,
        ) = _SQE.unpack(sqe)  # fmt: skip

    def __repr__(self) -> str:
        return f"command {self.opcode:#04x} (cid {self.cid}) of submission queue {self.sq.sqid}"

    @property
    def sqid(self) -> int:
        """Its submission queue's id."""
        return self.sq.sqid

    @property
    def is_admin(self) -> bool:
        """Whether it came through the admin queue."""
        return self.sq.sqid == 0

    @property
    def stale(self) -> bool:
        """Whether the controller was disabled or reset since it was fetched: it must do nothing more."""
        return self.sq.epoch != self.controller.epoch

    def complete(self, status: int = Status.SUCCESS, result: int = 0, *, dnr: bool = True, more: bool = False) -> None:
        """Post the completion, exactly once, from any thread but the control thread.

        `result` is dwords 0 and 1; `dnr` and `more` count only with an error `status`.
        """
        self.controller.complete(self, status, result, dnr=dnr, more=more)

    def transfer(self, length: int, to_guest: bool) -> Transfer:
        """Acquire the guest memory of the command's data pointer for `length` bytes; raise CommandError."""
        if length > self.controller.max_transfer:
            raise CommandError(Status.INVALID_FIELD)
        try:
            segments = dptr.resolve(self, length, self.controller.page_size, self.controller.memory)
            return self.controller.memory.acquire(segments, to_guest)
        except DmaError:
            raise CommandError(Status.DATA_TRANSFER_ERROR, location=dptr.LOCATION) from None

    def read_data(self, length: int) -> bytes:
        """Return `length` bytes of what the host gave with the command; raise CommandError."""
        transfer = self.transfer(length, to_guest=False)
        try:
            return b"".join(transfer.buffers)
        finally:
            transfer.finish(commit=False)

    def write_data(self, data: bytes) -> None:
        """Store `data` where the host asked for it; raise CommandError."""
        transfer = self.transfer(len(data), to_guest=True)
        position = 0
        for buffer in transfer.buffers:
            buffer[:] = data[position : position + len(buffer)]
            position += len(buffer)
        try:
            transfer.finish()
        except DmaError:
            raise CommandError(Status.DATA_TRANSFER_ERROR) from None
