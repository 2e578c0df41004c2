"""What the VM as a whole saves: its run state and its drives' io-status; who may load it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmove.vm.disks.iostatus import IoStatus
from nvmove.vm.moves.machinestate import MachineState
from nvmove.vmstate import stream
from nvmove.vmstate.machine import IDENT, VM
from nvmove.vmstate.schema import StateError
from nvmove.vmstate.tree import Tree


def machine_state(run_state: str, *devices: str, status: str = "ok") -> tuple[MachineState, IoStatus]:
    state = MachineState(devices)
    io = IoStatus(value=status)
    state.connect(lambda: run_state, {(devices[0], 1): io})
    return state, io


@pytest.mark.parametrize("run_state", ["running", "paused", "io-error"])
def test_the_run_state_arrives(run_state: str) -> None:
    there, _ = machine_state("paused", "nv0")
    assert there.loaded is None
    there.load(machine_state(run_state, "nv0")[0].save())
    assert there.loaded == run_state


def test_the_io_status_of_a_drive_arrives_when_it_is_asked_for() -> None:
    here, _ = machine_state("io-error", "nv0", "nv1", status="nospace")
    there, io = machine_state("paused", "nv1", "nv0")
    there._drives = {("nv0", 1): io, ("nv1", 1): (other := IoStatus(value="failed"))}
    there.load(here.save())
    assert io.value == "ok"
    there.restore()
    assert (io.value, other.value) == ("nospace", "ok")


def tree(**changes: object) -> bytes:
    whole: Tree = {"run_state": "running", "devices": [{"id": "nv0"}], "drives": [], **changes}
    return stream.dump([(stream.Section(IDENT, whole), VM)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tree(devices=[{"id": "nv0"}, {"id": "nv1"}]), "nvme devices are nv0 here, and were nv0, nv1"),
        (tree(run_state="dreaming"), "run state 'dreaming' is not known here"),
        (tree(drives=[{"device": "nv0", "nsid": 1, "io_status": "odd"}]), "nv0, namespace 1: io-status 'odd'"),
        (stream.dump([]), "0 sections instead of one"),
        (tree()[:-1], "truncated"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(data: bytes, message: str) -> None:
    state, _ = machine_state("running", "nv0")
    with pytest.raises(StateError, match=message):
        state.load(data)
    assert state.loaded is None


GOLDEN = Path(__file__).parents[3] / "data" / "state-v1"


@pytest.mark.parametrize(("name", "run_state", "status"), [("vm", "running", "ok"), ("vm-held", "io-error", "nospace")])
def test_the_first_format_keeps_loading(name: str, run_state: str, status: str) -> None:
    golden = (GOLDEN / f"{name}.nvmove").read_bytes()
    state, io = machine_state("paused", "nv0", "nv1")
    state.load(golden)
    state.restore()
    assert (state.loaded, io.value) == (run_state, status)
    assert machine_state(run_state, "nv0", "nv1", status=status)[0].save() == golden
