#!/usr/bin/env python3
"""Times whole commands on models of 6 GB (external data) and 1.9 GB (one file) against `cp`, `onnx` and `onnx_ir`.

    cargo build --release && python3 benches/large_models.py [--runs 3] [--only external|single] [--no-write]

The models are Llama-shaped: an embedding, layers of q, k, v, o, gate, up and down projections, lm_head; all of their
linear layers are folded. Measured as in whole_process.py: runs in turn, medians, the input in the page cache, files
synced between runs outside the clock, memory from runs of its own. The rivals do the same in Python, in a virtual
environment of their own: `onnx` loads, adds with NumPy and saves; `onnx_ir` does it tensor by tensor while it saves.
Needs 30 GB of disk and 16 GB of memory. Linux, Python 3.8; pip for the rivals (--no-rivals does without).
"""

import argparse
import datetime
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import whole_process as bench  # and with it the path to program
import program
from whole_process import ROOT, block, megabytes, node, number, say, varint

RANK = 64
RIVALS = ["onnx==1.23.2", "onnx-ir==1.1.0", "numpy"]
TITLE = "## Large models (`benches/large_models.py`)"
BEGIN, END = "<!-- large_models: begin -->", "<!-- large_models: end -->"
HEADER = (
    "| date | CPU | model | command | seconds, median (min–max) | against cp | against cp + fsync | peak RSS | peak anonymous |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


# ---- the models ----


class Shape:
    def __init__(self, hidden, inner, layers, vocabulary):
        self.hidden, self.inner, self.layers, self.vocabulary = hidden, inner, layers, vocabulary

    def weights(self):
        """(name, rows, columns) of every matrix, as `x · W` has it."""
        h, i = self.hidden, self.inner
        yield "model.embed_tokens.weight", self.vocabulary, h
        for layer in range(self.layers):
            for part, name, rows, columns in (
                ("self_attn", "q_proj", h, h), ("self_attn", "k_proj", h, h), ("self_attn", "v_proj", h, h),
                ("self_attn", "o_proj", h, h), ("mlp", "gate_proj", h, i), ("mlp", "up_proj", h, i), ("mlp", "down_proj", i, h),
            ):
                yield f"model.layers.{layer}.{part}.{name}.weight", rows, columns
        yield "lm_head.weight", h, self.vocabulary

    def nodes(self):
        def linear(name, x):
            path = "/" + name.replace("model.layers", "model/layers").replace(".self_attn.", "/self_attn/").replace(".mlp.", "/mlp/")
            path = path.replace("model/layers.", "model/layers.")
            out.append(node("MatMul", f"{path}/MatMul", [x, f"{name}.weight"], f"{path}/MatMul_output_0"))
            return f"{path}/MatMul_output_0"

        def op(kind, name, inputs):
            out.append(node(kind, f"{name}/{kind}", inputs, f"{name}/{kind}_output_0"))
            return f"{name}/{kind}_output_0"

        out = [node("Gather", "/model/embed_tokens/Gather", ["model.embed_tokens.weight", "input_ids"], "hidden")]
        x = "hidden"
        for layer in range(self.layers):
            at, here = f"model.layers.{layer}", f"/model/layers.{layer}"
            q, k, v = (linear(f"{at}.self_attn.{name}", x) for name in ("q_proj", "k_proj", "v_proj"))
            keys = f"{here}/self_attn/keys"
            out.append(node("Transpose", keys, [k], keys) + block(5, block(1, "perm") + number(8, 0) + number(8, 2) + number(8, 1) + number(20, 7)))
            scores = op("Softmax", f"{here}/self_attn", [op("MatMul", f"{here}/self_attn/scores", [q, keys])])
            mixed = op("MatMul", f"{here}/self_attn/mixed", [scores, v])
            x = op("Add", f"{here}/attention", [x, linear(f"{at}.self_attn.o_proj", mixed)])
            gate = linear(f"{at}.mlp.gate_proj", x)
            gate = op("Mul", f"{here}/mlp/act", [gate, op("Sigmoid", f"{here}/mlp/act", [gate])])
            inner = op("Mul", f"{here}/mlp", [gate, linear(f"{at}.mlp.up_proj", x)])
            x = op("Add", f"{here}/output", [x, linear(f"{at}.mlp.down_proj", inner)])
        out.append(node("MatMul", "/lm_head/MatMul", [x, "lm_head.weight"], "logits"))
        return b"".join(block(1, n) for n in out)

    def write(self, path, external):
        """Streams the model; its bytes are a tile of plausible floats, turned by another amount for each matrix."""
        tile = next(iter(bench.weights()))[0]
        aligned = lambda at: -(-at // 4096) * 4096
        heads, offset = [], 0
        for name, rows, columns in self.weights():
            size = rows * columns * 4
            inner = number(1, rows) + number(1, columns) + number(2, 1) + block(8, name)
            if external:
                offset = aligned(offset)
                for key, value in (("location", external.name), ("offset", offset), ("length", size)):
                    inner += block(13, block(1, key) + block(2, str(value)))
                heads.append((varint(5 << 3 | 2) + varint(len(inner) + 2) + inner + number(14, 1), size, offset))
                offset += size
            else:
                inner += varint(9 << 3 | 2) + varint(size)
                heads.append((varint(5 << 3 | 2) + varint(len(inner) + size) + inner, size, None))
        ids = block(1, block(2, "batch")) + block(1, block(2, "sequence"))
        logits = ids + block(1, number(1, self.vocabulary))
        info = lambda name, kind, shape: block(1, name) + block(2, block(1, number(1, kind) + block(2, shape)))
        before = self.nodes() + block(2, "main_graph")
        after = block(11, info("input_ids", 7, ids)) + block(12, info("logits", 1, logits))
        size = len(before) + sum(len(h) + (0 if external else s) for h, s, _ in heads) + len(after)
        with open(path, "wb") as out, open(external or os.devnull, "wb") as data:
            out.write(number(1, 8) + block(2, "bone-onnx benches/large_models.py") + varint(7 << 3 | 2) + varint(size) + before)
            for index, (head, left, offset) in enumerate(heads):
                out.write(head)
                to = data if external else out
                if external:
                    to.seek(offset)
                cut = 4 * 7919 * index % len(tile)
                while left:
                    part = tile[cut : cut + left]
                    to.write(part)
                    left, cut = left - len(part), 0
            out.write(after + block(8, block(1, "") + number(2, 17)))


LARGE = Shape(hidden=2048, inner=5632, layers=28, vocabulary=32000)  # 6.28 GB
SINGLE = Shape(hidden=2048, inner=5632, layers=7, vocabulary=28000)  # 1.90 GB


# ---- measuring ----


def rivals(directory):
    """A virtual environment with the rivals: its Python."""
    python = directory / "bin/python"
    if not python.is_file():
        say(f"installing {', '.join(RIVALS)} into {directory}")
        bench.run([sys.executable, "-m", "venv", directory])
        bench.run([python, "-m", "pip", "install", "--quiet", *RIVALS])
    return python


def measure(args, label, shape, external):
    home = args.dir / label.split()[0]
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    base, injected, merged = (home / name for name in ("base.onnx", "injected.onnx", "merged.onnx"))
    data = home / "base.onnx.data" if external else None
    say(f"writing {data or base}")
    shape.write(base, data)
    size = (data or base).stat().st_size
    inject = [args.bin, "inject", base, "-o", injected, "--target-modules", r".*(_proj|lm_head)", "--r", str(RANK)]
    inject += ["--share-data"] if external else []
    bench.run([*inject, "--init-weights", "false"])
    again = [home / "again.onnx" if part is injected else part for part in inject]
    copied, original = home / "copy", data or injected
    fold = [args.bin, "fold", injected, "-o", merged]
    cases = [
        (f"cp ({megabytes(original.stat().st_size)})", ["cp", original, copied], copied, False),
        ("cp + fsync", ["cp", original, copied], copied, True),
        ("fold, on the disk when it ends", fold, merged, False),
        ("fold --no-sync", [*fold, "--no-sync"], merged, False),
        ("inspect", [args.bin, "inspect", base, "--json"], None, False),
        ("inject --share-data" if external else "inject", again, home / "again.onnx", False),
    ]
    if args.venv:
        python = rivals(args.venv)
        for name in ("onnx", "onnx_ir"):
            command = [python, ROOT / "benches/large_rivals.py", name, injected, merged]
            cases.append((f"Python {name}: load, add, save", command, merged, False))

    def clean():
        for name in ("merged.onnx", "merged.onnx.data", "copy", "again.onnx"):
            (home / name).unlink(missing_ok=True)

    times = {name: [] for name, *_ in cases}
    for turn in range(args.runs + 1):
        for name, command, output, fsync in cases:
            clean()
            seconds = bench.clock(command, output or home / "none", fsync)
            if turn:  # the first round warms up
                times[name].append(seconds)
        say(f"{label}, round {turn} of {args.runs}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items() if t))
    peaks = {}
    for name, command, output, fsync in cases:
        if not fsync:
            clean()
            peaks[name] = bench.memory(command, output or home / "none")
        if name.startswith("fold"):
            check(home, size, external)
    clean()
    names = list(times)
    plain, synced = (statistics.median(times[name]) for name in names[:2])
    rows = []
    for name in names:
        middle = statistics.median(times[name])
        rss, anonymous = peaks.get(name, (None, None))
        rows.append(
            f"| {datetime.date.today().isoformat()} | {bench.cpu_name()}, {os.cpu_count()} cores | {label} | {name} "
            f"| {middle:.2f} ({min(times[name]):.2f}–{max(times[name]):.2f}) | {middle / plain:.2f}× | {middle / synced:.2f}× "
            f"| {megabytes(rss) if rss else ''} | {megabytes(anonymous) if rss else ''} |"
        )
    if not args.keep:
        shutil.rmtree(home, ignore_errors=True)
    return rows


def check(home, size, external):
    merged = (home / ("merged.onnx.data" if external else "merged.onnx")).stat().st_size
    if not 0.99 < merged / size < 1.01:
        sys.exit(f"large_models: the merged model has {merged} bytes, the base {size}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--dir", type=Path, default=ROOT / "target/large_models", help="for 30 GB of files; a disk, not tmpfs")
    parser.add_argument("--runs", type=int, default=3, help="timed rounds after one to warm up (default 3)")
    parser.add_argument("--only", choices=["external", "single"], help="one of the two models")
    parser.add_argument("--no-rivals", action="store_true", help="without onnx and onnx_ir")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--no-write", action="store_true", help="print the rows only")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs must be 1 or more")
    args.bin, args.dir = program.found(args.bin), args.dir.absolute()
    args.venv = None if args.no_rivals else args.dir / "venv"
    rows = []
    if args.only != "single":
        rows += measure(args, "6.3 GB, external data", LARGE, True)
    if args.only != "external":
        rows += measure(args, "1.9 GB, one file", SINGLE, False)
    if args.venv and not args.keep:
        shutil.rmtree(args.venv, ignore_errors=True)
    print("\n".join([HEADER, *rows]))
    if not args.no_write:
        bench.update(ROOT / "benches/RESULTS.md", rows, (TITLE, BEGIN, END, HEADER))
        say("written to benches/RESULTS.md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
