"""The values of the features that a host may set (Base 5.27.1)."""

from __future__ import annotations

import time
from collections.abc import Callable

from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.spec import (
    ARBITRATION_NO_LIMIT,
    HOST_BEHAVIOR_SIZE,
    TEMPERATURE_WARNING,
    TIMESTAMP_FROM_HOST,
    TIMESTAMP_MASK,
)
from nvmove.nvme.state import saved as state


class Features:
    """The current values. `clock` gives seconds that only grow."""

    def __init__(self, config: ControllerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        """Return to the defaults."""
        self.temperature_over = TEMPERATURE_WARNING
        self.temperature_under = 0
        self.volatile_write_cache = default_write_cache(self.config)
        self.interrupt_coalescing = 0
        self.coalescing_disabled: set[int] = set()
        """Vectors; the admin queue's is never coalesced and is not listed."""
        self.write_atomicity = 0
        self.async_event_configuration = 0
        self.host_behavior = bytes(HOST_BEHAVIOR_SIZE)
        self.timestamp_origin = 0
        self.clock_stood_still = False
        """The time between a save and a load is not in the timestamp."""
        self._set_timestamp(0)

    @property
    def number_of_queues(self) -> int:
        """Dword 0 of Number of Queues: always as many as there can be, whatever the guest asks for."""
        return (self.config.max_ioqpairs - 1) * 0x1_0001

    @property
    def timestamp_age(self) -> int:
        """Milliseconds since the timestamp was set."""
        return int((self.clock() - self._timestamp_set) * 1000)

    @property
    def timestamp(self) -> int:
        """Milliseconds now: since 1970 when the host has set it, else since the reset."""
        return self._timestamp + self.timestamp_age & TIMESTAMP_MASK

    def _set_timestamp(self, milliseconds: int) -> None:
        self._timestamp = milliseconds
        self._timestamp_set = self.clock()

    def host_timestamp(self, milliseconds: int) -> None:
        """The host sets the time."""
        self._set_timestamp(milliseconds & TIMESTAMP_MASK)
        self.timestamp_origin = TIMESTAMP_FROM_HOST
        self.clock_stood_still = False

    def save(self) -> state.FeaturesState:
        """Return all values as plain data."""
        return state.FeaturesState(
            arbitration=ARBITRATION_NO_LIMIT,
            temperature_over=self.temperature_over,
            temperature_under=self.temperature_under,
            volatile_write_cache=self.volatile_write_cache,
            number_of_queues=self.number_of_queues,
            interrupt_coalescing=self.interrupt_coalescing,
            coalescing_disabled=sorted(self.coalescing_disabled),
            write_atomicity=self.write_atomicity,
            async_event_configuration=self.async_event_configuration,
            timestamp=self._timestamp,
            timestamp_age=self.timestamp_age,
            timestamp_origin=self.timestamp_origin,
            host_behavior=self.host_behavior,
        )

    def load(self, saved: state.FeaturesState) -> None:
        """Replace all values by `saved`, which was checked."""
        self.temperature_over = saved.temperature_over
        self.temperature_under = saved.temperature_under
        self.volatile_write_cache = saved.volatile_write_cache
        self.interrupt_coalescing = saved.interrupt_coalescing
        self.coalescing_disabled = set(saved.coalescing_disabled)
        self.write_atomicity = saved.write_atomicity
        self.async_event_configuration = saved.async_event_configuration
        self.host_behavior = saved.host_behavior
        self.timestamp_origin = saved.timestamp_origin
        self.clock_stood_still = True
        self._timestamp = saved.timestamp
        self._timestamp_set = self.clock() - saved.timestamp_age / 1000


def default_write_cache(config: ControllerConfig) -> int:
    """Return the default of Volatile Write Cache: on, unless every namespace was configured without."""
    return int(not config.namespaces or any(namespace.write_cache for namespace in config.namespaces))
