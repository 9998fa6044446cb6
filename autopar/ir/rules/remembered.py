"""What discovery found before: in this process, and in files of the user's cache directory, one an operator with its arguments.

A file is a hint, not a fact: what it says is checked again before it is used. A damaged, foreign or unwritable cache is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from autopar.errors import RuleError
from autopar.ir.rules import notation
from autopar.ir.rules.given import FOUND, GivenRule, read_split

DIRECTORY = "AUTOPAR_CACHE_DIR"
"""Environment variable that names another directory than `~/.cache/autopar`; empty: no files."""

_MOST_BYTES = 1 << 16

_KNOWN: dict[str, GivenRule] = {}


def directory() -> Path | None:
    """Where findings are kept; None where they are not."""
    named = os.environ.get(DIRECTORY)
    if named is not None:
        return Path(named) / "rules" if named else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "autopar" / "rules" if os.path.isabs(base) else None


def known(key: str) -> GivenRule | None:
    """What this process found, or has checked, under `key`."""
    return _KNOWN.get(key)


def keep(key: str, rule: GivenRule) -> None:
    """Remember `rule` in this process and, if that can be, in a file."""
    _KNOWN[key] = rule
    folder = directory()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".rule", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, **asdict(rule)}, file, indent=1)
            os.replace(temporary, folder / _name(key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def filed(key: str) -> GivenRule | None:
    """What a file says of `key`; to be checked before it is used."""
    folder = directory()
    return None if folder is None else _read(folder / _name(key), key)


def all_filed() -> Iterator[GivenRule]:
    """Every rule that a sound file holds, by form."""
    folder = directory()
    with contextlib.suppress(OSError):
        found = [_read(path, None) for path in (sorted(folder.glob("*.json")) if folder is not None else ())]
        yield from sorted((rule for rule in found if rule is not None), key=lambda rule: (rule.target, rule.form))


def _name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read(path: Path, key: str | None) -> GivenRule | None:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        data = json.loads(path.read_text("utf-8"))
        if key is not None and data["key"] != key:
            return None
        texts = {name: data[name] for name in ("target", "form", "notation", "uneven", "why")}
        lines, linear, checks = tuple(data["splits"]), tuple(tuple(item) for item in data["linear"]), data["checks"]
        numbers = [checks, *(number for item in linear for number in item)]
        if not all(isinstance(item, str) for item in (*texts.values(), *lines)) or not all(type(item) is int for item in numbers):
            return None
        if texts["notation"]:
            notation.read(texts["notation"])
        for line in lines:
            read_split(line)
        return GivenRule(**texts, linear=linear, splits=lines, origin=FOUND, checks=checks)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, RuleError):
        return None
