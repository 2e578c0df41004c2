"""The controller against the same model, with a host that moves its doorbells into memory, and moves them again.

It rings only when EventIdx asks for it: a submission or a freed slot that the controller misses never completes.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from nvmove.nvme.spec import Admin, Status
from tests.nvme_shadow import DBS, EIS, ShadowHost
from tests.stateful.test_controller import Machine


class ShadowMachine(Machine):
    """As `Machine`, with Doorbell Buffer Config."""

    host: ShadowHost
    host_class = ShadowHost

    @precondition(lambda self: self.enabled)
    @rule(page=st.integers(0, 1))
    def configure(self, page: int) -> None:
        dbs, eis = DBS + 0x2000 * page, EIS + 0x2000 * page
        done = self.admin(Admin.DOORBELL_BUFFER_CONFIG, prp1=dbs, prp2=eis)
        if done is not None:
            offered = self.host.lines.msix_enabled
            assert done.status == (Status.SUCCESS if offered else Status.INVALID_OPCODE)
            if offered:
                self.host.use(dbs, eis)


ShadowMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestShadowDoorbells = ShadowMachine.TestCase
