"""The settings of a preflight, which its caller resolved."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from runfolder import launch

# The variables of the node and of this attempt.
OF_THE_NODE = {
    "node_rank": "SLUICE_NODE_RANK",
    "node_name": "SLURMD_NODENAME",
    "master_addr": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
    "run_folder": "SLUICE_RUN_FOLDER",
    "attempt": "SLUICE_ATTEMPT",
    "datasets": "SLUICE_DATASETS",
    "scratch": "SLUICE_SCRATCH",
    "device": "SLUICE_DEVICE",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the caller resolved: a variable of the node, or else a name of launch.env."""

    num_nodes: int
    node_rank: int
    node_name: str
    # Address and port of the first node; the port is one that training will use later.
    master_addr: str
    master_port: int
    run_folder: Path
    attempt: int
    datasets: Path
    # Node-local scratch as seen here.
    scratch: Path
    # cpu or cuda.
    device: str
    gpus_per_node: int
    # Bus bandwidth of an all-reduce over all processes; 0: no minimum.
    floor_bytes_per_second: float
    max_clock_skew_s: float
    min_free_memory_bytes: float
    # Of each GPU's memory, 0 to 1.
    min_free_gpu_fraction: float
    min_free_scratch_bytes: float
    # Of the whole check on a node.
    preflight_timeout_s: float
    # The site's interface between the nodes; if empty, the one that leads to the first node.
    interface: str = ""

    @classmethod
    def of_this_node(cls, environment: Mapping[str, str]) -> "Settings":
        """Return the settings, from the run's launch.env and the variables of this node.

        Raises:
            ValueError: one is missing or not a number.
        """
        own = {field: environment.get(name) for field, name in OF_THE_NODE.items()}
        if not own["run_folder"]:
            raise ValueError("SLUICE_RUN_FOLDER is not set; the batch script resolves it")
        # The container has the scratch folder at /tmp.
        own["scratch"] = own["scratch"] or "/tmp"
        given = launch.read(Path(own["run_folder"])) | own
        values: dict[str, object] = {}
        for field in fields(cls):
            name = OF_THE_NODE.get(field.name, field.name)
            text = given.get(field.name)
            if not text and field.default is not MISSING:
                continue
            if not text:
                raise ValueError(f"{name} is not set; the batch script resolves it")
            assert isinstance(field.type, type)
            try:
                values[field.name] = field.type(text)
            except ValueError:
                raise ValueError(f"{name} is not a number: {text!r}") from None
        return cls(**values)  # type: ignore[arg-type]

    @property
    def processes_per_node(self) -> int:
        """Return how many processes of a node take part in the all-reduce."""
        return self.gpus_per_node if self.device == "cuda" else 1
