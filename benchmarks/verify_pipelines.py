"""Is it still my model, in stages? Every model of the list on every shape of mesh under every schedule, and more, in float64.

    python benchmarks/verify_pipelines.py [--models gpt2 t5 ...] [--shapes 2,1,1 2,2,2 ...] [--schedules 1f1b ...] [--only-extra]

`autopar.verify` compares losses, gradients and parameters after 3 optimizer steps with one device. A model whose batch norms are in
training mode takes the whole batch at once (`microbatches=1`); `resnet-tuned` keeps its statistics, and takes microbatches. Beside the
matrix: uneven cuts, groups of different meshes, gradient accumulation, recomputation. Prints a line per case to stderr as it goes and
JSON at the end; the exit code is 1 if any case is not ok.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from verifying import finish, verified

from autopar.ir.pipelining.schedules import SCHEDULES
from autopar.runtime.verification.launch import RankPool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.pipelines import Case

MODELS = ("gpt2", "llama", "t5", "bart", "vit", "resnet", "resnet-tuned", "unet", "unet-groups", "unet-batch")
SHAPES = ((2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (2, 2, 2))
WHOLE_BATCH = ("resnet", "unet-batch")
ONE_THEN_THREE = ({"dp": 1, "tp": 1}, {"dp": 3, "tp": 1})
TURNED = ({"dp": 2, "tp": 1}, {"dp": 1, "tp": 2})


def matrix(models: list[str], shapes: list[tuple[int, int, int]], schedules: list[str]) -> list[Case]:
    return [
        Case(model, shape, schedule, microbatches=1 if model in WHOLE_BATCH else 8 if shape[0] == 4 else 4, batch=16)
        for shape in shapes
        for model in models
        for schedule in schedules
    ]


def extra(models: list[str]) -> list[Case]:
    """What the matrix has not."""
    found = []
    for model in models:
        parts = 1 if model in WHOLE_BATCH else 4
        found += [Case(model, (2, 1, 1), "1f1b", parts, uneven=share) for share in (0.15, 0.85)]
        found += [Case(model, (4, 1, 1), "1f1b", parts, uneven=share) for share in (0.15, 0.6)]
        found += [Case(model, TURNED, "1f1b", parts), Case(model, ONE_THEN_THREE, "gpipe", min(parts, 2), batch=12)]
        found += [Case(model, (2, 2, 1), name, parts, recompute="all") for name in ("1f1b", "zbv")]
        found += [Case(model, (1, 2, 2), None, parts), Case(model, (1, 2, 1), None, parts, recompute="all")]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), type=lambda text: tuple(map(int, text.split(","))), help="pp,dp,tp")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--only-extra", action="store_true", help="without the matrix")
    parser.add_argument("--only-matrix", action="store_true", help="without what is beside the matrix")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = [] if options.only_extra else matrix(options.models, options.shapes, options.schedules)
    cases += [] if options.only_matrix else extra(options.models)
    rows = []
    for ranks in sorted({case.ranks for case in cases}):
        with RankPool(ranks, threads=1) as pool:
            for case in cases:
                if case.ranks == ranks:
                    rows.append(verified(str(case), {"case": str(case), "ranks": ranks}, partial(case.verify, pool)))
    finish("verify_pipelines", rows)


if __name__ == "__main__":
    main()
