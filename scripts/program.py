"""Which bone-onnx the scripts run: --bin, else BONE_ONNX_BIN, else the release build."""

import os
import sys
from pathlib import Path

RELEASE = Path(__file__).resolve().parents[1] / "target/release/bone-onnx"


def add_bin(parser):
    default = Path(os.environ.get("BONE_ONNX_BIN", RELEASE))
    parser.add_argument("--bin", type=Path, default=default, metavar="FILE", help=f"the bone-onnx program (default {default})")


def found(path):
    """Its absolute path; ends the script where there is none."""
    if not os.access(path, os.X_OK):
        sys.exit(f"no program at {path}: cargo build --release, or say where it is with --bin")
    return path.absolute()
