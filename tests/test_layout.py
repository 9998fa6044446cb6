"""The documentation knows every file, every public name and the present plan format, and the repository names no machine or host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import autopar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import generate_docs  # noqa: E402

TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yml", ".json", ".sh", ""}
# Hosts that the repository may name: documentation, papers, code. No package index: where packages come from is pip's own business.
HOSTS = {
    "arxiv.org", "docs.pytorch.org", "pytorch.org", "github.com", "json-schema.org", "docs.nvidia.com", "www.w3.org", "127.0.0.1",
    "localhost",
}  # fmt: skip
URL = re.compile(r"https?://([\w.-]+)")
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:root|home|work|Users|opt)/\w")


def package_files() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "autopar").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
    )


def repository_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file() and path.suffix in TEXT_SUFFIXES]


def test_layout_lists_every_file_and_no_other() -> None:
    listed = set(re.findall(r"`(autopar/[\w/]+\.py)`", (ROOT / "docs/layout.md").read_text("utf-8")))
    assert sorted(set(package_files()) - listed) == [], "docs/layout.md does not list these files"
    assert sorted(name for name in listed if not (ROOT / name).exists()) == [], "docs/layout.md lists files that are gone"


@pytest.mark.parametrize("name", autopar.__all__)
def test_public_name_is_documented(name: str) -> None:
    assert f"`autopar.{name}" in (ROOT / "docs/api.md").read_text("utf-8"), f"docs/api.md does not mention autopar.{name}"
    assert (getattr(autopar, name).__doc__ or "").strip(), f"autopar.{name} has no docstring"


def test_every_error_is_documented() -> None:
    errors = re.findall(r"^class (\w+)", (ROOT / "autopar/errors.py").read_text("utf-8"), re.MULTILINE)
    page = (ROOT / "docs/api.md").read_text("utf-8")
    assert [name for name in errors if name not in page] == []


def test_generated_parts_are_current() -> None:
    for path, text in generate_docs.current_texts().items():
        assert path.read_text("utf-8") == text, f"{path.name}: run python scripts/generate_docs.py"


def test_plan_format_names_every_field() -> None:
    page = (ROOT / "docs/plan-format.md").read_text("utf-8").split("## JSON schema")[0]
    schema = autopar.Plan.model_json_schema()
    fields = {name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", {})}
    # The rows of `alternatives` repeat the names of other tables.
    assert sorted(name for name in fields if f"`{name}`" not in page and name != "why") == []


def test_repository_names_no_machine_and_no_host() -> None:
    found = []
    for path in repository_files():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            hosts = {host for host in URL.findall(line) if host not in HOSTS and not host.endswith(".example")}
            if hosts or MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
