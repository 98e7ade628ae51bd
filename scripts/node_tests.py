#!/usr/bin/env python3
"""Generates the ONNX backend node tests, for the proof of the gradient rules, into the cache of scripts/fetch.py.

    scripts/node_tests.py [--quiet] [--where]
    scripts/node_tests.py --report      runs every case and writes docs/OPS.md and fixtures/node_tests/manifest.tsv anew

Each case is a folder: model.onnx and test_data_set_0/input_*.pb, as onnx's own `generate-data` lays them out. The
models come from package onnx, pinned here, installed with pip into a virtual environment that is removed afterwards.
The folder's path goes to stdout, everything else to stderr. Needs Python 3.10 or newer with venv and pip.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetch import Failure, cache_dir

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["onnx==1.23.2", "numpy==2.4.6" if sys.version_info >= (3, 11) else "numpy==2.2.6"]
RECIPE = 1  # to be raised with a change of GENERATE: what is in the cache is then made again
MARKER = "complete"

# Run by the environment's Python: the node tests alone, every one with tensors, sequences or optionals as inputs.
GENERATE = """
import pathlib, sys
import onnx
import onnx.backend.test.case.node as node
from onnx import numpy_helper as helper

root = pathlib.Path(sys.argv[1])
for case in node.collect_testcases():
    inputs, _ = case.data_sets[0]
    data = root / case.name / "test_data_set_0"
    data.mkdir(parents=True)
    (root / case.name / "model.onnx").write_bytes(case.model.SerializeToString())
    for i, (value, info) in enumerate(zip(inputs, case.model.graph.input)):
        if info.type.HasField("sequence_type"):
            value = helper.from_list(value, info.name)
        elif info.type.HasField("optional_type"):
            value = helper.from_optional(value, info.name)
        elif not isinstance(value, onnx.TensorProto):
            value = helper.from_array(value, info.name)
        (data / f"input_{i}.pb").write_bytes(value.SerializeToString())
"""


def run(command, what):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env.update(PIP_REQUIRE_VIRTUALENV="false", PIP_NO_COLOR="1")
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        raise Failure(f"{what} failed: {(said or ['nothing was said'])[-1].strip()[:300]}")


def generate(say):
    root = cache_dir() / f"node-tests-onnx-{PACKAGES[0].split('==')[1]}-{RECIPE}"
    if (root / MARKER).is_file():
        say(f"{root}: here already")
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".node-tests-", dir=root.parent))
    try:
        say(f"{' '.join(PACKAGES)}: installing")
        venv.create(work / "venv", with_pip=True)
        python = str(work / "venv" / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        run([*pip, *PACKAGES], "pip install")
        say("writing the cases")
        run([python, "-I", "-W", "ignore", "-c", GENERATE, str(work / "cases")], "generating the cases")
        (work / "cases" / MARKER).touch()
        if root.exists():
            shutil.rmtree(root)
        os.rename(work / "cases", root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{root}: {sum(1 for p in root.iterdir() if p.is_dir())} cases")
    return root


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="only the path and errors")
    parser.add_argument("--where", action="store_true", help="print where the cases are or would be; do nothing")
    parser.add_argument("--report", action="store_true", help="run every case, write the table and the manifest anew")
    args = parser.parse_args()
    say = (lambda line: None) if args.quiet else (lambda line: print(f"node_tests: {line}", file=sys.stderr, flush=True))
    if args.where:
        print(cache_dir() / f"node-tests-onnx-{PACKAGES[0].split('==')[1]}-{RECIPE}")
        return 0
    try:
        root = generate(say)
        print(root, flush=True)
        if args.report:
            env = dict(os.environ, BONE_ONNX_NODE_TESTS=str(root), BONE_ONNX_NODE_TESTS_REPORT="1")
            command = ["cargo", "test", "--release", "--test", "node_tests", "--", "--nocapture"]
            return subprocess.run(command, cwd=ROOT, env=env).returncode
    except (Failure, OSError) as error:
        print(f"node_tests.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
