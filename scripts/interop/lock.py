#!/usr/bin/env python3
"""Writes the hashes into requirements.txt and peft-*.txt, after a version in them was changed.

    scripts/interop/lock.py

Asks pip for the wheel of each pinned version, for CPython 3.11 to 3.14 on Linux x86_64, and writes what it would
install; a version that is not pinned is an error. Nothing is installed. Dependencies are not followed: the files
list all of them, since torch's own (3 GB of CUDA libraries) must stay out.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_26_x86_64", "manylinux2014_x86_64")


def wheels(file, python, folder):
    """(name==version, sha256) of each wheel that pip would take for this Python."""
    report = Path(folder) / "report.json"
    plain = Path(folder) / "plain.txt"
    plain.write_text("\n".join(pinned(file)) + "\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--implementation", "cp", "--target", folder]
    command += ["--python-version", python, "--report", str(report), "-r", str(plain)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(command, check=True)
    for item in json.loads(report.read_text())["install"]:
        yield (
            item["metadata"]["name"].lower().replace("_", "-"),
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )


def pinned(file):
    lines = [line.split()[0] for line in file.read_text().splitlines() if line.strip() and line[0] not in "# "]
    for line in lines:
        if "==" not in line:
            sys.exit(f"{file.name}: {line} has no version: write {line}==VERSION")
    return lines


def main():
    here = Path(__file__).resolve().parent
    for file in [here / "requirements.txt", *sorted(here.glob("peft-*.txt"))]:
        hashes = {line.partition("==")[0].lower(): [] for line in pinned(file)}
        with tempfile.TemporaryDirectory() as folder:
            for python in PYTHONS:
                for name, sha256 in wheels(file, python, folder):
                    if sha256 not in hashes[name]:
                        hashes[name].append(sha256)
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        for line in pinned(file):
            words = [line, *(f"--hash=sha256:{sha256}" for sha256 in hashes[line.partition("==")[0].lower()])]
            head.append(" \\\n    ".join(words))
        file.write_text("\n".join(head) + "\n")


if __name__ == "__main__":
    main()
