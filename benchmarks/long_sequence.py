"""One layer of Llama 3 8B at long sequences, batch 1: how it is split over a sequence, what a step takes, what a rank holds.

    python benchmarks/long_sequence.py [--tokens 131072] [--ranks 1 2 4 8 16] [--layers 1] [--device h100]
        [--split searched heads gather ring]

Plans decoder layers (hidden 4096, 32 heads of which 8 for keys, bfloat16, on `meta`) between a small embedding and a mean, for machines of
8 devices, AdamW, with nothing computed again and no limit on memory, so that every number of ranks has a plan. `searched` is free; `heads`
(all-to-all to heads and back), `gather` (keys and values gathered) and `ring` pin how attention is split, on one axis in a machine and on
another between machines.
Prints JSON: per number of ranks and split the mesh, the splits of attention and of the products, seconds of a step as simulated, bytes
on a rank by kind, and `memory_ratio`, bytes on one rank over those of the same row on all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

import autopar
from autopar.errors import InfeasibleError, PinError
from autopar.ir.plan import Plan

ATTENTION = "scaled_dot_product_attention_*"
PINS = {"heads": ("q", "h"), "gather": ("l", "l"), "ring": ("ring", "ring")}
"""Splits between machines and in one; `q`: the query heads of one head of keys."""
NO_LIMIT_BYTES = 1 << 50


class Layers(nn.Module):
    """Decoder layers, and a mean so that there is a loss: all that is not a layer is next to nothing."""

    def __init__(self, tokens: int, layers: int) -> None:
        super().__init__()
        self.model = LlamaModel(
            LlamaConfig(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
                vocab_size=1024, max_position_embeddings=tokens, use_cache=False,
            )
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids).last_hidden_state
        return found.float().square().mean()


def planned(tokens: int, layers: int, device: str, ranks: int, split: str) -> Plan:
    machines, per_machine = -(-ranks // 8), min(ranks, 8)
    with torch.device("meta"):
        model = Layers(tokens, layers).bfloat16()
        ids = torch.zeros(1, tokens, dtype=torch.int64)
    mesh, pins = None, None
    if split != "searched" and ranks > 1:
        mesh, (between, inside) = (machines, per_machine), PINS[split]
        pins = {ATTENTION: f"{between}@dp, {inside}@tp" if machines > 1 else f"{inside}@tp"}
    return autopar.plan(
        model, (ids,), f"{device}x{per_machine}" + (f":{machines}" if machines > 1 else ""), mesh=mesh, pins=pins, microbatches=1,
        recompute="none", memory_limit_bytes=NO_LIMIT_BYTES,
    )  # fmt: skip


def row(plan: Plan) -> dict[str, Any]:
    ways: dict[str, Counter[str]] = {"attention": Counter(), "products": Counter(), "norms": Counter()}
    kinds = {"scaled_dot_product_attention": "attention", "linear": "products", "mean": "norms"}
    for segment in plan.segments:
        for op in segment.ops:
            if kind := kinds.get(op.target.split(".")[1]):
                real = {axis: name for axis, name in op.split.items() if plan.mesh[axis] > 1}
                ways[kind][" ".join(f"{name}@{axis}" for axis, name in real.items()) or "whole"] += segment.count
    return {
        "mesh": plan.mesh,
        "splits": {kind: dict(found) for kind, found in ways.items()},
        "step_s": plan.predicted.step_s,
        "memory_bytes": sum(plan.memory_bytes.values()),
        "memory_by_kind_bytes": plan.memory_bytes,
        "gap": plan.gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--device", default="h100")
    parser.add_argument("--split", nargs="+", choices=["searched", *PINS], default=["searched", *PINS])
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for tokens in options.tokens:
        alone: dict[str, Any] | None = None
        for ranks in options.ranks:
            for split in options.split[:1] if ranks == 1 else options.split:
                facts: dict[str, Any] = {"tokens": tokens, "ranks": ranks, "split": split}
                try:
                    facts |= row(planned(tokens, options.layers, options.device, ranks, split))
                except (PinError, InfeasibleError) as error:
                    facts["why_not"] = str(error).splitlines()[0]
                if ranks == 1:
                    alone = facts
                if alone and "memory_bytes" in facts:
                    facts["memory_ratio"] = alone["memory_bytes"] / facts["memory_bytes"]
                found.append(facts)
                print(f"{tokens} tokens, {ranks} ranks, {split}: {facts.get('step_s', facts.get('why_not'))}", file=sys.stderr)
    json.dump(found, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
