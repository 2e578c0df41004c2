"""`nvmove serve`: the device alone, for a VM manager that starts QEMU itself."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from nvmove.block.backend import BackendError
from nvmove.block.config import DriveConfig
from nvmove.block.fault import FaultRules, FaultyBackend
from nvmove.block.open import open_drive
from nvmove.block.policy import DriveErrors, ErrorPolicy
from nvmove.device import NvmeDevice
from nvmove.engine import choice
from nvmove.errors import UserError
from nvmove.limits import raise_descriptors
from nvmove.nvme.config import ControllerConfig
from nvmove.options.devices import MSG_TIMEOUT, DriveUse, ParsedController, parse_controllers, parse_device
from nvmove.options.drives import with_device_actions
from nvmove.options.faults import add_argument, parse_fault
from nvmove.options.nulls import null_drive
from nvmove.options.syntax import Option, OptionError, parse
from nvmove.owned import OwnedDevice
from nvmove.vfio.transport import ListenError

ENDING_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `nvmove serve`."""
    parser.add_argument("--socket", metavar="PATH", required=True, type=Path, help="the vfio-user socket to listen on")
    parser.add_argument(
        "--drive",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="a disk, in QEMU's -drive syntax: id=d0,file=PATH,format=raw or id=d0,file=nbd://HOST/EXPORT",
    )
    parser.add_argument(
        "--device",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="nvme,serial=…,drive=d0, in QEMU's -device syntax; further namespaces as nvme-ns,drive=…",
    )
    add_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; a client may come, go and come again."""
    raise_descriptors()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        controller, drives = _configure(args.device, args.drive)
        faults = FaultRules()
        for text in args.fault:
            faults.add(parse_fault(text, drives))
        with contextlib.ExitStack() as cleanup:
            backends: dict[str, FaultyBackend] = {}
            for use in controller.drives:
                image = open_drive(drives[use.name], share_rw=use.share_rw)
                backends[use.name] = FaultyBackend(image, faults, [use.name])
                cleanup.callback(backends[use.name].close)
            config = _with_write_cache(controller, drives)
            errors = {use.name: _errors(use, drives[use.name]) for use in controller.drives}
            device: OwnedDevice = NvmeDevice(
                config, backends, id=config.id or "nvme0", errors=errors, client_migrates=True
            )
            cleanup.callback(device.close)
            if slow := choice.notice():
                print(f"nvmove: warning: {slow}", file=sys.stderr)
            for drive, backend in backends.items():
                backend.block_size = functools.partial(device.block_size, drive)
            device.start(args.socket)
            print(attach_lines(args.socket, controller), flush=True)
            gc.freeze()  # as in vm/machine.py
            signal.sigwait(ENDING_SIGNALS)
    except (BackendError, ListenError, OptionError) as error:
        raise UserError(str(error)) from None
    return 0


def _configure(devices: list[str], drives: list[str]) -> tuple[ParsedController, dict[str, DriveConfig]]:
    controllers = parse_controllers(parse_device(text) for text in devices)
    if len(controllers) != 1:
        raise UserError(f"serve: one --device nvme,… is wanted, {len(controllers)} are given", status=2)
    known: dict[str, DriveConfig] = {}
    for text in drives:
        config = _drive(parse("--drive", text))
        name = config.id or config.node_name
        if not name or name in known:
            raise UserError(f"serve: --drive {text}: every drive needs an id of its own (id=d0)")
        known[name] = config
    wanted = {use.name for use in controllers[0].drives}
    for use in controllers[0].drives:
        if use.name not in known:
            raise use.option.error(f"Property '{use.option.get('driver')}.drive' can't find value '{use.name}'")
        if use.image_owner == "qemu":
            raise use.option.error("image-owner=qemu: serve has no QEMU that could open the image")
    for name in known:
        if name not in wanted:
            raise UserError(f"serve: the drive '{name}' is used by no --device")
    return controllers[0], known


def _drive(option: Option) -> DriveConfig:
    null = null_drive(option)
    if null is None:
        return DriveConfig.from_options(option.values)
    values = {key: str(value) for key, value in null.rest.values.items() if key not in ("driver", "format")}
    return msgspec.structs.replace(DriveConfig.from_options(values), format="raw", null=null.config)


def _errors(use: DriveUse, drive: DriveConfig) -> DriveErrors:
    """Return a drive's policies. No VM can be stopped here: a request that is held would never end."""
    config = with_device_actions(drive, use.werror, use.rerror)
    if "stop" in (config.werror, config.rerror):
        raise use.option.error(f"drive '{use.name}': serve has no VM that werror=stop or rerror=stop could stop")
    werror = ErrorPolicy.REPORT if config.werror == "enospc" else ErrorPolicy(config.werror)
    return DriveErrors(werror, ErrorPolicy(config.rerror))


def _with_write_cache(controller: ParsedController, drives: Mapping[str, DriveConfig]) -> ControllerConfig:
    cached = {
        use.name: drives[use.name].options.writeback if use.write_cache == "auto" else use.write_cache == "on"
        for use in controller.drives
    }
    return controller.finish(cached)


def attach_lines(socket: Path, controller: ParsedController) -> str:
    """Return the QEMU arguments that attach the device."""
    address = {"type": "unix", "path": str(socket.absolute())}
    device = {"driver": "vfio-user-pci", "socket": address, "x-msg-timeout": MSG_TIMEOUT, **controller.pci}
    return (
        "Attach it to a QEMU 10.1 or later whose memory is shared:\n"
        "  -object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram \\\n"
        f"  -device '{json.dumps(device)}'"
    )
