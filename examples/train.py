# train.py
import torch
import transformers

import autopar

torch.manual_seed(0)
config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
model = transformers.GPT2LMHeadModel(config)
tokens = torch.randint(0, 256, (8, 32))
batch = {"input_ids": tokens, "labels": tokens}  # the global batch

plan = autopar.plan(model, batch, "cpu:4")
m = autopar.parallelize(model, batch, plan=plan)  # or just autopar.parallelize(model)
opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
for step in range(5):
    opt.zero_grad()
    loss = m(**batch).loss  # same call, same outputs; the loss of the global batch
    loss.backward()
    autopar.clip_grad_norm_(m.parameters(), 1.0)
    opt.step()
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
torch.distributed.destroy_process_group()
