"""The least there is to it: any module, one line, torchrun.

    torchrun --nproc-per-node 4 examples/quickstart.py

`autopar.parallelize(model)` takes the inputs' shapes from the first call and the cluster from the running processes. Rank 0 makes the
plan and every rank gets it. Run it with plain `python` and the model is simply the model.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

import autopar

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 10))

model = autopar.parallelize(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

centres = torch.randn(10, 64)
for step in range(20):
    labels = torch.randint(0, 10, (32,))
    inputs = centres[labels] + 0.5 * torch.randn(32, 64)  # the global batch, the same on every rank
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    if rank == 0 and step % 5 == 0:
        print(f"step {step:2}: loss {loss.item():.4f}")

if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
