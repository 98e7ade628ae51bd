#!/usr/bin/env python3
"""Checks bone-onnx against others' tools: the real peft, and stock ONNX Runtime for Python.

    scripts/interop.py [--bin FILE] [--only WORD] [--json] [--keep DIR]

    export      directories that bone-onnx writes (BONE, MISS, LORA), loaded by peft: the injected model's outputs
    golden      peft's directories in shared/goldens: imported and exported again, or converted, loaded by peft
    import      directories that peft writes here, folded by bone-onnx: the outputs of peft's merge_and_unload
    events      what TensorBoard reads of runs, resumed ones among them: the numbers in metrics.jsonl, every one
    hot swap    two .onnx_adapter files, swapped in one session of ONNX Runtime: the folded models' outputs

Outputs must agree within 1e-5, and differ from the base model's. One line a check; exit 1 if any failed. The packages
(peft 0.18.1 and 0.21.2, torch, onnxruntime 1.31.1, tensorboard 2.21.0) go into the cache of scripts/fetch.py: 26 s the first time on a
46 MB/s network, 1.5 GB. Needs Linux x86_64, CPython 3.11 to 3.14 with venv and pip 22.3 or newer, and a C compiler.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "interop")]

import environment
import program
from fetch import Failure

ROOT = HERE.parent


def say(line):
    print(f"interop: {line}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--goldens", type=Path, default=ROOT.parent / "shared" / "goldens", help="%(default)s")
    parser.add_argument("--only", default="", metavar="WORD", help="only the checks whose line holds this")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="write the files there, a folder a check, and leave them"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout and nothing else there")
    parser.add_argument("--install-only", action="store_true", help="make the environment, check nothing")
    args = parser.parse_args()
    try:
        made = environment.ensure(say)
        if args.install_only:
            print(made.root)
            return 0
        args.bin = program.found(args.bin)
        if args.keep and args.keep.is_dir() and any(args.keep.iterdir()):
            raise Failure(f"{args.keep} is not empty")
        if not (args.goldens / "mlp").is_dir():
            raise Failure(
                f"no {args.goldens}/mlp: the golden data is expected in shared/ beside the checkout; or --goldens"
            )
    except (Failure, OSError) as error:
        print(f"interop.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    settings = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()}
    command = [made.executable, "-B", str(HERE / "interop" / "checks.py"), json.dumps(settings)]
    sys.stdout.flush()
    os.execve(made.executable, command, environment.clean_variables())


if __name__ == "__main__":
    sys.exit(main())
