"""What every part of a controller may use of the whole. Each part that wants more says so in a protocol of its own."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Protocol

from nvmove.nvme.config import ControllerConfig
from nvmove.nvme.events import EventQueue
from nvmove.nvme.features import Features
from nvmove.nvme.logs import Logs
from nvmove.nvme.namespace import NamespaceTable
from nvmove.nvme.queue import CompletionQueue, SubmissionQueue
from nvmove.nvme.ratelimit import RateLimit
from nvmove.nvme.registers import Registers
from nvmove.nvme.seams import Engine, Interrupts, Memory
from nvmove.nvme.spec import EventType, Log


class Suspends(Protocol):
    """Who has lent queue pairs to somebody (`nvmove.nvme.leases.Leases`)."""

    def suspended(self, *queues: SubmissionQueue, timeout: float | None = None) -> AbstractContextManager[bool]:
        """Have these queues back, or all, and lend none in the body; whether that came within `timeout` seconds."""

    def refresh(self) -> None:
        """Bring counters up to date. With the lock held."""

    def in_flight(self, sq: SubmissionQueue) -> int:
        """How many of a queue's commands are fetched and not complete. With the lock held."""


class Controller(Protocol):
    """The controller, to its parts: `nvmove.nvme.controller.Controller`."""

    @property
    def config(self) -> ControllerConfig:
        """How it was configured."""

    @property
    def lock(self) -> threading.RLock:
        """For all of its state; never held while guest memory is touched or a request is submitted."""

    @property
    def memory(self) -> Memory:
        """The guest's."""

    @property
    def interrupts(self) -> Interrupts:
        """To the guest."""

    @property
    def engine(self) -> Engine:
        """Who runs the queues."""

    @property
    def registers(self) -> Registers:
        """Those of BAR0."""

    @property
    def sqs(self) -> dict[int, SubmissionQueue]:
        """By queue id."""

    @property
    def cqs(self) -> dict[int, CompletionQueue]:
        """By queue id."""

    @property
    def namespaces(self) -> NamespaceTable:
        """All of them."""

    @property
    def features(self) -> Features:
        """Their values."""

    @property
    def logs(self) -> Logs:
        """What the log pages hold."""

    @property
    def events(self) -> EventQueue:
        """Asynchronous events, and requests for them."""

    @property
    def leases(self) -> Suspends:
        """What is lent."""

    @property
    def log_limit(self) -> RateLimit:
        """How much may be logged of what a guest can cause."""

    @property
    def epoch(self) -> int:
        """Counts disables and resets."""

    @property
    def paused(self) -> bool:
        """Whether the device is."""

    @property
    def runs(self) -> bool:
        """Whether commands are fetched now."""

    @property
    def page_size(self) -> int:
        """Memory page size in bytes."""

    @property
    def max_transfer(self) -> int:
        """The largest transfer of one command in bytes."""

    def create_cq(self, cq: CompletionQueue) -> None:
        """Add a completion queue that was checked."""

    def create_sq(self, sq: SubmissionQueue) -> None:
        """Add a submission queue that was checked; raises OSError: there is no worker for it."""

    def raise_event(self, kind: EventType, info: int, page: Log) -> None:
        """Queue an asynchronous event. From any thread."""

    def fatal(self, why: str) -> None:
        """Controller Fatal Status (Base 9.5)."""
