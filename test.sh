#!/usr/bin/env bash
# Install what the tests need into .venv, check the style, run the tests. Arguments go to pytest: ./test.sh -k resume, ./test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")"
./quickstart.sh --install
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
exec .venv/bin/python -m pytest -n 2 -m 'not gpu' "$@"
