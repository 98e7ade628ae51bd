"""The Python packages of scripts/interop.py: one virtual environment in the cache, and a folder for each peft.

    <cache>/interop-<hash of the pins>/venv           torch, transformers, onnxruntime, ...
    <cache>/interop-<hash of the pins>/peft-0.18.1    put on PYTHONPATH: the last release with Bone
    <cache>/interop-<hash of the pins>/peft-0.21.2    the current one: MiSS and LoRA

torch is installed without the 3 GB of CUDA libraries that it names as dependencies: a CPU never calls them, the loader
only wants to find them. Small libraries of the same names, made with the C compiler that Rust needs anyway, stand in
for them; every function of theirs answers 100, CUDA's "no device".
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from pathlib import Path

from fetch import Failure, cache_dir

HERE = Path(__file__).resolve().parent
PEFTS = ("0.18.1", "0.21.2")
PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))  # those that the hashes were written for, by lock.py
RECIPE = 1  # to be raised with a change of make(): what is in the cache is then made again
MARKER = "complete"
WEEK = 7 * 24 * 3600

CUDA_LIBRARY = re.compile(r"\(NEEDED\).*\[((?:libcu|libnv|libnccl)[^\]]*)\]")
CUDA_SYMBOL = re.compile(r" [Uwv] ((?:__)?(?:cu|nv|nccl)\w+)(?:@(\S+))?$", re.MULTILINE)
# A library's symbols carry its file name as their version; this one's do not.
SYMBOL_VERSIONS = {"libnvshmem_host.so.3": "NVSHMEM"}


class Environment:
    """Where the packages are; `python(peft)` gives the command and the variables to run with."""

    def __init__(self, root):
        self.root = root

    @property
    def executable(self):
        return str(self.root / "venv" / "bin" / "python")

    def variables(self, peft):
        return dict(clean_variables(), PYTHONPATH=str(self.root / f"peft-{peft}"))


def clean_variables():
    """This process's variables less what would lead Python or a package elsewhere; packages stay off the network."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_TARGET", "PIP_USER"))
    }
    return dict(kept, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", PYTHONNOUSERSITE="1", OMP_NUM_THREADS="1")


def ensure(say):
    """The environment, made if it is not there yet or was left half-made."""
    check_platform()
    root = cache_dir() / f"interop-{key()}"
    if is_good(root):
        (root / MARKER).touch()
        return Environment(root)
    if root.exists():
        say(f"{root}: not complete, making it again")
        shutil.rmtree(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".interop-", dir=root.parent))
    try:
        make(staged, say)
        (staged / MARKER).touch()
        try:
            os.rename(staged, root)
        except OSError:
            if not is_good(root):  # unless another process has just put the same thing there
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    remove_others(root)
    return Environment(root)


def remove_others(root):
    """Environments of older pins that nobody has used for a week, and what a killed run has left."""
    for other in [*root.parent.glob("interop-*"), *root.parent.glob(".interop-*")]:
        marker = other / MARKER if (other / MARKER).exists() else other
        if other != root and time.time() - marker.stat().st_mtime > WEEK:
            shutil.rmtree(other, ignore_errors=True)


def key():
    """Changes with the pins, with what is done with them, and with the Python that runs this."""
    digest = hashlib.sha256(repr((RECIPE, sys.version_info[:3], sys.base_prefix)).encode())
    for name in ["requirements", *(f"peft-{version}" for version in PEFTS)]:
        digest.update((HERE / f"{name}.txt").read_bytes())
    return digest.hexdigest()[:12]


def is_good(root):
    return (root / MARKER).is_file() and os.access(root / "venv" / "bin" / "python", os.X_OK)


def check_platform():
    if (platform.system(), platform.machine()) not in (("Linux", "x86_64"), ("Linux", "AMD64")):
        raise Failure(f"the packages are pinned for Linux x86_64, not for {platform.system()} {platform.machine()}")
    if sys.version_info[:2] not in PYTHONS or platform.python_implementation() != "CPython":
        names = ", ".join(".".join(map(str, version)) for version in PYTHONS)
        raise Failure(
            f"the packages are pinned for CPython {names}; this is {sys.version.split()[0]}: run one of those"
        )
    for tool in ("cc", "readelf", "nm"):
        if not shutil.which(tool):
            raise Failure(f"no {tool}: install a C compiler and binutils (build-essential on Debian)")


def make(root, say):
    say("torch, transformers, onnxruntime: installing (once, about 650 MB to download, 1.5 GB on disk)")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    python = root / "venv" / "bin" / "python"
    install(HERE / "requirements.txt", python)
    for version in PEFTS:
        say(f"peft {version}: installing")
        install(HERE / f"peft-{version}.txt", python, "--target", root / f"peft-{version}")
    (torch,) = (root / "venv" / "lib").glob("python*/site-packages/torch/lib")
    stand_in_for_cuda(torch)


def install(requirements, python, *options):
    """pip of this Python, for `python`; every file is checked against its pinned hash."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--require-hashes", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--quiet", "--retries", "2", "--timeout", "30", *options, "-r", requirements]
    env = dict(clean_variables(), PIP_REQUIRE_VIRTUALENV="false", PIP_NO_COLOR="1")
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        if any("No module named pip" in line for line in said):
            raise Failure(
                f"{sys.executable} has no pip; install it (python3 -m ensurepip, or your system's python3-pip)"
            )
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["nothing"]
        raise Failure(
            f"cannot install {requirements.name}: is the package registry reachable? Check the network and pip's "
            f"settings (python3 -m pip config list), then run this again. pip said: {errors[0].strip()[:200]}"
        )


def stand_in_for_cuda(folder):
    """Writes, beside torch's libraries, a library for each of CUDA's that they name, with all they ask of it."""
    needed, symbols = set(), defaultdict(set)
    for library in folder.glob("*.so"):
        needed.update(CUDA_LIBRARY.findall(output("readelf", "-dW", library)))
        for name, version in CUDA_SYMBOL.findall(output("nm", "-D", "--undefined-only", library)):
            symbols[version].add(name)
    with tempfile.TemporaryDirectory() as work:
        source, versions = Path(work) / "cuda.c", Path(work) / "cuda.map"
        for name in sorted(needed):
            version = SYMBOL_VERSIONS.get(name, name)
            source.write_text(
                "".join(f"int {f}(void) {{ return 100; }}\n" for f in sorted(symbols[version] | symbols[""]))
            )
            versions.write_text(f"{version} {{ *; }};\n")
            flags = ["-shared", "-fPIC", "-nostdlib", "-w", f"-Wl,-soname,{name},--version-script={versions}"]
            output("cc", *flags, "-o", folder / name, source)


def output(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=dict(os.environ, LC_ALL="C"))
    if done.returncode:
        raise Failure(f"{command[0]} failed: {done.stderr.strip().splitlines()[:1]}")
    return done.stdout
