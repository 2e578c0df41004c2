"""QEMU's null disks on a command line: `file=null-co://`, `driver=null-co`, and the options of these drivers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nvmove.block.config import NULL_DRIVERS, NULL_OPTIONS, NullConfig
from nvmove.block.null import describe
from nvmove.options import syntax
from nvmove.options.syntax import Option

_FILES = {f"{driver}://": driver for driver in NULL_DRIVERS}


@dataclass(frozen=True, slots=True)
class NullDrive:
    """A null disk that an option describes."""

    driver: str
    config: NullConfig
    rest: Option
    """All else the option says, with `file` as the disk's name."""


def null_drive(option: Option) -> NullDrive | None:
    """Read a `-drive`; None when it is no null disk. Raises OptionError."""
    file, prefix = str(option.values.get("file", "")), "file."
    driver = option.get("file.driver") or _FILES.get(file, "")
    if not file and driver not in NULL_DRIVERS:
        driver, prefix = option.get("driver") or option.get("format"), ""
    if driver not in NULL_DRIVERS or file not in ("", f"{driver}://"):
        return None
    given = {name: option.values[prefix + name] for name in NULL_OPTIONS if prefix + name in option.values}
    config = null_config(replace(option, values=given), sizes=True)
    taken = {"file", "file.driver", *(prefix + name for name in NULL_OPTIONS)}
    rest = {"file": describe(driver, config)} | {k: v for k, v in option.values.items() if k not in taken}
    return NullDrive(driver, config, replace(option, values=rest))


def null_config(option: Option, *, sizes: bool = False) -> NullConfig:
    """Read the driver's options; with `sizes` as -drive takes them (`10M`), else as -blockdev (integers only).

    Raises OptionError, with QEMU's words.
    """
    default = NullConfig()
    if sizes:
        size = syntax.size(option, "size", default.size, bits=63)
    else:
        size = syntax.signed(option, "size", default.size, bits=64)
    latency = syntax.signed(option, "latency-ns", default.latency_ns, bits=64)
    if latency < 0:
        raise option.error("latency-ns is invalid")
    if size < 0:
        raise option.error("Parameter 'size' expects a >0 size")
    return NullConfig(
        size=size, read_zeroes=syntax.boolean(option, "read-zeroes", default.read_zeroes), latency_ns=latency
    )
