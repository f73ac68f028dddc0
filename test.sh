#!/usr/bin/env bash
# Install what the tests need into .venv, check the style, run the tests. Arguments go to pytest: ./test.sh -k resume, ./test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")"
./quickstart.sh --install
if ! cmp -s .venv/lock.txt .venv/tested.txt; then  # requirements-lock.txt, with the torch that quickstart.sh found
    .venv/bin/python -m pip install --disable-pip-version-check --quiet -r .venv/lock.txt
    cp .venv/lock.txt .venv/tested.txt
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
exec .venv/bin/python -m pytest -n 2 -m 'not gpu' "$@"
