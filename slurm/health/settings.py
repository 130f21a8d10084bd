"""What the caller of a preflight resolved."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the caller resolved; each field is the variable SLUICE_ and its name in capitals."""

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
    scratch_inside: Path
    # cpu or cuda.
    device: str
    gpus_per_node: int
    # Bus bandwidth of an all-reduce over all processes; 0: none is asked for.
    floor_bytes_per_second: float
    max_clock_skew_s: float
    min_free_memory_bytes: float
    # Of each GPU's memory, 0 to 1.
    min_free_gpu_fraction: float
    min_free_scratch_bytes: float
    # Of the whole check on a node.
    preflight_timeout_s: float

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Return the settings.

        Raises:
            ValueError: a variable is missing or not a number.
        """
        values: dict[str, object] = {}
        for field in fields(cls):
            name = f"SLUICE_{field.name.upper()}"
            if not environment.get(name):
                raise ValueError(f"{name} is not set; the batch script resolves it")
            assert isinstance(field.type, type)
            try:
                values[field.name] = field.type(environment[name])
            except ValueError:
                raise ValueError(f"{name} is not a number: {environment[name]!r}") from None
        return cls(**values)  # type: ignore[arg-type]

    @property
    def processes_per_node(self) -> int:
        """Return how many processes of a node take part in the all-reduce."""
        return self.gpus_per_node if self.device == "cuda" else 1
