#!/usr/bin/env python3
"""Times our gradient graphs against those of onnx-ad 0.3.0, side by side in ONNX Runtime, and how long each takes to make.

    cargo build --release && python3 benches/gradient_graphs.py [--rounds 15] [--threads 2] [--json]

Two models: an MLP of eight 768 × 768 layers (gradient of its input), and the 3-layer MiniLM sentence encoder of
scripts/fetch.py (gradients of its 18 linear weights, made inputs of the graph because onnx-ad differentiates nothing
else). Both gradient models compute the base's outputs as well and get the same seeds; their gradients have to agree.
Runs alternate, figures are medians. The packages go into a virtual environment in the cache.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "scripts"))
import program  # noqa: E402

PACKAGES = ["numpy==2.2.6", "onnx==1.23.2", "onnxruntime==1.31.1", "onnx-ad==0.3.0"]
AGREE = 1e-4


def environment():
    """The Python that has PACKAGES; made in the cache the first time."""
    cache = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fetch.py", "--where"], check=True, capture_output=True, text=True
    )
    home = Path(cache.stdout.strip()) / "bench-onnx-ad"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (home / "complete").touch()
    return python


def mlp(path):
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    nodes, weights, x = [], [], "x"
    for i in range(8):
        weights.append(numpy_helper.from_array((rng.standard_normal((768, 768)) / 28).astype("f4"), f"w{i}"))
        weights.append(numpy_helper.from_array(np.zeros(768, "f4"), f"b{i}"))
        nodes.append(helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], [f"h{i}"], name=f"fc{i}", transB=1))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"a{i}"]))
        x = f"a{i}"
    info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [128, 768])
    graph = helper.make_graph(nodes, "mlp", [info("x")], [info(x)], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return {"x": rng.standard_normal((128, 768)).astype("f4")}, ["x"]


def minilm(path):
    import numpy as np
    import onnx
    from onnx import helper

    where = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fetch.py", "minilm"], check=True, capture_output=True, text=True
    )
    found = [line for line in where.stdout.splitlines() if line.endswith("L3-v2.onnx")]
    model = onnx.load(found[0])
    graph = model.graph
    read = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    promoted = [t for t in graph.initializer if t.name in read]
    feeds = {}
    for tensor in promoted:
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        feeds[tensor.name] = onnx.numpy_helper.to_array(tensor)
        graph.initializer.remove(tensor)
    # One size for all: onnx-ad makes smaller graphs where shapes are known, and so do we.
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_value = (8, 64)[axis]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    onnx.save(model, path)
    rng = np.random.default_rng(2)
    for value in graph.input:
        if value.name not in feeds:
            high = 20000 if "ids" in value.name and "type" not in value.name else 1
            feeds[value.name] = rng.integers(0, high, (8, 64)) if high > 1 else np.ones((8, 64), "i8")
            if "type" in value.name:
                feeds[value.name] = np.zeros((8, 64), "i8")
            feeds[value.name] = feeds[value.name].astype("i8")
    return feeds, [t.name for t in promoted]


def compare(name, make, binary, rounds, threads, folder):
    import numpy as np
    import onnx
    import onnx_ad
    import onnxruntime as ort

    base, ours, theirs = (folder / f"{name}.{part}.onnx" for part in ("base", "ours", "theirs"))
    feeds, wrt = make(base)
    began = time.perf_counter()
    subprocess.run([binary, "grad", base, "-o", ours, *(word for name in wrt for word in ("--wrt", name))], check=True, stdout=subprocess.DEVNULL)
    made = [time.perf_counter() - began]
    began = time.perf_counter()
    adjoint = onnx_ad.reverse(onnx.load(base), inputs=wrt, layout="onnx")
    onnx.save(adjoint, theirs)
    made.append(time.perf_counter() - began)

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    load = lambda path: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    forward, sessions = load(base), [load(ours), load(theirs)]
    outputs = [o.name for o in forward.get_outputs() if "float" in o.type]
    rng = np.random.default_rng(3)
    values = forward.run(outputs, feeds)
    seeds = {o: rng.standard_normal(v.shape).astype("f4") for o, v in zip(outputs, values, strict=True)}
    runs = []
    for session, seed, gradient, last in [
        (sessions[0], "{}.seed", "{}.grad", False),
        (sessions[1], "adj_{}", "adj_{}", True),
    ]:
        fed = dict(feeds)
        fed.update({seed.format(o): v[..., None] if last else v for o, v in seeds.items()})
        runs.append((session, [gradient.format(w) for w in wrt], fed))
    results = [session.run(names, fed) for session, names, fed in runs]
    worst = 0.0
    for mine, other in zip(*results, strict=True):
        other = other.reshape(mine.shape)
        worst = max(worst, float(np.abs(mine - other).max() / max(np.abs(other).max(), 1e-12)))
    if not worst <= AGREE:
        raise SystemExit(f"{name}: the gradients differ by {worst:.1e}")
    times = [[], [], []]
    for _ in range(rounds):
        for place, (session, names, fed) in enumerate([*runs, (forward, outputs, feeds)]):
            began = time.perf_counter()
            session.run(names, fed)
            times[place].append(time.perf_counter() - began)
    ms = [statistics.median(t) * 1000 for t in times]
    return {
        "model": name,
        "forward_ms": ms[2],
        "ours_ms": ms[0],
        "onnx_ad_ms": ms[1],
        "ratio": ms[0] / ms[1],
        "ours_made_s": made[0],
        "onnx_ad_made_s": made[1],
        "ours_nodes": len(onnx.load(ours).graph.node),
        "onnx_ad_nodes": len(adjoint.graph.node),
        "worst_difference": worst,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout and nothing else there")
    args = parser.parse_args()
    try:
        import onnx_ad  # noqa: F401
    except ImportError:
        python = environment()
        os.execv(python, [python, __file__, *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            compare(name, make, program.found(args.bin), args.rounds, args.threads, Path(folder))
            for name, make in [("8 × (768 × 768) MLP, 128 rows", mlp), ("3-layer MiniLM, 8 × 64", minilm)]
        ]
    if args.json:
        print(json.dumps({"rows": rows}))
        return
    print("| model | forward, ms | ours, ms | onnx-ad, ms | ours / onnx-ad | made by us, s | by onnx-ad, s | nodes | of onnx-ad |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['model']} | {r['forward_ms']:.1f} | {r['ours_ms']:.1f} | {r['onnx_ad_ms']:.1f} | **{r['ratio']:.2f}** "
            f"| {r['ours_made_s']:.2f} | {r['onnx_ad_made_s']:.2f} | {r['ours_nodes']} | {r['onnx_ad_nodes']} |"
        )


if __name__ == "__main__":
    main()
