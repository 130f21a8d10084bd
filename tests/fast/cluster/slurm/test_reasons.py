"""reasons.py: Slurm's words in plain words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.slurm import reasons

# What releases since 22.05 say (slurm/src/common/slurm_protocol_defs.c).
CODES = """
None Resources Priority Dependency DependencyNeverSatisfied BeginTime JobHeldUser JobHeldAdmin
launch_failed_requeued_held job_requeued_in_held_state PartitionTimeLimit PartitionNodeLimit
PartitionDown PartitionInactive ReqNodeNotAvail NodeDown Reservation ReservationDeleted
BadConstraints InvalidAccount InvalidQOS AccountNotAllowed QOSNotAllowed Licenses
JobArrayTaskLimit Prolog Cleaning QOSUsageThreshold SystemFailure
QOSMaxWallDurationPerJobLimit AssocMaxWallDurationPerJobLimit QOSTimeLimit AssociationTimeLimit
QOSMaxCpuPerUserLimit QOSMaxGRESPerUser QOSMaxJobsPerUserLimit QOSMaxNodePerUserLimit
QOSMaxMemoryPerUser QOSMaxSubmitJobPerUserLimit QOSMaxCpuPerJobLimit QOSMaxGRESPerJob
QOSMaxNodePerJobLimit QOSMaxGRESMinutesPerJob QOSMaxCpuMinutesPerJobLimit QOSMinCpuNotSatisfied
QOSMinGRES QOSGrpCpuLimit QOSGrpGRES QOSGrpGRESMinutes QOSGrpCPURunMinutesLimit QOSJobLimit
QOSResourceLimit AssocGrpCpuLimit AssocGrpGRES AssocGrpGRESMinutes AssocGrpCPUMinutesLimit
AssocGrpCPURunMinutesLimit AssocGrpJobsLimit AssocGrpNodeLimit AssocMaxJobsLimit
AssocMaxCpuPerJobLimit AssocMaxGRESPerJob AssocMaxGRESPerNode MaxGRESPerAccount
AssociationJobLimit AssociationResourceLimit BurstBufferStageIn
"""


@pytest.mark.parametrize("code", CODES.split())
def test_every_reason_is_said_in_plain_words_that_say_what_it_means(code: str) -> None:
    said = reasons.why(code, 12)
    assert " " in said and "{" not in said
    assert len(said) <= 160


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("QOSMaxWallDurationPerJobLimit", "shorter TIME="),
        ("QOSMaxGRESPerUser", "when one of your jobs ends"),
        ("QOSMaxGRESPerJob", "fewer NODES="),
        ("AssocGrpGRES", "your account's jobs"),
        ("AssocGrpGRESMinutes", "time is used up"),
        ("AssocGrpCPURunMinutesLimit", "remaining time"),
        ("AssocMaxJobsLimit", "when one of your jobs ends"),
        ("BeginTime", "about two minutes"),
        ("JobHeldUser", "scontrol release 12"),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-2]", "(ReqNodeNotAvail, UnavailableNodes:node"),
    ],
)
def test_the_narrow_pattern_is_taken_before_the_wide_one(code: str, words: str) -> None:
    assert words in reasons.why(code, 12)


def test_a_held_job_of_another_cluster_is_released_there() -> None:
    for code in ("JobHeldUser", "launch_failed_requeued_held", "job_requeued_in_held_state"):
        assert " scontrol release 12 " in reasons.why(code, 12)
        assert " scontrol --clusters=far release 12 " in reasons.waits(code, "N/A", 12, "far")


@given(st.text())
def test_an_unknown_reason_stays_as_it_is_but_for_control_characters(code: str) -> None:
    assert reasons.why(code, 12).isprintable()
    assert reasons.why("Brand" + "\x1b[31m" + "New", 12) == "Brand?[31mNew"


@pytest.mark.parametrize("hour", ["00:00:00", "12:00:00", "23:59:59"])
def test_a_time_is_said_as_one_says_it(hour: str) -> None:
    now = time.mktime(time.strptime(f"2026-11-23T{hour}", "%Y-%m-%dT%H:%M:%S"))
    for moment, said in (
        ("2026-11-23T10:05:00", "10:05"),
        ("2026-11-22T10:05:00", "Sun 10:05"),
        ("2026-11-21T10:05:00", "2026-11-21 10:05"),
        ("2026-11-25T10:05", "Wed 10:05"),
        ("2026-11-28T10:05:00", "Sat 10:05"),
        ("2026-11-29T10:05:00", "2026-11-29 10:05"),
    ):
        assert reasons.clock(moment, now) == said
    assert reasons.clock("2011-12-01T10:05:00") == "2011-12-01 10:05"
    assert reasons.clock("N/A") == reasons.clock("Unknown") == ""


def test_a_duration_is_said_as_slurm_says_it() -> None:
    assert [reasons.duration(s) for s in (0, 61, 3600, 90061)] == [
        *("0:00:00", "0:01:01", "1:00:00", "1-01:01:01")
    ]
