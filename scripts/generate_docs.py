"""Writes the parts of the documentation that are made from the code. A test holds the files equal to what this writes.

    python scripts/generate_docs.py

A part stands in its page between `<!-- begin NAME -->` and `<!-- end -->`. The JSON schema of plan files is a file of its own.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import autopar.errors
from autopar.ir.cluster import DEVICES, LINKS
from autopar.ir.plan import Plan

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"


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
    head = "| link | start | latency a hop | bytes per second and direction |\n|---|---|---|---|\n"
    rows = (
        f"| `{key}` | {link.start_s * 1e6:g} us | {link.latency_s * 1e6:g} us | {link.bytes_per_s / 1e9:g} GB/s |\n"
        for key, link in LINKS.items()
    )
    return head + "".join(rows)


def errors() -> str:
    tree = re.search(r"^    AutoparError\n(?:    \S.*\n)+", autopar.errors.__doc__ or "", re.MULTILINE)
    assert tree, "autopar/errors.py: the docstring has no tree"
    return f"```text\n{textwrap.dedent(tree[0])}```\n"


# Files in the order in which a model passes through them; those that are not named here follow in the order of the alphabet.
PROCESSING_ORDER = {
    "autopar": "api cli errors",
    "autopar/ir": (
        "graph placement text experts fold conversion cluster precision plan plan_json plan_check plan_stages assignment folded_names "
        "plan_roles plan_digest plan_text units"
    ),
    "autopar/ir/tracing": (
        "sources trace leaf_modules trace_leaves trace_export trace_repeats trace_lower trace_expand trace_assemble trace_precision "
        "trace_errors library_patches own_backward canonical canonical_losses canonical_bags canonical_rows canonical_masks "
        "canonical_experts rewriter reshard_points modes"
    ),
    "autopar/ir/pipelining": "microbatch microbatch_ways microbatch_write stages schedules schedule_zbv schedule_check",
    "autopar/ir/rules": (
        "split notation nest table given register neighbours local_args local_context operators expert_operators samples pieces check "
        "complete discover trial remembered"
    ),
    "autopar/ir/rules/families": "common pointwise views cuts reductions contractions recurrent indexing losses experts",
    "autopar/search": (
        "planner flat ways accumulate choose meshes structure strategies pins baselines follow build recompute account describe remedies "
        "alternatives"
    ),
    "autopar/search/prices": "work experts liveness regions optimizers collectives sequence costs segments",
    "autopar/search/solver": (
        "problem check problem_file judge solve rounding reduce steps chain eliminate least_sums powers minimise marginals memory "
        "local incumbent exact over_time last_resort shrink shrinking interned rows contract tighten dominated series parts timed "
        "arrays compiled warm trees messages reduced_costs dual evaluate forest cuts moves possible pairs hurry walker residual "
        "finish"
    ),
    "autopar/search/stages": (
        "propose guess short stage_prices profile stage_search stage_costs stage_space stage_form stage_bounds stage_improve "
        "stage_workload pipeline alike place"
    ),
    "autopar/search/simulator": "workload flows timeline simulate quick predict",
    "autopar/runtime": (
        "build handshake process_mesh lower convert collectives module distributed one_device microbatches inputs precision parameters "
        "gather gradients recompute deferred evaluation sampler loss last_words"
    ),
    "autopar/runtime/operators": (
        "local_ops local_classes local_reduce attention_blocks zigzag ring_attention experts experts_even dropout alike leaf"
    ),
    "autopar/runtime/pipelining": "pipeline pipeline_stage pipeline_schedule pipeline_wire pipeline_transfer pipeline_tied",
    "autopar/runtime/state": "materialize initialise shards strided_shards checkpoint parts parts_checkpoint clip",
    "autopar/runtime/verification": "verify verify_runs verify_report one_dtype launch rank_process",
    "autopar/report": (
        "show explain explain_stage diff diff_stages validate simulate timeline chrome_trace schedule_svg compare clusters rules progress "
        "terminal"
    ),
}


def files(folder: str) -> str:
    """A table of the Python files in `folder`: each with the first sentence of its docstring."""
    names = PROCESSING_ORDER[folder].split()
    found = {path.stem: path for path in sorted((REPOSITORY / folder).glob("*.py")) if path.stem not in ("__init__", "__main__")}
    rows = []
    for stem in [*(name for name in names if name in found), *(stem for stem in found if stem not in names)]:
        docstring = ast.get_docstring(ast.parse(found[stem].read_text("utf-8"))) or ""
        assert docstring, f"{found[stem]} has no docstring"
        sentence = re.split(r"(?<=\.)\s+(?=[A-Z`])|\n\n", docstring)[0].replace("\n", " ").replace("|", "\\|").rstrip(":")
        rows.append(f"| `{folder}/{stem}.py` | {sentence} |\n")
    return "| file | what it is |\n|---|---|\n" + "".join(rows)


PARTS: dict[str, Callable[[], str]] = {"devices": devices, "links": links, "errors": errors}
PARTS |= {folder: partial(files, folder) for folder in PROCESSING_ORDER}
_PART = re.compile(r"(<!-- begin ([\w/]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


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
        print(f"wrote {path.relative_to(REPOSITORY)}")
