"""Metrics for Prometheus, by its naming conventions, with the prefix `tinker_sync_`. docs/alerts.yml is made for them."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tinker_sync.model.moments import parse_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from prometheus_client.metrics_core import Metric

    from tinker_sync.activity import Activity, Vitals

_PREFIX = "tinker_sync_"


class Metrics:
    """Turns one look at the state into the text that Prometheus reads."""

    def __init__(self, activity: Activity, vitals: Vitals, *, version: str) -> None:
        self._activity = activity
        self._vitals = vitals
        self._version = version
        self._processes = CollectorRegistry()
        ProcessCollector(registry=self._processes)

    def render(self, document: Mapping[str, Any], *, waiting: int, tasks: int) -> bytes:
        """`document` is that of `status --json`, `waiting` how many transfers wait or run, `tasks` asyncio's."""
        registry = CollectorRegistry()
        found = [*self._families(document, waiting), _gauge("tasks", "Tasks of the event loop.", tasks)]
        registry.register(_Families(found))
        return generate_latest(registry) + generate_latest(self._processes)

    def _families(self, document: Mapping[str, Any], waiting: int) -> Iterable[Metric]:
        yield _gauge("build_info", "The version that runs.", 1, version=self._version, python=platform.python_version())
        yield _gauge("start_time_seconds", "When the service was started.", self._vitals.started_at.timestamp())
        yield from _of_document(document)
        yield _gauge("queued_transfers", "Transfers that wait or run.", waiting)
        yield _gauge("running_transfers", "Transfers that receive now.", len(self._activity.running))
        yield from self._of_loops()
        yield from self._of_activity()

    def _of_loops(self) -> Iterable[Metric]:
        vitals = self._vitals
        last = GaugeMetricFamily(
            _PREFIX + "last_success_timestamp_seconds", "When each kind of work last went well.", labels=["work"]
        )
        for work, moment in {
            "poll": vitals.polled_at,
            "listing": vitals.listed_at,
            "transfer": self._activity.committed_at,
            "retention": vitals.retained_at,
            "scrub": vitals.scrubbed_at,
        }.items():
            if moment is not None:
                last.add_metric([work], moment.timestamp())
        yield last
        works = vitals.credential_works
        yield _gauge("credential_refused", "1 while the service refuses the credential.", int(works is False))
        yield _gauge("service_trouble", "1 while the last poll failed.", int(vitals.trouble is not None))
        good = int(vitals.reload_error is None)
        yield _gauge("config_last_reload_successful", "1 unless the last changed configuration was refused.", good)
        if vitals.reloaded_at is not None:
            at = vitals.reloaded_at.timestamp()
            yield _gauge(
                "config_last_reload_success_timestamp_seconds", "When the configuration was last taken over.", at
            )

    def _of_activity(self) -> Iterable[Metric]:
        activity = self._activity
        received = CounterMetricFamily(
            _PREFIX + "transfer_received_bytes",
            "Bytes that came, of failed transfers too.",
            value=activity.received_bytes,
        )
        yield received
        seconds = CounterMetricFamily(
            _PREFIX + "transfer_seconds", "Seconds that transfers took, all together.", value=activity.transfer_seconds
        )
        yield seconds
        ended = CounterMetricFamily(_PREFIX + "transfers", "Attempts to transfer that ended.", labels=["outcome"])
        for outcome in ("committed", "failed"):
            ended.add_metric([outcome], activity.transfers[outcome])
        yield ended
        deletes = CounterMetricFamily(_PREFIX + "deletes", "What was let go.", labels=["side", "action"])
        for side, action in (("remote", "delete"), ("remote", "expire"), ("local", "trash")):
            deletes.add_metric([side, action], activity.deletes[side, action])
        yield deletes
        requests = CounterMetricFamily(_PREFIX + "http_requests", "Requests sent.", labels=["route", "status"])
        for (route, status), count in sorted(activity.requests.items()):
            requests.add_metric([route, status], count)
        yield requests


def _of_document(document: Mapping[str, Any]) -> Iterable[Metric]:
    numbers = {
        "replicas": ("replicas", "Verified copies, superseded ones too."),
        "replica_bytes": ("bytes", "What they weigh."),
        "damaged_replicas": ("damaged", "Copies whose last look found them damaged."),
        "upstream_checkpoints": ("upstream", "Checkpoints that the account lists."),
        "upstream_bytes": ("upstream_bytes", "What the account says they weigh."),
        "pending_checkpoints": ("pending", "Wanted, not here, and not failing."),
        "failing_checkpoints": ("failing", "Failed, and to be tried again."),
        "unmirrorable_checkpoints": ("unmirrorable", "Not handed out by this server."),
        "quarantined_checkpoints": ("quarantined", "Came whole and failed a check of their content."),
        "expiring_by_our_ttl": ("running_out", "Upstream under a TTL that retention set."),
        "trash_entries": ("trash", "What local retention let go and is still there."),
        "min_free_bytes": ("min_free", "Below it nothing more is copied."),
    }
    for name, (key, help_text) in numbers.items():
        yield _gauge(name, help_text, document[key])
    expiring = document["expiring_unmirrored"]
    yield _gauge("expiring_unmirrored_checkpoints", "Wanted, not here, and ending within 24 h.", len(expiring))
    if expiring:
        at = parse_time(expiring[0]["expires_at"]).timestamp()
        yield _gauge("next_uncopied_expiry_timestamp_seconds", "When the first of them ends.", at)
    if document["free_bytes"] is not None:
        yield _gauge("free_bytes", "Room on the mirror's disk.", document["free_bytes"])
    last = document["last_pass"] or {}
    yield _gauge("due_deletes", "Verdicts that let a checkpoint go upstream.", last.get("due") or 0)
    yield _gauge("breaker_tripped", "1 while the breaker holds deletes back.", int(bool(last.get("breaker"))))
    yield _gauge("enforcement_stopped", "1 while the stop flag is set.", int(document["stopped"]))


def _gauge(name: str, help_text: str, value: float, **labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(_PREFIX + name, help_text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


class _Families(Collector):
    """What was just looked at, as a collector."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._found = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._found


def age(moment: datetime | None, now: datetime) -> float | None:
    """Seconds since; None where it never was."""
    return None if moment is None else (now - moment).total_seconds()
