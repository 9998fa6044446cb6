"""Writes the JSON schema of plan files to docs/plan.schema.json. A test holds the file equal to what this writes.

python scripts/plan_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path

from autopar.ir.plan import Plan

SCHEMA = Path(__file__).resolve().parent.parent / "docs" / "plan.schema.json"


def schema_text() -> str:
    return json.dumps(Plan.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), "utf-8")
    print(f"wrote {SCHEMA}")
