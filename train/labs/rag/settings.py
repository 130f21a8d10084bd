"""The settings of lab 4."""

from __future__ import annotations

from dataclasses import dataclass, field

from runfolder.errors import UserError
from train.engine.config import LoopSettings
from train.engine.settings import CheckpointSettings, EncoderSettings
from train.labs.rag.chunks import ChunkSettings
from train.labs.rag.corpus import StagedPassages
from train.labs.rag.indexes import IndexSettings
from train.labs.rag.passages import PassageDataSettings


@dataclass(kw_only=True)
class GeneratorSettings:
    """The model that generates the answers of `make ask`; without one it shows the passages."""

    name: str | None = None
    """A hub id (owner/name), or the folder of a causal language model, such as a run's export."""
    revision: str | None = None
    """The commit of the hub id; not used for a folder."""


@dataclass(kw_only=True)
class Config(LoopSettings):
    """Embed passages, index them, and measure how well questions find theirs."""

    run_folder: str = ""
    """Where checkpoints, metrics and the index go; $SLUICE_RUN_FOLDER when empty."""
    max_steps: int = 1
    """Batches of chunks to embed. The data determines it; give `batch_size` instead."""
    batch_size: int = 32
    """Chunks in one forward pass of one process. A step is one such batch."""
    model: EncoderSettings = field(default_factory=EncoderSettings)
    data: PassageDataSettings = field(default_factory=PassageDataSettings)
    chunks: ChunkSettings = field(default_factory=ChunkSettings)
    index: IndexSettings = field(default_factory=IndexSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    staged: StagedPassages | None = None
    """Written by the set-up; not for the command line."""
    dry_run: bool = False
    """The preset `tiny` on the embedded sample: embed, stop, resume, index, measure."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.batch_size <= 65_536:
            raise UserError(f"batch_size: {self.batch_size} is not between 1 and 65536")
        if self.precision == "bf16" or self.compile:
            setting = "compile" if self.compile else "precision"
            raise UserError(f"{setting}: this lab embeds in fp32, not compiled; leave it out")
        if not self.export:
            raise UserError("export: this lab builds an index and exports no model; leave it out")
