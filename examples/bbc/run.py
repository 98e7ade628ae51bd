#!/usr/bin/env python3
"""BBC News on a 3-layer sentence encoder: Bone on every linear layer + head, against a head on the frozen encoder.

    cargo build --release && python3 examples/bbc/run.py

Two training sizes, three splits each, tested on all the rest: 12 runs. Each is skipped where its result exists, so an
interrupted run goes on where it was. Needs Python 3.8 only; the model, tokenizer, texts and libonnxruntime come from
scripts/fetch.py. Everything is written under --work, the table also to --results.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "scripts"))
import fetch
import program

CLASSES = ("business", "entertainment", "politics", "sports", "tech")  # a label is the position here
EMBEDDINGS = "onnx::Shape_422"  # the token embeddings, f32 [batch, seq, 384]; the exporter's name for them
METHODS = {"frozen": "head on the frozen encoder", "bone": "Bone on all linear layers + head"}
# Both methods' settings are the best of a search on splits that are not used here (README.md).
SETTINGS = {
    ("frozen", 100): {"head-lr": "3e-3", "epochs": "30"},
    ("frozen", 1000): {"head-lr": "1e-3", "epochs": "20"},
    ("bone", 100): {"lr": "1e-4", "head-lr": "1e-2", "epochs": "20", "schedule": "linear"},
    ("bone", 1000): {"lr": "1e-4", "head-lr": "1e-2", "epochs": "5", "schedule": "linear"},
}
RANK, MAX_LENGTH, BATCH = 16, 48, 16
BEGINNING = 30  # words; two texts that share these are one story


def say(line):
    print(f"bbc: {line}", file=sys.stderr, flush=True)


def read_texts(folder):
    """(text, label) of every distinct story.

    The corpus holds 100 texts twice, and 22 more with the same beginning and another end, of which the model sees only
    the beginning. Neither kind may land in both halves of a split.
    """
    stories, texts = {}, []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).glob("*.txt")):
            data = path.read_bytes()
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                text = data.decode("latin-1")  # one text, for its pound signs
            words = text.split()
            beginning = " ".join(words[:BEGINNING])
            if beginning not in stories:
                texts.append((" ".join(words), label))
            if stories.setdefault(beginning, label) != label:
                sys.exit(f"bbc: {path} repeats a text of the class {CLASSES[stories[beginning]]}")
    return texts


def write_splits(texts, work, sizes, seeds):
    """train.jsonl and test.jsonl per size and seed. The order hangs on the texts and the seed alone."""
    for seed in seeds:
        order = sorted(texts, key=lambda t: hashlib.sha256(f"{seed}:{t[0]}".encode()).digest())
        for size in sizes:
            folder = split_dir(work, size, seed)
            folder.mkdir(parents=True, exist_ok=True)
            for name, part in (("train", order[:size]), ("test", order[size:])):
                lines = "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in part)
                temp = folder / f".{name}.jsonl"
                temp.write_text(lines, encoding="ascii")
                os.replace(temp, folder / f"{name}.jsonl")
            say(f"{folder}: {size} to train on, {len(order) - size} to test")


def split_dir(work, size, seed):
    return work / "data" / f"{size}-{seed}"


def flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def call(command, log):
    """Runs it with its output in the log; the last lines are shown when it fails."""
    with open(log, "a", encoding="utf-8") as out:
        out.write(f"\n$ {' '.join(map(str, command))}\n")
        out.flush()
        started = time.monotonic()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out, text=True)
        seconds = time.monotonic() - started
        out.write(done.stdout)
    if done.returncode:
        tail = "".join(Path(log).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-15:])
        sys.exit(f"bbc: exit status {done.returncode} from {' '.join(map(str, command))}\n{tail}\nbbc: all of it is in {log}")
    return done.stdout, seconds


def last_eval(metrics):
    found = None
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("eval_accuracy") is not None:
            found = row
    if found is None:
        sys.exit(f"bbc: {metrics} holds no line with eval_accuracy")
    return found


def worst_difference(report):
    """The largest absolute difference anywhere in verify's JSON, whatever the nesting."""
    if isinstance(report, dict):
        own = [v for k, v in report.items() if "abs" in k and isinstance(v, (int, float)) and not isinstance(v, bool)]
        return max(own + [d for v in report.values() for d in [worst_difference(v)] if d is not None], default=None)
    if isinstance(report, list):
        return max((d for v in report for d in [worst_difference(v)] if d is not None), default=None)
    return None


def one_run(args, files, method, size, seed):
    folder = args.work / "runs" / f"{method}-{size}-{seed}"
    settings = dict(SETTINGS[method, size], **{"max-length": MAX_LENGTH, "batch-size": BATCH, "seed": seed})
    inject = ["--head", f"topic:{len(CLASSES)}", "--head-input", EMBEDDINGS, "--pool", "mean", "--pool-mask", "attention_mask"]
    if method == "bone":
        inject = ["--target-modules", "all-linear", "--r", str(RANK)] + inject
    identity = {"inject": inject, "train": settings, "engine": args.engine}
    result_file = folder / "result.json"
    if result_file.is_file():
        result = json.loads(result_file.read_text(encoding="utf-8"))
        if result.get("identity") == identity:
            say(f"{folder.name}: {result['accuracy']:.4f} (done before)")
            return result
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, injected, out, merged = folder / "log.txt", folder / "start.onnx", folder / "train", folder / "merged.onnx"
    data = split_dir(args.work, size, seed)
    say(f"{folder.name}: training")
    call([args.bin, "inject", files["model"], "-o", injected, *inject], log)
    command = [args.bin, "train", injected, "-o", out, "--data", data / "train.jsonl"]
    command += ["--eval-data", data / "test.jsonl", "--eval-strategy", "end"]
    command += ["--loss", "cross-entropy", "--output", "topic", "--tokenizer", files["tokenizer"]]
    command += ["--text-field", "text", "--label-field", "label", *flags(settings), "--engine", args.engine]
    _, seconds = call(command, log)
    final = last_eval(out / "metrics.jsonl")
    result = {"identity": identity, "accuracy": final["eval_accuracy"], "loss": final.get("eval_loss"), "seconds": seconds}
    call([args.bin, "fold", out / "injected.onnx", "-o", merged], log)
    for engine in ("onnxruntime", "tract"):
        verify = [args.bin, "verify", out / "injected.onnx", merged, "--atol", "1e-4", "--engine", engine, "--json"]
        report, _ = call(verify, log)
        result[f"merged_{engine}"] = worst_difference(json.loads(report))
    if not args.keep and seed != args.seeds[0]:
        for path in (injected, merged, out / "injected.onnx"):
            path.unlink()
    temp = folder / ".result.json"
    temp.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temp, result_file)
    say(f"{folder.name}: {result['accuracy']:.4f} in {seconds:.0f} s")
    return result


def cpu_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table(results, sizes, seeds, total):
    rows = ["| training texts | tested on | method | settings | accuracy, mean (min–max) | seconds a run |", "|---|---|---|---|---|---|"]
    differences = {"onnxruntime": [], "tract": []}
    for size in sizes:
        for method in METHODS:
            runs = [results[method, size, seed] for seed in seeds if (method, size, seed) in results]
            if not runs:
                continue
            scores = [run["accuracy"] for run in runs]
            settings = ", ".join(f"{k} {v}" for k, v in SETTINGS[method, size].items())
            rows.append(
                f"| {size} | {total - size} | {METHODS[method]} | {settings} | {sum(scores) / len(scores):.3f} "
                f"({min(scores):.3f}–{max(scores):.3f}) | {sum(run['seconds'] for run in runs) / len(runs):.0f} |"
            )
            for engine, found in differences.items():
                found += [run[f"merged_{engine}"] for run in runs if run[f"merged_{engine}"] is not None]
    rows.append("")
    worst = [f"{max(found):.1e} in {engine}" for engine, found in differences.items() if found]
    rows.append(
        f"{len(seeds)} random splits each, {total} distinct stories, {MAX_LENGTH} tokens, batch {BATCH}, r = {RANK}; seconds are "
        "those of `train`, with the evaluation."
        + (f" Merged against injected file, worst difference of an output: {', '.join(worst)}." if worst else "")
    )
    return "\n".join(rows)


def get_files(args):
    """Paths of what the runs need, fetched where missing."""
    cache = fetch.cache_dir()
    targets = ["bbc"] if args.only_prepare else ["bbc", "minilm"]
    if not args.only_prepare and args.engine == "onnxruntime" and not os.environ.get("ORT_DYLIB_PATH"):
        targets.append("onnxruntime")
    try:
        paths = fetch.fetch(targets, lambda line: None if line.endswith("verified") else say(line))
    except fetch.Failure as error:
        sys.exit(f"bbc: {error}")
    if "onnxruntime" in targets:
        os.environ["ORT_DYLIB_PATH"] = str(paths[-1])
    return {
        "texts": cache / "data/bbc",
        "model": cache / "models/paraphrase-MiniLM-L3-v2.onnx",
        "tokenizer": cache / "models/minilm-tokenizer.json",
    }


def main():
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--work", type=Path, default=ROOT / "target/bbc", help="where runs are kept (default target/bbc)")
    parser.add_argument("--results", type=Path, help="Markdown file for the table (default RESULTS.md in --work)")
    parser.add_argument("--sizes", type=numbers, default=[100, 1000], help="training sizes (default 100,1000)")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="splits (default 0,1,2)")
    parser.add_argument("--methods", default=",".join(METHODS), help="default frozen,bone")
    parser.add_argument("--engine", default="onnxruntime", choices=("onnxruntime", "tract"))
    parser.add_argument("--only-prepare", action="store_true", help="write the jsonl files and stop")
    parser.add_argument("--keep", action="store_true", help="keep every run's models, not only those of the first split")
    args = parser.parse_args()
    args.work = args.work.absolute()
    methods = args.methods.split(",")
    unknown = [m for m in methods if m not in METHODS] + [str(s) for s in args.sizes if ("bone", s) not in SETTINGS]
    if unknown:
        parser.error(f"no settings for {', '.join(unknown)}")

    files = get_files(args)
    texts = read_texts(files["texts"])
    write_splits(texts, args.work, args.sizes, args.seeds)
    if args.only_prepare:
        return 0
    args.bin = program.found(args.bin)
    results = {}
    for size in args.sizes:
        for seed in args.seeds:
            for method in methods:
                results[method, size, seed] = one_run(args, files, method, size, seed)
    text = table(results, args.sizes, args.seeds, len(texts))
    print(text)
    results_file = args.results or args.work / "RESULTS.md"
    version = subprocess.run([args.bin, "--version"], capture_output=True, text=True).stdout.strip()
    heading = f"{datetime.date.today().isoformat()}, {version or 'bone-onnx'}, engine {args.engine}, {cpu_name()}"
    results_file.write_text(f"{heading}\n\n{text}\n", encoding="utf-8")
    say(f"written to {results_file}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
