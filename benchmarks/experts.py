"""Expert parallelism on a model of the size of Mixtral 8x7B, planned and simulated, beside the best plan without it.

    python benchmarks/experts.py --cluster h100x8:8 --batch 512 --microbatches 8

Prints JSON: of the searched plan, of the best plan in which no rank sends tokens to experts (every operation of routed experts forced
to split tokens or the inside of experts, or to run whole), and of the same model with one expert beside the dense model. Planning
needs no GPU and no weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autopar.ir.cluster import resolve
from autopar.ir.experts import EXPERTS
from autopar.ir.graph import Graph
from autopar.ir.plan import Plan
from autopar.ir.rules.nest import Call, Nest
from autopar.ir.rules.table import RULES
from autopar.ir.tracing.trace import trace
from autopar.search.planner import plan_graph


def model_graph(kind: str, batch: int, seq: int, layers: int, **sizes: int) -> Graph:
    """The graph of a model on `meta`, bfloat16, training, for `batch` sequences of `seq` tokens."""
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, max_position_embeddings=seq, use_cache=False, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        ids = torch.zeros(batch, seq, dtype=torch.long)
    return trace(model, (), {"input_ids": ids, "labels": ids}).graph


MIXTRAL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
"""Jiang et al. 2024, "Mixtral of Experts", table 1."""


def without_expert_parallelism() -> None:
    """From now on, in this process, routed experts cannot be split by expert: what is left is to split tokens or the inside of experts."""
    family = RULES[EXPERTS]

    def narrowed(call: Call) -> Nest | None:
        nest = family(call)
        return None if nest is None else replace(nest, whole=nest.whole | {"e"}, joint=())

    RULES[EXPERTS] = narrowed


def roles(plan: Plan) -> list[str]:
    """How the routed experts are split, over all stages: `"n@dp, n+e@tp"`."""
    rows = [op.split for segment in plan.segments for op in segment.ops if op.target == EXPERTS]
    return sorted({", ".join(f"{name}@{axis}" for axis, name in row.items() if name != "replicate") for row in rows})


def facts(plan: Plan, seconds: float) -> dict[str, Any]:
    return {
        "mesh": plan.mesh,
        "groups": [group.mesh for group in plan.groups],
        "schedule": plan.pipeline.schedule if plan.pipeline else None,
        "microbatches": plan.microbatches,
        "experts": roles(plan),
        "fits": plan.predicted.fits,
        "simulated_s": plan.predicted.step_s,
        "planning_s": round(seconds, 1),
    }


def planned(options: argparse.Namespace, kind: str, sizes: dict[str, int]) -> dict[str, Any]:
    graph = model_graph(kind, options.batch, options.seq, options.layers, **sizes)
    mesh = tuple(map(int, options.mesh.split("x"))) if options.mesh else None
    started = time.monotonic()
    plan = plan_graph(graph, resolve(options.cluster), mesh=mesh, microbatches=options.microbatches, expert_imbalance=options.imbalance)
    return facts(plan, time.monotonic() - started)


DENSE = {name: size for name, size in MIXTRAL.items() if "expert" not in name}
RUNS: dict[str, tuple[str, dict[str, int]]] = {
    "searched": ("mixtral", MIXTRAL),
    "without expert parallelism": ("mixtral", MIXTRAL),
    "one expert": ("mixtral", {**MIXTRAL, "num_local_experts": 1, "num_experts_per_tok": 1}),
    "dense": ("mistral", DENSE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="h100x8:8")
    parser.add_argument("--batch", type=int, default=512, help="sequences a step: 2 million tokens, as such models are trained with")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--mesh", help="e.g. 8x8, instead of searching all meshes and pipelines")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--imbalance", type=float, default=None)
    parser.add_argument("--only", choices=RUNS, action="append", help="one of the runs, in this process")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.only or RUNS:
        if options.only:
            if name == "without expert parallelism":
                without_expert_parallelism()
            found[name] = planned(options, *RUNS[name])
        else:  # rules are remembered for the life of a process
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if not options.only:
        found["speedup"] = found["without expert parallelism"]["simulated_s"] / found["searched"]["simulated_s"]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
