#!/usr/bin/env bash
# Runs every bench and adds dated rows to benches/RESULTS.md. Leave the machine alone meanwhile (about 6 minutes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BONE_ONNX_CACHE=$(python3 scripts/fetch.py --where)
export BONE_ONNX_CACHE BONE_ONNX_RECORD=1
ORT_DYLIB_PATH=${ORT_DYLIB_PATH:-$(python3 scripts/fetch.py onnxruntime)}
export ORT_DYLIB_PATH
if [[ ! -e $BONE_ONNX_CACHE/models/all-MiniLM-L6-v2.onnx ]]; then
    python3 scripts/fetch.py minilm6
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet onnx==1.23.2
    "$venv/bin/python" scripts/minilm6_onnx.py
fi
cargo build --release
cargo bench --bench step
python3 benches/whole_process.py "$@"
