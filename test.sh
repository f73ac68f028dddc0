#!/usr/bin/env bash
# Install what the tests need into .venv, then run them. Arguments go to pytest: ./test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")"
./quickstart.sh --install
exec .venv/bin/python -m pytest -n 2 "$@"
