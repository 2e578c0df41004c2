"""Opening the drive that a configuration names, without QEMU behind it."""

from __future__ import annotations

import msgspec

from nvmove.block.backend import Backend, BackendError
from nvmove.block.config import DriveConfig
from nvmove.block.nbd.backend import open_nbd
from nvmove.block.null import NullBackend
from nvmove.block.raw.backend import RawBackend, open_raw


def open_drive(drive: DriveConfig, *, share_rw: bool = False, active: bool = True) -> Backend:
    """Open a raw image or an NBD export; raises BackendError, one line.

    `share_rw` is the device's property; `active` is `open_raw`'s. All else in `drive` is honoured or refused.
    """
    name = drive.id or drive.node_name or drive.file
    if drive.format is None:
        raise BackendError(f"drive '{name}': needs format=raw (nvmove does not guess formats)")
    if drive.format != "raw":
        raise BackendError(
            f"drive '{name}': format={drive.format} needs QEMU or qemu-nbd behind it: export the image with "
            f"`qemu-nbd -f {drive.format} -k SOCKET -t -e 0 FILE` and give file=nbd+unix:///?socket=SOCKET,format=raw"
        )
    if drive.others:
        raise BackendError(f"drive '{name}': option '{drive.others[0][0]}' is not supported without QEMU")
    options = msgspec.structs.replace(drive.options, share_rw=share_rw)
    if drive.null is not None:
        return NullBackend(drive.null, options, active=active)
    scheme, colon, _ = drive.file.partition(":")
    if not colon or "/" in scheme or scheme in ("file", "host_device"):
        return open_raw(drive.file, options=options, active=active)
    return open_nbd(drive.file, options=options)


def open_local(drive: DriveConfig, *, active: bool = True) -> RawBackend | NullBackend:
    """Open what nvmove serves itself beside a QEMU: a raw image or a null disk; raises BackendError, one line.

    `active` is `open_raw`'s.
    """
    if drive.null is not None:
        return NullBackend(drive.null, drive.options, active=active)
    return open_raw(drive.file, options=drive.options, active=active)
