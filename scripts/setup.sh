#!/usr/bin/env bash
# Makes the environment in .venv: torch first and alone, by the exact pin of constraints.txt; then autopar and what it and its tests
# need, at the versions of constraints.txt. `make` calls this when .venv/.installed is missing or older than the pins; running it
# again is harmless. Nothing that pip says is hidden: where the network is at fault, the last lines are pip's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(python3 python3.11 python3.12 python3.13 python3.14 python); fi
python=""
for candidate in "${candidates[@]}"; do
  if new_enough "$candidate"; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "autopar needs Python 3.11 or newer. Tried:" >&2
  for candidate in "${candidates[@]}"; do
    echo "  $candidate: $("$candidate" --version 2>&1 || true)" >&2
  done
  echo "Install one, or name one: make setup PYTHON=/path/to/python3.11" >&2
  exit 1
fi

if ! new_enough .venv/bin/python || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  echo "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

torch="$(grep -E '^torch==' constraints.txt)"
echo "installing $torch (some minutes, once)"
install "$torch"
echo "installing autopar and the rest"
install -c constraints.txt setuptools
install -c constraints.txt --no-build-isolation -e '.[dev]'
.venv/bin/python -m autopar.search.solver.warm || echo "could not compile the search's loops ahead; the first search will" >&2
touch .venv/.installed
