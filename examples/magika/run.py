#!/usr/bin/env python3
"""magika taught a new file kind: Python stubs (.pyi), which it calls Python like any other source.

    cargo build --release && python3 examples/magika/run.py

Real files out of four packages: trained on those of django and django-stubs, tested on those of sphinx and scipy-stubs,
of which not a file is trained on. A head of four kinds is trained on the frozen network, and once more together with
Bone on its linear layers. Needs Python 3.8 and pip; the model and libonnxruntime come from scripts/fetch.py, the packages
are pinned by hash, and only their archives are read. Everything is written under --work.
"""

import argparse
import array
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "scripts"))
import fetch

KINDS = {".py": "python", ".pyi": "python stub", ".js": "javascript", ".po": "gettext"}
WHEELS = {
    "train": {
        "django==5.2.19": "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        "django-stubs==6.1.2": "ffb6e74f54b8c1f9b2f3bc4852c5abbaa2324b2a7cb1c51854c5f95abe67165c",
    },
    "test": {
        "sphinx==9.0.4": "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb",
        "scipy-stubs==1.17.1.5": "58ebf054a86c000c72e8982e121c4ead0d3d9ba7a6c38aa5fa71b07f96a427fd",
    },
}
MOST = {"train": 100, "test": 150}  # files of a kind
BEGIN, END, PADDING = 1024, 1024, 256  # what magika sees of a file: models/standard_v3_3/config.min.json
FEATURES = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/LayerNorm_1/AddV2_1:0"  # before the layer of its own 214 kinds
METHODS = {
    "head on the frozen network": ([], {"head-lr": "1e-2"}),
    "Bone on both linear layers + head": (["--target-nodes", ".*MatMul|.*Einsum", "--r", "16"], {"lr": "1e-3", "head-lr": "1e-2"}),
}


def say(line):
    print(f"magika: {line}", file=sys.stderr, flush=True)


def wheel(requirement, sha256, folder):
    """The archive of a package, as pinned."""
    name = requirement.partition("==")[0].replace("-", "_")
    found = list(folder.glob(f"{name}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", "3.12", "--dest", str(folder), requirement]
        subprocess.run(command, check=True)
        found = list(folder.glob(f"{name}-*.whl"))
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != sha256:
        sys.exit(f"magika: {found[0]} is not the file that was pinned; remove it")
    return found[0]


def seen(content):
    """2048 numbers: the first and the last bytes without white space around them, as magika's own package reads them."""
    block = 4096
    begin = content[:block].lstrip()[:BEGIN]
    end = content[-block:].rstrip()[-END:]
    return [*begin, *[PADDING] * (BEGIN - len(begin)), *[PADDING] * (END - len(end)), *end]


def samples(part, folder):
    """(numbers, kind) of at most so many files of each kind, in an order that hangs on the contents alone."""
    found = {}
    for requirement, sha256 in WHEELS[part].items():
        with zipfile.ZipFile(wheel(requirement, sha256, folder)) as archive:
            for name in archive.namelist():
                kind = list(KINDS).index(Path(name).suffix) if Path(name).suffix in KINDS else None
                content = archive.read(name) if kind is not None else b""
                if len(content) >= 64:
                    found[hashlib.sha256(content).digest()] = (kind, content)
    taken = []
    for kind in range(len(KINDS)):
        of_kind = [(digest, content) for digest, (k, content) in found.items() if k == kind]
        taken += [(digest, kind, content) for digest, content in sorted(of_kind)[: MOST[part]]]
    return {digest: (seen(content), kind) for digest, kind, content in taken}


def write(path, rows):
    """A .safetensors file with the arrays bytes [n, 2048] and labels [n]."""
    numbers = array.array("i", [n for values, _ in rows for n in values])
    labels = array.array("q", [kind for _, kind in rows])
    if sys.byteorder == "big":
        numbers.byteswap(), labels.byteswap()
    middle = 4 * len(numbers)
    header = {
        "bytes": {"dtype": "I32", "shape": [len(rows), BEGIN + END], "data_offsets": [0, middle]},
        "labels": {"dtype": "I64", "shape": [len(rows)], "data_offsets": [middle, middle + 8 * len(labels)]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers.tobytes() + labels.tobytes())


def call(command):
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"magika: exit status {done.returncode} from {' '.join(map(str, command))}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT / "target" / "release" / "bone-onnx", help="%(default)s")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "magika", help="%(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (%(default)s)")
    args = parser.parse_args()
    script = [sys.executable, str(ROOT / "scripts" / "fetch.py"), "--quiet"]
    paths = subprocess.run([*script, "onnxruntime", "magika"], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    os.environ["ORT_DYLIB_PATH"], model = paths[0], paths[-1]
    args.work.mkdir(parents=True, exist_ok=True)
    parts = {part: samples(part, args.work) for part in WHEELS}
    shared = parts["train"].keys() & parts["test"].keys()
    if shared:
        say(f"{len(shared)} files are in both halves and are not tested on")
    parts["test"] = {digest: row for digest, row in parts["test"].items() if digest not in shared}
    for part, rows in parts.items():
        write(args.work / f"{part}.safetensors", list(rows.values()))
        counts = [sum(kind == k for _, kind in rows.values()) for k in range(len(KINDS))]
        say(f"{part}: " + ", ".join(f"{count} {name}" for count, name in zip(counts, KINDS.values())))
    print("| method | accuracy on files of other packages, mean (min–max) | seconds of training |\n|---|---|---|")
    for at, (method, (adapters, rates)) in enumerate(METHODS.items()):
        injected = args.work / f"injected-{at}.onnx"
        head = ["--head", f"kind:{len(KINDS)}", "--head-input", FEATURES, "--pool", "none"]
        call([args.bin, "inject", model, "-o", injected, *head, *adapters, "--json", "-q"])
        found, seconds = [], 0
        for seed in range(args.seeds):
            out = args.work / f"run-{at}-{seed}"
            shutil.rmtree(out, ignore_errors=True)
            command = [args.bin, "train", injected, "-o", out, "--data", args.work / "train.safetensors"]
            command += ["--eval-data", args.work / "test.safetensors", "--loss", "cross-entropy", "--output", "kind"]
            command += ["--batch-size", 16, "--epochs", 3, "--eval-strategy", "end", "--schedule", "linear", "--seed", seed, "--json", "-q"]
            started = time.monotonic()
            result = call(command + [word for flag, value in rates.items() for word in (f"--{flag}", value)])
            seconds += time.monotonic() - started
            found.append(result["eval_accuracy"])
        accuracy = f"{sum(found) / len(found):.3f} ({min(found):.3f}–{max(found):.3f})"
        print(f"| {method} | {accuracy} | {seconds / args.seeds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
