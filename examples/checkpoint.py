"""Save under one plan, load under another, and continue with the same losses.

torchrun --nproc-per-node 4 examples/checkpoint.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers

import autopar

config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0  # so that the losses can be compared
tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(1))
batch = {"input_ids": tokens, "labels": tokens}


def build(baseline: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    module = autopar.parallelize(model, batch, baseline=baseline)
    return module, torch.optim.AdamW(module.parameters(), lr=1e-3)


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    return {"model": module.state_dict(), "optimizer": autopar.optimizer_state_dict(module, optimizer)}


first, first_optimizer = build("fsdp")
train(first, first_optimizer, steps=3)
folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
dist.broadcast_object_list(folder)
dcp.save(state_of(first, first_optimizer), checkpoint_id=folder[0])
expected = train(first, first_optimizer, steps=3)

second, second_optimizer = build("tp")
state = state_of(second, second_optimizer)
dcp.load(state, checkpoint_id=folder[0])  # each rank reads the parts that it holds under this plan
second.load_state_dict(state["model"])
autopar.load_optimizer_state_dict(second, second_optimizer, state["optimizer"])
losses = train(second, second_optimizer, steps=3)

if dist.get_rank() == 0:
    agree = all(abs(a - b) < 1e-4 for a, b in zip(losses, expected, strict=True))
    print("under fsdp:", *(f"{loss:.5f}" for loss in expected))
    print("under tp:  ", *(f"{loss:.5f}" for loss in losses))
    print("the same losses" if agree else "OTHER LOSSES")
dist.destroy_process_group()
