"""What a job asks for: resolved from job, site and command line, refused where it cannot be."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan.request import Request, Sizes, in_words, resolve_request, sbatch_command
from cluster.site.settings import Container, Paths, Site, Slurm
from cluster.slurm import notation
from runfolder.errors import UserError

SITE = Site(
    slurm=Slurm(
        partition="gpu",
        cpus_per_node=64,
        gpus_per_node=4,
        memory_per_node_mb=512_000,
        sbatch_flags=["--constraint=a100"],
        gpu_type="a100",
        account="lab",
        qos="long",
    ),
    paths=Paths(scratch="/tmp"),
    container=Container(),
    source=Path("site.toml"),
)
ASKED = {"num_nodes": 2, "gpus_per_node": 4, "time": "04:00:00"}


def resolve(site: Site = SITE, on_cpu: bool = False, **sizes: str) -> Request:
    asked: dict[str, Any] = dict(ASKED)
    return resolve_request(
        site, Sizes(**sizes), asked=asked, origin="job.yaml: resources.gpus_per_node", on_cpu=on_cpu
    )


def test_a_job_gets_what_its_file_says_and_the_share_of_cpus_that_its_gpus_are() -> None:
    found = resolve()
    assert (found.num_nodes, found.gpus_per_node, found.world_size) == (2, 4, 8)
    assert (found.cpus_per_node, found.memory_per_node_mb) == (64, 512_000)
    assert found.device == "cuda"
    half = resolve(gpus="2", nodes="1")
    assert (half.world_size, half.cpus_per_node, half.memory_per_node_mb) == (2, 32, 256_000)


def test_without_gpus_it_trains_on_whole_nodes_and_a_dry_run_on_few_cpus() -> None:
    whole = resolve(gpus="0", nproc="2")
    assert (whole.device, whole.cpus_per_node, whole.processes_per_node) == ("cpu", 64, 2)
    small = resolve(on_cpu=True)
    assert (small.device, small.cpus_per_node, small.gpus_per_node) == ("cpu", 1, 0)


def test_a_site_whose_image_is_for_cpus_trains_on_cpus_whatever_gpus_are_asked_for() -> None:
    found = resolve(replace(SITE, container=Container(variant="cpu")))
    assert (found.device, found.gpus_per_node) == ("cpu", 4)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"gpus": "8"}, "GPUS=8: a node has 4 (site.toml: slurm.gpus_per_node)"),
        ({"gpus": "4", "nproc": "3"}, "NPROC=3: each process uses one GPU, and the job asks for 4"),
        ({"nodes": "0"}, "NODES=0: must be a whole number, at least 1"),
        ({"nodes": "two"}, "NODES=two: must be a whole number"),
        ({"gpus": "-1"}, "GPUS=-1: must be a whole number, at least 0"),
        ({"gpus": "0", "nproc": "65"}, "NPROC=65: a job gets 64 CPUs"),
        ({"time": "soon"}, "TIME=soon: is not a time limit"),
        ({"time": "1:2:3:4"}, "TIME=1:2:3:4: is not a time limit"),
        ({"time": "9"}, "TIME=9 (9 minutes): leaves no time to train"),
    ],
)
def test_what_a_node_does_not_have_is_refused(sizes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        resolve(**sizes)


def test_a_job_file_that_asks_for_too_much_is_named() -> None:
    few = replace(SITE, slurm=replace(SITE.slurm, gpus_per_node=2))
    with pytest.raises(UserError, match=r"job\.yaml: resources\.gpus_per_node: asks for 4 GPUs"):
        resolve(few)


def test_the_sbatch_command_says_it_all() -> None:
    folder = Path("/runs/x")
    command = sbatch_command(SITE, resolve(gpus="2"), name="sluice-x", folder=folder)
    assert command[0] == "sbatch"
    assert {
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--nodes=2",
        "--gpus-per-node=a100:2",
        "--mem=256000M",
        "--signal=B:USR1@300",
        "--constraint=a100",
        "--requeue",
    } < set(command)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("01:00:00", 3600),
        ("2-0", 172_800),
        ("1-02:03", 93_780),
        ("1-02:03:04", 93_784),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str, expected: int | None) -> None:
    assert notation.seconds(time) == expected


@given(st.text(alphabet="0123456789:-dhm ", max_size=12))
def test_any_other_time_is_refused(time: str) -> None:
    try:
        found = notation.seconds(time)
    except ValueError:
        return
    assert found is not None
    assert found >= 0


@pytest.mark.parametrize(
    ("time", "words"),
    [
        ("24:00", "24 minutes"),
        ("90", "1 hour 30 minutes"),
        ("04:00:00", "4 hours"),
        ("1-12", "1 day 12 hours"),
        ("1:30", "1 minute 30 seconds"),
        ("2-00:00:01", "2 days 1 second"),
        ("UNLIMITED", "without limit"),
    ],
)
def test_a_time_limit_is_said_back_in_words(time: str, words: str) -> None:
    assert in_words(time) == words
    assert f"at most {time} ({words})" in str(replace(resolve(), time=time))


def test_a_sign_in_the_name_of_a_folder_is_no_pattern_of_slurms() -> None:
    words = sbatch_command(SITE, resolve(), name="n", folder=Path("/home/100%j"))
    assert "--chdir=/home/100%j" in words
    assert "--output=/home/100%%j/slurm-%j.log" in words
