"""How long planning takes and how good its plans are, for the model zoo in the sizes that people train.

    python benchmarks/plan_zoo.py [--models gpt2 llama ...] [--cluster h100x8] [--exact S] [--repeats 1] [--write docs/plans.md]

Every model (AdamW, on `meta`) is planned with the memory its devices have and, where that fits, with seven tenths of what it then takes.
`--exact S` plans each also with `effort="exact"` and S seconds. Prints JSON: CPU seconds of tracing and of the search (the least of
`--repeats`), step time, the bound, the gap between them, memory; `--write` keeps it as a table in a page of the documentation, between
its markers.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import autopar
from autopar.ir.cluster import resolve
from autopar.ir.tracing.trace import split_example, trace
from autopar.search.planner import plan_graph

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.zoo import ZOO

TIGHT = 0.7
BEGIN, END = "<!-- begin plans -->", "<!-- end plans -->"


@dataclass(frozen=True, slots=True)
class Size:
    """`options` of `ZOO[...].build`; one global batch: `sequence` tokens a row, or images of `pixels` by `pixels`."""

    what: str
    batch: int
    sequence: int = 0
    pixels: int = 0
    options: dict[str, Any] = field(default_factory=dict)


SIZES: dict[str, Size] = {
    "gpt2": Size("GPT-2 XL", 64, 1024, options={"layers": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257, "n_positions": 1024}),
    "llama": Size("Llama 8B", 16, 4096, options={
        "layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 4096}),
    "qwen3": Size("Qwen3 8B", 16, 4096, options={
        "layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 4096}),
    "bert": Size("BERT large", 256, 512, options={
        "layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 30522}),
    "t5": Size("T5 3B", 32, 512, options={
        "layers": 24, "num_decoder_layers": 24, "d_model": 1024, "d_ff": 16384, "num_heads": 32, "d_kv": 128, "vocab_size": 32128}),
    "bart": Size("BART large", 64, 1024, options={
        "layers": 12, "decoder_layers": 12, "d_model": 1024, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
        "encoder_attention_heads": 16, "decoder_attention_heads": 16, "vocab_size": 50265, "max_position_embeddings": 1024}),
    "vit": Size("ViT huge", 256, pixels=224, options={
        "layers": 32, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
        "num_labels": 1000}),
    "resnet": Size("ResNet-152", 256, pixels=224, options={
        "depths": [3, 8, 36, 3], "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck",
        "num_labels": 1000}),
    "unet-groups": Size("U-Net of 5 levels", 64, pixels=256, options={"layers": 5, "width": 64}),
    "encoder": Size("nn.Transformer encoder", 64, 512, options={"layers": 24, "width": 1024}),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--cluster", default="h100x8")
    parser.add_argument("--exact", type=float, metavar="S")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--write", type=Path)
    return parser.parse_args()


def inputs(name: str, model: torch.nn.Module) -> Any:
    """A global batch of the size wanted, on `meta`."""
    size = SIZES[name]
    small = ZOO[name].inputs(model, batch=2, sequence=size.sequence or 16)

    def enlarged(tensor: torch.Tensor) -> torch.Tensor:
        shape = [size.batch, *tensor.shape[1:]]
        if size.pixels and tensor.dim() >= 3:
            shape[-2:] = [size.pixels] * 2
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return {key: enlarged(item) for key, item in small.items()} if isinstance(small, dict) else tuple(enlarged(item) for item in small)


def planned(graph: Any, options: argparse.Namespace, **settings: Any) -> tuple[dict[str, Any], autopar.Plan]:
    """Plan `--repeats` times. The row of a plan, and the plan."""
    seconds = []
    for _ in range(options.repeats):
        start = time.process_time()
        plan = plan_graph(graph, resolve(options.cluster), **settings)
        seconds.append(time.process_time() - start)
    shape = {axis: size for axis, size in plan.mesh.items() if size > 1}
    row = {
        "search_s": round(min(seconds), 3), "step_s": plan.predicted.step_s, "cost_s": plan.cost_s, "bound_s": plan.lower_bound_s,
        "gap": plan.gap, "memory_bytes": sum(plan.memory_bytes.values()), "limit_bytes": plan.predicted.memory_limit_bytes,
        "fits": plan.predicted.fits, "mesh": shape, "groups": len(plan.groups), "microbatches": plan.microbatches,
    }  # fmt: skip
    return row, plan


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model."""
    size = SIZES[name]
    model = ZOO[name].build(device="meta", **size.options).to(torch.bfloat16)
    seconds = []
    example = inputs(name, model)
    for _ in range(options.repeats):
        start = time.process_time()
        traced = trace(model, *split_example(example))
        seconds.append(time.process_time() - start)
    graph = traced.graph
    common = {
        "model": size.what, "parameters": sum(p.numel() for p in model.parameters()), "operations": len(graph.ops),
        "batch": size.batch, "trace_s": round(min(seconds), 3),
    }  # fmt: skip
    free, plan = planned(graph, options)
    rows = [common | {"memory": "of the devices", "effort": "fast"} | free]
    limits: dict[str, int | None] = {"of the devices": None}
    if plan.predicted.fits:
        limits["tight"] = int(TIGHT * free["memory_bytes"])
        rows.append(common | {"memory": "tight", "effort": "fast"} | planned(graph, options, memory_limit_bytes=limits["tight"])[0])
    if options.exact:
        for memory, limit in limits.items():
            settings = {"memory_limit_bytes": limit, "effort": "exact", "time_limit_s": options.exact}
            rows.append(common | {"memory": memory, "effort": "exact"} | planned(graph, options, **settings)[0])
    return rows


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in options.models:
        for row in measure(name, options):
            rows.append(row)
            print(
                f"{row['model']:24} {row['memory']:15} {row['effort']:6} trace {row['trace_s']:.2f} s search {row['search_s']:.2f} s "
                f"gap {row['gap']:.2%} step {row['step_s'] * 1e3:.4g} ms {'fits' if row['fits'] else 'does not fit'}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    print(json.dumps({"benchmark": "plan_zoo", "cluster": options.cluster, "machine": platform.machine(), "results": rows}, indent=2))
    if options.write:
        write(options.write, rows)


def write(page: Path, rows: list[dict[str, Any]]) -> None:
    """The table between the markers of a page."""
    lines = [
        "| model | operations | memory | effort | mesh | step | gap | trace, CPU s | search, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "1 rank"
        if row["groups"] > 1:
            mesh = f"{row['groups']} groups"
        if row["microbatches"] > 1:
            mesh += f", {row['microbatches']} microbatches"
        memory = f"{row['memory_bytes'] / 2**30:.1f} of {row['limit_bytes'] / 2**30:.1f} GiB" + ("" if row["fits"] else ", does not fit")
        step = f"{row['step_s'] * 1e3:.1f} ms | {row['gap']:.2%} | {row['trace_s']:.2f} | {row['search_s']:.2f}"
        lines.append(f"| {row['model']}, batch {row['batch']} | {row['operations']} | {memory} | {row['effort']} | {mesh} | {step} |")
    text = page.read_text("utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
