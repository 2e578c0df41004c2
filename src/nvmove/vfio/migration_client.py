"""The client's side of the protocol's own migration: what a VM manager does that moves a device itself."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from nvmove.vfio import features
from nvmove.vfio.client import VfioUserClient
from nvmove.vfio.dirty import bitmap_size
from nvmove.vfio.features import DATA_HEADER_SIZE, FEATURE_HEADER_SIZE, GET, PROBE, SET, Feature
from nvmove.vfio.message import Command
from nvmove.vfio.migration import State


class MigrationClient:
    """Drives the migration of the device that `client` is connected to. Raises what `client` does."""

    def __init__(self, client: VfioUserClient) -> None:
        self._client = client

    def probe(self, feature: int, methods: int = 0) -> None:
        """Ask whether a feature is there, with these methods; ClientError when not."""
        self._client.call(Command.DEVICE_FEATURE, features.feature_payload(feature, PROBE | methods))

    @property
    def flags(self) -> int:
        """What of migration the device supports: MIGRATION_STOP_COPY and so on."""
        return int.from_bytes(self._get(Feature.MIGRATION, room=8), "little")

    @property
    def state(self) -> State:
        """The device's migration state."""
        return self.get_state()

    @state.setter
    def state(self, target: State) -> None:
        self.set(Feature.MIG_DEVICE_STATE, features.state_payload(target))

    def get_state(self) -> State:
        """Ask for the device's migration state."""
        return State(struct.unpack_from("<I", self._get(Feature.MIG_DEVICE_STATE, room=8))[0])

    def read(self, size: int) -> bytes:
        """Read the next `size` bytes of the state; fewer: that was all."""
        reply = self._client.call(Command.MIG_DATA_READ, features.data_payload(size))
        return reply[DATA_HEADER_SIZE:]

    def write(self, data: bytes) -> None:
        """Write the next bytes of a state."""
        self._client.call(Command.MIG_DATA_WRITE, features.data_payload(len(data), data))

    def save(self, size: int = 1 << 20) -> bytes:
        """Stop the device and read its state in pieces of `size` bytes."""
        self.state = State.STOP_COPY
        data = bytearray()
        while piece := self.read(size):
            data += piece
        return bytes(data)

    def load(self, data: bytes, size: int = 1 << 20) -> None:
        """Give the device a state in pieces of `size` bytes; it is stopped then."""
        self.state = State.RESUMING
        for start in range(0, len(data), size):
            self.write(data[start : start + size])
        self.state = State.STOP

    def start_log(self, page_size: int = 4096, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """Log what the device writes in `ranges` of (address, length), or everywhere; return the page size it took."""
        reply = self.set(Feature.DMA_LOGGING_START, features.log_start_payload(page_size, list(ranges)))
        return int.from_bytes(reply[:8], "little")

    def stop_log(self) -> None:
        """Log no more."""
        self.set(Feature.DMA_LOGGING_STOP)

    def report(self, start: int, length: int, page_size: int = 4096) -> Iterator[int]:
        """Yield the addresses of the pages written since the last report."""
        request = features.log_report_payload(start, length, page_size)
        room = len(request) + bitmap_size(length, page_size)
        bitmap = self._get(Feature.DMA_LOGGING_REPORT, request, room)[len(request) :]
        for index, bits in enumerate(bitmap):
            for bit in range(8):
                if bits & 1 << bit:
                    yield start + (index * 8 + bit) * page_size

    def set(self, feature: int, data: bytes = b"") -> bytes:
        """Set a feature; return the reply's data."""
        return self._client.call(Command.DEVICE_FEATURE, features.feature_payload(feature, SET, data))[
            FEATURE_HEADER_SIZE:
        ]

    def _get(self, feature: Feature, data: bytes = b"", room: int = 0) -> bytes:
        payload = features.feature_payload(feature, GET, data, room)
        return self._client.call(Command.DEVICE_FEATURE, payload)[FEATURE_HEADER_SIZE:]
