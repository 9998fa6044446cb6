"""Is it still my model? Seven models, and others by name, under the searched plan and every baseline, on 2 and 4 ranks, in float64.

    python benchmarks/verify_zoo.py [--models gpt2 llama ...] [--plans searched ddp ...] [--ranks 2 4] [--all]

`autopar.verify` compares losses, gradients and parameters after 3 optimizer steps with one device. Prints a line per case to stderr as it
goes and JSON at the end; the exit code is 1 if any case is not ok. Rows of `zoo/` are models too; `make zoo` tries each in other ways.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from verifying import finish, verified

import autopar
from autopar.runtime.verification.launch import RankPool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.zoo import ZOO
from zoo import BESIDES, MODELS

ROWS = MODELS | BESIDES | ZOO
SEVEN = ("gpt2", "llama", "qwen3", "bert", "t5", "vit", "resnet")
PLANS = ("searched", "ddp", "zero1", "fsdp", "tp", "tp-sp")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SEVEN), choices=list(ROWS), metavar="MODEL")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--all", action="store_true", help="also the models that the project's own tests add")
    return parser.parse_args()


def verify(name: str, plan_name: str, ranks: int, pool: RankPool) -> autopar.VerifyReport:
    """Plan and verify one model; `pool` has as many `ranks`."""
    entry = ROWS[name]
    model = entry.build().double()
    example = entry.inputs(model)
    plan = autopar.plan(model, example, f"cpu:{ranks}", baseline=None if plan_name == "searched" else plan_name)
    return autopar.verify(model, example, plan, ranks=pool)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    models = list(ZOO) if options.all else options.models
    rows = []
    for ranks in options.ranks:
        with RankPool(ranks) as pool:
            for name in models:
                for plan_name in options.plans:
                    labels = {"model": name, "plan": plan_name, "ranks": ranks}
                    rows.append(verified(f"{name:8} {plan_name:9} {ranks} ranks", labels, partial(verify, name, plan_name, ranks, pool)))
    finish("verify_zoo", rows)


if __name__ == "__main__":
    main()
