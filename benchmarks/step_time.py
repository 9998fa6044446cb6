"""Step time and peak memory of autopar's rank programs beside PyTorch's own, on the same model, batch and processes.

    python benchmarks/step_time.py [--layers 4] [--hidden 256] [--batch 16] [--sequence 128] [--rounds 15] [--ranks 4]

Starts `--ranks` local processes (gloo), which hold all programs at once and run them in turn, round after round, so that a busy
machine slows all alike. One round times one whole training step of each program (forward, backward, fused AdamW), from a barrier until
the slowest rank is done; the median over the rounds is reported, and beside it that of the CPU time of all ranks together, which others
on the machine disturb less. Peak memory is measured in separate steps (`memory.py`), on the worst rank. A small Llama without dropout,
float32, one thread a process. Prints JSON; a ratio below 1.0 is in autopar's favour.

| program          | beside                                                    |
|------------------|-----------------------------------------------------------|
| baseline `ddp`   | `DistributedDataParallel`                                 |
| baseline `fsdp`  | `fully_shard` on every layer and on the model             |
| baseline `tp`    | `parallelize_module`, Megatron's layout, `loss_parallel`  |
| searched plan    | the fastest of the three                                  |
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

PAIRS = {"ddp": "DistributedDataParallel", "fsdp": "fully_shard", "tp": "parallelize_module"}
SEARCHED = "searched"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16, help="rows of the global batch")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[*PAIRS, SEARCHED], choices=[*PAIRS, SEARCHED])
    return parser.parse_args()


@dataclass(frozen=True)
class Program:
    """`step()` trains one step and returns the loss; `owned()` are the tensors that outlive a step on this rank."""

    name: str
    step: Callable[[], float]
    owned: Callable[[], Iterable[Any]]
    predicted_bytes: dict[str, int] | None = None
    predicted_s: float | None = None


def build_model(options: argparse.Namespace, device: str = "cpu") -> Any:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=options.sequence,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).train()


def build_batch(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    tokens = torch.randint(0, options.vocabulary, (options.batch, options.sequence), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def training_step(module: Any, batch: dict[str, Any], name: str, context: Any = contextlib.nullcontext, **prediction: Any) -> Program:
    """The same loop for every program; forward and backward pass run in `context()`."""
    import torch
    from memory import lasting
    from torch.distributed.tensor import DTensor

    # The fused optimizer takes DTensors or plain tensors, not both at once; `parallelize_module` leaves some parameters plain.
    groups: dict[bool, list[Any]] = {}
    for parameter in module.parameters():
        groups.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups.values()], lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with context():
            loss = module(**batch).loss
            loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Program(name, step, lambda: lasting(module, optimizer), **prediction)


def rows_of_this_rank(batch: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    return {key: value.chunk(dist.get_world_size())[dist.get_rank()].clone() for key, value in batch.items()}


def torch_ddp(options: argparse.Namespace) -> Program:
    from torch.nn.parallel import DistributedDataParallel

    module = DistributedDataParallel(build_model(options), gradient_as_bucket_view=True)
    return training_step(module, rows_of_this_rank(build_batch(options)), "DistributedDataParallel")


def torch_fsdp(options: argparse.Namespace) -> Program:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (options.ranks,))
    model = build_model(options)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return training_step(model, rows_of_this_rank(build_batch(options)), "fully_shard")


def torch_tp(options: argparse.Namespace) -> Program:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

    mesh = init_device_mesh("cpu", (options.ranks,))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    layout = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    layout |= {f"model.layers.*.{name}": RowwiseParallel() for name in rows}
    layout["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    layout["lm_head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)  # logits stay split up to the loss
    model = parallelize_module(build_model(options), mesh, layout)
    return training_step(model, build_batch(options), "parallelize_module", context=loss_parallel)


def ours(options: argparse.Namespace, name: str) -> Program:
    """The rank program of a baseline by name, or of the searched plan."""
    import autopar

    batch = build_batch(options)
    model = build_model(options)
    cluster = f"cpu:{options.ranks}"
    if name == SEARCHED:
        plan = autopar.plan(model, batch, cluster, optimizer="adamw")
    else:
        plan = autopar.plan(model, batch, cluster, baseline=name, optimizer="adamw")
    module = autopar.parallelize(model, batch, plan=plan)
    return training_step(module, batch, f"autopar {name}", predicted_bytes=plan.memory_bytes, predicted_s=plan.cost_s)


def time_rounds(programs: dict[str, Program], options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per step of every program, one entry a round: of the slowest rank, and CPU seconds of all ranks together."""
    import torch
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {key: [] for key in programs}
    cpu_seconds: dict[str, list[float]] = {key: [] for key in programs}
    order = list(programs)
    for number in range(options.warmup + options.rounds):
        order.append(order.pop(0))  # another one is first in every round
        for key in order:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            programs[key].step()
            spent = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            cpu = torch.tensor(time.process_time() - start_cpu, dtype=torch.float64)  # of all threads, gloo's too
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            dist.all_reduce(cpu)
            if number >= options.warmup:
                seconds[key].append(spent.item())
                cpu_seconds[key].append(cpu.item())
    return seconds, cpu_seconds


def mean_over_ranks(loss: float) -> float:
    """PyTorch's data-parallel programs know the loss of their own rows only; the rows are as many on every rank."""
    import torch
    import torch.distributed as dist

    mean = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean.item() / dist.get_world_size())


def worst_peak_bytes(program: Program) -> int:
    import torch
    import torch.distributed as dist
    from memory import measure

    peak = torch.tensor(measure(program.step, program.owned))
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak.item())


def worker(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    builders: dict[str, Callable[[], Program]] = {}
    for name in options.only:
        builders[f"autopar {name}"] = lambda name=name: ours(options, name)
    for name, build in (("ddp", torch_ddp), ("fsdp", torch_fsdp), ("tp", torch_tp)):
        if name in options.only or SEARCHED in options.only:
            builders[PAIRS[name]] = lambda build=build: build(options)
    programs = {key: build() for key, build in builders.items()}
    first_losses = {key: mean_over_ranks(program.step()) for key, program in programs.items()}
    seconds, cpu_seconds = time_rounds(programs, options)
    peaks = {key: worst_peak_bytes(program) for key, program in programs.items()}
    if dist.get_rank() == 0:
        print(json.dumps(report(programs, first_losses, seconds, cpu_seconds, peaks, options), indent=2), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def report(
    programs: dict[str, Program],
    first_losses: dict[str, float],
    seconds: dict[str, list[float]],
    cpu_seconds: dict[str, list[float]],
    peaks: dict[str, int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    cpu = {key: statistics.median(values) for key, values in cpu_seconds.items()}
    rows = []
    for name in options.only:
        mine = f"autopar {name}"
        other = PAIRS.get(name) or min(PAIRS.values(), key=lambda key: medians[key])
        predicted = programs[mine].predicted_bytes
        rows.append(
            {
                "program": mine,
                "beside": other,
                "step_time_ratio": round(medians[mine] / medians[other], 4),
                "cpu_time_ratio": round(cpu[mine] / cpu[other], 4),
                "peak_memory_ratio": round(peaks[mine] / peaks[other], 4),
                "step_s": round(medians[mine], 6),
                "beside_step_s": round(medians[other], 6),
                "peak_memory_bytes": peaks[mine],
                "beside_peak_memory_bytes": peaks[other],
                "predicted_memory_bytes": sum(predicted.values()) if predicted else None,
                "predicted_memory_bytes_by_kind": predicted,
                "predicted_step_s": programs[mine].predicted_s,
                "first_loss": first_losses[mine],
                "beside_first_loss": first_losses[other],
            }
        )
    settings = {key: value for key, value in vars(options).items() if key != "only"}
    settings["optimizer"] = "AdamW, fused, on both sides"
    return {
        "benchmark": "step_time",
        "settings": settings,
        "all_step_s": {key: round(value, 6) for key, value in medians.items()},
        "all_cpu_s": {key: round(value, 6) for key, value in cpu.items()},
        "results": rows,
    }


def main() -> None:
    options = arguments()
    if "LOCAL_RANK" in os.environ:
        worker(options)
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
