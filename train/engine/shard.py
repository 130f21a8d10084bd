"""A rank's part of a checkpoint: fp32 tensors as a safetensors file, written one by one.

The same bytes as safetensors' own `save_file` writes, which a test cannot interrupt between two
tensors, and whose files only their owner can read. The format: 8 bytes with the length of the
header, little-endian, the header, the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from runfolder import moments


def save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors, contiguous and on the CPU; they are not copied.

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
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for number, name in enumerate(header):
            if number == len(header) // 2:
                stream.flush()
                moments.reached("in-shard")
            stream.write(tensors[name].detach().numpy().data)
