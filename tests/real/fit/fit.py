# ruff: noqa: PTH112, PTH123, SIM115
"""What somebody might bring: it knows nothing of Sluice. HOLD lets a test find it at a step."""

import argparse
import os
import time

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
if options.resume and os.path.isdir("out/last"):
    accelerator.load_state("out/last")
    step = int(open("out/last/step").read())
while step < options.steps:
    torch.manual_seed(1000 * step + accelerator.process_index)
    loss = model(torch.randn(4, 8)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if accelerator.is_main_process:
        with open("losses", "a") as file:
            print(step, loss.item(), file=file)
    if step == 8:
        accelerator.save_state("out/last")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            open("out/last/step", "w").write(str(step))
    while str(step) == os.environ.get("HOLD") and not options.resume:
        time.sleep(0.1)
