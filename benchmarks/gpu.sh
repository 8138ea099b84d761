#!/usr/bin/env bash
# Builds nitp_ops on a machine with a GPU, without a network, and runs stages there. docs/gpu.md says how.
#
#   benchmarks/gpu.sh build|test|sanitize|large|bench-rows|bench-token|bench-latent|all [STAGE...]
#       [--out DIR] [--commit ID] [--wheels DIR] [--python PATH]
#   benchmarks/gpu.sh short --budget-s S --bundle-mib M [--bundle DIR] [--out DIR] [--commit ID] [--python PATH]
#                                     what is worth most within S seconds, without an installation; --help says more
#   benchmarks/gpu.sh bundle --bundle-mib M --out DIR     peers and library for it, in parts of M MiB (no GPU needed)
#   benchmarks/gpu.sh collect DIR     adds the JSON files that came back in DIR to benchmarks/results (no GPU needed)
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3 wheels="" arguments=()
while (($#)); do
  case $1 in
    --wheels | --python | --out | --commit | --bundle | --bundle-mib | --budget-s)
      if (($# < 2)); then
        echo "benchmarks/gpu.sh: $1 needs a value" >&2
        exit 2
      fi
      ;;&
    --wheels) wheels=$2 && shift 2 ;;
    --python) python=$2 && shift 2 ;;
    --out | --commit | --bundle | --bundle-mib | --budget-s) arguments+=("$1" "$2") && shift 2 ;;
    *) arguments+=("$1") && shift ;;
  esac
done
if ((${#arguments[@]} == 0)); then
  sed -n '2,9s/^# \{0,1\}//p' benchmarks/gpu.sh >&2
  exit 2
fi
case ${arguments[0]} in
  collect) exec "$python" -m benchmarks.gpu.run_report "${arguments[@]:1}" ;;
  short | bundle) exec "$python" -m "benchmarks.gpu.${arguments[0]}" "${arguments[@]:1}" ;;
esac
"$python" - "${arguments[@]}" <<'CHECK'  # before minutes go into a build
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no GPU (torch.cuda.is_available() is False)")
CHECK

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [[ -n $wheels ]]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch" "$wheels"/*.whl
  export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
"$python" -m benchmarks.gpu.stages "${arguments[@]}"
