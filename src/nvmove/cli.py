"""The `nvmove` command: its subcommands and what every one of them shares.

Each subcommand's module has `add_arguments(parser)` and `run(args) -> int`; it is imported only when it is used:
start-up time counts. Bad input is one line on stderr and exit status 1, a usage error 2.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import importlib
import io
import logging
import os
import sys
from typing import NoReturn

from nvmove.errors import UserError

COMMANDS = {
    "run": ("nvmove.vm.command", "run a VM: QEMU's command line, its -device nvme served by nvmove"),
    "serve": ("nvmove.serve", "serve one NVMe device over vfio-user, for a QEMU that somebody else starts"),
    "inspect": ("nvmove.inspect", "show the device state in a snapshot, a migration file or a state file"),
    "bench": ("nvmove.bench.command", "measure nvmove beside QEMU's own nvme, and beside fio"),
    "demo": ("nvmove.demo", "show on a real Linux guest what nvmove does, in about a minute"),
}


_IN_ASCII = {"…": "...", "✓": "+", "✗": "-", "×": "x", "–": "-", "→": "->"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Return what is written in place of characters that the terminal's encoding lacks (codecs.register_error)."""
    assert isinstance(error, UnicodeEncodeError)
    wanted = error.object[error.start : error.end]
    spelt = [_IN_ASCII.get(one) or one.encode("ascii", "backslashreplace").decode() for one in wanted]
    return "".join(spelt), error.end


def _print_anywhere() -> None:
    """Let nothing that is printed fail for its characters, whatever the locale or PYTHONIOENCODING say."""
    codecs.register_error("nvmove", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nvmove")


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that takes as long as all else that a refusal needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        metadata = importlib.import_module("importlib.metadata")
        print(f"nvmove {metadata.version('nvmove')}")
        parser.exit()


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; `only` names the one subcommand whose arguments are wanted, None all of them."""
    top = argparse.ArgumentParser(
        prog="nvmove", description="NVMe disks for QEMU virtual machines that can be saved, moved and paused."
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if only in {None, name}:
            importlib.import_module(module).add_arguments(sub)
    return top


_EXHAUSTED = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EROFS}


def _exhausted(error: BaseException) -> str:
    """Return the line for what the machine has not enough of; empty where the error is something else."""
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        return ": ".join([*([f"'{error.filename}'"] if error.filename else []), error.strerror or str(error)])
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    return str(error) if "can't start new thread" in str(error) else ""


def main() -> int:
    """Run the command line in `sys.argv`; return the exit status."""
    _print_anywhere()
    name = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    level = os.environ.get("NVMOVE_LOG", "warning").upper()
    logging.basicConfig(
        format="nvmove: %(message)s", level=level if level in logging.getLevelNamesMapping() else "WARNING"
    )
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # what it reports is raised as well, and said by us
    try:
        args = parser(only=name if name in COMMANDS else "").parse_args()
        return int(importlib.import_module(COMMANDS[args.command][0]).run(args))
    except UserError as error:
        error.say()
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError, RuntimeError) as error:
        line = _exhausted(error)
        if not line:
            raise
        UserError(line).say()
        return 1
