#!/usr/bin/env python3
"""Times whole commands on a 500 MB model: `fold` and `inject` against `cp` of the same file, with peak memory.

    cargo build --release && python3 benches/whole_process.py [--runs 9] [--no-write]

Interleaved runs, medians; the input is in the page cache, dirty pages are written back between runs, outside the
clock. `fold` fsyncs what it writes and `cp` does not, so there is a row for cp + fsync as well. Memory comes from runs of
its own, by polling /proc/PID/status: peak RSS is the kernel's high-water mark (mapped file pages count), peak anonymous
memory the highest value seen. The rows go into benches/RESULTS.md between its markers; rows of the same day and CPU
are replaced. Linux, Python 3.8, standard library.
"""

import argparse
import array
import datetime
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "scripts"))
import program  # noqa: E402

LAYERS, WIDTH, RANK = 30, 2048, 64  # 30 × 2048 × 2048 × 4 bytes = 503 MB
TITLE = "## Whole commands on a 500 MB model (`benches/whole_process.py`)"
BEGIN, END = "<!-- whole_process: begin -->", "<!-- whole_process: end -->"
HEADER = (
    "| date | CPU | command | seconds, median (min–max) | against cp | against cp + fsync | peak RSS | peak anonymous |\n"
    "|---|---|---|---|---|---|---|---|"
)


# ---- the model: a chain of MatMul and Relu, in protobuf's wire format ----


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def number(field, value):
    return varint(field << 3) + varint(value)


def block(field, data):
    if isinstance(data, str):
        data = data.encode()
    return varint(field << 3 | 2) + varint(len(data)) + data


def node(op, name, inputs, output):
    return b"".join([block(1, i) for i in inputs] + [block(2, output), block(3, name), block(4, op)])


def value_info(name):
    shape = block(1, block(2, "n")) + block(1, number(1, WIDTH))
    return block(1, name) + block(2, block(1, number(1, 1) + block(2, shape)))


def weights():
    """One matrix of plausible floats; each layer gets it rotated by a prime number of values."""
    rng = random.Random(0)
    tile = array.array("f", (rng.gauss(0, 0.02) for _ in range(1 << 16)))
    matrix = (tile * (WIDTH * WIDTH // len(tile))).tobytes()
    for layer in range(LAYERS):
        cut = 4 * 7919 * layer % len(matrix)
        yield memoryview(matrix)[cut:], memoryview(matrix)[:cut]


def write_model(path):
    """Streams the file, so that this process stays small."""
    raw_size = WIDTH * WIDTH * 4
    nodes, heads, value = b"", [], "x"
    for layer in range(LAYERS):
        last = layer == LAYERS - 1
        name, weight = f"/layers.{layer}/MatMul", f"onnx::MatMul_{100 + layer}"
        nodes += block(1, node("MatMul", name, [value, weight], "y" if last else f"{name}_output_0"))
        if not last:
            relu = f"/act/Relu_{layer}" if layer else "/act/Relu"
            nodes += block(1, node("Relu", relu, [f"{name}_output_0"], f"{relu}_output_0"))
            value = f"{relu}_output_0"
        inner = number(1, WIDTH) * 2 + number(2, 1) + block(8, weight) + varint(9 << 3 | 2) + varint(raw_size)
        heads.append(varint(5 << 3 | 2) + varint(len(inner) + raw_size) + inner)
    before = nodes + block(2, "main_graph")
    after = block(11, value_info("x")) + block(12, value_info("y"))
    size = len(before) + sum(map(len, heads)) + LAYERS * raw_size + len(after)
    temp = path.with_suffix(".partial")
    with open(temp, "wb") as out:
        out.write(number(1, 8) + block(2, "bone-onnx benches/whole_process.py") + varint(7 << 3 | 2) + varint(size) + before)
        for head, parts in zip(heads, weights()):
            out.write(head)
            for part in parts:
                out.write(part)
        out.write(after + block(8, block(1, "") + number(2, 17)))
    os.replace(temp, path)


# ---- measuring ----


def run(command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()[-2000:]
        sys.exit(f"whole_process: exit status {done.returncode} from {' '.join(map(str, command))}\n{said}")


def clock(command, output, fsync):
    output.unlink(missing_ok=True)
    os.sync()
    started = time.perf_counter()
    run(command)
    if fsync:
        with open(output, "rb") as f:
            os.fsync(f.fileno())
    return time.perf_counter() - started


def kib(status):
    """VmHWM and RssAnon from /proc/PID/status; 0 where absent, as for a zombie."""
    found = {b"VmHWM": 0, b"RssAnon": 0}
    with open(status, "rb") as f:
        for line in f:
            name = line.partition(b":")[0]
            if name in found:
                found[name] = int(line.split()[1])
    return found[b"VmHWM"], found[b"RssAnon"]


def memory(command, output):
    """Peak RSS and peak anonymous memory of the process, in bytes. (ru_maxrss would count this process at the fork.)"""
    output.unlink(missing_ok=True)
    os.sync()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rss = anonymous = 0
    while child.poll() is None:
        try:
            now = kib(f"/proc/{child.pid}/status")
            rss, anonymous = max(rss, now[0]), max(anonymous, now[1])
        except OSError:
            pass
        time.sleep(0.0005)
    if child.returncode:
        sys.exit(f"whole_process: exit status {child.returncode} from {' '.join(map(str, command))}")
    return rss * 1024, anonymous * 1024


def cpu_name():
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def megabytes(size):
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def measure(args):
    args.dir.mkdir(parents=True, exist_ok=True)
    base, injected, merged, copy = (args.dir / name for name in ("base.onnx", "injected.onnx", "merged.onnx", "copy.onnx"))
    say(f"writing {base}")
    write_model(base)
    inject = [args.bin, "inject", base, "-o", injected, "--target-modules", "all-linear", "--r", str(RANK)]
    inject += ["--init-weights", "false"]
    run(inject)
    again = [str(args.dir / "injected-again.onnx") if part is injected else part for part in inject]
    fold = [args.bin, "fold", injected, "-o", merged]
    cases = [
        ("cp", ["cp", injected, copy], copy, False),
        ("cp + fsync", ["cp", injected, copy], copy, True),
        ("fold", fold, merged, False),
        ("fold --no-sync", [*fold, "--no-sync"], merged, False),
        ("inject", again, Path(again[4]), False),
    ]
    times = {name: [] for name, *_ in cases}
    for turn in range(args.runs + 1):
        for name, command, output, fsync in cases:
            seconds = clock(command, output, fsync)
            if turn:  # the first round warms up
                times[name].append(seconds)
        say(f"round {turn} of {args.runs}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items() if t))
    peaks = {name: [memory(command, output) for _ in range(3)] for name, command, output, fsync in cases if not fsync}
    if not 0.99 < merged.stat().st_size / base.stat().st_size < 1.01:
        sys.exit(f"whole_process: {merged} is {merged.stat().st_size} bytes, the base {base.stat().st_size}")
    version = subprocess.run([args.bin, "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
    sizes = f"{megabytes(injected.stat().st_size)}, {LAYERS} layers, r = {RANK}"
    labels = {"fold": f"fold ({version}), on the disk when it ends", "fold --no-sync": "fold --no-sync, which like cp does not wait", "inject": f"inject ({version}; reads {megabytes(base.stat().st_size)})"}
    labels["cp"] = f"cp ({sizes})"
    plain, synced = (statistics.median(times[name]) for name in ("cp", "cp + fsync"))
    rows = []
    for name, *_ in cases:
        middle = statistics.median(times[name])
        rss, anonymous = (max(peak) for peak in zip(*peaks[name])) if name in peaks else (None, None)
        rows.append(
            f"| {datetime.date.today().isoformat()} | {cpu_name()}, {os.cpu_count()} cores | {labels.get(name, name)} "
            f"| {middle:.2f} ({min(times[name]):.2f}–{max(times[name]):.2f}) | {middle / plain:.2f}× "
            f"| {middle / synced:.2f}× | {megabytes(rss) if rss else ''} | {megabytes(anonymous) if rss else ''} |"
        )
    if not args.keep:
        for path in (base, injected, merged, copy, Path(again[4])):
            path.unlink(missing_ok=True)
    return rows


def update(results, rows, section=(TITLE, BEGIN, END, HEADER)):
    """Puts the rows between the markers; earlier rows stay, those of the same day, CPU and first cell are replaced."""
    title, begin, end, header = section
    text = results.read_text(encoding="utf-8") if results.is_file() else "# Results\n"
    if begin not in text or end not in text:
        text = text.rstrip("\n") + f"\n\n{title}\n\n{begin}\n{header}\n{end}\n"
    head, rest = text.split(begin, 1)
    body, tail = rest.split(end, 1)
    # Tables of several models have the model after the CPU.
    cells = 3 + header.startswith("| date | CPU | model |")
    key = lambda row: row.split("|")[1:cells]
    new = [key(row) for row in rows]
    old = [line for line in body.splitlines() if line.startswith("| 2") and key(line) not in new]
    temp = results.with_name(f".{results.name}.partial")
    temp.write_text(f"{head}{begin}\n{header}\n" + "\n".join(old + rows) + f"\n{end}{tail}", encoding="utf-8")
    os.replace(temp, results)


def say(line):
    print(f"whole_process: {line}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--dir", type=Path, default=ROOT / "target/whole_process", help="for 2.5 GB of files; a disk, not tmpfs")
    parser.add_argument("--runs", type=int, default=9, help="timed rounds after one to warm up (default 9)")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--no-write", action="store_true", help="print the rows only")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs must be 1 or more")
    args.bin, args.dir = program.found(args.bin), args.dir.absolute()
    rows = measure(args)
    print("\n".join([HEADER, *rows]))
    if not args.no_write:
        update(ROOT / "benches/RESULTS.md", rows)
        say("written to benches/RESULTS.md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
