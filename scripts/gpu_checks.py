#!/usr/bin/env python3
"""Runs every check that needs a GPU and writes a dated table with the device's name to docs/GPU.md.

    cargo build --release
    scripts/gpu_checks.py                  # on a machine with a GPU, onnxruntime-gpu and PyTorch
    scripts/gpu_checks.py --cpu --no-write # the same machinery with tiny models, without a GPU (test.sh)

Checks: the losses of 50 steps on CUDA against the CPU's, within 1e-4 in float32; from the engine's profile, that no node
of a gradient graph falls to the CPU; step time and peak memory against PyTorch with the same Bone adapters, for an
encoder of 6 layers (batch 64 x 128, float32) and a Llama-shaped decoder of a billion parameters (batch 4 x 512,
bfloat16: --precision on float32 weights here, bfloat16 weights there). The models have random weights and are written here, byte by byte: only Python is needed, and PyTorch for
the comparison (without it the rows say so).

A GPU machine that no registry reaches: with the parts that pack ONNX Runtime's CUDA provider in DIR, and the binary in
DIR as bone-onnx.xz (`xz -9 -k target/release/bone-onnx`), `--parts DIR` unpacks both into --work. CUDA's own libraries
are found in the nvidia packages that PyTorch's wheel brings. `--only` runs some of the checks, so that they fit several
short calls; the results are kept in --work, and the last call writes the table from all of them.
"""

import argparse
import datetime
import json
import lzma
import math
import os
import random
import site
import statistics
import struct
import subprocess
import sys
import tarfile
import threading
import time
from array import array
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import program  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- gpu_checks: begin -->", "<!-- gpu_checks: end -->"
RANK, LR, WARM = 16, 1e-3, 5  # WARM: steps that no time is taken of
TYPES = {"float32": (1, "F32", 4), "float16": (10, "F16", 2), "bfloat16": (16, "BF16", 2)}


def say(line):
    print(f"gpu_checks: {line}", file=sys.stderr, flush=True)


# ---- ONNX files, by hand ----


def varint(n):
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out) + bytes([n])


def block(field, content):
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


def number(field, n):
    return varint(field << 3) + varint(n)


def attribute(name, value):
    if isinstance(value, float):
        return block(5, block(1, name) + varint(2 << 3 | 5) + struct.pack("<f", value) + number(20, 1))
    if isinstance(value, int):
        return block(5, block(1, name) + number(3, value) + number(20, 2))
    return block(5, block(1, name) + b"".join(number(8, n) for n in value) + number(20, 7))


def value_info(name, kind, dims):
    dims = b"".join(block(1, number(1, d) if isinstance(d, int) else block(2, d)) for d in dims)
    return block(1, name) + block(2, block(1, number(1, kind) + block(2, dims)))


class Graph:
    """Nodes and constants of a model; the weights are in a file beside it."""

    def __init__(self, dtype):
        self.dtype, self.nodes, self.tensors, self.used = dtype, [], {}, {}

    def op(self, kind, scope, *inputs, output=None, outputs=1, **attributes):
        count = self.used.get((scope, kind), 0)
        self.used[scope, kind] = count + 1
        name = f"{scope}/{kind}" + (f"_{count}" if count else "")
        out = [output or f"{name}_output_{i}" for i in range(outputs)]
        self.nodes.append(
            b"".join(block(1, x) for x in inputs)
            + b"".join(block(2, y) for y in out)
            + block(3, name)
            + block(4, kind)
            + b"".join(attribute(k, v) for k, v in attributes.items())
        )
        return out[0] if outputs == 1 else out

    def integers(self, values):
        return self.tensor(f"ints.{'_'.join(map(str, values)).replace('-', 'm')}", 7, [len(values)], struct.pack(f"<{len(values)}q", *values))

    def index(self, value):
        return self.tensor(f"index.{value}", 7, [], struct.pack("<q", value))

    def floats(self, name, dims, values, dtype=None):
        dtype = dtype or self.dtype
        return self.tensor(f"{name}.{dtype}", TYPES[dtype][0], dims, encode(array("f", values), dtype))

    def scalar(self, value, dtype=None):
        return self.floats(f"number.{value}", [], [value], dtype)

    def tensor(self, name, kind, dims, raw):
        self.tensors[name] = b"".join(number(1, d) for d in dims) + number(2, kind) + block(8, name) + block(9, raw)
        return name

    def write(self, path, weights, inputs, outputs):
        tensors = [block(5, t) for t in self.tensors.values()]
        for name, (dims, offset, length) in weights.index.items():
            places = (("location", weights.path.name), ("offset", str(offset)), ("length", str(length)))
            inner = b"".join(number(1, d) for d in dims) + number(2, TYPES[self.dtype][0]) + block(8, name)
            inner += b"".join(block(13, block(1, key) + block(2, value)) for key, value in places) + number(14, 1)
            tensors.append(block(5, inner))
        graph = b"".join(block(1, n) for n in self.nodes) + block(2, "main_graph") + b"".join(tensors)
        graph += b"".join(block(11, value_info(*i)) for i in inputs) + b"".join(block(12, value_info(*o)) for o in outputs)
        path.write_bytes(number(1, 8) + block(2, "bone-onnx scripts/gpu_checks.py") + block(7, graph) + block(8, block(1, "") + number(2, 17)))


def encode(values, dtype):
    """Little-endian bytes of an array of floats; bfloat16 rounded to nearest even."""
    if dtype == "float32":
        return values.tobytes()
    if dtype == "float16":
        return struct.pack(f"<{len(values)}e", *values)
    words = array("I", values.tobytes())
    return array("H", [((w + 0x7FFF + (w >> 16 & 1)) >> 16) & 0xFFFF for w in words]).tobytes()


class Weights:
    """Random matrices in one file, and where each of them is."""

    def __init__(self, path, dtype, shapes, scale):
        self.path, self.index = path, {}
        torch = pytorch()
        with open(path, "wb") as out:
            for seed, (name, dims) in enumerate(shapes):
                out.write(bytes(-out.tell() % 64))
                count = math.prod(dims)
                ones = name.endswith("norm.weight")
                if ones or name.endswith(".bias"):
                    raw = encode(array("f", [1.0 if ones else 0.0]) * count, dtype)
                elif torch:
                    device = "cuda" if torch.cuda.is_available() else "cpu"
                    values = torch.randn(count, generator=torch.Generator(device).manual_seed(seed), device=device) * scale
                    raw = values.to(getattr(torch, dtype)).cpu().view(torch.uint8).numpy().tobytes()
                else:
                    draw = random.Random(seed).gauss
                    raw = encode(array("f", (draw(0, scale) for _ in range(count))), dtype)
                self.index[name] = (dims, out.tell(), len(raw))
                out.write(raw)


def pytorch():
    try:
        import torch

        return torch
    except ImportError:
        return None


# ---- the models: an ONNX file, and the same in PyTorch ----


class Encoder:
    """BERT-shaped, mean over the tokens, four classes."""

    loss, classes = "cross-entropy", 4
    targets = r".*\.(query|key|value|dense)"

    def __init__(self, dtype, hidden, heads, inner, layers, vocabulary, batch, length):
        self.dtype, self.computes, self.hidden, self.heads, self.inner = dtype, dtype, hidden, heads, inner
        self.layers, self.vocabulary, self.batch, self.length = layers, vocabulary, batch, length

    def shapes(self):
        h, i = self.hidden, self.inner
        yield "embeddings.word_embeddings.weight", [self.vocabulary, h]
        yield "embeddings.position_embeddings.weight", [self.length, h]
        yield from self.norm("embeddings.norm")
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}"
            for name, rows, columns in ((f"{at}.attention.self.query", h, h), (f"{at}.attention.self.key", h, h), (f"{at}.attention.self.value", h, h), (f"{at}.attention.output.dense", h, h), (f"{at}.intermediate.dense", h, i), (f"{at}.output.dense", i, h)):
                yield f"{name}.weight", [rows, columns]
                yield f"{name}.bias", [columns]
            yield from self.norm(f"{at}.attention.output.norm")
            yield from self.norm(f"{at}.output.norm")
        yield "classifier.weight", [h, self.classes]

    def norm(self, name):
        yield f"{name}.weight", [self.hidden]
        yield f"{name}.bias", [self.hidden]

    def onnx(self, path, weights):
        g = Graph(self.dtype)
        scope = lambda name: "/" + name.replace(".layer.", "/layer@").replace(".", "/").replace("@", ".")
        linear = lambda name, x: g.op("Add", scope(name), g.op("MatMul", scope(name), x, f"{name}.weight"), f"{name}.bias")
        norm = lambda name, x: g.op("LayerNormalization", scope(name), x, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=1e-12)
        words = g.op("Gather", "/embeddings/word_embeddings", "embeddings.word_embeddings.weight", "input_ids")
        length = g.op("Gather", "", g.op("Shape", "", "input_ids"), g.integers([1]), axis=0)
        places = g.op("Slice", "/embeddings", "embeddings.position_embeddings.weight", g.integers([0]), length, g.integers([0]))
        x = norm("embeddings.norm", g.op("Add", "/embeddings", words, places))
        size = self.hidden // self.heads
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}"
            here = scope(f"{at}.attention.self")

            def heads(name, perm):
                y = g.op("Reshape", here, linear(f"{at}.attention.self.{name}", x), g.integers([0, 0, self.heads, size]))
                return g.op("Transpose", here, y, perm=perm)

            q, k, v = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
            scores = g.op("Mul", here, g.op("MatMul", here, q, k), g.scalar(size**-0.5))
            y = g.op("MatMul", here, g.op("Softmax", here, scores, axis=-1), v)
            y = g.op("Reshape", here, g.op("Transpose", here, y, perm=[0, 2, 1, 3]), g.integers([0, 0, self.hidden]))
            x = norm(f"{at}.attention.output.norm", g.op("Add", scope(f"{at}.attention.output"), linear(f"{at}.attention.output.dense", y), x))
            y, act = linear(f"{at}.intermediate.dense", x), scope(f"{at}.intermediate.act")
            erf = g.op("Add", act, g.op("Erf", act, g.op("Div", act, y, g.scalar(math.sqrt(2)))), g.scalar(1.0))
            y = g.op("Mul", act, g.op("Mul", act, y, erf), g.scalar(0.5))
            x = norm(f"{at}.output.norm", g.op("Add", scope(f"{at}.output"), linear(f"{at}.output.dense", y), x))
        x = g.op("ReduceMean", "/pool", x, axes=[1], keepdims=0)
        g.op("MatMul", "/classifier", x, "classifier.weight", output="logits")
        g.write(path, weights, [("input_ids", 7, ["batch", "sequence"])], [("logits", TYPES[self.dtype][0], ["batch", self.classes])])

    def labels(self, rows, draw):
        return [rows], [draw(self.classes) for _ in range(rows)]

    def torch(self, w, linear, ids):
        import torch.nn.functional as F

        norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)
        x = norm("embeddings.norm", F.embedding(ids, w["embeddings.word_embeddings.weight"]) + w["embeddings.position_embeddings.weight"][: ids.shape[1]])
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}"
            split = lambda name: linear(f"{at}.attention.self.{name}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            y = F.scaled_dot_product_attention(split("query"), split("key"), split("value")).transpose(1, 2).flatten(2)
            x = norm(f"{at}.attention.output.norm", linear(f"{at}.attention.output.dense", y) + x)
            x = norm(f"{at}.output.norm", linear(f"{at}.output.dense", F.gelu(linear(f"{at}.intermediate.dense", x))) + x)
        return x.mean(1) @ w["classifier.weight"]

    def torch_loss(self, logits, labels):
        import torch.nn.functional as F

        return F.cross_entropy(logits.float(), labels)


class Decoder:
    """Llama-shaped: RMSNorm in float32, rotary positions, grouped queries, SwiGLU."""

    loss = "causal-lm"
    targets = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    def __init__(self, dtype, hidden, heads, groups, inner, layers, vocabulary, batch, length, computes="float32"):
        self.dtype, self.hidden, self.heads, self.groups, self.inner = dtype, hidden, heads, groups, inner
        self.layers, self.vocabulary, self.batch, self.length = layers, vocabulary, batch, length
        self.size, self.computes = hidden // heads, computes

    def shapes(self):
        h, i, kv = self.hidden, self.inner, self.groups * self.size
        yield "model.embed_tokens.weight", [self.vocabulary, h]
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for name, rows, columns in (("self_attn.q_proj", h, h), ("self_attn.k_proj", h, kv), ("self_attn.v_proj", h, kv), ("self_attn.o_proj", h, h), ("mlp.gate_proj", h, i), ("mlp.up_proj", h, i), ("mlp.down_proj", i, h)):
                yield f"{at}.{name}.weight", [rows, columns]
            yield f"{at}.input_layernorm.weight", [h]
            yield f"{at}.post_attention_layernorm.weight", [h]
        yield "model.norm.weight", [h]
        yield "lm_head.weight", [h, self.vocabulary]

    def tables(self):
        """Cosines and sines of the rotary positions, each [length, size]."""
        rates = [10000.0 ** (-2 * (i % (self.size // 2)) / self.size) for i in range(self.size)]
        return [[turn(place * rate) for place in range(self.length) for rate in rates] for turn in (math.cos, math.sin)]

    def onnx(self, path, weights):
        g, half = Graph(self.dtype), self.dtype != "float32"
        scope = lambda name: "/" + name.replace(".layers.", "/layers@").replace(".", "/").replace("@", ".")
        linear = lambda name, x: g.op("MatMul", scope(name), x, f"{name}.weight")

        def norm(name, x):
            here = scope(name)
            wide = g.op("Cast", here, x, to=1) if half else x
            mean = g.op("ReduceMean", here, g.op("Mul", here, wide, wide), axes=[-1], keepdims=1)
            root = g.op("Sqrt", here, g.op("Add", here, mean, g.scalar(1e-5, "float32")))
            y = g.op("Div", here, wide, root)
            y = g.op("Cast", here, y, to=TYPES[self.dtype][0]) if half else y
            return g.op("Mul", here, y, f"{name}.weight")

        length = g.op("Gather", "", g.op("Shape", "", "input_ids"), g.integers([1]), axis=0)
        dims = [self.length, self.size]
        turns = [g.op("Slice", "/rotary", g.floats(name, dims, table), g.integers([0]), length, g.integers([0])) for name, table in zip(("cos", "sin"), self.tables())]
        blocked = [0.0 if j <= i else -3e38 if self.dtype != "float16" else -65504.0 for i in range(self.length) for j in range(self.length)]
        mask = g.op("Slice", "/mask", g.floats("causal", [self.length] * 2, blocked), g.integers([0, 0]), g.op("Concat", "/mask", length, length, axis=0), g.integers([0, 1]))
        x = g.op("Gather", "/model/embed_tokens", "model.embed_tokens.weight", "input_ids")
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            here = scope(f"{at}.self_attn")
            y = norm(f"{at}.input_layernorm", x)

            def heads(name, count):
                z = g.op("Reshape", here, linear(f"{at}.self_attn.{name}", y), g.integers([0, 0, count, self.size]))
                return g.op("Transpose", here, z, perm=[0, 2, 1, 3])

            def turned(z):
                middle = self.size // 2
                parts = [g.op("Slice", here, z, g.integers([a]), g.integers([b]), g.integers([3])) for a, b in ((0, middle), (middle, self.size))]
                swapped = g.op("Concat", here, g.op("Neg", here, parts[1]), parts[0], axis=3)
                return g.op("Add", here, g.op("Mul", here, z, turns[0]), g.op("Mul", here, swapped, turns[1]))

            def repeated(z):
                each = self.heads // self.groups
                if each == 1:
                    return z
                wide = g.op("Expand", here, g.op("Unsqueeze", here, z, g.integers([2])), g.integers([1, 1, each, 1, 1]))
                return g.op("Reshape", here, wide, g.integers([0, self.heads, -1, self.size]))

            q, k = turned(heads("q_proj", self.heads)), repeated(turned(heads("k_proj", self.groups)))
            scores = g.op("MatMul", here, q, g.op("Transpose", here, k, perm=[0, 1, 3, 2]))
            scores = g.op("Add", here, g.op("Mul", here, scores, g.scalar(self.size**-0.5)), mask)
            z = g.op("MatMul", here, g.op("Softmax", here, scores, axis=-1), repeated(heads("v_proj", self.groups)))
            z = g.op("Reshape", here, g.op("Transpose", here, z, perm=[0, 2, 1, 3]), g.integers([0, 0, self.hidden]))
            x = g.op("Add", scope(at), x, linear(f"{at}.self_attn.o_proj", z))
            y, act = norm(f"{at}.post_attention_layernorm", x), scope(f"{at}.mlp.act_fn")
            gate = linear(f"{at}.mlp.gate_proj", y)
            gate = g.op("Mul", act, gate, g.op("Sigmoid", act, gate))
            inner = g.op("Mul", scope(f"{at}.mlp"), gate, linear(f"{at}.mlp.up_proj", y))
            x = g.op("Add", scope(at), x, linear(f"{at}.mlp.down_proj", inner))
        g.op("MatMul", "/lm_head", norm("model.norm", x), "lm_head.weight", output="logits")
        g.write(path, weights, [("input_ids", 7, ["batch", "sequence"])], [("logits", TYPES[self.dtype][0], ["batch", "sequence", self.vocabulary])])

    def labels(self, rows, draw):
        return [rows, self.length], None  # the tokens themselves

    def torch(self, w, linear, ids):
        import torch
        import torch.nn.functional as F

        def norm(name, x):
            wide = x.float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w[f"{name}.weight"]

        x = F.embedding(ids, w["model.embed_tokens.weight"])
        if "rotary" not in w:
            w["rotary"] = [torch.tensor(t, device=x.device).to(x.dtype).view(self.length, self.size) for t in self.tables()]
        cos, sin = (t[: ids.shape[1]] for t in w["rotary"])
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            y = norm(f"{at}.input_layernorm", x)
            split = lambda name: linear(f"{at}.self_attn.{name}", y).unflatten(-1, (-1, self.size)).transpose(1, 2)
            turned = lambda z: z * cos + torch.cat((-z[..., self.size // 2 :], z[..., : self.size // 2]), -1) * sin
            repeated = lambda z: z.repeat_interleave(self.heads // self.groups, 1)
            z = F.scaled_dot_product_attention(turned(split("q_proj")), repeated(turned(split("k_proj"))), repeated(split("v_proj")), is_causal=True)
            x = x + linear(f"{at}.self_attn.o_proj", z.transpose(1, 2).flatten(2))
            y = norm(f"{at}.post_attention_layernorm", x)
            x = x + linear(f"{at}.mlp.down_proj", F.silu(linear(f"{at}.mlp.gate_proj", y)) * linear(f"{at}.mlp.up_proj", y))
        return norm("model.norm", x) @ w["lm_head.weight"]

    def torch_loss(self, logits, labels):
        import torch.nn.functional as F

        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


SIZES = {  # name: (for a GPU, for --cpu)
    "parity": (Encoder("float32", 384, 12, 1536, 6, 30522, 8, 32), Encoder("float32", 32, 2, 64, 2, 100, 4, 8)),
    "encoder": (Encoder("float32", 384, 12, 1536, 6, 30522, 64, 128), Encoder("float32", 32, 2, 64, 2, 100, 4, 8)),
    "decoder": (Decoder("float32", 2048, 32, 8, 8192, 16, 32000, 4, 512, "bfloat16"), Decoder("float32", 32, 4, 2, 64, 2, 100, 2, 8)),
}


# ---- running ----


class Bench:
    def __init__(self, args):
        self.args, self.cpu = args, args.cpu
        self.env = dict(os.environ)
        libraries = [str(d) for root in [*site.getsitepackages(), site.getusersitepackages()] for d in Path(root).glob("nvidia/*/lib")]
        if libraries:
            self.env["LD_LIBRARY_PATH"] = ":".join([*libraries, self.env.get("LD_LIBRARY_PATH", "")]).rstrip(":")
        if args.parts:
            self.unpack(args.parts)
        args.bin = program.found(args.bin)
        if args.ort:
            self.env["ORT_DYLIB_PATH"] = str(args.ort.resolve())

    def unpack(self, parts):
        home = self.args.work / "unpacked"
        home.mkdir(parents=True, exist_ok=True)
        if (parts / "bone-onnx.xz").is_file():
            self.args.bin = home / "bone-onnx"
            self.args.bin.write_bytes(lzma.decompress((parts / "bone-onnx.xz").read_bytes()))
            self.args.bin.chmod(0o755)
        if not list(home.glob("libonnxruntime.so*")):
            packed = home / "packed"
            packed.write_bytes(b"".join(p.read_bytes() for p in sorted(parts.glob("part-*"))))
            with lzma.open(packed) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                tar.extractall(home, filter="data")
            packed.unlink()
        self.args.ort = next(home.glob("libonnxruntime.so*"))

    def run(self, *command, device_memory=False):
        """Runs a command; its output, and the peak of its memory in bytes (the device's, or resident)."""
        process = subprocess.Popen([str(part) for part in command], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        peak = Watch(process.pid, None if self.cpu or not device_memory else self.free())
        out, err = process.communicate()
        top = peak.stop()
        if process.returncode:
            raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{out.decode(errors='replace')[-2000:]}\n{err.decode(errors='replace')[-3000:]}")
        return out.decode(), top

    def free(self):
        torch = pytorch()
        return torch.cuda.mem_get_info()[0] if torch and torch.cuda.is_available() else None

    def model(self, name):
        """Writes the model, its injected form and data for it, once; its size and its directory."""
        spec, home = SIZES[name][int(self.cpu)], self.args.work / f"{name}{'-cpu' if self.cpu else ''}"
        if (home / "injected.onnx").is_file():
            return spec, home
        home.mkdir(parents=True, exist_ok=True)
        say(f"writing the model of check {name}")
        weights = Weights(home / "weights.bin", spec.dtype, list(spec.shapes()), 0.02 if spec.hidden > 100 else 0.2)
        (home / "weights.json").write_text(json.dumps(weights.index))
        spec.onnx(home / "base.onnx", weights)
        rows, draw = 4 * spec.batch, random.Random(1).randrange
        ids = array("q", [draw(spec.vocabulary) for _ in range(rows * spec.length)])
        dims, labels = spec.labels(rows, draw)
        arrays = [("input_ids", [rows, spec.length], ids.tobytes()), ("labels", dims, ids.tobytes() if labels is None else array("q", labels).tobytes())]
        header, at = {}, 0
        for key, shape, raw in arrays:
            header[key] = {"dtype": "I64", "shape": shape, "data_offsets": [at, at + len(raw)]}
            at += len(raw)
        head = json.dumps(header).encode()
        (home / "data.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"".join(raw for *_, raw in arrays))
        self.run(self.args.bin, "inject", home / "base.onnx", "-o", home / "injected.onnx", "--target-modules", spec.targets, "--r", RANK, "--share-data")
        return spec, home

    def train(self, name, device, steps, *more):
        """Trains with bone-onnx: losses, seconds of a step, peak memory."""
        spec, home = self.model(name)
        out = home / f"run-{device.replace(':', '')}{'-'.join(more)}"
        options = ["--loss", spec.loss, "--steps", steps, "--batch-size", spec.batch, "--lr", LR, "--no-shuffle", "--device", device, "--precision", spec.computes, *more]
        subprocess.run(["rm", "-rf", str(out)], check=True)
        _, peak = self.run(self.args.bin, "--quiet", "train", home / "injected.onnx", "-o", out, "--data", home / "data.safetensors", "--engine", "onnxruntime", *options, device_memory=device != "cpu")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line], statistics.median([line["seconds"] for line in lines if "seconds" in line][WARM:]), peak

    def rival(self, name, steps):
        """The same in PyTorch, in a process of its own."""
        if not pytorch():
            return None
        self.model(name)
        out, peak = self.run(sys.executable, __file__, "--rival", name, "--steps", steps, "--work", self.args.work, *(["--cpu"] if self.cpu else []), device_memory=True)
        result = json.loads(out.splitlines()[-1])
        return result["losses"], statistics.median(result["seconds"][WARM:]), peak


class Watch:
    """The peak of a process's memory: what it takes of the device's, else what is resident."""

    def __init__(self, pid, free):
        self.pid, self.free, self.peak, self.done = pid, free, 0, threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self):
        while not self.done.wait(0.01):
            try:
                if self.free is not None:
                    self.peak = max(self.peak, self.free - pytorch().cuda.mem_get_info()[0])
                else:
                    status = Path(f"/proc/{self.pid}/status").read_text()
                    self.peak = max(self.peak, next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0))
            except (OSError, ValueError):
                pass

    def stop(self):
        self.done.set()
        self.thread.join()
        return self.peak


def rival(args):
    """PyTorch's side: frozen weights, Bone blocks in float32, AdamW; one JSON line of losses and seconds."""
    import torch

    spec, home = SIZES[args.rival][int(args.cpu)], args.work / f"{args.rival}{'-cpu' if args.cpu else ''}"
    device, dtype = ("cpu" if args.cpu else "cuda"), getattr(torch, spec.dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    raw = torch.from_file(str(home / "weights.bin"), size=(home / "weights.bin").stat().st_size, dtype=torch.uint8)
    computes = getattr(torch, spec.computes)
    weights = {name: raw[at : at + size].view(dtype).view(dims).to(device, computes) for name, (dims, at, size) in json.loads((home / "weights.json").read_text()).items()}
    data = (home / "data.safetensors").read_bytes()
    head = struct.unpack("<Q", data[:8])[0]
    arrays = {}
    for name, info in json.loads(data[8 : 8 + head]).items():
        begin, end = info["data_offsets"]
        arrays[name] = torch.frombuffer(bytearray(data[8 + head + begin : 8 + head + end]), dtype=torch.int64).view(info["shape"])
    import re

    blocks = {name[:-7]: torch.zeros(RANK, w.shape[1], device=device, requires_grad=True) for name, w in weights.items() if name.endswith(".weight") and re.fullmatch(spec.targets, name[:-7])}

    def linear(name, x):
        shards = x.unflatten(-1, (-1, RANK)).sum(-2)
        y = x @ weights[f"{name}.weight"] + shards @ blocks[name].to(x.dtype)
        bias = weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    optimizer = torch.optim.AdamW(blocks.values(), lr=LR, weight_decay=0.0)
    rows, losses, seconds = arrays["input_ids"].shape[0], [], []
    for step in range(args.steps):
        begun = time.perf_counter()
        at = step * spec.batch % rows
        ids, labels = (arrays[name][at : at + spec.batch].to(device, non_blocking=True) for name in ("input_ids", "labels"))
        loss = spec.torch_loss(spec.torch(weights, linear, ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"losses": losses, "seconds": seconds}))


# ---- the checks: rows of (what, result, limit, passed or None) ----


def worst(a, b):
    if len(a) != len(b):
        raise RuntimeError(f"{len(a)} losses against {len(b)}")
    return max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b))


def parity(bench):
    here = ("cpu", ("--optimizer-on-device", "true")) if bench.cpu else ("cuda", ())
    device, _, _ = bench.train("parity", here[0], 50, *here[1])
    host, _, _ = bench.train("parity", "cpu", 50)
    off = worst(device, host)
    moved = abs(host[-1] - host[0])
    yield f"50 steps in float32, {here[0]}{' (optimizer as a graph)' if bench.cpu else ''} against the CPU: worst relative difference of a loss (they move by {moved:.3f})", f"{off:.1e}", "≤ 1e-4", off <= 1e-4 and moved > 0


def profile(bench):
    for name in ("encoder", "decoder"):
        spec, home = bench.model(name)
        command = [bench.args.bin, "--json", "doctor", "--graph", home / "injected.onnx", "--engine", "onnxruntime", "--batch-size", min(spec.batch, 4), "--length", spec.length, "--precision", spec.computes, "--device", "cpu" if bench.cpu else "cuda"]
        done = subprocess.run([str(part) for part in command], env=bench.env, capture_output=True, text=True)
        if not done.stdout.startswith("{"):
            raise RuntimeError(done.stderr)
        report = json.loads(done.stdout)
        if "error" in report:
            raise RuntimeError(report["error"])
        fallen = report["fell_to_cpu"]
        for node in fallen:
            say(f"{name}: on the CPU: {node['op']} {node['name']}")
        kinds = ", ".join(sorted({node["op"] for node in fallen}))
        yield f"{name} ({spec.computes}): nodes of the gradient graph that fell to the CPU, of {report['nodes']}; copies to or from it", f"{len(fallen)}{f' ({kinds})' if kinds else ''}; {report['copies']}", "0", not fallen


def speed(name):
    def check(bench):
        spec, steps = SIZES[name][int(bench.cpu)], 12 if bench.cpu else 30
        label = f"{name} of {spec.layers} layers, {spec.batch} × {spec.length}, {spec.computes}"
        losses, seconds, memory = bench.train(name, "cpu" if bench.cpu else "cuda", steps)
        theirs = bench.rival(name, steps)
        if theirs is None:
            yield f"{label}: time of a step, peak memory", f"{seconds * 1e3:.1f} ms, {memory / 2**20:.0f} MiB", "PyTorch is not installed here", None
            return
        off = worst(losses, theirs[0])
        bound = 1e-3 if spec.computes == "float32" else 3e-2
        yield f"{label}: losses against PyTorch's, worst relative difference", f"{off:.1e}", f"≤ {bound:g}", off <= bound
        yield f"{label}: time of a step against PyTorch's", f"{seconds * 1e3:.1f} ms against {theirs[1] * 1e3:.1f} ms, {seconds / theirs[1]:.2f}×", "", None
        yield f"{label}: peak memory against PyTorch's", f"{memory / 2**20:.0f} MiB against {theirs[2] / 2**20:.0f} MiB, {memory / max(theirs[2], 1):.2f}×", "", None

    return check


CHECKS = {"parity": parity, "profile": profile, "encoder": speed("encoder"), "decoder": speed("decoder")}


def device_name(cpu):
    torch = pytorch()
    if not cpu and torch and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (PyTorch {torch.__version__})"
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"CPU: {names[0] if names else 'unknown'}, {os.cpu_count()} threads"


def table(results, name):
    lines = [f"{datetime.date.today()}, {name}", "", "| check | result | limit | |", "|---|---|---|---|"]
    marks = {True: "passed", False: "FAILED", None: ""}
    for rows in results.values():
        lines += [f"| {what} | {result} | {limit} | {marks[passed]} |" for what, result, limit, passed in rows]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU: a test of this script")
    parser.add_argument("--only", default=",".join(CHECKS), help=f"comma-separated, of {', '.join(CHECKS)}")
    program.add_bin(parser)
    parser.add_argument("--ort", type=Path, help="libonnxruntime.so.* of onnxruntime-gpu [default: as bone-onnx finds it]")
    parser.add_argument("--parts", type=Path, help="directory with part-* of the packed provider and bone-onnx.xz")
    parser.add_argument("--work", type=Path, default=ROOT / "target/gpu_checks", help="directory for models, runs and results")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.rival:
        return rival(args)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"there is no check {unknown[0]}; there are {', '.join(CHECKS)}")
    kept = args.work / f"results{'-cpu' if args.cpu else ''}.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    failed = False
    bench = Bench(args)
    for name in names:
        say(name)
        try:
            results[name] = list(CHECKS[name](bench))
        except (RuntimeError, OSError) as error:
            say(f"{name}: {error}")
            words = str(error).strip().splitlines()
            results[name] = [(f"{name} could not be run", words[-1].replace("|", "/")[:200] if words else "", "", False)]
        failed |= any(passed is False for *_, passed in results[name])
        results = {name: results[name] for name in CHECKS if name in results}
        kept.write_text(json.dumps(results))
    text = table(results, device_name(args.cpu))
    print(text)
    page = ROOT / "docs/GPU.md"
    if not args.no_write:
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
