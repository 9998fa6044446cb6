# pipeline.py
import torch
import transformers

import autopar

torch.manual_seed(0)
config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
model = transformers.GPT2LMHeadModel(config)
tokens = torch.randint(0, 256, (8, 32))
batch = {"input_ids": tokens, "labels": tokens}

plan = autopar.plan(model, batch, "cpu:4", mesh={"pp": 2, "dp": 2, "tp": 1}, schedule="1f1b", microbatches=4)
m = autopar.parallelize(model, batch, plan=plan)
opt = torch.optim.AdamW(m.parameters(), lr=1e-2)  # of this rank's stages
for step in range(5):
    opt.zero_grad()
    loss = m.step(**batch)  # detached, of the global batch, on every rank
    autopar.clip_grad_norm_(m.parameters(), 1.0)
    opt.step()
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
m.eval()
with torch.no_grad():
    logits = m(**batch).logits  # calling the module evaluates: whole outputs on every rank
torch.distributed.destroy_process_group()
