"""`nvmove bench`: measures nvmove beside what it is compared with, on this machine, in one run."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console as Screen

from nvmove.bench.measure import Settings, conditions
from nvmove.bench.report import Section, show, show_conditions, to_json
from nvmove.bench.svg import draw
from nvmove.errors import UserError
from nvmove.lab.console import GuestError
from nvmove.lab.qmp import QmpClosed, QmpError
from nvmove.lab.scratch import terminate_as_interrupt, working_directory
from nvmove.lab.sysroot import find_sysroot

KINDS = {
    "guest": "fio in the same stock guest, on nvmove and on QEMU's own nvme",
    "host": "our own initiator against `nvmove serve`, beside fio on the same file",
    "curves": "what depth, command size, queues, held requests, saving and pausing cost",
    "downtime": "live migration of a guest under fio, on nvmove and on QEMU's own nvme",
}
"""Each is a module of this package with a function `measure(settings) -> Section`."""
FORMATS = ("raw", "qcow2")
_PREFIX = "nvmove-bench-"
_MEMORY = Path("/dev/shm")
_WIDTH = 120
"""Columns of the tables where there is no terminal to ask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nvmove bench`."""
    kinds = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
    parser.add_argument("kind", choices=[*KINDS, "all"], help=f"{kinds}; all: one after the other")
    parser.add_argument("--seconds", type=_seconds, default=2.0, metavar="N", help="of each measurement (default: 2)")
    parser.add_argument(
        "--rounds", type=_rounds, default=3, metavar="N", help="medians are taken of so many (default: 3)"
    )
    parser.add_argument("--format", choices=FORMATS, help="of the images of `guest` (default: raw)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the curves there, as SVG")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where the image on a disk is put")


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 < value <= 3600):
        raise ValueError
    return value


def _rounds(text: str) -> int:
    value = int(text)
    if not 0 < value <= 1000:
        raise ValueError
    return value


def run(args: argparse.Namespace) -> int:
    """Measure and tell; return 0, 130 after Ctrl-C. Raise UserError for what cannot be measured here."""
    sysroot = find_sysroot()
    _check(args)
    screen = Screen()
    if not screen.is_terminal:
        screen.width = _WIDTH
    found: list[Section] = []
    try:
        with ExitStack() as cleanup:
            cleanup.enter_context(terminate_as_interrupt())
            directory = cleanup.enter_context(working_directory(_PREFIX))
            disk = cleanup.enter_context(working_directory(_PREFIX, args.directory))
            memory = cleanup.enter_context(working_directory(_PREFIX, _MEMORY))
            around = conditions(sysroot)
            show_conditions(screen, around)
            for kind in KINDS if args.kind == "all" else [args.kind]:
                with screen.status(f"{kind}…") as status:

                    def tell(text: str, kind: str = kind, update: Callable[[str], None] = status.update) -> None:
                        update(f"{kind}: {text}")

                    settings = Settings(
                        sysroot=sysroot,
                        directory=directory,
                        disk=disk,
                        memory=memory,
                        seconds=args.seconds,
                        rounds=args.rounds,
                        format=args.format or "raw",
                        tell=tell,
                    )
                    found.append(importlib.import_module(f"nvmove.bench.{kind}").measure(settings))
                show(screen, found[-1])
    except KeyboardInterrupt:
        screen.print("interrupted; nothing is left")
        return 130
    except (GuestError, TimeoutError, QmpError, QmpClosed) as error:
        raise UserError(f"bench: {' '.join(str(error).split())}") from None
    if args.plots is not None:
        for plot in [plot for section in found for plot in section.plots]:
            (args.plots / f"{plot.name}.svg").write_text(draw(plot), encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(to_json(around, found), indent=1) + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for what could not be measured or written: better said before than after the measurements."""
    if not os.access(_MEMORY, os.W_OK):
        raise UserError(f"bench: there is no {_MEMORY} for images in memory (a tmpfs)")
    if args.format is not None and args.kind not in ("guest", "all"):
        raise UserError(f"bench: --format is for `guest`, not for `{args.kind}`")
    if args.json is not None and not os.access(args.json.parent, os.W_OK):
        raise UserError(f"bench: --json {args.json}: there is no directory {args.json.parent} to write to")
    if args.plots is not None:
        try:
            args.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"bench: --plots {args.plots}: {error.strerror}") from None
    if args.directory is not None and not os.access(args.directory, os.W_OK):
        raise UserError(f"bench: --directory {args.directory}: there is no such directory to write to")
