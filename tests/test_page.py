"""The page, the probes and the metrics of a running service: what they say, to whom, and that they stay quick."""

from __future__ import annotations

import base64
import json
import platform
import re
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
import pytest

from tests.conftest import NOW, Site, run
from tests.test_service import RUN, replicas, serving
from tinker_sync.activity import Activity, Vitals
from tinker_sync.catalog.store import SqlCatalog
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.events import Event
from tinker_sync.model.paths import TinkerPath
from tinker_sync.model.work import Replica, Transfer
from tinker_sync.overview import Surroundings
from tinker_sync.planning import Selection
from tinker_sync.sandbox import Fault, adapter
from tinker_sync.web.views import MARKS_PER_RUN, ROWS_PER_PAGE, RUNS_PER_PAGE, Views, ViewSettings
from tinker_sync.web.words import curve, since, span
from tinker_sync.wiring import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tests.test_service import Running
    from tinker_sync.retention import Verdict

TOP = Path(__file__).parents[1]
POLICY = """
[retention]
min_age = "1h"
price_per_gb_month = 0.5
[[retention.remote]]
name = "old ones"
types = ["training"]
keep_last = 2
"""
LISTENING = '[poll]\ninterval = "1s"\n[status]\nlisten = "127.0.0.1:0"\n'


@pytest.fixture
def site(outside: Site) -> Site:
    """The service is a process of its own."""
    return outside


def address(service: Running) -> str:
    """Where the page is."""
    found: str = service.until(lambda: re.search(r'"url": "(http://[^"]+)"', service.log)).group(1)
    return found


def metrics(url: str) -> dict[str, float]:
    """By name and labels."""
    lines = [line for line in httpx.get(f"{url}metrics").text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_probes_metrics_and_status_tell_the_truth(site: Site) -> None:
    """Before, while and after there is trouble; the same numbers as `status`."""
    now = site.sandbox.account.now()
    for n in range(5):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n), time=now - timedelta(days=5 - n))
    site.sandbox.account.add(RUN, "broken", payload=adapter(0), ttl=timedelta(hours=4))
    site.sandbox.faults.append(Fault("archive", "status", status=500, match="broken"))
    with serving(site, LISTENING + POLICY) as service:
        url = address(service)
        service.until(lambda: len(replicas(site)) == 5 and metrics(url)["tinker_sync_failing_checkpoints"] == 1)
        assert httpx.get(f"{url}healthz").text == "alive\n"
        assert httpx.get(f"{url}readyz").json() == {"ready": True, "problems": []}
        found = metrics(url)
        for name, value in {
            "replicas": 5,
            "upstream_checkpoints": 6,
            "expiring_unmirrored_checkpoints": 1,
            "due_deletes": 4,
            "breaker_tripped": 0,
            'transfers_total{outcome="committed"}': 5,
            'deletes_total{action="delete",side="remote"}': 0,
            "config_last_reload_successful": 1,
            'build_info{python="' + platform.python_version() + '",version="0.1.0"}': 1,
        }.items():
            assert found[f"tinker_sync_{name}"] == value, name
        assert found['tinker_sync_http_requests_total{route="checkpoints",status="200"}'] >= 1
        assert found["tinker_sync_transfer_received_bytes_total"] > 5 * 10_000
        assert abs(found['tinker_sync_last_success_timestamp_seconds{work="listing"}'] - time.time()) < 20
        told = httpx.get(f"{url}status.json").json()
        said = json.loads(run(["--config", str(site.home / "config.toml"), "status", "--json"], check=0).stdout)
        assert set(said) <= set(told)
        assert (told["replicas"], told["bytes"], told["level"]) == (5, said["bytes"], "bad")
        assert told["last_pass"]["due_bytes"] > 0

        key, site.sandbox.key = site.sandbox.key, "tml-another"
        service.until(lambda: httpx.get(f"{url}readyz").status_code == 503)
        assert httpx.get(f"{url}readyz").json()["problems"] == ["the service refuses the credential"]
        assert metrics(url)["tinker_sync_credential_refused"] == 1
        site.sandbox.key = key
        (site.home / "key").write_text(key)  # as if it were replaced: asked again at once
        service.until(lambda: httpx.get(f"{url}readyz").status_code == 200, 15)
        assert "credential.changed" in service.log
        (site.home / "config.toml").write_text("[nonsense]\n")
        service.until(lambda: metrics(url)["tinker_sync_config_last_reload_successful"] == 0)
        assert "unknown section" in httpx.get(f"{url}status.json").json()["service"]["reload_error"]
        assert service.end()[0] == 0


def test_documents_name_the_metrics_that_there_are(site: Site) -> None:
    """Every metric of the rules and of docs/OPERATION.md exists, and every one that exists is documented."""
    site.sandbox.account.add(RUN, "waits", payload=adapter(0), ttl=timedelta(hours=4))
    site.sandbox.faults.append(Fault("archive", "status", status=500))
    with serving(site, LISTENING) as service:
        url = address(service)
        service.until(lambda: metrics(url).get("tinker_sync_expiring_unmirrored_checkpoints") == 1)
        (site.home / "config.toml").write_text((site.home / "config.toml").read_text() + "# touched\n")
        service.until(lambda: "tinker_sync_config_last_reload_success_timestamp_seconds" in metrics(url))
        service.until(lambda: 'tinker_sync_last_success_timestamp_seconds{work="retention"}' in metrics(url))
        names = {re.sub(r"\{.*", "", name) for name in metrics(url) if name.startswith("tinker_sync_")}
        assert service.end()[0] == 0
    rules = (TOP / "docs" / "alerts.yml").read_text()
    assert set(re.findall(r"tinker_sync_\w+", rules)) <= names
    text = (TOP / "docs" / "OPERATION.md").read_text().split("### Metrics")[1].split("## ")[0]
    documented = {f"tinker_sync_{name}" for name in re.findall(r"`(\w+)(?:\{[^`]*)?`", text)} - {
        "tinker_sync_tinker_sync_"
    }
    assert documented == names


def test_the_page_shows_every_checkpoint_with_its_state_and_reason(site: Site) -> None:
    """Copied, failing, gone, to be deleted, not wanted; rule and reason in the text; names cannot break out of it."""
    now = site.sandbox.account.now()
    for n in range(4):
        site.sandbox.account.add(RUN, f"{n:06}", payload=adapter(n), time=now - timedelta(days=5 - n))
    evil = "<img src=x onerror=alert(1)>\"'"
    site.sandbox.account.add(RUN, evil, payload=adapter(9), time=now - timedelta(days=9))
    site.sandbox.account.add(RUN, "broken", payload=adapter(0), time=now - timedelta(days=8))
    site.sandbox.account.add(RUN, "left-out", payload=adapter(0), time=now - timedelta(days=7))
    gone = site.sandbox.account.add("other:train:0", "gone", payload=adapter(0), time=now - timedelta(days=6)).path
    site.sandbox.faults.append(Fault("archive", "status", status=500, match="broken"))
    with serving(site, 'exclude = ["*/*/left-out"]\n' + LISTENING + POLICY) as service:
        url = address(service)
        service.until(
            lambda: len(replicas(site)) == 5 and "transfer.failed" in service.log and site.directory(gone).exists()
        )
        del site.sandbox.account.checkpoints[gone]
        service.until(lambda: "gone upstream, here only</i>" in httpx.get(url).text)
        page = httpx.get(url).text
        states = {name: state for state, name in re.findall(
            r'class="mark (\w+)"[^>]*><span[^>]*>.</span><span class="tip"><b>weights/([^<]*)</b>', page)}  # fmt: skip
        assert states["000003"] == states["000002"] == "copied"
        assert states["000001"] == states["000000"] == "leaving"
        assert (states["broken"], states["left-out"], states["gone"]) == ("failing", "skipped", "gone")
        assert "to be deleted upstream by “old ones”" in page
        assert "kept upstream by “old ones”" in page
        assert "excluded by" in page
        assert "<img" not in page
        assert "&lt;img src=x" in page
        assert "a month" in page
        shown = httpx.get(f"{url}runs/{quote(RUN, safe='')}").text
        assert "<img" not in shown
        assert shown.count("<tr id=") == 7
        assert httpx.get(f"{url}runs/none").status_code == 404
        with (site.root / ".tinker-sync" / "journal.jsonl").open("a") as journal:
            journal.write(
                '{"event": "odd", "time": 5}\n{"event": "<i>", "time": "2026-01-01T00:00:00Z", "why": {"a": 1}}\n'
            )
        assert "&lt;i&gt;" in httpx.get(url).text
        assert httpx.get(f"{url}?page=-1&page=x").status_code == httpx.get(f"{url}?page=99999").status_code == 200
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert httpx.request(method, url).status_code == 405
        policy = httpx.get(url).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r'\s(style|on\w+)="', page)
        assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
        key = (site.home / "key").read_text()
        for path in ("", "status.json", "metrics", f"runs/{quote(RUN, safe='')}"):
            assert key not in httpx.get(url + path).text
        assert service.end()[0] == 0


def test_who_may_ask(site: Site) -> None:
    """On loopback by a loopback name; with a token by the token alone, as Bearer or as a browser's password."""
    with serving(site, LISTENING) as service:
        url = address(service)
        for host, status in (
            ("evil.example", 421),
            ("localhost:1", 200),
            ("[::1]:80", 200),
            ("127.9.9.9", 200),
            ("127.evil", 421),
        ):
            assert httpx.get(f"{url}status.json", headers={"Host": host}).status_code == status, host
        assert service.end()[0] == 0
    token = site.home / "token"
    token.write_text("0123456789abcdef\n")
    with serving(site, LISTENING + f'token_file = "{token}"\n') as service:
        url = address(service)
        basic = base64.b64encode(b"me:0123456789abcdef").decode()
        for header, status in (
            (None, 401), ("Bearer 0123456789abcdef", 200), ("Bearer 0123456789abcde", 401), ("Bearer", 401),
            (f"Basic {basic}", 200), ("Basic !!!", 401), ("Basic bWU=", 401), ("Digest 0123456789abcdef", 401),
        ):  # fmt: skip
            headers = {"Host": "proxy.example"} | ({} if header is None else {"Authorization": header})
            for path in ("", "metrics", "status.json", "readyz", "runs/x"):
                expected = 404 if status == 200 and path == "runs/x" else status
                found = httpx.get(url + path, headers=headers).status_code
                assert found == expected or (path == "readyz" and status == 200 and found in (200, 503)), (header, path)
            assert httpx.get(f"{url}healthz", headers=headers).status_code == 200
        assert service.end()[0] == 0


def test_who_only_connects_takes_nothing_from_the_mirror(site: Site) -> None:
    """Hundreds of silent connections, and requests that never end: few are held, and what is new is copied."""
    with serving(site, LISTENING) as service:
        url = httpx.URL(address(service))
        quiet = [socket.create_connection(("127.0.0.1", url.port)) for _ in range(300)]
        try:
            for one in quiet[::2]:
                with suppress(OSError):
                    one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
            site.sandbox.account.add(RUN, "000000", payload=adapter(0))
            service.until(lambda: replicas(site) == {"000000"})
            assert len(list(Path(f"/proc/{service.process.pid}/fd").iterdir())) < 150
        finally:
            for one in quiet:
                one.close()
        service.until(lambda: httpx.get(f"{url}healthz").status_code == 200)
        code, seconds = service.end()
        assert (code, seconds < 8) == (0, True)
        assert "Traceback" not in service.log


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('listen = "0.0.0.0:9464"', "no loopback address"),
        ('listen = "[::]:9464"', "no loopback address"),
        ('listen = "example.org:80"', "no loopback address"),
        ('listen = "9464"', "no address"),
        ('listen = "127.0.0.1:99999"', "no address"),
        ('token_file = "/nowhere/token"', "cannot be read"),
    ],
)
def test_what_cannot_be_listened_to_is_refused_before_anything_starts(site: Site, text: str, said: str) -> None:
    """By check-config and by run, exit 2."""
    config = site.write_config(f"[status]\n{text}\n")
    for arguments in (["check-config"], ["run"]):
        assert said in run(["--config", str(config), *arguments], check=2).stderr


def test_a_short_token_is_refused(site: Site) -> None:
    """An empty file would let everybody in."""
    (site.home / "token").write_text("\n")
    config = site.write_config(f'[status]\nlisten = "0.0.0.0:0"\ntoken_file = "{site.home / "token"}"\n')
    assert "fewer than 16 characters" in run(["--config", str(config), "run"], check=2).stderr


def test_an_address_that_is_taken_is_no_reason_not_to_mirror(site: Site) -> None:
    """It is said, and tried again."""
    site.sandbox.account.add(RUN, "000000", payload=adapter(0))
    port = httpx.URL(site.sandbox.base_url).port
    with serving(site, f'[poll]\ninterval = "1s"\n[status]\nlisten = "127.0.0.1:{port}"\n') as service:
        service.until(lambda: "status.unavailable" in service.log and replicas(site) == {"000000"})
        assert service.end()[0] == 0


# Large accounts


class Still:
    """An engine that does nothing, with an account of its own."""

    waiting = 0
    skipped: Mapping[TinkerPath, str] = {}

    def __init__(self, rows: Mapping[TinkerPath, Checkpoint]) -> None:
        self.rows = rows
        self.explained: list[int] = []

    def explain(
        self, rows: Mapping[TinkerPath, Checkpoint], replicas: Mapping[TinkerPath, Replica], now: datetime
    ) -> Mapping[TinkerPath, Sequence[Verdict]]:
        """Nothing, and how much was asked about."""
        self.explained.append(len(rows) + len(replicas))
        return {}


async def test_a_page_costs_what_it_shows(tmp_path: Path) -> None:
    """Marks, rows and what is explained are bounded, and nothing is read again while nothing is written."""
    from concurrent.futures import ThreadPoolExecutor

    runs, each = 40, 60
    paths = [TinkerPath(f"run-{r:03}:train:0", "weights", f"{n:06}") for r in range(runs) for n in range(each)]
    rows = {path: Checkpoint(path, NOW + timedelta(minutes=place), 10) for place, path in enumerate(paths)}
    engine = Still(rows)
    with SqlCatalog.open(tmp_path / "c.db") as catalog, ThreadPoolExecutor(1) as reader:
        catalog.observe(list(rows.values()), NOW, complete=True)
        reads = 0
        whole = catalog.unmirrored

        def counted() -> list[tuple[Checkpoint, datetime | None, datetime]]:
            nonlocal reads
            reads += 1
            return whole()

        catalog.unmirrored = counted  # type: ignore[method-assign]
        views = Views(
            catalog=catalog,
            engine=engine,
            activity=Activity(lambda: NOW),
            vitals=Vitals(NOW),
            clock=SYSTEM_CLOCK,
            reader=reader,
            surroundings=lambda: Surroundings("/m", enforce=False),
            events=lambda most: [],
            settings=ViewSettings(Selection(), price_per_gb_month=None),
        )
        for _ in range(3):
            model = await views.page(1)
        assert reads == 1
        assert (model.runs, model.pages, len(model.rows)) == (runs, -(-runs // RUNS_PER_PAGE), RUNS_PER_PAGE)
        assert model.rows[0].run_id == "run-039:train:0"  # the newest first
        assert {len(row.marks) for row in model.rows} == {MARKS_PER_RUN}
        assert {row.earlier for row in model.rows} == {each - MARKS_PER_RUN}
        assert max(engine.explained) == RUNS_PER_PAGE * each
        last = await views.page(10**6)
        assert last.number == last.pages
        found = await views.run("run-000:train:0", 1)
        assert found is not None
        assert len(found.marks) == min(each, ROWS_PER_PAGE)
        assert found.marks[0].path.name == f"{each - 1:06}"
        assert (await views.state())["pending"] == runs * each


# Numbers


def test_rates_and_time_left() -> None:
    """Smoothed, and nothing claimed before anything came."""
    at = 0.0
    activity = Activity(lambda: NOW, lambda: at)
    transfer = Transfer(PATH, NOW, 1000, 0)
    activity.started(transfer, None)
    (running,) = activity.running
    assert (running.expected, running.seconds_left) == (1000, None)
    for at in (1.0, 2.0, 3.0):  # noqa: B007 - the clock
        activity.advanced(transfer, 100)
    assert activity.rate == pytest.approx(100)
    assert running.seconds_left == pytest.approx(7)
    at = 9.0  # nothing came for long: it stalls, and claims nothing
    assert activity.rate < 30
    at = 10.0
    activity.ended(transfer, None)
    assert (activity.running, activity.transfer_seconds, activity.received_bytes) == ((), 10.0, 300)
    for kind, facts in (("committed", {}), ("failed", {}), ("failed", {"side": "local"})):
        activity.happened(Event(kind, PATH, facts))
    assert (activity.transfers["committed"], activity.transfers["failed"], activity.committed_at) == (1, 1, NOW)


PATH = TinkerPath.parse("tinker://r:train:0/weights/a")


def test_words() -> None:
    """Times, lengths and the curve."""
    assert since(None, NOW) == "never"
    assert since(NOW - timedelta(minutes=3), NOW) == "3 minutes ago"
    assert since("2026-01-15T12:00:05Z", NOW) == "in 5 seconds"
    assert since(NOW, NOW) == "now"
    assert (span(None), span(90.0)) == ("unknown", "2 minutes")
    points = [(NOW, 0), (NOW + timedelta(hours=1), 5), (NOW + timedelta(hours=2), 10)]
    assert curve(points) == "0,120 0.0,120.0 0.0,120.0 300.0,120.0 300.0,62.0 600.0,62.0 600.0,4.0 600,4.0 600,120"
    assert curve([(NOW, 0), (NOW, 3)]).endswith("600,120")
