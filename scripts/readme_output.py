"""Runs the commands in README.md's console blocks and writes what they print below them. A test holds the page equal to that.

    python scripts/readme_output.py

In a block, a line `$ command` is run, in one folder for the whole page; the lines below it are its output. Where the page has `...`, any
number of lines is left out, up to the line that follows it in the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"(^```console\n)(.*?)(^```)", re.MULTILINE | re.DOTALL)


def run(command: str, folder: str) -> list[str]:
    """Lines that `command` writes to its standard output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != (1 if command.startswith("autopar diff") else 0):
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return [line.rstrip() for line in done.stdout.rstrip().splitlines()]


def shortened(lines: list[str], before: list[str]) -> list[str]:
    """`lines`, with as much left out as in `before`: its `...` stands for all up to the line whose first word follows there."""
    if "..." not in before:
        return lines
    cut = before.index("...")
    head, rest = lines[:cut], lines[cut:]
    if cut + 1 == len(before):
        return [*head, "..."]
    word = before[cut + 1].split()[0]
    found = next((i for i, line in enumerate(rest) if line.split()[:1] == [word]), 0)
    return [*head, "...", *shortened(rest[found:], before[cut + 1 :])]


def current_text() -> str:
    """README.md as it should be."""
    with tempfile.TemporaryDirectory() as folder:

        def block(match: re.Match[str]) -> str:
            parts = re.split(r"^\$ (.*)\n", match[2], flags=re.MULTILINE)
            text = parts[0]
            for command, output in zip(parts[1::2], parts[2::2], strict=True):
                found = shortened(run(command, folder), output.rstrip().splitlines())
                text += f"$ {command}\n" + "".join(f"{line}\n" for line in found)
            return match[1] + text + match[3]

        return _BLOCK.sub(block, README.read_text("utf-8"))


if __name__ == "__main__":
    README.write_text(current_text(), "utf-8")
    print(f"wrote {README}")
