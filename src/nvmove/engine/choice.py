"""Which engine runs the queues: the compiled one where it was built, or what the environment says."""

from __future__ import annotations

import importlib.util
import os

from nvmove.engine.plain import PlainEngine
from nvmove.errors import UserError
from nvmove.nvme.seams import Engine
from nvmove.vfio.receive import PlainReceiver, Receiver

VARIABLE = "NVMOVE_ENGINE"
PLAIN, COMPILED = "plain", "compiled"
NOT_BUILT = (
    "the compiled engine was not built (it wants a C compiler and Python's headers when nvmove is installed): "
    "disks are slower"
)


def chosen() -> str:
    """Return `plain` or `compiled`. Raises UserError: the variable says something else, or what cannot be had."""
    is_built = importlib.util.find_spec("nvmove.engine.loop") is not None
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in {"", PLAIN, COMPILED}:
        raise UserError(f"{VARIABLE}={wanted} is neither {PLAIN} nor {COMPILED}")
    if wanted == COMPILED and not is_built:
        raise UserError(f"{VARIABLE}={COMPILED}: {NOT_BUILT.partition(':')[0]}")
    return wanted or (COMPILED if is_built else PLAIN)


def notice() -> str:
    """Return what a user should know about the engine, one line, or nothing. Raises UserError as `chosen`."""
    is_fallback = chosen() == PLAIN and os.environ.get(VARIABLE) != PLAIN
    return NOT_BUILT if is_fallback else ""


def new_engine(name: str) -> Engine:
    """Return a new engine for the device `name`. Raises UserError as `chosen`."""
    if chosen() == PLAIN:
        return PlainEngine(name)
    from nvmove.engine.compiled import CompiledEngine  # noqa: PLC0415

    return CompiledEngine(name)


def receiver_of(engine: Engine) -> Receiver:
    """Return who receives the messages of the client whose queues `engine` runs."""
    return engine.receiver if isinstance(engine, PlainEngine) else PlainReceiver()
