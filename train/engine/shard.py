"""A rank's part of a checkpoint: fp32 tensors as a safetensors file, written one by one.

The same bytes as safetensors' own `save_file` writes, which a test cannot interrupt between two
tensors, and whose files only their owner can read. The format: 8 bytes with the length of the
header, little-endian, the header, the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from runfolder import moments


def save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Write tensors, contiguous and on the CPU, to the disk; they are not copied.

    Returns what `durable.describe` would: size and hash, taken on the way, since to read the file
    again takes as long as to write it.

    Raises:
        OSError: the file could not be written; a part of it may be there.
    """
    header, end = {}, 0
    for name in sorted(tensors):
        tensor = tensors[name]
        assert tensor.dtype == torch.float32, name
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Padding, so that the data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def write(part: bytes | memoryview) -> None:
            digest.update(part)
            stream.write(part)

        write(len(text).to_bytes(8, "little") + text)
        for number, name in enumerate(header):
            if number == len(header) // 2:
                stream.flush()
                moments.reached("in-shard")
            write(tensors[name].detach().numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}
