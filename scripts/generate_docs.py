"""Writes the parts of the documentation that are made from the code. A test holds the files equal to what this writes.

    python scripts/generate_docs.py

A part stands in its page between `<!-- begin NAME -->` and `<!-- end -->`. The JSON schema of plan files is a file of its own.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import autopar.errors
from autopar.ir.cluster import DEVICES, LINKS
from autopar.ir.plan import Plan

DOCS = Path(__file__).resolve().parent.parent / "docs"


def devices() -> str:
    head = "| device | memory | bfloat16 | float32 | bandwidth | efficiency (flops, bandwidth) | launch |\n|---|---|---|---|---|---|---|\n"
    rows = []
    for key, device in DEVICES.items():
        flops = dict(device.flops_per_s)
        rates = " | ".join(f"{flops[dtype] / 1e12:g} Tflop/s" for dtype in ("bfloat16", "float32"))
        efficiency = f"{device.flops_efficiency:g}, {device.bandwidth_efficiency:g}"
        rows.append(
            f"| `{key}` | {device.memory_bytes / 1e9:.4g} GB | {rates} | {device.memory_bytes_per_s / 1e9:g} GB/s | {efficiency} "
            f"| {device.launch_s * 1e6:g} us |\n"
        )
    return head + "".join(rows)


def links() -> str:
    head = "| link | latency a hop | bytes per second and direction |\n|---|---|---|\n"
    return head + "".join(f"| `{key}` | {link.latency_s * 1e6:g} us | {link.bytes_per_s / 1e9:g} GB/s |\n" for key, link in LINKS.items())


def errors() -> str:
    tree = re.search(r"^    AutoparError\n(?:    \S.*\n)+", autopar.errors.__doc__ or "", re.MULTILINE)
    assert tree, "autopar/errors.py: the docstring has no tree"
    return f"```text\n{textwrap.dedent(tree[0])}```\n"


PARTS: dict[str, Callable[[], str]] = {"devices": devices, "links": links, "errors": errors}
_PART = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def current_texts() -> dict[Path, str]:
    """Every file with generated parts, as it should be."""
    found = {DOCS / "plan.schema.json": json.dumps(Plan.model_json_schema(), indent=2) + "\n"}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text("utf-8")
        if _PART.search(text):
            found[path] = _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]()}\n{part[3]}", text)
    return found


if __name__ == "__main__":
    for path, text in current_texts().items():
        path.write_text(text, "utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
