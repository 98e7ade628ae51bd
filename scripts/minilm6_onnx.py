#!/usr/bin/env python3
"""Builds all-MiniLM-L6-v2.onnx, the six-layer sentence encoder that the benches train.

    scripts/minilm6_onnx.py [--out FILE] [--quiet]

No registry ships this model as ONNX, so its published weights (scripts/fetch.py minilm6) are put into the graph that
torch.onnx's TorchScript exporter writes for a BertModel: opset 17, weights transposed as onnx::MatMul_N, biases under
their module path, exact GELU as Div/Erf/Add/Mul/Mul. Inputs input_ids and attention_mask, i64 [batch_size,
sequence_length], output last_hidden_state; no pooler. The default place is the cache, beside the weights; the
file's SHA-256 is pinned, and a good one is left alone. onnx and numpy come from a virtual environment that is
thrown away afterwards; the path goes to stdout.
"""

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import fetch

REQUIRES = ("onnx==1.23.2", "numpy>=1.23")
SHA256 = "6d07ddfe7aafec68bfbae50f7aa3baee161618d88230ec5562087f6469c88edc"
LAYERS, HIDDEN, HEADS, EPS = 6, 384, 12, 1e-12


def read_safetensors(path):
    import numpy as np

    data = np.memmap(path, dtype=np.uint8, mode="r")
    size = struct.unpack("<Q", data[:8].tobytes())[0]
    header = json.loads(data[8 : 8 + size].tobytes())
    types = {"F32": np.float32, "I64": np.int64}
    tensors = {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + at for at in info["data_offsets"])
            tensors[name] = data[begin:end].view(types[info["dtype"]]).reshape(info["shape"])
    return tensors


class Exporter:
    """Names nodes and values as torch.onnx does: /module/path/Op, /module/path/Op_1, …, value = node + _output_0."""

    def __init__(self, weights):
        self.weights = weights
        self.nodes, self.initializers, self.used, self.matmuls = [], {}, {}, 0

    def op(self, kind, scope, inputs, output=None, **attributes):
        from onnx import helper

        count = self.used.get((scope, kind), 0)
        self.used[scope, kind] = count + 1
        name = f"{scope}/{kind}" + (f"_{count}" if count else "")
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))
        return output

    def const(self, scope, value, dtype="int64"):
        import numpy as np
        from onnx import numpy_helper

        return self.op("Constant", scope, [], value=numpy_helper.from_array(np.array(value, dtype)))

    def param(self, name, value=None, save_as=None):
        save_as = save_as or name
        if save_as not in self.initializers:
            import numpy as np

            self.initializers[save_as] = np.ascontiguousarray(self.weights[name] if value is None else value)
        return save_as

    def dim(self, scope, value, axis):
        shape = self.op("Shape", scope, [value])
        return self.op("Gather", scope, [shape, self.const(scope, axis)], axis=0)

    def linear(self, module, x):
        scope = "/" + module.replace(".layer.", "/layer@").replace(".", "/").replace("@", ".")
        weight = f"onnx::MatMul_{700 + self.matmuls}"
        self.matmuls += 1
        self.param(f"{module}.weight", self.weights[f"{module}.weight"].T, weight)
        y = self.op("MatMul", scope, [x, weight])
        return self.op("Add", scope, [self.param(f"{module}.bias"), y])

    def layer_norm(self, module, x, output=None):
        scope = "/" + module.replace(".layer.", "/layer@").replace(".", "/").replace("@", ".")
        inputs = [x, self.param(f"{module}.weight"), self.param(f"{module}.bias")]
        return self.op("LayerNormalization", scope, inputs, output, axis=-1, epsilon=EPS)


def embeddings(g):
    scope = "/embeddings"
    batch, seq = g.dim("", "input_ids", 0), g.dim("", "input_ids", 1)
    unsqueezed = [g.op("Unsqueeze", "", [d, g.const("", [0])]) for d in (batch, seq)]
    shape = g.op("Concat", "", unsqueezed, axis=0)
    types = g.op("Expand", "", [g.const("", [[0]]), shape])

    mask = g.op("Unsqueeze", "", ["attention_mask", g.const("", [1])])
    mask = g.op("Unsqueeze", "", [mask, g.const("", [2])])
    mask = g.op("Cast", "", [mask], to=1)
    mask = g.op("Sub", "", [g.const("", 1.0, "float32"), mask])
    mask = g.op("Mul", "", [mask, g.const("", -3.4028234663852886e38, "float32")])

    ids = g.param("embeddings.position_ids")
    positions = g.op("Slice", scope, [ids, g.const(scope, [0]), unsqueezed[1], g.const(scope, [1]), g.const(scope, [1])])
    table = lambda kind: g.param(f"embeddings.{kind}.weight")
    words = g.op("Gather", f"{scope}/word_embeddings", [table("word_embeddings"), "input_ids"])
    kinds = g.op("Gather", f"{scope}/token_type_embeddings", [table("token_type_embeddings"), types])
    x = g.op("Add", scope, [words, kinds])
    places = g.op("Gather", f"{scope}/position_embeddings", [table("position_embeddings"), positions])
    return g.layer_norm("embeddings.LayerNorm", g.op("Add", scope, [x, places])), mask


def attention(g, layer, x, mask):
    scope = f"/encoder/layer.{layer}/attention/self"

    def heads(name, perm):
        y = g.linear(f"encoder.layer.{layer}.attention.self.{name}", x)
        dims = [g.op("Unsqueeze", scope, [g.dim(scope, y, axis), g.const(scope, [0])]) for axis in (0, 1)]
        sizes = [g.const(scope, [HEADS]), g.const(scope, [HIDDEN // HEADS])]
        y = g.op("Reshape", scope, [y, g.op("Concat", scope, dims + sizes, axis=0)], allowzero=0)
        return g.op("Transpose", scope, [y], perm=perm)

    query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
    scores = g.op("MatMul", scope, [query, key])
    scores = g.op("Div", scope, [scores, g.const(scope, math.sqrt(HIDDEN // HEADS), "float32")])
    scores = g.op("Softmax", scope, [g.op("Add", scope, [scores, mask])], axis=-1)
    y = g.op("Transpose", scope, [g.op("MatMul", scope, [scores, value])], perm=[0, 2, 1, 3])
    dims = [g.op("Unsqueeze", scope, [g.dim(scope, y, axis), g.const(scope, [0])]) for axis in (0, 1)]
    y = g.op("Reshape", scope, [y, g.op("Concat", scope, dims + [g.const(scope, [HIDDEN])], axis=0)], allowzero=0)
    return residual(g, f"encoder.layer.{layer}.attention.output", y, x)


def residual(g, module, y, x, output=None):
    scope = "/" + module.replace(".layer.", "/layer@").replace(".", "/").replace("@", ".")
    y = g.op("Add", scope, [g.linear(f"{module}.dense", y), x])
    return g.layer_norm(f"{module}.LayerNorm", y, output)


def gelu(g, scope, x):
    y = g.op("Erf", scope, [g.op("Div", scope, [x, g.const(scope, math.sqrt(2), "float32")])])
    y = g.op("Add", scope, [y, g.const(scope, 1.0, "float32")])
    return g.op("Mul", scope, [g.op("Mul", scope, [x, y]), g.const(scope, 0.5, "float32")])


def build(weights, path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    g = Exporter(weights)
    x, mask = embeddings(g)
    for layer in range(LAYERS):
        x = attention(g, layer, x, mask)
        y = g.linear(f"encoder.layer.{layer}.intermediate.dense", x)
        y = gelu(g, f"/encoder/layer.{layer}/intermediate/intermediate_act_fn", y)
        x = residual(g, f"encoder.layer.{layer}.output", y, x, "last_hidden_state" if layer == LAYERS - 1 else None)

    dims = ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        g.nodes,
        "main_graph",
        [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*dims, HIDDEN])],
        [numpy_helper.from_array(value, name) for name, value in g.initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.producer_name, model.producer_version = "bone-onnx scripts/minilm6_onnx.py", "1"
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def build_in_throwaway_venv(weights, path, say):
    try:
        import onnx

        if onnx.__version__ == REQUIRES[0].partition("==")[2]:
            return build(read_safetensors(weights), path)
    except ImportError:
        pass
    with tempfile.TemporaryDirectory(prefix=".venv-", dir=path.parent) as folder:
        say(f"{' '.join(REQUIRES)}: installing into a throw-away virtual environment")
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        done = subprocess.run([*pip, *REQUIRES], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            errors = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
            raise fetch.Failure(f"cannot install {' '.join(REQUIRES)}; pip said: {(errors or ['nothing'])[0]}")
        subprocess.run([python, __file__, "--build", str(weights), str(path)], check=True, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: models/all-MiniLM-L6-v2.onnx in the cache")
    parser.add_argument("--quiet", action="store_true", help="only the path and errors")
    parser.add_argument("--build", nargs=2, type=Path, help=argparse.SUPPRESS)  # how it calls itself in the venv
    args = parser.parse_args()
    if args.build:
        return build(read_safetensors(args.build[0]), args.build[1])
    say = (lambda line: None) if args.quiet else (lambda line: print(f"minilm6: {line}", file=sys.stderr, flush=True))
    out = (args.out or fetch.cache_dir() / "models" / "all-MiniLM-L6-v2.onnx").absolute()
    try:
        if out.is_file() and fetch.sha256_file(out) == SHA256:
            say(f"{out}: here already, verified")
        else:
            (weights,) = fetch.fetch(["minilm6"], say)
            out.parent.mkdir(parents=True, exist_ok=True)
            temp = out.with_name(f".{out.name}.{os.getpid()}")
            try:
                build_in_throwaway_venv(weights, temp, say)
                found = fetch.sha256_file(temp)
                if found != SHA256:
                    raise fetch.Failure(f"built a file with SHA-256 {found}, expected {SHA256}; not used")
                os.replace(temp, out)
            finally:
                temp.unlink(missing_ok=True)
    except (fetch.Failure, OSError, subprocess.CalledProcessError) as error:
        print(f"minilm6_onnx.py: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
