"""What a run of the initiator came to: rates, and latencies from a histogram of buckets that are 1.6 % wide at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def bucket_ns(bucket: int) -> float:
    """Return the latency in nanoseconds that a bucket of the initiator stands for: its middle.

    Below 64 a bucket is one nanosecond; above, each power of two has 64 buckets.
    """
    if bucket < 64:
        return float(bucket)
    shift = bucket // 64 - 1
    return float((64 + bucket % 64) << shift) + ((1 << shift) - 1) / 2


def percentile_us(histogram: Mapping[int, int], percent: float) -> float:
    """Return the latency in microseconds that `percent` of the commands did not exceed; 0 without any."""
    left = sum(histogram.values()) * percent / 100
    for bucket in sorted(histogram):
        left -= histogram[bucket]
        if left <= 0:
            return bucket_ns(bucket) / 1000
    return 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One job on one or several queues."""

    commands: int
    seconds: float
    messages: int
    """Doorbells that went over the socket."""
    histogram: Mapping[int, int]
    starved: int = 0
    """How often a job that goes ahead found the device without commands."""

    @property
    def iops(self) -> float:
        """Commands per second."""
        return self.commands / self.seconds if self.seconds else 0.0

    @property
    def p50(self) -> float:
        """The median latency in microseconds."""
        return percentile_us(self.histogram, 50)

    @property
    def p99(self) -> float:
        """The latency in microseconds that one in a hundred exceeds."""
        return percentile_us(self.histogram, 99)


def merge(runs: Iterable[Run]) -> Run:
    """Return runs side by side as one: counts add up, the longest time counts."""
    every = list(runs)
    histogram: Counter[int] = Counter()
    for run in every:
        histogram.update(run.histogram)
    return Run(
        commands=sum(run.commands for run in every),
        seconds=max(run.seconds for run in every),
        messages=sum(run.messages for run in every),
        histogram=histogram,
        starved=sum(run.starved for run in every),
    )
