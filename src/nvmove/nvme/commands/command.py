"""One command that was fetched from a submission queue, from its SQE to its completion."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from nvmove.nvme.commands import dptr
from nvmove.nvme.errors import CommandError
from nvmove.nvme.seams import DmaError, Transfer
from nvmove.nvme.spec import SQE_SIZE, Status

if TYPE_CHECKING:
    from nvmove.nvme.controller import Controller
    from nvmove.nvme.queue import SubmissionQueue

_SQE = struct.Struct("<BBHIQQ16sIIIIII")
"""Common command format, Base 3.3.3.1: opcode, flags, CID, NSID, dwords 2-3, MPTR, DPTR, dwords 10 to 15."""
assert _SQE.size == SQE_SIZE


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
