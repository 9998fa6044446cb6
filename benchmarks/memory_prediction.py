"""Peak memory that the simulator predicts for every rank beside what a tracker measures on the running rank program.

    python benchmarks/memory_prediction.py [--models gpt2 t5 ...] [--plans ddp 1f1b ...]

Every plan trains the model for two steps on two local processes (gloo), forward, backward and fused AdamW, in float32 or with
float32 masters. On each rank
the largest sum of live storages of the second is taken (`memory.py`) and set beside the prediction for the rank's group. Models are those
of the zoo, at a size where a rank holds tens of megabytes. Prints a line per case to stderr and JSON at the end: a ratio above 1.0
predicts more than is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from memory import lasting, measure

import autopar
from autopar.runtime.verification.launch import RankPool
from autopar.search.simulator.simulate import simulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.zoo import ZOO

ATTENTION = "scaled_dot_product_attention_*"
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({"layers": 6, "n_embd": 256, "n_head": 4, "vocab_size": 4096, "n_positions": 128}, {"batch": 16, "sequence": 128}),
    "llama": (
        {"layers": 6, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 4096, "num_attention_heads": 4},
        {"batch": 16, "sequence": 128},
    ),
    "llama, long": (
        {"layers": 4, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
        {"batch": 1, "sequence": 2048},
    ),
    "t5": ({"layers": 4, "d_model": 256, "d_ff": 1024, "d_kv": 64, "vocab_size": 4096}, {"batch": 16, "sequence": 64}),
    "vit": ({"layers": 6, "hidden_size": 256, "intermediate_size": 1024, "patch_size": 4}, {"batch": 32}),
    "resnet-tuned": ({"layers": 3, "embedding_size": 64, "hidden_sizes": [64, 128]}, {"batch": 256}),
    "unet-groups": ({"layers": 3, "width": 32}, {"batch": 192}),
}
"""Options of `build` and of `inputs`; what stands before a comma is the name in the zoo."""

PLANS: dict[str, dict[str, Any]] = {
    "ddp": {"baseline": "ddp"},
    "fsdp": {"baseline": "fsdp"},
    "searched": {"mesh": (2, 1), "microbatches": 1},
    "tensor": {"mesh": (1, 2), "microbatches": 1},
    "accumulation": {"mesh": (2, 1), "microbatches": 4},
    "recompute": {"mesh": (2, 1), "microbatches": 1, "recompute": "all"},
    "gpipe": {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "schedule": "gpipe", "microbatches": 4},
    "1f1b": {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "schedule": "1f1b", "microbatches": 4},
    "interleaved-1f1b": {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "schedule": "interleaved-1f1b", "microbatches": 4},
    "zbv": {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "schedule": "zbv", "microbatches": 4},
    "heads": {"mesh": (1, 2), "microbatches": 1, "pins": {ATTENTION: "h@tp"}},
    "gathered keys": {"mesh": (1, 2), "microbatches": 1, "pins": {ATTENTION: "l@tp"}},
    "ring": {"mesh": (1, 2), "microbatches": 1, "pins": {ATTENTION: "ring@tp"}},
    "ring, recompute": {"mesh": (1, 2), "microbatches": 1, "pins": {ATTENTION: "ring@tp"}, "recompute": "all"},
    "ddp, bfloat16": {"baseline": "ddp", "precision": "bfloat16"},
    "fsdp, bfloat16": {"baseline": "fsdp", "precision": "bfloat16"},
    "tensor, bfloat16": {"mesh": (1, 2), "microbatches": 1, "precision": "bfloat16"},
    "accumulation, bfloat16": {"mesh": (2, 1), "microbatches": 4, "precision": {"compute": "bfloat16", "reduce": "bfloat16"}},
    "1f1b, bfloat16": {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "schedule": "1f1b", "microbatches": 4, "precision": "bfloat16"},
    "fsdp, autocast": {"baseline": "fsdp", "precision": {"compute": "bfloat16", "by": "autocast"}},
    "1f1b, recompute": {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "schedule": "1f1b", "microbatches": 4, "recompute": "all"},
}
"""Options of `autopar.plan`; those that are given no mesh have two ranks."""

LONG = ("heads", "gathered keys", "ring", "ring, recompute")
"""Plans of long sequences, which the model with one has, and no other."""


def model_and_batch(name: str) -> tuple[torch.nn.Module, Any]:
    build, inputs = SIZES[name]
    entry = ZOO[name.split(",")[0]]
    model = entry.build(**build)
    return model, entry.inputs(model, **inputs)


def measure_rank(name: str, plan: autopar.Plan) -> int:
    """Peak bytes of a training step on this rank."""
    model, batch = model_and_batch(name)
    module = autopar.parallelize(model, batch, plan=plan)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    named = batch if isinstance(batch, dict) else None

    def step() -> None:
        optimizer.zero_grad()
        _ = module.step(**named) if named is not None else module.step(*batch)
        optimizer.step()

    return measure(step, lambda: lasting(module, optimizer))


def case(name: str, plan_name: str, pool: RankPool) -> dict[str, Any]:
    """Predict and measure one plan of one model; the pool has two ranks."""
    found: dict[str, Any] = {"model": name, "plan": plan_name}
    model, batch = model_and_batch(name)
    try:
        plan = autopar.plan(model, batch, "cpu:2", optimizer="adamw", **PLANS[plan_name])
        simulation = simulate(plan)
        measured = pool.run(measure_rank, name, plan)
    except autopar.AutoparError as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    predicted = [int(peak) for ranks, peak in zip(simulation.ranks, simulation.peak_bytes, strict=True) for _ in ranks]
    return found | {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "ratios": [round(guess / seen, 4) for guess, seen in zip(predicted, measured, strict=True)],
        "predicted_bytes_by_kind": [{kind: int(size) for kind, size in memory.at_peak().items()} for memory in simulation.memory],
    }


def line(row: dict[str, Any]) -> str:
    ratios = "  ".join(f"{ratio:.3f}" for ratio in row.get("ratios", ()))
    sizes = "  ".join(f"{size / 2**20:.1f}" for size in row.get("measured_bytes", ()))
    return f"{row['model']:14} {row['plan']:22} {ratios or row['error'].splitlines()[0]}  of {sizes} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    with RankPool(2, threads=1) as pool:
        for name in options.models:
            for plan_name in (plan for plan in options.plans if (plan in LONG) == ("long" in name)):
                rows.append(case(name, plan_name, pool))
                print(line(rows[-1]), file=sys.stderr, flush=True)
    worst = max((abs(ratio - 1) for row in rows for ratio in row.get("ratios", ())), default=0.0)
    print(json.dumps({"benchmark": "memory_prediction", "worst_deviation": round(worst, 4), "results": rows}, indent=2))
    sys.exit(1 if any("error" in row for row in rows) else 0)


if __name__ == "__main__":
    main()
