"""The checks of scripts/interop.py; runs in the environment's Python, the settings are JSON in its first argument."""

import json
import re
import shutil
import sys
import tempfile
import time
import traceback
from functools import cache, partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tables import CASES, EVENTS, FULL_RANK, READERS, SWAPPED, TAGS, TRAIN, WRITTEN
from tools import EFFECT, TOLERANCE, Cli, Failed, Worst, differ, run, session, start_pefts


class Checks:
    """All checks as (line, function); a function takes a folder of its own and a Worst, and raises Failed."""

    def __init__(self, settings, folder):
        self.goldens = Path(settings["goldens"])
        self.cli = Cli(settings["bin"])
        self.folder = folder
        self.pefts = start_pefts(settings["goldens"], folder)

    def close(self):
        for peft in self.pefts.values():
            peft.close()

    def all(self):
        yield from self.exports()
        yield from self.golden_directories()
        yield from self.imports()
        yield from self.hot_swaps()
        yield "events     read by TensorBoard", self.events

    # -- data

    def base(self, onnx):
        return self.goldens / f"{onnx}.onnx"

    @cache
    def weights(self, model):
        """The base model's parameters by name, and the data beside them."""
        return load_file(self.goldens / model / "base.safetensors")

    @cache
    def feeds(self, onnx):
        stored = self.weights(onnx.partition("/")[0])
        if onnx.startswith("bert"):
            return {name: stored[f"data.{name}"] for name in ("input_ids", "attention_mask")}
        return {"x": stored["x"].reshape(4, 4, 12) if onnx.endswith("matmul") else stored["x"]}

    @cache
    def data(self, onnx):
        """The training data, as a file."""
        model = onnx.partition("/")[0]
        stored = self.weights(model)
        if model == "bert":
            arrays = {**self.feeds(onnx), "labels": stored["data.labels"]}
        else:
            arrays = {**self.feeds(onnx), "target": stored["y"].reshape(*self.feeds(onnx)["x"].shape[:-1], -1)}
        path = self.folder / f"{onnx.replace('/', '-')}-data.safetensors"
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)
        return path

    def train(self, onnx, injected, folder, lr="0.05"):
        """The trained model's file."""
        self.cli("train", f"{TRAIN[onnx]} --lr {lr}", model=injected, out=folder, data=self.data(onnx))
        return folder / "injected.onnx"

    @cache
    def make(self, case):
        """The case's model, its file."""
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder))
        injected = folder / "injected.onnx"
        self.cli("inject", case.flags, model=self.base(case.onnx), out=injected)
        return self.train(case.onnx, injected, folder / "trained") if case.trained else injected

    def load(self, peft_type, model, directory, folder):
        """What peft makes of a directory: its arrays. It must miss no tensor and find none that it does not know."""
        peft = self.pefts[READERS[peft_type]]
        directory = the_directory(directory)
        answer, arrays = peft("load", folder / f"peft-{peft_type}.npz", model=model, directory=directory)
        for what in ("missing", "unexpected"):
            if answer[what]:
                raise Failed(f"peft {peft.version} calls {', '.join(answer[what])[:200]} {what}")
        return arrays

    # -- what bone-onnx exports, peft loads

    def exports(self):
        for case in CASES:
            for peft_type in case.types:
                line = f"export   {case.onnx}: {case.name}, as {peft_type} -> peft {READERS[peft_type]}"
                if peft_type == "LORA" and "--init-weights bat" in case.flags:
                    yield line, partial(self.export_bat_as_lora, case)
                else:
                    yield line, partial(self.export, case, peft_type)

        case = CASES[0]
        line = f"export   {case.onnx}: {case.name}, as LORA in .onnx_adapter -> onnxruntime {ort.__version__}"
        yield line, partial(self.export_lora_parameters, case)

    def export(self, case, peft_type, folder, worst):
        injected = self.make(case)
        expected = run(injected, self.feeds(case.onnx))
        name = re.search(r"--adapter-name \S+", case.flags)
        flags = f"--peft-type {peft_type} {name.group() if name else ''}"
        self.cli("export", flags, model=injected, out=folder / peft_type)
        arrays = self.load(peft_type, case.model, folder / peft_type, folder)
        differ("the adapter", arrays["base"], expected)
        for name in case.full:
            differ(f"{name}, which should be trained", self.weights(case.model)[name], arrays[f"weight.{name}"])
        worst.agree("peft's output and the injected model's", expected, arrays["y"])
        worst.agree("peft's merged output and the injected model's", expected, arrays["merged"])

    def export_bat_as_lora(self, case, folder, worst):
        """BAT is no LoRA: what bone-onnx says is lost of each layer is what is lost, and at full rank nothing is."""
        injected = self.make(case)
        self.cli("export", "--peft-type MISS", model=injected, out=folder / "miss")
        whole = self.load("MISS", case.model, folder / "miss", folder)
        base = self.weights(case.model)
        told = self.cli("export", "--peft-type LORA", model=injected, out=folder / "lora")["relative_errors"]
        near = self.load("LORA", case.model, folder / "lora", folder)
        if not told:
            raise Failed("adapter export --json names no relative_errors for a BAT adapter")
        for module, error in told.items():
            weight = f"weight.{module}.weight"
            change = whole[weight].astype(np.float64) - base[f"{module}.weight"]
            left = np.linalg.norm(whole[weight] - near[weight].astype(np.float64)) / np.linalg.norm(change)
            worst.agree(f"{module}: the relative error found and the one told", np.array(error), left)
        if max(told.values()) < EFFECT:
            raise Failed("a LoRA of rank r lost nothing of a BAT adapter, so this check proves nothing")
        self.cli("export", f"--peft-type LORA --lora-rank {FULL_RANK}", model=injected, out=folder / "full")
        full = self.load("LORA", case.model, folder / "full", folder)
        expected = run(injected, self.feeds(case.onnx))
        differ("the adapter", full["base"], expected)
        worst.agree("peft's output at full rank and the injected model's", expected, full["y"])

    def export_lora_parameters(self, case, folder, worst):
        """The LoRA form of .onnx_adapter, as ONNX Runtime reads it: each pair's product is the change of the weight."""
        injected = self.make(case)
        self.cli("export", "--peft-type MISS", model=injected, out=folder / "miss")
        whole = self.load("MISS", case.model, folder / "miss", folder)
        base = self.weights(case.model)
        self.cli("export", "--peft-type LORA --format onnx_adapter", model=injected, out=folder / "lora.onnx_adapter")
        read = ort.AdapterFormat.read_adapter(str(folder / "lora.onnx_adapter")).get_parameters()
        names = sorted(read)
        firsts = [name for name in names if ".lora_A" in name]
        seconds = [name.replace(".lora_A", ".lora_B") for name in firsts]
        if not firsts or sorted(firsts + seconds) != names:
            raise Failed(f"pairs of .lora_A and .lora_B were expected, not {', '.join(names)[:200]}")
        for first, second in zip(firsts, seconds, strict=True):
            module = first.partition(".lora_A")[0]
            change = whole[f"weight.{module}.weight"] - base[f"{module}.weight"]
            differ(module, change, np.zeros_like(change))
            a, b = read[first].numpy(), read[second].numpy()
            product = b @ a if a.shape[1] == change.shape[1] else (a @ b).T  # [out, in], or as MatMul has it
            worst.agree(f"{module}: the pair's product and the change of the weight", change, product)

    # -- peft's golden directories

    def golden_directories(self):
        stored = {}
        for file in ("mlp/train_bone", "mlp/train_miss", "bert/train"):
            model = file.partition("/")[0]
            arrays = load_file(self.goldens / f"{file}.safetensors")
            stored.update({f"{model}/{key}": value for key, value in arrays.items()})
        for file in sorted(self.goldens.glob("*/*/adapter_config.json")):
            directory, config = file.parent, json.loads(file.read_text())
            model, kind = directory.parent.name, config["peft_type"]
            name = f"{model}/{directory.name}"
            bases = [base for base in TRAIN if base.startswith(f"{model}/")]
            before = stored[f"{name}/{'logits_final' if model == 'bert' else 'pred_reloaded_from_disk'}"]
            yield (
                f"golden   {name} -> peft {READERS[kind]}",
                partial(self.golden, kind, model, directory, before),
            )
            for onnx in bases:
                yield (
                    f"golden   {name} -> {onnx} -> {kind} -> peft {READERS[kind]}",
                    partial(self.golden_again, kind, onnx, directory),
                )
            for out in ("BONE", "MISS", "LORA"):
                if out == "BONE" and (config["init_weights"] == "mini" or config["bias"] != "none"):
                    continue  # BONE has no mini, and does not save biases
                yield (
                    f"golden   {name} converted to {out} -> peft {READERS[out]}",
                    partial(self.golden_converted, kind, out, bases[0], directory),
                )

    def golden(self, kind, model, directory, before, folder, worst):
        """No bone-onnx: this environment's peft gives what was stored when the goldens were made."""
        worst.agree("peft's output and the stored one", before, self.load(kind, model, directory, folder)["y"])

    def golden_again(self, kind, onnx, directory, folder, worst):
        """Imported, exported again."""
        model = onnx.partition("/")[0]
        expected = self.load(kind, model, directory, folder)["y"]
        imported = folder / "imported.onnx"
        self.cli("import", model=self.base(onnx), directory=directory, out=imported)
        worst.agree("the imported model's output and peft's", expected, run(imported, self.feeds(onnx)))
        self.cli("export", f"--peft-type {kind}", model=imported, out=folder / "exported")
        exported = self.load(kind, model, folder / "exported", folder)
        worst.agree("peft's output after the way through bone-onnx and before", expected, exported["y"])

    def golden_converted(self, kind, out, onnx, directory, folder, worst):
        """From a directory to another, with no injected model between; BAT as LoRA at full rank."""
        model = onnx.partition("/")[0]
        expected = self.load(kind, model, directory, folder)["y"]
        bat = json.loads((directory / "adapter_config.json").read_text())["init_weights"] == "bat"
        flags = f"--peft-type {out}" + (f" --lora-rank {FULL_RANK}" if bat and out == "LORA" else "")
        self.cli("convert", flags, directory=directory, model=self.base(onnx), out=folder / out)
        worst.agree(f"peft's output as {kind} and as {out}", expected, self.load(out, model, folder / out, folder)["y"])

    # -- what peft writes, bone-onnx folds

    def imports(self):
        for name, model, adapters, orders in WRITTEN:
            kind = name.partition(",")[0]
            version = READERS[kind.upper()]
            onnx = {"mlp": "mlp/base_gemm", "bert": "bert/base"}[model]
            for order in orders:
                spelled = f" merged {' then '.join(order)}" if len(orders) > 1 else ""
                yield (
                    f"import   peft {version} -> {onnx}: {name}{spelled}",
                    partial(self.imported, kind, version, onnx, adapters, order),
                )

    def imported(self, kind, version, onnx, adapters, order, folder, worst):
        request = dict(model=onnx.partition("/")[0], kind=kind, adapters=adapters, order=order, seed=3)
        answer, arrays = self.pefts[version]("write", folder / "write.npz", directory=folder / "peft", **request)
        leaked = any(".bone_block." in key for key in answer["keys"])
        if kind == "bone" and len(adapters) > 1 and not leaked:
            raise Failed(f"peft {version} wrote no other adapter's tensors into a file, which this check is for")
        differ("the adapter", arrays["base"], arrays["merged"])
        directory = {name: folder / "peft" / ("" if name == "default" else name) for name in adapters}
        feeds = self.feeds(onnx)

        # fold BASE --adapter DIR …
        merged = folder / "merged.onnx"
        self.cli("fold", " ".join(f"--adapter {directory[name]}" for name in order), model=self.base(onnx), out=merged)
        worst.agree("the folded model's output and merge_and_unload's", arrays["merged"], run(merged, feeds))

        # adapter import, one after the other, then fold
        model = self.base(onnx)
        for number, name in enumerate(adapters):
            out = folder / f"imported-{number}.onnx"
            self.cli("import", f"--adapter-name {name}", model=model, directory=directory[name], out=out)
            model = out
        again = folder / "merged-again.onnx"
        self.cli("fold", f"--adapter-names {','.join(order)}", model=model, out=again)
        worst.agree("the imported and folded model's and merge_and_unload's", arrays["merged"], run(again, feeds))

    # -- stock ONNX Runtime swaps exported adapters

    def events(self, folder, worst):
        """A run left alone, one that goes on from a checkpoint whose metrics were cut, and one whose events are lost."""
        onnx = EVENTS
        model = folder / "injected.onnx"
        self.cli("inject", "--target-modules all-linear --r 4", model=self.base(onnx), out=model)
        data = self.data(onnx)
        flags = f"--loss mse --labels target --lr 0.05 --eval-data {data} --eval-steps 2 --save-steps 3"
        for name in ("alone", "resumed", "lost"):
            out = folder / name
            self.cli("train", flags, model=model, out=out, data=data)
            if name == "alone":
                check_events(out, 5, worst)
                continue
            # The state in which a process that was killed after step 4 leaves it.
            shutil.rmtree(out / "checkpoint-5")
            before = check_events(out, 5, worst)
            if name == "lost":
                shutil.rmtree(out / "tensorboard")
            self.cli("train", f"{flags} --resume", model=model, out=out, data=data)
            after = check_events(out, 5, worst)
            kept = [event == before[at] for at, event in enumerate(after) if event.step <= 3]
            if name == "resumed" and not all(kept):
                raise Failed("the events before the checkpoint are others after a resume")

    def hot_swaps(self):
        for name, onnx, flags in SWAPPED:
            yield (
                f"hot swap {onnx}: {name} -> onnxruntime {ort.__version__}",
                partial(self.hot_swap, onnx, flags),
            )

    def hot_swap(self, onnx, flags, folder, worst):
        """`a` is trained in the session's own model, `b` in another one under another name."""
        feeds = self.feeds(onnx)
        injected = {name: folder / f"{name}-injected.onnx" for name in "ab"}
        self.cli("inject", f"{flags} --overridable", model=self.base(onnx), out=injected["a"])
        self.cli("inject", f"{flags} --adapter-name elsewhere", model=self.base(onnx), out=injected["b"])
        expected, adapters = {None: run(self.base(onnx), feeds)}, {None: None}
        for name, lr, slot in (("a", "0.05", ""), ("b", "0.02", "--slot default")):
            trained = self.train(onnx, injected[name], folder / name, lr)
            self.cli("fold", model=trained, out=folder / f"{name}.onnx")
            expected[name] = run(folder / f"{name}.onnx", feeds)
            self.cli("export", f"--format onnx_adapter {slot}", model=trained, out=folder / f"{name}.onnx_adapter")
            adapters[name] = ort.LoraAdapter()
            adapters[name].Load(str(folder / f"{name}.onnx_adapter"))
            held = ort.AdapterFormat.read_adapter(str(folder / f"{name}.onnx_adapter")).get_parameters()
            if "--modules-to-save" in flags and not any(key.startswith("lin1.") for key in held):
                raise Failed(
                    f"the .onnx_adapter holds {', '.join(held)}, but nothing of lin1, which was trained in full"
                )
        for one, two in ((None, "a"), (None, "b"), ("a", "b")):
            differ("the adapters", expected[one], expected[two])
        on = session(injected["a"])
        for name in (None, "a", "b", "a", None, "b", "b", None):
            what = f"adapter {name} and its folded model" if name else "no adapter and the base"
            worst.agree(f"the session with {what}", expected[name], run(on, feeds, adapters[name]))


def the_directory(path):
    """Where adapter_config.json is: `path`, or the only folder in it (peft puts a named adapter into one)."""
    found = [config.parent for config in (*path.glob("adapter_config.json"), *path.glob("*/adapter_config.json"))]
    if len(found) != 1:
        raise Failed(f"{len(found)} adapter_config.json where one was expected")
    return found[0]


def check_events(out, steps, worst):
    """Compares all scalars in a run's folder, as TensorBoard reads them, with its metrics.jsonl; the loss's events."""
    read = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    expected = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        for key, tag in TAGS.items():
            if key in line:
                expected.setdefault(tag, []).append((line["step"], float(np.float32(line[key]))))
    if [step for step, _ in expected["train/loss"]] != list(range(1, steps + 1)):
        raise Failed(f"{out.name}: metrics.jsonl has the steps {expected['train/loss']}")
    for tag in sorted(set(expected) | set(found)):
        if expected.get(tag) != found.get(tag):
            raise Failed(f"{out.name}: {tag} is {found.get(tag)} and should be {expected.get(tag)}")
    times = [event.wall_time for event in read.Scalars("train/loss")]
    if times != sorted(times) or not 0 <= time.time() - times[0] < 3600:
        raise Failed(f"{out.name}: wall times {times}")
    return read.Scalars("train/loss")


def main():
    settings = json.loads(sys.argv[1])
    results = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="interop-") as temporary:
        root = Path(settings["keep"] or temporary)
        root.mkdir(parents=True, exist_ok=True)
        checks = Checks(settings, root)
        for number, (line, check) in enumerate(checks.all()):
            if settings["only"] not in line:
                continue
            folder = root / f"{number:03}"
            folder.mkdir()
            worst, reason = Worst(), None
            try:
                check(folder, worst)
            except Failed as error:
                reason = str(error)
            except Exception as error:  # a check that cannot be run has failed; the others go on
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
            name = " ".join(line.split())
            results.append({"check": name, "passed": reason is None, "worst": worst.value, "reason": reason})
            if not settings["json"]:
                print(f"{'FAILED' if reason else 'ok':6} {worst.value:7.1e}  {line}", flush=True)
                if reason:
                    print(f"                {reason}", flush=True)
        checks.close()
    return report(results, settings["json"], time.monotonic() - started)


def report(results, as_json, seconds):
    failed = [result for result in results if not result["passed"]]
    if as_json:
        counts = {"passed": len(results) - len(failed), "failed": len(failed)}
        print(json.dumps({"tolerance": TOLERANCE, **counts, "seconds": round(seconds, 1), "checks": results}, indent=1))
        return int(bool(failed) or not results)
    if failed:
        print("\nfailed:")
        for result in failed:
            print(f"  {result['check']}\n    {result['reason']}")
    print(f"\n{len(results) - len(failed)} passed, {len(failed)} failed")
    return int(bool(failed) or not results)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
