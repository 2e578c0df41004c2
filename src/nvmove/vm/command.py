"""`nvmove run QEMU ARGS…`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from nvmove.block.fault import FaultRules
from nvmove.errors import UserError
from nvmove.options.faults import add_argument, parse_fault
from nvmove.vm.line.arguments import lift
from nvmove.vm.line.plan import Plan
from nvmove.vm.rundir import RunDirectory

_MORE = """\
Of -device nvme and nvme-ns, beside QEMU's own properties:
  image-owner=auto|nvmove|qemu  who opens a raw image: nvmove is faster, QEMU has block jobs
  x-doorbells=messages|mapped   mapped: for host-side initiators that poll

Environment:
  NVMOVE_QEMU    the QEMU to use, whatever the command line names: 10.1 or later, with vfio-user-pci
  NVMOVE_ENGINE  compiled or plain
  NVMOVE_LOG     debug, info, warning, error

Documentation: docs/ in nvmove's source; docs/reference/cli.md is about this command.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `nvmove run`."""
    parser.epilog = _MORE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_argument(parser)
    parser.add_argument(
        "qemu", nargs=argparse.REMAINDER, metavar="QEMU ARGS…", help="QEMU and its arguments, as you would start it"
    )


def run(args: argparse.Namespace) -> int:
    """Run a VM; return QEMU's exit status."""
    words = args.qemu[1:] if args.qemu[:1] == ["--"] else args.qemu
    if not words:
        raise UserError("run: no QEMU given (nvmove run qemu-system-x86_64 …)", status=2)
    with _ending_cleanly(), RunDirectory() as directory:
        plan = lift(words, directory)
        for warning in plan.warnings:
            print(f"nvmove: warning: {warning}", file=sys.stderr)
        if not plan.passthrough:
            faults = FaultRules()
            for text in args.fault:
                faults.add(parse_fault(text, plan.drive_names))
            # Only now: what a VM needs takes ten times as long to import as what a refusal needs.
            from nvmove.vm import machine  # noqa: PLC0415

            return machine.run(plan, directory, faults)
    if args.fault:
        raise UserError(f"--fault {args.fault[0]}: no -device nvme is there that it could be for")
    return _become(plan)


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end us as SIGINT does, with everything cleaned up, also before Machine takes care of them."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    replaced = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _become(plan: Plan) -> NoReturn:
    """Run QEMU as it was typed, in our place: there is nothing for nvmove to do."""
    try:
        os.execvp(plan.program, [plan.program, *plan.arguments])
    except OSError as error:
        raise UserError(f"cannot run '{plan.program}': {error.strerror}") from None
