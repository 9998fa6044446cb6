"""Each rank loads only its own rows of the batch.

torchrun --nproc-per-node 4 examples/per_rank.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autopar

GLOBAL_BATCH = 32


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(inputs), labels)


torch.manual_seed(0)
model = Classifier()
labels = torch.randint(0, 10, (256,))
dataset = TensorDataset(torch.randn(10, 64)[labels] + 0.5 * torch.randn(256, 64), labels)

example = dataset[:GLOBAL_BATCH]  # a global batch: only its shapes count
plan = autopar.plan(model, example, "cpu:4")
model = autopar.parallelize(model, example, plan=plan, inputs="per-rank")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

sampler = plan.sampler(dataset)
loader = DataLoader(dataset, batch_size=GLOBAL_BATCH // sampler.num_replicas, sampler=sampler)
for epoch in range(3):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = model(inputs, labels)  # of the global batch, the same on every rank
        loss.backward()
        optimizer.step()
    if torch.distributed.get_rank() == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

torch.distributed.destroy_process_group()
