"""Retention decides: golden tables for each rule, laws over generated inventories, accidents of others by name."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NOW, hours, minutes
from tests.test_pure import replica_of
from tinker_sync.inventory import Holdings, make_members
from tinker_sync.model.checkpoint import Checkpoint
from tinker_sync.model.moments import UNKNOWN_TIME
from tinker_sync.model.paths import SEGMENT_OF_TYPE, TinkerPath
from tinker_sync.retention import (
    KeepBest,
    Member,
    Policy,
    RetentionPlan,
    RetentionRules,
    not_worth_copying,
    plan_retention,
    step_of,
)

DAY = timedelta(days=1)


def member(
    name: str,
    age: timedelta,
    *,
    run: str = "run",
    kind: str = "sampler",
    mirrored: bool = True,
    here_only: bool = False,
    expires_at: datetime | None = None,
    public: bool = False,
    fidelity: str = "exact",
    damaged: tuple[str, ...] = (),
    **fields: Any,
) -> Member:
    """A checkpoint of the inventory, copied unless said otherwise."""
    path = TinkerPath(run, SEGMENT_OF_TYPE[kind], name)
    row = Checkpoint(path, NOW - age, 1000, public=public, expires_at=expires_at)
    replica = replica_of(row, fidelity=fidelity, damaged=damaged) if mirrored or here_only else None
    return Member(path, row.time, None if here_only else row, replica, step=step_of(name), **fields)


def rules(*remote: Policy, local: tuple[Policy, ...] = (), **fields: Any) -> RetentionRules:
    """Policies with an hour of min_age, in UTC, and a breaker out of the way unless set."""
    chosen: dict[str, Any] = {"timezone": UTC, "min_age": hours(1), "max_deletes": 10**9, "max_delete_fraction": 1.0}
    chosen["types_apart"] = True
    return RetentionRules(remote=remote, local=local, **(chosen | fields))


def policy(**fields: Any) -> Policy:
    """For all types, unless set."""
    return Policy(**({"name": "p", "types": ("training", "sampler", "external")} | fields))


def gone(members: list[Member], chosen: RetentionRules, side: str = "remote", **options: Any) -> set[str]:
    """The names that would go on that side."""
    plan = plan_retention(members, chosen, now=NOW, **({"complete": True} | options))
    return {v.path.name for v in plan.verdicts if v.side == side and v.action != "keep"}


def kept(members: list[Member], chosen: RetentionRules) -> set[str]:
    """The names that stay upstream."""
    return {m.path.name for m in members} - gone(members, chosen)


def why(members: list[Member], chosen: RetentionRules, name: str, side: str = "remote", **options: Any) -> set[str]:
    """The reasons of one verdict."""
    plan = plan_retention(members, chosen, now=NOW, **({"complete": True} | options))
    (verdict,) = [v for v in plan.verdicts if v.path.name == name and v.side == side]
    return {reason.why for reason in verdict.reasons}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("000020", 20), ("final", None), ("step-100", 100), ("checkpoint-16000", 16000), ("run.ckpt-20", 20),
        ("teacher_sync_3", None), ("epoch_7", 7), ("iter12", 12), ("Step_5", 5), ("20b", None), ("\u0663", None),
    ],
)  # fmt: skip
def test_steps_of_names(name: str, step: int | None) -> None:
    """Digits alone, or behind one of five words."""
    assert step_of(name) == step


DAILY = [member(f"{n:06}", n * DAY + hours(2)) for n in range(40)]
"""One a day, `000000` the newest."""


@pytest.mark.parametrize(
    ("fields", "stay"),
    [
        ({"keep_last": 3}, {"000000", "000001", "000002"}),
        ({"keep_within": 2 * DAY}, {"000000", "000001", "000002"}),
        ({"keep_slots": {"daily": 3}}, {"000000", "000001", "000002"}),
        ({"keep_slots": {"weekly": 2}}, {"000000", "000004"}),
        ({"keep_slots": {"monthly": 2}}, {"000000", "000015"}),
        ({"keep_slots": {"yearly": 5}}, {"000000", "000015", "000039"}),
        ({"keep_names": ("0000*5",)}, {"000000", "000005", "000015", "000025", "000035"}),
        ({"keep_every_steps": 10}, {"000000", "000009", "000019", "000029", "000039"}),
        ({"keep_last": 1, "keep_names": ("000039",)}, {"000000", "000039"}),
    ],
)
def test_each_rule(fields: dict[str, Any], stay: set[str]) -> None:
    """A golden table over forty days; the newest is always kept."""
    assert kept(DAILY, rules(policy(**fields))) == stay


def test_slots_across_a_change_of_the_clocks() -> None:
    """A month of hourly saves in Berlin: every hour of the long day is a slot of its own, every day is one."""
    start = datetime(2026, 10, 20, tzinfo=UTC)
    members = []
    for n in range(24 * 14):
        row = member(f"{n:06}", hours(0))
        assert row.remote is not None
        assert row.replica is not None
        at = start + n * timedelta(hours=1)
        members.append(
            replace(row, time=at, remote=replace(row.remote, time=at), replica=replace(row.replica, time=at))
        )
    late = start + 20 * DAY
    zone = ZoneInfo("Europe/Berlin")

    def staying(**slots: int) -> int:
        plan = plan_retention(members, rules(policy(keep_slots=slots), timezone=zone), now=late, complete=True)
        return sum(1 for v in plan.verdicts if v.side == "remote" and v.action == "keep")

    assert staying(hourly=300) == 300
    assert staying(daily=10) == 10
    local = {m.time.astimezone(zone).date() for m in members}
    assert staying(daily=10_000) == len(local) + 1, "all days, and the oldest besides"


def test_the_best_are_kept_and_what_has_no_number() -> None:
    """Minimum and maximum, ties to the newest; missing, NaN and words mean keep."""
    values = {"a": "0.5", "b": "0.1", "c": "0.3", "d": "nan", "e": "good", "f": "0.1", "g": "9"}
    members = [member(name, (n + 1) * DAY, user_metadata={"loss": v}) for n, (name, v) in enumerate(values.items())]
    members.append(member("none", 9 * DAY, user_metadata={}))
    members.append(member("newest", hours(2), user_metadata={"loss": "7"}))
    least = rules(policy(keep_best=KeepBest("loss", "min", 1)))
    assert kept(members, least) == {"b", "d", "e", "none", "newest"}
    most = rules(policy(keep_best=KeepBest("loss", "max", 1)))
    assert kept(members, most) == {"g", "d", "e", "none", "newest"}


def test_guards_hold_whatever_a_policy_says() -> None:
    """Each guard keeps, and says so by its word."""
    members = [
        member("newest", hours(2)),
        member("no-copy", 2 * DAY, mirrored=False),
        member("broken-copy", 2 * DAY, damaged=("x",)),
        member("public", 2 * DAY, public=True),
        member("pinned", 2 * DAY, pinned=True),
        member("adapter", 2 * DAY, fidelity="adapter"),
        member("ordinary", 3 * DAY),
        member("young", minutes(30), kind="training"),
        member("future", -hours(1), kind="training"),
        member("older", 2 * DAY, kind="training"),
    ]
    chosen = rules(policy(keep_names=("nothing",)))
    assert gone(members, chosen) == {"ordinary", "older"}
    for name, word in (
        ("newest", "newest"), ("no-copy", "not-replicated"), ("broken-copy", "not-replicated"), ("public", "public"),
        ("pinned", "pinned"), ("adapter", "fidelity"), ("young", "young"), ("future", "future"),
    ):  # fmt: skip
        assert word in why(members, chosen, name), name
    assert "newest" in why(members, chosen, "young"), "the newest that lasts, beside the future one"
    accepting = rules(policy(keep_names=("nothing",), delete_adapter_only=True))
    assert "adapter" in gone(members, accepting)


def test_a_checkpoint_without_a_time_stays() -> None:
    """Nobody knows how old it is."""
    undated = member("undated", NOW - UNKNOWN_TIME)
    assert gone([*DAILY[:3], undated], rules(policy(keep_names=("none",)))) == {"000001", "000002"}


def test_year_one_and_pins_with_brackets() -> None:
    """Some languages' word for no time is kept and breaks nothing; a pin is taken literally too."""
    ancient = member("ancient", NOW - datetime(1, 1, 1, tzinfo=UTC))
    chosen = rules(policy(keep_within=DAY, keep_slots={"daily": 3}), timezone=ZoneInfo("America/New_York"))
    assert "ancient" not in gone([*DAILY[:3], ancient], chosen)
    row = Checkpoint(TinkerPath("run", "sampler_weights", "best[1]"), NOW, 1)
    for pin in (str(row.path), "run/*/best[[]1]"):
        holdings = Holdings(pins=(pin,), base_models={"run": ""})
        (made,) = make_members([row], holdings, now=NOW, short_ttl=hours(3))
        assert made.pinned
        assert made.base_model is None, "an empty base model is an unknown one"


def test_first_match_governs_and_unknown_keeps() -> None:
    """Order decides; what cannot be told is kept; what none selects is kept; types never cross."""
    members = [
        member("a", DAY, base_model="Qwen/Qwen3-8B", user_metadata={"team": "x"}),
        member("b", 2 * DAY, base_model="Qwen/Qwen3-8B", user_metadata={"team": "y"}),
        member("c", 3 * DAY, base_model=None, user_metadata={"team": "y"}),
        member("d", 4 * DAY, base_model="meta/Llama", user_metadata=None),
        member("z", hours(2)),
    ]
    strict = policy(name="strict", base_model="Qwen/*", metadata={"team": "y"}, keep_names=("none",))
    assert gone(members, rules(strict)) == {"b"}
    assert why(members, rules(strict), "c") == {"unknown"}
    assert why(members, rules(strict), "d") == {"no-policy"}, "a certain no decides, whatever else is unknown"
    generous = policy(name="generous", include=("*/*/b",), keep_last=9)
    assert gone(members, rules(generous, strict)) == set()
    training = policy(name="t", types=("training",), keep_names=("none",))
    assert gone(members, rules(training)) == set()


def test_never_both_sides() -> None:
    """What both would let go stays on both; an original that expires is no second copy; orphans stay."""
    members = [
        member("new", hours(2)),
        member("old", 5 * DAY),
        member("expiring", 6 * DAY, expires_at=NOW + 7 * DAY),
        member("orphan", 7 * DAY, here_only=True),
        member("ours", 8 * DAY, here_only=True, deleted_by_us=True),
    ]
    greedy = policy(keep_names=("none",))
    both = rules(greedy, local=(greedy,))
    assert gone(members, both) == {"expiring"}
    assert gone(members, both, "local") == set()
    assert "other-side" in why(members, both, "old")
    assert "expiring-original" in why(members, both, "expiring", "local")
    local = rules(local=(greedy,))
    assert gone(members, local, "local") == {"old"}
    assert why(members, local, "orphan", "local") >= {"orphan"}
    without = rules(local=(policy(keep_names=("none",), keep_orphans=False),))
    assert gone(members, without, "local") == {"old", "orphan"}
    assert "last-copy" in why(members, without, "ours", "local")


def test_the_breaker() -> None:
    """Over either limit none is permitted; small accounts are not stopped by the fraction; `allow` lifts both once."""
    greedy = policy(keep_names=("none",))
    assert plan_retention(DAILY, rules(greedy, max_deletes=39), now=NOW, complete=True).breaker is None
    tripped = plan_retention(DAILY, rules(greedy, max_deletes=38), now=NOW, complete=True)
    assert tripped.breaker is not None
    assert tripped.permitted == ()
    assert plan_retention(DAILY, rules(greedy, max_delete_fraction=0.9), now=NOW, complete=True).breaker is not None
    few = DAILY[:10]
    assert plan_retention(few, rules(greedy, max_delete_fraction=0.1), now=NOW, complete=True).breaker is None
    strict = rules(greedy, max_deletes=1)
    assert plan_retention(DAILY, strict, now=NOW, complete=True, allow=39).breaker is None
    assert plan_retention(DAILY, strict, now=NOW, complete=True, allow=38).breaker is not None


def test_under_our_ttl_it_takes_part_in_no_rule_and_shows_when_its_verdict_changes() -> None:
    """It fills no count of others; that a rule would keep it by now is a reason besides `expiring`."""
    chosen = rules(policy(keep_last=2), action="expire", grace=7 * DAY)
    running = {"ttl_is_ours": True, "expires_at": NOW + DAY}
    members = [*DAILY[:4], *(replace(m) for m in DAILY[4:5])]
    ours = member("ours", 2 * DAY + hours(3), **running)
    assert gone([*members, ours], chosen) == gone(members, chosen)
    assert why([*members, ours], chosen, "ours") == {"expiring"}
    assert why([DAILY[0], ours], chosen, "ours") >= {"expiring", "keep_last"}
    assert why([*members, replace(ours, pinned=True)], chosen, "ours") == {"expiring", "pinned"}


def test_what_expires_by_itself_sooner_is_not_put_under_a_ttl() -> None:
    """Ours would be later than the present one."""
    chosen = rules(policy(keep_last=1), action="expire", grace=7 * DAY)
    members = [
        DAILY[0],
        member("soon", 3 * DAY, expires_at=NOW + 6 * DAY),
        member("late", 4 * DAY, expires_at=NOW + 8 * DAY),
    ]
    assert gone(members, chosen) == {"late"}
    assert why(members, chosen, "soon") == {"expires"}


def test_a_short_lived_one_that_goes_says_why() -> None:
    """It takes part in no rule, so none keeps it; while it is the newest it stays."""
    members = [DAILY[1], member("rolling", hours(5), short_lived=True), member("final", hours(2))]
    assert why(members, rules(policy(keep_last=9)), "rolling") == {"no-rule", "short-lived"}
    assert why(members[:2], rules(policy(keep_last=9)), "rolling") == {"newest"}


def test_max_bytes_is_the_last_rule() -> None:
    """The oldest with a living, unexpiring original that stays; kept by rules or by none, but by no guard."""
    members = [
        *DAILY[:6],
        member("orphan", 50 * DAY, here_only=True),
        member("expiring", 51 * DAY, expires_at=NOW + DAY),
        member("pinned", 52 * DAY, pinned=True),
    ]
    weight = sum(m.replica.total_bytes for m in members if m.replica is not None)
    one = weight // len(members)
    chosen = rules(local=(policy(keep_last=99),), max_bytes=weight - 2 * one)
    assert gone(members, chosen, "local") == {"000004", "000005"}
    assert why(members, chosen, "000005", "local") == {"max_bytes"}
    unmet = plan_retention(members, rules(max_bytes=one), now=NOW, complete=True)
    assert (unmet.over_bytes, unmet.least_bytes) == (3 * one, 4 * one)
    both = rules(policy(keep_last=5), max_bytes=one)
    assert "000005" not in gone(members, both, "local"), "the remote side lets it go"


def test_what_would_be_let_go_at_once_is_not_worth_copying() -> None:
    """Only what is safe upstream: an original that expires, or that policy deletes there, is copied."""
    listed = [member(f"{n:06}", (n + 1) * DAY, mirrored=False) for n in range(5)]
    listed.append(member("expiring", 9 * DAY, mirrored=False, expires_at=NOW + DAY))
    chosen = rules(local=(policy(keep_last=2),))
    assert {path.name for path in not_worth_copying(listed, chosen, now=NOW)} == {"000002", "000003", "000004"}
    both = rules(policy(keep_last=2), local=(policy(keep_last=2),))
    assert not_worth_copying(listed, both, now=NOW) == {}
    assert not_worth_copying(listed, rules(policy(keep_last=2)), now=NOW) == {}


def test_a_segment_that_is_called_like_a_type_is_none_of_that_type() -> None:
    """`tinker://run/sampler/x` is no sampler."""
    odd = TinkerPath("run", "sampler", "x")
    row = Checkpoint(odd, NOW - 9 * DAY, 1)
    members = [*DAILY[:3], Member(odd, row.time, row, replica_of(row))]
    plan = plan_retention(members, rules(policy(keep_names=("none",))), now=NOW, complete=True)
    assert next(v for v in plan.verdicts if v.path == odd and v.side == "remote").reasons[0].why == "no-policy"


# Accidents of others


def test_the_one_group_bug() -> None:
    """A published script takes `tinker` for the run of every path: here each run and type is a group of its own."""
    members = [
        member(f"{n}", (n + 1) * DAY, run=f"r{r}", kind=k)
        for n in range(3)
        for r in range(3)
        for k in ("sampler", "training")
    ]
    plan = plan_retention(members, rules(policy(keep_last=1)), now=NOW, complete=True)
    stay = {(v.path.run_id, v.path.checkpoint_type) for v in plan.verdicts if v.side == "remote" and v.action == "keep"}
    assert len(stay) == 6


def test_order_is_by_time_and_step_never_by_string() -> None:
    """`step-1000` is newer than `step-999`, and of one second the higher step is."""
    members = [member(f"step-{n}", DAY) for n in (9, 10, 99, 100, 999, 1000)]
    assert kept(members, rules(policy(keep_last=2))) == {"step-1000", "step-999"}


def test_a_rolling_save_is_no_anchor() -> None:
    """Newer rolling saves neither fill a count nor move the window."""
    members = [member(f"{n:06}", n * DAY) for n in range(1, 6)]
    rolling = [member(f"rolling-{n}", minutes(70 + n), short_lived=True) for n in range(5)]
    for fields in ({"keep_last": 2}, {"keep_within": DAY}, {"keep_slots": {"daily": 2}}):
        alone = kept(members, rules(policy(**fields)))
        together = kept(members + rolling, rules(policy(**fields)))
        assert alone <= together
        assert together - alone <= {m.path.name for m in rolling}


def test_an_unproven_listing_lets_nothing_go() -> None:
    """On neither side, and says why."""
    greedy = policy(keep_names=("none",))
    chosen = rules(greedy, local=(policy(keep_last=1, keep_orphans=False),))
    assert gone(DAILY, chosen, complete=False) == set()
    assert gone(DAILY, chosen, "local", complete=False) == set()
    assert "unproven" in why(DAILY, chosen, "000039", complete=False)


def test_a_clock_ten_years_ahead_and_one_set_back() -> None:
    """Ahead: counting from the newest, nothing more goes. Back: what seems to be of the future stays."""
    chosen = rules(policy(keep_within=10 * DAY))
    now = {v.path for v in plan_retention(DAILY, chosen, now=NOW, complete=True).verdicts if v.action != "keep"}
    ahead = plan_retention(DAILY, chosen, now=NOW + 3650 * DAY, complete=True)
    assert {v.path for v in ahead.verdicts if v.action != "keep"} == now
    back = plan_retention(DAILY, chosen, now=NOW - 3650 * DAY, complete=True)
    assert all(v.action == "keep" for v in back.verdicts)


def test_a_run_of_the_cookbook() -> None:
    """000020 … 002000 in both types, rolling saves between, `final`: samplers thin out, training is never touched."""
    ages = {n: (100 - n) * minutes(30) for n in range(100)}
    members = [member(f"{(n + 1) * 20:06}", age, kind=k) for n, age in ages.items() for k in ("training", "sampler")]
    members += [member(f"rolling-{n}", age - minutes(10), kind="training", short_lived=True) for n, age in ages.items()]
    members.append(member("final", hours(2) - minutes(100), kind="sampler"))
    chosen = rules(policy(types=("sampler",), keep_last=3, keep_every_steps=500, keep_names=("final",)))
    assert gone(members, chosen).isdisjoint(
        {m.path.name for m in members if m.path.segment == "weights"}
        - {m.path.name for m in members if m.path.segment != "weights"}
    )
    plan = plan_retention(members, chosen, now=NOW, complete=True)
    stay = {
        v.path.name
        for v in plan.verdicts
        if v.side == "remote" and v.action == "keep" and v.path.segment == "sampler_weights"
    }
    assert stay >= {"final", "002000", "001980", "000480", "000980", "001480"}
    assert all(v.action == "keep" for v in plan.verdicts if v.path.segment == "weights" and v.side == "remote")


# Laws


ages = st.integers(-60, 60 * 24 * 60).map(minutes)
generated = st.lists(
    st.builds(
        member,
        st.sampled_from([f"{n:06}" for n in range(12)] + ["final", "best-1", "x"]),
        ages,
        run=st.sampled_from(["a", "b"]),
        kind=st.sampled_from(["training", "sampler"]),
        mirrored=st.booleans(),
        here_only=st.sampled_from([False, False, True]),
        public=st.sampled_from([False, False, False, True]),
        pinned=st.sampled_from([False, False, False, True]),
        short_lived=st.sampled_from([False, False, True]),
        ttl_is_ours=st.sampled_from([False, False, False, True]),
        expires_at=st.sampled_from([None, None, NOW + DAY]),
        base_model=st.sampled_from([None, "m"]),
        user_metadata=st.sampled_from([None, {}, {"loss": "1"}, {"loss": "2"}]),
        damaged=st.sampled_from([(), (), (), ("x",)]),
        fidelity=st.sampled_from(["exact", "exact", "adapter"]),
        deleted_by_us=st.sampled_from([False, False, True]),
        withheld=st.sampled_from(["", "", "", "403"]),
    ),
    max_size=25,
    unique_by=lambda m: m.path,
)
policies = st.builds(
    policy,
    types=st.sampled_from([("sampler",), ("training",), ("training", "sampler")]),
    base_model=st.sampled_from([None, None, "m"]),
    include=st.sampled_from([(), (), ("a/*/*",), ("*/*/0*",)]),
    metadata=st.sampled_from([{}, {}, {"loss": "1"}]),
    delete_adapter_only=st.booleans(),
    keep_last=st.sampled_from([None, 1, 3]),
    keep_within=st.sampled_from([None, DAY]),
    keep_slots=st.sampled_from([{}, {"daily": 2}, {"hourly": 3, "weekly": 1}]),
    keep_every_steps=st.sampled_from([None, 4]),
    keep_best=st.sampled_from([None, KeepBest("loss", "min", 1)]),
    keep_names=st.sampled_from([("final",), ("zzz",)]),
    keep_orphans=st.booleans(),
)
sides = st.lists(policies, max_size=2).map(lambda chosen: tuple(replace(p, name=f"p{n}") for n, p in enumerate(chosen)))
law = settings(max_examples=150, deadline=None)


def decide(members: list[Member], chosen: RetentionRules) -> RetentionPlan:
    """With a proven listing."""
    return plan_retention(members, chosen, now=NOW, complete=True)


@given(
    generated, sides, sides, st.sampled_from(["UTC", "Asia/Kolkata"]), st.booleans(), st.sampled_from([0, 0, 1, 5000]),
    st.sampled_from(["delete", "expire"]),
)  # fmt: skip
@law
def test_laws(
    members: list[Member],
    upstream: tuple[Policy, ...],
    here: tuple[Policy, ...],
    zone: str,
    apart: bool,
    max_bytes: int,
    action: str,
) -> None:
    """Total, deterministic, order-free; nothing unreplicated, never both, the newest survives, twins go together."""
    chosen = rules(
        *upstream, local=here, timezone=ZoneInfo(zone), types_apart=apart, max_bytes=max_bytes, action=action,
        grace=hours(2),
    )  # fmt: skip
    plan = decide(members, chosen)
    assert plan == decide(list(reversed(members)), chosen)
    sides = [(v.path, v.side) for v in plan.verdicts]
    wanted = [
        (m.path, s) for m in members for s, there in (("remote", m.remote), ("local", m.replica)) if there is not None
    ]
    assert sorted(sides) == sorted(wanted)
    assert all(v.reasons for v in plan.verdicts)
    by_path = {m.path: m for m in members}
    going = [v for v in plan.verdicts if v.action != "keep"]
    assert len({v.path for v in going}) == len(going), "never both"
    for verdict in going:
        subject = by_path[verdict.path]
        if verdict.side == "remote":
            assert subject.replica is not None
            assert not subject.replica.damaged
            assert subject.remote is not None
            assert not subject.remote.public
            assert not any((subject.pinned, subject.withheld, subject.ttl_is_ours))
            assert NOW - subject.time >= hours(1)
            by = next(p for p in upstream if p.name == verdict.policy)
            assert subject.replica.fidelity == "exact" or by.delete_adapter_only
        elif subject.remote is not None:
            assert subject.remote.expires_at is None
            assert not subject.pinned
        else:
            assert not subject.deleted_by_us
    groups: dict[Any, list[Member]] = {}
    for m in members:
        if m.remote is not None:
            groups.setdefault((m.path.run_id, m.path.segment), []).append(m)
    left = {v.path for v in going if v.side == "remote"}
    if not apart:
        for v in going:
            twins = {
                m.path for m in members if m.remote and (m.path.run_id, m.path.name) == (v.path.run_id, v.path.name)
            }
            assert v.side == "local" or twins <= left
    limited = replace(chosen, max_deletes=3, max_delete_fraction=0.3)
    permitted = [v for v in decide(members, limited).permitted if v.side == "remote"]
    listed = sum(1 for m in members if m.remote is not None)
    assert len(permitted) <= 3
    assert len(permitted) < 10 or len(permitted) <= 0.3 * listed
    assert (
        len(
            [
                v
                for v in plan_retention(members, limited, now=NOW, complete=True, allow=1).permitted
                if v.side == "remote"
            ]
        )
        <= 1
    )
    assert all(v.action == "keep" for v in plan_retention(members, chosen, now=NOW, complete=False).verdicts)
    for group in groups.values():
        newest = max(m.time for m in group)
        assert any(m.time == newest and m.path not in left for m in group)


@given(
    generated,
    policies,
    st.sampled_from([{"keep_last": 5}, {"keep_within": 9 * DAY}, {"keep_names": ("0*", "final", "zzz")}]),
)
@law
def test_adding_a_keep_rule_never_lets_more_go(members: list[Member], upstream: Policy, more: dict[str, Any]) -> None:
    """With another rule, or a larger one, what goes is a part of what went."""
    for key, value in more.items():
        if getattr(upstream, key) is None or key == "keep_names":
            larger = replace(upstream, **{key: value})
            before = {v.path for v in decide(members, rules(upstream)).verdicts if v.action != "keep"}
            after = {v.path for v in decide(members, rules(larger)).verdicts if v.action != "keep"}
            assert after <= before


@given(generated, policies)
@law
def test_deciding_twice_is_deciding_once_and_short_lived_change_nothing(
    members: list[Member], upstream: Policy
) -> None:
    """After the deletes nothing more goes at once; without the short-lived ones the others fare the same."""
    chosen = rules(upstream)
    going = {v.path for v in decide(members, chosen).verdicts if v.action != "keep"}
    rest = [m for m in members if m.path not in going]
    assert not {v.path for v in decide(rest, chosen).verdicts if v.action != "keep"}
    lasting = [m for m in members if not m.short_lived]
    alone = {v.path for v in decide(lasting, chosen).verdicts if v.action != "keep"}
    assert alone == {path for path in going if path in {m.path for m in lasting}}
