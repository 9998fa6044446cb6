"""What autopar does, in two parts. `make demo` runs this; it needs no GPU and no network.

1. Plan an 8-billion-parameter Llama for one machine with 8 H100s. The model stands on `meta`, so no memory is needed, and no GPU.
2. Train a small GPT-2 with random weights under the searched plan on 4 local processes, beside the same training on one.

    python examples/train_gpt2.py [--steps 40] [--ranks 4] [--skip-llama]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import autopar

VOCABULARY, SEQUENCE, BATCH = 256, 64, 16


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--skip-llama", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # from the parent to its ranks
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if "LOCAL_RANK" in os.environ:
        train_on_ranks(options)
        return
    if not options.skip_llama:
        plan_llama()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        train(options)


# Part 1 -----------------------------------------------------------------------------------------------------------------------------


def plan_llama() -> None:
    heading("1. Plan a Llama of 8 billion parameters for 8 GPUs, without any")
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        tokens = torch.zeros(8, 4096, dtype=torch.int64)
    start = time.perf_counter()
    plan = autopar.plan(model, {"input_ids": tokens, "labels": tokens}, "h100x8")
    print(plan)
    print(f"\nPlanned in {time.perf_counter() - start:.1f} s, tracing included.")


# Part 2 -----------------------------------------------------------------------------------------------------------------------------


def build_gpt2() -> torch.nn.Module:
    """Random weights, the same on every process; without dropout, whose masks would hide whether the losses agree."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=SEQUENCE, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def batch_of_step(step: int) -> dict[str, torch.Tensor]:
    """Text of a source that can be learned: nine times in ten the next token is a fixed function of the last, else it is drawn.

    `input_ids` and `labels`: `(BATCH, SEQUENCE)`, the global batch, the same on every rank.
    """
    follows = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(1000 + step)
    drawn = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    surprises = torch.rand(BATCH, SEQUENCE, generator=generator) < 0.1
    columns = [drawn[:, 0]]
    for position in range(1, SEQUENCE):
        columns.append(torch.where(surprises[:, position], drawn[:, position], follows[columns[-1]]))
    tokens = torch.stack(columns, dim=1)
    return {"input_ids": tokens, "labels": tokens}


def losses_of(module: torch.nn.Module, steps: int) -> Any:
    """The training loop. It is the same for one device and for many."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss = module(**batch_of_step(step)).loss
        loss.backward()
        optimizer.step()
        yield loss.item()


def train(options: argparse.Namespace) -> None:
    heading(f"2. Train a small GPT-2 on {options.ranks} local processes under the searched plan")
    plan = autopar.plan(build_gpt2(), batch_of_step(0), f"cpu:{options.ranks}")
    print(str(plan).split("\n\n")[0])  # what it is, what it costs; parameters, operations and collectives as above
    plan.save(options.folder / "plan.json")
    alone = list(losses_of(build_gpt2(), options.steps))
    (options.folder / "alone.json").write_text(json.dumps(alone))

    heading("Losses: the same program on 4 ranks and on one device" if options.ranks == 4 else "Losses")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    arguments = ["--steps", str(options.steps), "--ranks", str(options.ranks), "--folder", str(options.folder)]
    done = subprocess.run([*launcher, __file__, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    sys.exit(done.returncode)


def train_on_ranks(options: argparse.Namespace) -> None:
    """What every rank runs: load the plan, make the distributed module, train."""
    plan = autopar.Plan.load(options.folder / "plan.json")
    module = autopar.parallelize(build_gpt2(), batch_of_step(0), plan=plan)
    alone = json.loads((options.folder / "alone.json").read_text())
    talks = torch.distributed.get_rank() == 0
    if talks:
        print(f"{'step':>6}  {f'{options.ranks} ranks':>12}  {'one device':>12}  {'difference':>12}", flush=True)
    largest = 0.0
    for step, (loss, expected) in enumerate(zip(losses_of(module, options.steps), alone, strict=True)):
        largest = max(largest, abs(loss - expected))
        if talks and (step % 4 == 0 or step == options.steps - 1):
            print(f"{step:>6}  {loss:>12.6f}  {expected:>12.6f}  {loss - expected:>+12.1e}", flush=True)
    if talks:
        print(f"\nLargest difference of any step: {largest:.1e} (float32 rounding).", flush=True)
    torch.distributed.destroy_process_group()
    if largest > 1e-3:
        raise SystemExit("the losses differ by more than rounding explains")


if __name__ == "__main__":
    main()
