#!/usr/bin/env python3
"""Code search in one's own code base: a sentence encoder tuned with multiple-negatives ranking, before and after.

    cargo build --release && python3 examples/code_search/run.py

The 3-layer MiniLM encoder, made for everyday English, learns to find a Python function by the first sentence of its
docstring: functions of five packages, pinned by hash, of which only the archives are read. Recall and MRR of 1,000 functions
among themselves, out of files of which nothing was trained on, with the base file and with the folded one. Needs Python
3.8 and pip; model, tokenizer and libonnxruntime come from scripts/fetch.py, and what computes the metric (onnxruntime,
tokenizers, numpy) goes into a virtual environment in --work. Everything is written under --work.
"""

import argparse
import ast
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "scripts"))
import fetch
import program

PACKAGES = (
    {"package": "django==5.2.19", "wheel": "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"},
    {"package": "networkx==3.7", "wheel": "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0"},
    {"package": "pandas==3.1.1", "wheel": "028490c8ac2e03e18c9b08b7f3612e149b03570209bcf741d23833a7a5377ab2"},
    {"package": "scikit-learn==1.9.1", "wheel": "e5d7b18a5b9dca241a74695f3275fa4c895a9dadc72b3d8df5fa9d1083c9b83e"},
    {"package": "sympy==1.14.0", "wheel": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"},
)
REQUIRES = ("onnxruntime==1.31.1", "tokenizers==0.22.2", "numpy>=1.23")
TOKENS = "onnx::Shape_422"  # the token embeddings, f32 [batch, seq, 384]; the exporter's name for them
HELD_OUT = 1000  # functions to choose settings by, and as many to test on
WORDS, LINES = range(4, 61), 3  # of a sentence that counts; the least of a function below its docstring
LENGTH = 128  # tokens of a function that a search reads
RANK = 16
# The best of a few by the validation functions (README.md). Training reads the first half of what a search reads.
SETTINGS = {"lr": "5e-4", "schedule": "linear", "warmup-ratio": "0.1", "steps": "320", "batch-size": "32", "max-length": "64"}
PLACES = 10  # of recall and MRR


def say(line):
    print(f"code_search: {line}", file=sys.stderr, flush=True)


def sentence(docstring):
    """The first sentence of a docstring, or its first paragraph where that has no end."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    end = re.search(r"[.!?](?=\s|$)", paragraph)
    return paragraph[: end.end()] if end else paragraph


def functions(source):
    """(sentence, code, identity) of every function with a docstring; the code is the source without it.

    Decorators, name and comments stay, as a search sees them. Two functions are one where only names differ, or layout.
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not ast.get_docstring(node):
            continue
        text, first, *rest = sentence(ast.get_docstring(node)), *node.body
        if len(text.split()) not in WORDS or not rest or rest[-1].end_lineno - first.end_lineno < LINES:
            continue
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        code = textwrap.dedent("\n".join(lines[start : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]))
        yield text, code, " ".join(ast.dump(part) for part in (node.args, *rest))


def read_pairs(folder):
    """[(sentence, code)] by file. No sentence and no code comes twice, so that none is in both halves of a split."""
    seen, files = set(), {}
    for source in PACKAGES:
        with zipfile.ZipFile(fetch.kept_wheel(source, folder, say)) as members:
            for name in sorted(members.namelist()):
                if not name.endswith(".py") or re.search(r"(^|/)tests?/|/test_", name):
                    continue
                for text, code, identity in functions(members.read(name).decode("utf-8")):
                    keys = {text.lower(), identity}
                    if not keys & seen:
                        files.setdefault(name, []).append((text, code))
                    seen |= keys
    return files


def write_splits(files, work):
    """train.jsonl, validation.jsonl and test.jsonl, by file; the order hangs on the files' names alone."""
    parts = {"test": [], "validation": [], "train": []}
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        open_part = next((p for p in ("test", "validation") if len(parts[p]) < HELD_OUT), "train")
        parts[open_part] += files[name]
    for part, pairs in parts.items():
        if part != "train":
            del pairs[HELD_OUT:]
        lines = "".join(json.dumps({"anchor": text, "positive": code}) + "\n" for text, code in pairs)
        (work / f"{part}.jsonl").write_text(lines, encoding="ascii")
    return {part: len(pairs) for part, pairs in parts.items()}


def metric(model, tokenizer, data):
    """How well each function is found by its sentence, among all of them. Runs in the virtual environment."""
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def embed(texts):
        rows = []
        for at in range(0, len(texts), 32):
            encodings = tokenizer.encode_batch(texts[at : at + 32])
            ids, mask = (np.array([getattr(e, what) for e in encodings], np.int64) for what in ("ids", "attention_mask"))
            tokens = session.run([TOKENS], {"input_ids": ids, "attention_mask": mask})[0]
            mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            rows.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(rows)

    pairs = [json.loads(line) for line in Path(data).read_text(encoding="ascii").splitlines()]
    cosines = embed([p["anchor"] for p in pairs]) @ embed([p["positive"] for p in pairs]).T
    better = (cosines > np.diag(cosines)[:, None]).sum(1)  # how many other functions are nearer
    reciprocal = np.where(better < PLACES, 1 / (better + 1), 0)
    found = {"recall@1": better == 0, f"recall@{PLACES}": better < PLACES, f"MRR@{PLACES}": reciprocal}
    print(json.dumps({name: float(values.mean()) for name, values in found.items()}))


def environment(work):
    """The Python of a virtual environment with what the metric needs."""
    folder = work / "venv"
    python = folder / "bin/python"
    if not (folder / "complete").is_file():
        say(f"installing {', '.join(REQUIRES)} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        call([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", *REQUIRES])
        (folder / "complete").touch()
    return python


def call(command):
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"code_search: exit status {done.returncode} from {' '.join(map(str, command))}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--work", type=Path, default=ROOT / "target/code_search", help="default target/code_search")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each with a seed of its own (default 3)")
    parser.add_argument("--on", default="test", choices=("test", "validation"), help="functions to measure on (default test)")
    parser.add_argument("--set", default=[], nargs="*", metavar="FLAG=VALUE", help="other settings of train, as lr=1e-4")
    parser.add_argument("--python", type=Path, help="one that has onnxruntime, tokenizers and numpy, in place of a new one")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    try:
        paths = fetch.fetch(["minilm", "onnxruntime"], lambda line: None if line.endswith("verified") else say(line))
        files = read_pairs(work / "packages")
    except fetch.Failure as error:
        sys.exit(f"code_search: {error}")
    model, tokenizer, library = paths
    os.environ.setdefault("ORT_DYLIB_PATH", str(library))
    args.bin = program.found(args.bin)
    python = args.python or environment(work)
    settings = dict(SETTINGS, **dict(pair.split("=", 1) for pair in args.set))
    counts = write_splits(files, work)
    say(f"{len(files)} files: " + ", ".join(f"{count} functions to {part}" for part, count in counts.items()))

    measure = lambda file: json.loads(call([python, __file__, "--metric", file, tokenizer, work / f"{args.on}.jsonl"]))
    before = measure(model)
    say(f"as it comes: {before}")
    injected, seconds, after = work / "start.onnx", 0, []
    call([args.bin, "inject", model, "-o", injected, "--target-modules", "all-linear", "--r", RANK])
    for seed in range(args.seeds):
        run, merged = work / f"run-{seed}", work / f"merged-{seed}.onnx"
        shutil.rmtree(run, ignore_errors=True)
        command = [args.bin, "train", injected, "-o", run, "--data", work / "train.jsonl", "--seed", seed]
        command += ["--eval-data", work / "validation.jsonl", "--loss", "multiple-negatives-ranking", "--output", TOKENS]
        command += ["--pool", "mean", "--tokenizer", tokenizer, "--eval-steps", 80]
        command += [part for name, value in settings.items() for part in (f"--{name}", value)]
        started = time.monotonic()
        call(command)
        seconds += time.monotonic() - started
        call([args.bin, "fold", run / "injected.onnx", "-o", merged])
        after.append(measure(merged))
        say(f"tuned, seed {seed}: {after[-1]}")

    spread = lambda values: f"**{sum(values) / len(values):.3f}** ({min(values):.3f}–{max(values):.3f})"
    text = "\n".join(
        [
            f"| encoder | {' | '.join(before)} |",
            "|---" * (len(before) + 1) + "|",
            f"| as it comes | {' | '.join(f'{value:.3f}' for value in before.values())} |",
            f"| **tuned, folded** | {' | '.join(spread([run[name] for run in after]) for name in before)} |",
            "",
            f"({datetime.date.today().isoformat()}, {args.on}; mean and range of {args.seeds} trainings of {seconds / args.seeds:.0f} s "
            f"on {os.cpu_count()} CPU cores; {counts['train']} functions to train on, r = {RANK}, "
            f"{', '.join(f'{name} {value}' for name, value in settings.items())}.)",
        ]
    )
    print(text)
    (work / "RESULTS.md").write_text(text + "\n", encoding="utf-8")
    say(f"written to {work / 'RESULTS.md'}; the curves are {work / 'run-0/loss.png'} and so on")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--metric"]:
        metric(*sys.argv[2:5])
        sys.exit(0)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
