"""Runs rows of the zoo and writes docs/models.md.

    python -m zoo                   # all rows, and the page
    python -m zoo llama t5          # these rows, to the terminal
    python -m zoo --only besides    # one of the two tables

A line a plan goes to stderr while it runs. The exit code is 1 if a row of the first table is not right in every column.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers

from autopar.runtime.verification.launch import RankPool
from zoo import BESIDES, MODELS
from zoo.page import line, replaced, summary, table
from zoo.run import Found, Trial, run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
TABLES = {"models": MODELS, "besides": BESIDES}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="rows by name; without, all, and the page is written")
    parser.add_argument("--only", choices=list(TABLES), help="one of the tables")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS | BESIDES]:
        parser.error(f"no row is called {', '.join(unknown)}; rows: {', '.join(MODELS | BESIDES)}")
    return options


def tell(name: str, trial: Trial) -> None:
    first = trial.error.splitlines()[0] if trial.error else f"{trial.worst:.1e}, one rank does {trial.share:.0%}"
    verdict = "ok" if trial.ok else "NOT OK"
    print(f"{name:16} {trial.way.title:18}{verdict:8}{first}  ({trial.seconds:.1f} s)", file=sys.stderr, flush=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning)
    page = PAGE.read_text("utf-8")
    wrong = False
    with RankPool(2, threads=1) as two, RankPool(4, threads=1) as four:
        pools = {2: two, 4: four}
        for title, rows in TABLES.items():
            chosen = [row for name, row in rows.items() if (not options.models or name in options.models) and options.only in (None, title)]
            if not chosen:
                continue
            started = time.perf_counter()
            found: list[Found] = []
            print(table([]), end="", flush=True)
            for row in chosen:
                found.append(run(row, pools.__getitem__, tell=partial(tell, row.name)))
                print(line(found[-1]), flush=True)
            told = summary(found, time.perf_counter() - started)
            print(f"\n{told}")
            wrong |= title == "models" and not all(item.ok for item in found)
            page = replaced(page, title, f"{told}\n{table(found)}")
    if not options.models:
        PAGE.write_text(page, "utf-8")
        print(f"wrote {PAGE.name}", file=sys.stderr)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
