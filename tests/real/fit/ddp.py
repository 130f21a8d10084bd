"""Fit a small network with plain PyTorch; it resumes whenever it finds a checkpoint."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CHECKPOINT = Path("checkpoints/last.pt")
STEPS = 20

# RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment.
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, device = dist.get_rank(), torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
step = 0
if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT, map_location=device)
    net.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
    if rank == 0:
        print(f"resuming at step {step}")
model = DistributedDataParallel(net)
while step < STEPS:
    torch.manual_seed(1000 * step + rank)
    loss = model(torch.randn(4, 8).to(device)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    if rank == 0:
        print(f"step {step} loss {loss.item()}")
        if step % 8 == 0:
            # A checkpoint that is half written has another name.
            CHECKPOINT.parent.mkdir(exist_ok=True)
            states = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(states, f"{CHECKPOINT}.new")
            Path(f"{CHECKPOINT}.new").replace(CHECKPOINT)
dist.destroy_process_group()
