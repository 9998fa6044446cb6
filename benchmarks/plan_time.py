"""How long planning takes, and what depth costs.

    python benchmarks/plan_time.py [--depths 8 16 32 64 128] [--repeats 3] [--limit none|device] [--case llama|gpt3]

A Llama of 8 billion parameters at depth 32 (hidden 4096, 32 heads of which 8 for keys, vocabulary 128256, bfloat16, on `meta`), batch 16,
sequence 8192, AdamW, planned for one machine of 8 H100s on the mesh (dp 2, tp 4). Each repeat is a fresh process; time starts after the
imports and after the model stands. Prints JSON: medians of trace, fold, search (costs and solver) and total seconds, and the largest
peak of resident memory. `ratio_to_8` is the total beside that of 8 layers in the same run.

`--case gpt3` plans a GPT of GPT-3's shape instead (hidden 12288, 96 heads, vocabulary 50304, sequence 2048, batch 1536; 175 billion
parameters at depth 96, of 24 48 96 by default) on 1,024 H100s with everything open: stages, meshes, microbatches, schedules, recomputation,
within the devices' memory.

`--limit none` (default) plans without a memory limit, so that every depth has a plan; `--limit device` with what an H100 has, and reports
what came of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

MESH = {"dp": 2, "tp": 4}
CLUSTER = "h100x8"
NO_LIMIT_BYTES = 1 << 50
CASES: dict[str, dict[str, Any]] = {
    "llama": {"depths": [8, 16, 32, 64, 128], "batch": 16, "sequence": 8192, "cluster": CLUSTER, "mesh": MESH},
    "gpt3": {"depths": [24, 48, 96], "batch": 1536, "sequence": 2048, "cluster": "h100x8:128", "mesh": None},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["llama", "gpt3"], default="llama")
    parser.add_argument("--depths", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--limit", choices=["none", "device"], default="none")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the depth that a fresh process measures
    options = parser.parse_args()
    case = CASES[options.case]
    options.depths = options.depths or case["depths"]
    options.batch, options.sequence = options.batch or case["batch"], options.sequence or case["sequence"]
    return options


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """One planning of one depth, in this process."""
    import torch
    import transformers

    import autopar
    from autopar.ir.cluster import resolve
    from autopar.ir.fold import fold
    from autopar.ir.tracing.trace import split_example, trace
    from autopar.search.planner import plan_graph

    torch.set_num_threads(1)
    case = CASES[options.case]
    with torch.device("meta"):
        model = build(transformers, options.case, depth, options.sequence).to(torch.bfloat16)
        tokens = torch.zeros(options.batch, options.sequence, dtype=torch.int64)
    imported_bytes = peak_bytes()

    start = time.perf_counter()
    traced = trace(model, *split_example({"input_ids": tokens, "labels": tokens}))
    traced_at = time.perf_counter()
    found: dict[str, Any] = {"depth": depth, "operations": len(traced.graph.ops)}
    try:
        limit_bytes = NO_LIMIT_BYTES if options.limit == "none" and case["mesh"] else None
        plan = plan_graph(traced.graph, resolve(case["cluster"]), mesh=case["mesh"], memory_limit_bytes=limit_bytes)
        found |= {"plan_step_s": plan.cost_s, "gap": plan.gap, "plan_memory_bytes": sum(plan.memory_bytes.values())}
        if not case["mesh"]:
            found |= {"mesh": plan.mesh, "microbatches": plan.microbatches, "fits": plan.predicted.fits}
            found["candidates"] = {row.groups: row.cost_s for row in plan.candidates}
    except autopar.AutoparError as error:
        found["error"] = str(error).splitlines()[0]
    done = time.perf_counter()
    fold(traced.graph)  # again and alone, to be told apart from the search that it is a part of
    fold_s = time.perf_counter() - done
    return found | {
        "trace_s": traced_at - start,
        "fold_s": fold_s,
        "search_s": max(0.0, done - traced_at - fold_s),
        "total_s": done - start,
        "peak_memory_bytes": peak_bytes(),
        "imports_memory_bytes": imported_bytes,
    }


def build(transformers: Any, case: str, depth: int, sequence: int) -> Any:
    """The model of a case."""
    if case == "gpt3":
        config = transformers.GPT2Config(
            vocab_size=50304, n_embd=12288, n_layer=depth, n_head=96, n_positions=sequence, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=depth, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=sequence,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def fresh(depth: int, options: argparse.Namespace) -> dict[str, Any]:
    settings = ["--case", options.case, "--one", str(depth)]
    settings += ["--batch", str(options.batch), "--sequence", str(options.sequence), "--limit", options.limit]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, *settings], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    options = arguments()
    if options.one is not None:
        print(json.dumps(measure(options.one, options)))
        return
    runs: dict[int, list[dict[str, Any]]] = {depth: [] for depth in options.depths}
    for _ in range(options.repeats):
        for depth in options.depths:  # in turn, so that a busy moment does not fall on one depth alone
            runs[depth].append(fresh(depth, options))
    rows = []
    for found in runs.values():
        row = dict(found[0])
        for key in ("trace_s", "fold_s", "search_s", "total_s"):
            row[key] = round(statistics.median(run[key] for run in found), 4)
        for key in ("peak_memory_bytes", "imports_memory_bytes"):
            row[key] = max(run[key] for run in found)
        rows.append(row)
    first = next((row for row in rows if row["depth"] == 8), rows[0])
    for row in rows:
        row[f"ratio_to_{first['depth']}"] = round(row["total_s"] / first["total_s"], 3)
    case = CASES[options.case]
    settings = {"case": options.case, "mesh": case["mesh"], "cluster": case["cluster"]}
    settings |= {"batch": options.batch, "sequence": options.sequence, "dtype": "bfloat16"}
    settings |= {"repeats": options.repeats, "memory_limit": options.limit}
    print(json.dumps({"benchmark": "plan_time", "settings": settings, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
