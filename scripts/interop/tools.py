"""What the checks work with: the command line, peft in its own process, ONNX Runtime, and what counts as agreeing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from environment import PEFTS, Environment

TOLERANCE = 1e-5
# An adapter that changes no output by more than this would prove nothing.
EFFECT = 1e-3

# How bone-onnx is called; a check adds flags behind.
COMMANDS = {
    "inject": "inject {model} -o {out}",
    "train": "train {model} -o {out} --data {data} --steps 5 --no-shuffle",
    "import": "adapter import {model} {directory} -o {out}",
    "export": "adapter export {model} -o {out}",
    "convert": "adapter convert {directory} --base {model} -o {out}",
    "fold": "fold {model} -o {out}",
}


class Failed(Exception):
    """A check's reason."""


class Cli:
    def __init__(self, binary):
        self.binary = binary
        self.env = dict(os.environ, RUST_BACKTRACE="0")

    def __call__(self, name, flags="", **values):
        """Runs one of COMMANDS with more flags behind; the JSON that it prints."""
        values = {key: str(value) for key, value in values.items()}
        words = [word.format(**values) for word in COMMANDS[name].split()] + flags.split()
        done = subprocess.run(
            [self.binary, *words, "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.env,
            timeout=300,
        )
        if done.returncode:
            raise Failed(f"bone-onnx {' '.join(words)} exited {done.returncode}: {reason(done.stderr)}")
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise Failed(f"bone-onnx {words[0]} --json printed no JSON object: {done.stdout[:80]!r}") from None


def reason(stderr):
    """What went wrong, in one line: from the error, or the panic, on."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()] or ["nothing was said"]
    first = next((n for n, line in enumerate(said) if line.startswith("error") or "panicked at" in line), len(said) - 1)
    return " ".join(said[first:])[:400]


class Peft:
    """One release of peft, in a process of its own; see worker.py for the requests."""

    def __init__(self, version, goldens, log):
        here = Environment(Path(sys.prefix).parent)
        command = [here.executable, str(Path(__file__).with_name("worker.py")), goldens]
        self.version = version
        self.log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command,
                env=here.variables(version),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, do, arrays, **values):
        """What the worker answers, and its arrays."""
        values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        try:
            self.process.stdin.write(json.dumps({"do": do, "arrays": str(arrays), **values}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            said = Path(self.log).read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise Failed(f"peft {self.version}'s process ended: {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"peft {self.version}: {answer['error']}")
        with np.load(arrays) as stored:
            return answer, dict(stored)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def start_pefts(goldens, folder):
    return {version: Peft(version, goldens, os.path.join(folder, f"peft-{version}.log")) for version in PEFTS}


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path_or_session, feeds, adapter=None):
    """The first output; `adapter` is an ort.LoraAdapter."""
    on = path_or_session if isinstance(path_or_session, ort.InferenceSession) else session(path_or_session)
    options = ort.RunOptions()
    if adapter is not None:
        options.add_active_adapter(adapter)
    return on.run(None, feeds, options)[0]


class Worst:
    """The largest difference that a check has met."""

    def __init__(self):
        self.value = 0.0

    def agree(self, what, expected, found, tolerance=TOLERANCE):
        """`found` may come in another shape (rows as [4, 4, n] for [16, n])."""
        if expected.size != found.size:
            raise Failed(f"{what}: {found.shape} where {expected.shape} was expected")
        found = found.reshape(expected.shape)
        if not (np.isfinite(expected).all() and np.isfinite(found).all()):
            raise Failed(f"{what}: not finite")
        worst = float(np.abs(expected.astype(np.float64) - found).max())
        self.value = max(self.value, worst)
        if worst > tolerance:
            raise Failed(f"{what}: differ by {worst:.1e}, more than {tolerance:.0e}")


def differ(what, a, b):
    """Fails where an adapter does nothing, for then agreement proves nothing."""
    if float(np.abs(a - b.reshape(a.shape)).max()) < EFFECT:
        raise Failed(f"{what}: makes no difference, so this check proves nothing")
