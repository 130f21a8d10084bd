"""Fit a small network with accelerate; --resume continues from the newest checkpoint."""

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()
accelerator = Accelerator()
set_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer = accelerator.prepare(model, optimizer)
step = 0
if options.resume and os.path.exists("out/newest"):
    step = int(open("out/newest").read())
    accelerator.load_state(f"out/{step}")
    accelerator.print(f"resuming at step {step}")
while step < options.steps:
    torch.manual_seed(1000 * step + accelerator.process_index)
    loss = model(torch.randn(4, 8)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    accelerator.print(f"step {step} loss {loss.item()}")
    if step % 8 == 0:
        # Named as the newest only when every process has written its part.
        accelerator.save_state(f"out/{step}")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            open("out/newest.new", "w").write(str(step))
            os.replace("out/newest.new", "out/newest")
