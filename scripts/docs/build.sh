#!/usr/bin/env bash
# Build the pages of this folder into scripts/docs/_build/html. Warnings are errors.
#
# Needs `pip install '.[docs]'`; PYTHON names another interpreter than python.
set -euo pipefail
cd "$(dirname "$0")/../.."

rm -rf scripts/docs/_build scripts/docs/api
"${PYTHON:-python}" -m sphinx --nitpicky --fail-on-warning --quiet scripts/docs scripts/docs/_build/html
echo "written: scripts/docs/_build/html/index.html"
