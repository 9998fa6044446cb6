"""Lose a rank, and go on from the last checkpoint on those that are left, under another plan.

    torchrun --nproc-per-node 4 examples/resume.py --mesh pp=2,dp=2,tp=1     # kill one of the processes while it trains
    torchrun --nproc-per-node 2 examples/resume.py --mesh dp=2,tp=1          # the same curve from the last checkpoint on

When a rank is lost, the others end with a `PeerError` that says what they were waiting for, unless `torchrun` ends them first. A
checkpoint counts once it is complete, so one that was being written is passed over. How it was split among ranks does not matter to
those who load it.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import autopar

parser = argparse.ArgumentParser()
parser.add_argument("--mesh", default="", help="such as pp=2,dp=2,tp=1; by default the fastest")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
options = parser.parse_args()
mesh = {axis: int(size) for axis, size in (item.split("=") for item in options.mesh.split(",") if item)}

config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0  # so that the losses can be compared
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(config)


def batch(step: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens}


ranks = int(os.environ.get("WORLD_SIZE", "1"))
plan = autopar.plan(model, batch(0), f"cpu:{ranks}", mesh=mesh or None, microbatches=2)
module = autopar.parallelize(model, batch(0), plan=plan, timeout_s=60)
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

start = 0
complete = [int(folder.parent.name) for folder in options.folder.glob("*/.metadata")]  # written last
if complete:
    start = max(complete)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=options.folder / str(start))  # each rank reads the parts that it holds under this plan
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

for step in range(start, options.steps):
    optimizer.zero_grad()
    loss = module.step(**batch(step))
    optimizer.step()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"step {step}: loss {loss.item():.5f}", flush=True)
    if (step + 1) % options.every == 0:
        model_state, optimizer_state = get_state_dict(module, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=options.folder / str(step + 1))

if dist.is_initialized():
    dist.destroy_process_group()
