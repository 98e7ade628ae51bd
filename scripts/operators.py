#!/usr/bin/env python3
"""Writes fixtures/operators/operators.tsv: every operator of ONNX's default domain and of ai.onnx.ml, by its schemas.

    scripts/operators.py

Columns: domain, operator, the operator sets that defined it anew, the one that deprecated it ("-": none), and whether
some version takes and gives floating-point tensors. The schemas come from package onnx, pinned here, installed with
pip into a virtual environment that is removed afterwards. Needs Python 3.10 or newer with venv and pip.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.dont_write_bytecode = True
PACKAGE = "onnx==1.23.2"
OUT = Path(__file__).resolve().parent.parent / "fixtures/operators/operators.tsv"

LIST = """
from onnx import defs
FLOATS = ("tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)")
schemas = {}
for schema in defs.get_all_schemas_with_history():
    if schema.domain in ("", "ai.onnx.ml"):
        schemas.setdefault((schema.domain, schema.name), []).append(schema)
for (domain, name), versions in sorted(schemas.items()):
    versions.sort(key=lambda schema: schema.since_version)
    types = lambda values: {t for value in values for t in value.types}
    floats = any(types(v.inputs).intersection(FLOATS) and types(v.outputs).intersection(FLOATS) for v in versions)
    since = ",".join(str(v.since_version) for v in versions if not v.deprecated)
    gone = next((str(v.since_version) for v in versions if v.deprecated), "-")
    print(domain or "ai.onnx", name, since, gone, "float" if floats else "-", sep="\\t")
"""

with tempfile.TemporaryDirectory() as folder:
    venv.create(folder, with_pip=True)
    python = str(Path(folder) / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    table = subprocess.run([python, "-c", LIST], check=True, stdout=subprocess.PIPE, text=True).stdout
OUT.parent.mkdir(parents=True, exist_ok=True)
OUT.write_text(table)
print(f"{len(table.splitlines())} operators in {OUT}", file=sys.stderr)
