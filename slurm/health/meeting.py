"""The rendezvous of the nodes: a store on the head node, through which they exchange results."""

import json
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from slurm.health.reach import wait_until_reachable
from slurm.health.report import Report, Unhealthy
from slurm.health.settings import Settings

# The share of the time for the whole check after which a missing node is given up.
RENDEZVOUS_SHARE = 0.7
# How long a present node may take to answer; the head node waits this long at the end.
ANSWER_S = 5.0


class Meeting:
    """The store on the head node, in which each node leaves a value under each topic."""

    def __init__(self, settings: Settings, report: Report) -> None:
        """Open the store or connect to it.

        Raises:
            Unhealthy: the head node does not answer, or its port is taken.
        """
        self.settings, self.report = settings, report
        self.rank, self.num_nodes = settings.node_rank, settings.num_nodes
        self.names: list[str] = []
        report.begin("rendezvous", guilty=False)
        wait_s = settings.preflight_timeout_s * RENDEZVOUS_SHARE - report.seconds()
        place = f"{settings.master_addr}:{settings.master_port}"
        # Not left to the store, which waits several times longer than its timeout.
        head = (settings.master_addr, settings.master_port)
        if self.rank != 0 and not wait_until_reachable(head, wait_s):
            raise Unhealthy(
                f"rendezvous: the head node did not answer at {place}"
                f" within {report.seconds():.0f} s"
            )
        try:
            self.store = dist.TCPStore(
                settings.master_addr,
                settings.master_port,
                is_master=self.rank == 0,
                # The store takes whole seconds, and 0 would mean forever.
                timeout=timedelta(seconds=max(1.0, wait_s)),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            if self.rank == 0 and "EADDRINUSE" in str(error):
                raise Unhealthy(f"port {place} is taken on this node", guilty=True) from None
            raise

    def exchange(self, topic: str, value: Any, wait_s: float) -> list[Any]:
        """Leave a value and return those of all nodes, by rank.

        Raises:
            Unhealthy: some nodes left none in time; the report then says which.
        """
        keys = [f"{topic}/{rank}" for rank in range(self.num_nodes)]
        try:
            self.store.set(keys[self.rank], json.dumps(value))
            try:
                self.store.wait(keys, timedelta(seconds=max(1.0, wait_s)))
            except dist.DistStoreError:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                self.report.content["missing"] = missing
                raise Unhealthy(
                    f"{topic}: {len(missing)} of {self.num_nodes} nodes did not answer"
                    f" within {self.report.seconds():.0f} s"
                ) from None
            return [json.loads(text) for text in self.store.multi_get(keys)]
        except dist.DistNetworkError:
            raise Unhealthy(f"{topic}: the head node closed the connection") from None

    def gather(self, usable: bool) -> bool:
        """Wait until all nodes are there; return whether the devices of all are usable."""
        wait_s = self.settings.preflight_timeout_s * RENDEZVOUS_SHARE - self.report.seconds()
        here = {"node": self.settings.node_name, "usable": usable}
        everybody = self.exchange("rendezvous", here, wait_s)
        self.names = [each["node"] for each in everybody]
        self.report.passed(f"{self.num_nodes} nodes")
        return all(each["usable"] for each in everybody)

    def leave(self, ends: float) -> None:
        """End the meeting; the head node stays until the others have left."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            until = min(time.monotonic() + ANSWER_S, ends - 1)
            there = [
                rank
                for rank in range(self.num_nodes if self.rank == 0 else 0)
                if self.store.check([f"rendezvous/{rank}"])
            ]
            while there and time.monotonic() < until:
                if self.store.check([f"left/{rank}" for rank in there]):
                    break
                time.sleep(0.02)
