"""`nvmove-fault-add`, `-list` and `-remove` as a QMP client has them."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

from nvmove.block.backend import Operation
from nvmove.block.fault import FaultRule, FaultRules
from nvmove.vm.disks.faults import FaultCommands
from tests.fake_qemu import facade_on_fake, qmp_terminal


def talk(rules: FaultRules, *commands: tuple[str, dict[str, Any]]) -> list[Any]:
    """The values of commands, or the texts of their errors."""

    async def run() -> list[Any]:
        async with facade_on_fake() as (facade, qemu):
            FaultCommands(rules, ["d0"]).register(facade)
            terminal = await qmp_terminal(facade)
            answers = []
            for name, arguments in commands:
                request = json.dumps({"execute": name, "arguments": arguments})
                answer = json.loads(await terminal.talk(request.encode() + b"\n"))
                answers.append(answer["return"] if "return" in answer else answer["error"]["desc"])
            assert not any(request["execute"].startswith("nvmove") for request in qemu.requests)
            await terminal.end()
            return answers

    return asyncio.run(run())


def test_faults_are_added_listed_and_removed() -> None:
    rules = FaultRules()
    rules.add(FaultRule(Operation.FLUSH, errno=errno.EIO))
    given = {"op": "write", "lba": "1000-2000", "errno": "ENOSPC", "delay": "50ms", "count": 3, "drive": "d0"}
    first = {"id": 1, "op": "flush", "errno": "EIO", "hits": 0}
    assert talk(
        rules,
        ("nvmove-fault-list", {}),
        ("nvmove-fault-add", given),
        ("nvmove-fault-list", {}),
        ("nvmove-fault-remove", {"id": 1}),
        ("nvmove-fault-list", {}),
    ) == [[first], {"id": 2}, [first, {"id": 2, **given, "hits": 0}], {}, [{"id": 2, **given, "hits": 0}]]


def test_errors_are_one_clear_line() -> None:
    rules = FaultRules()
    assert talk(
        rules,
        ("nvmove-fault-add", {"errno": "EWRONG"}),
        ("nvmove-fault-remove", {"id": 1}),
        ("nvmove-fault-remove", {"id": "1"}),
        ("nvmove-fault-remove", {}),
        ("nvmove-fault-remove", {"id": 1, "all": True}),
        ("nvmove-fault-list", {"id": 1}),
    ) == [
        "nvmove-fault-add: errno=EWRONG is no error's name (ENOSPC, EIO, EDQUOT, ETIMEDOUT, ENOTCONN, EPERM, …)",
        "nvmove-fault-remove: there is no fault 1",
        "Invalid parameter type for 'id', expected: integer",
        "Parameter 'id' is missing",
        "Parameter 'all' is unexpected",
        "Parameter 'id' is unexpected",
    ]
    assert rules.list() == []


def test_they_wait_for_no_other_command() -> None:
    """Removing a fault may be just what a savevm waits for."""

    async def run() -> None:
        rules = FaultRules()
        async with facade_on_fake() as (facade, _):
            FaultCommands(rules, []).register(facade)
            async with facade.exclusive(), asyncio.timeout(20):
                task = asyncio.create_task(facade.dispatch("nvmove-fault-list"))
                assert await task == []

    asyncio.run(run())
