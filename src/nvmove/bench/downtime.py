"""How long a live migration stops a guest under fio: on nvmove and on QEMU's own nvme, turn and turn about.

Two figures: the downtime that the source's `query-migrate` tells, and the outage, from the source's STOP event to the
destination's RESUME event, which has in it all that is done at the destination too. Both ends are on this machine.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence

from nvmove.bench.guest import FRONTS, disk_arguments
from nvmove.bench.measure import Settings, make_image, median
from nvmove.bench.report import Section
from nvmove.lab.console import GuestError
from nvmove.lab.fio import wait_writes, writes_done
from nvmove.lab.machine import LINUX, Machine
from nvmove.lab.migration import ENDED, Traveller, wait_status
from nvmove.lab.qmp import Event

_LOAD = (
    "(fio --name=load --filename=/dev/nvme0n1 --rw=randrw --bs=4k --ioengine=libaio --iodepth=32 --direct=1"
    " --time_based --runtime=1d --norandommap >/tmp/fio.load 2>&1 &)"
)
_WRITES = 500
"""So many before each migration, so that it happens in the midst of I/O, and after it, so that I/O goes on."""
_GOAL = 1.2


def measure(settings: Settings) -> Section:
    """Measure; raises GuestError."""
    section = Section(
        "downtime",
        "Live migration of a guest (TCG) under fio, random reads and writes at depth 32, image in memory",
        {
            "what": "device",
            "downtime_ms": "downtime ms",
            "outage_ms": "STOP to RESUME ms",
            "total_ms": "total ms",
            "ram_mib": "RAM sent MiB",
            "marked_pages": "pages marked",
            "marking_ms": "marking ms",
        },
    )
    found: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    with contextlib.ExitStack() as cleanup:
        guests = {name: _boot(settings, name, front, cleanup) for name, front in FRONTS.items()}
        for number in range(settings.rounds):
            for name in guests if number % 2 == 0 else reversed(guests):
                settings.tell(f"round {number + 1} of {settings.rounds}: migrate on {name}")
                found[name].append(_hop(guests[name]))
    medians = {}
    for name, rounds in found.items():
        medians[name] = {key: median([one[key] for one in rounds]) for key in rounds[0]}
        section.rows.append({"what": name} | medians[name] | {"rounds": rounds})
    for key, what in (("downtime_ms", "downtime"), ("outage_ms", "outage")):
        ours, theirs = ([one[key] for one in found[name]] for name in FRONTS)
        section.ratio_of_rounds(f"{what} / QEMU's nvme", ours, theirs, _GOAL, at_most=True)
    return section


def _boot(settings: Settings, name: str, front: Sequence[str], cleanup: contextlib.ExitStack) -> Traveller:
    def another(number: str) -> Machine:
        machine = Machine(settings.directory / f"{name[0]}{number}", settings.sysroot, front, "384M", LINUX)
        cleanup.callback(machine.kill)
        return machine

    settings.tell(f"boot on {name}")
    image = make_image(settings.memory / f"{name}.img", settings.image)
    guest = Traveller(another("m0"), disk_arguments(image), another)
    guest.boot()
    guest.machine.console.check(_LOAD)
    guest.machine.qmp.execute("stop")
    return guest


def _hop(guest: Traveller) -> dict[str, float]:
    """Let the guest run, move it in the midst of its I/O, see that it goes on, and stop it."""
    source = guest.machine
    source.qmp.execute("cont")
    wait_writes(source.console, writes_done(source.console) + _WRITES)
    source.qmp.events.clear()
    target = guest.destination()
    target.qmp.execute("migrate-incoming", {"uri": guest.uri(target)})
    source.qmp.execute("migrate", {"uri": guest.uri(target)})
    answer = wait_status(source.qmp, *ENDED)
    if answer["status"] != "completed":
        raise GuestError(f"the migration {answer['status']}: {answer.get('error-desc', 'no reason')}")
    resumed = target.qmp.wait_event("RESUME")
    stopped = source.qmp.wait_event("STOP")
    guest.machine = target
    source.quit()
    wait_writes(target.console, writes_done(target.console) + _WRITES)
    target.qmp.execute("stop")
    marking = answer.get("nvmove-marking")
    marked = {} if marking is None else {"marked_pages": marking["pages"], "marking_ms": marking["milliseconds"]}
    return marked | {
        "downtime_ms": float(answer["downtime"]),
        "outage_ms": (_seconds(resumed) - _seconds(stopped)) * 1000,
        "total_ms": float(answer["total-time"]),
        "ram_mib": answer["ram"]["transferred"] / (1 << 20),
    }


def _seconds(event: Event) -> float:
    return float(event["timestamp"]["seconds"]) + float(event["timestamp"]["microseconds"]) / 1e6
