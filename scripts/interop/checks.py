"""The checks of scripts/interop.py; runs in the environment's Python, with the settings as JSON in its first argument."""

import json
import re
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file, save_file

from tools import TOLERANCE, Cli, Failed, Worst, differ, run, session, start_pefts

# peft_type -> the release that reads it here
READERS = {"BONE": "0.18.1", "MISS": "0.21.2", "LORA": "0.21.2"}

MLP = "--target-modules lin0,lin1"
QV = "--target-modules query,value"
TRAINED = True  # five steps, for values where the initial ones are zeros


@dataclass(frozen=True)
class Case:
    """A model that bone-onnx makes: injected with these flags, then perhaps trained."""

    name: str
    onnx: str
    flags: str
    trained: bool = False
    types: tuple = ("BONE", "MISS", "LORA")

    @property
    def model(self):
        return self.onnx.partition("/")[0]


RANDOM = "--init-weights false --seed 7"
CASES = [
    Case("random", "mlp/base_gemm", f"{MLP} --r 4 {RANDOM}"),
    Case("random, MatMul", "mlp/base_matmul", f"{MLP} --r 4 {RANDOM}"),
    Case("random, r does not divide in", "mlp/base_gemm", f"{MLP} --r 5 {RANDOM}"),
    Case("random, adapter named mine", "mlp/base_gemm", f"{MLP} --r 4 {RANDOM} --adapter-name mine"),
    Case("trained", "mlp/base_gemm", f"{MLP} --r 4", TRAINED),
    Case("trained BAT", "mlp/base_gemm", f"{MLP} --r 4 --init-weights bat", TRAINED),
    Case("trained mini", "mlp/base_gemm", f"{MLP} --r 4 --init-weights mini --mini-r 2", TRAINED, ("MISS", "LORA")),
    Case("trained, lin1 saved in full", "mlp/base_gemm", "--target-modules lin0 --r 4 --modules-to-save lin1", TRAINED),
    Case("trained, every bias", "mlp/base_gemm", f"{MLP} --r 4 --bias all", TRAINED, ("MISS", "LORA")),
    Case("trained BAT, every bias", "mlp/base_gemm", f"{MLP} --r 4 --bias all --init-weights bat", TRAINED, ("MISS",)),
    Case("trained, its own biases", "mlp/base_gemm", "--target-modules lin0 --r 4 --bias bone_only", TRAINED, ("MISS", "LORA")),
    Case("random, SEQ_CLS", "bert/base", f"{QV} --r 8 {RANDOM} --task-type SEQ_CLS"),
    Case("random, all-linear, padded", "bert/base", f"--target-modules all-linear --r 5 {RANDOM} --task-type SEQ_CLS"),
    Case("trained BAT", "bert/base", f"{QV} --r 4 --init-weights bat", TRAINED),
    Case("trained mini, classifier saved", "bert/base", f"{QV} --r 4 --init-weights mini --mini-r 4 --modules-to-save classifier", TRAINED, ("MISS", "LORA")),
]
TRAIN_FLAGS = {
    "mlp": "--labels target --loss mse --lr 0.05 --batch-size 16",
    "bert": "--labels labels --loss cross-entropy --lr 0.05 --batch-size 8",
}

# What peft writes here: (name, release, model, {adapter: config}, orders to merge in)
LIN = dict(target_modules=["lin0", "lin1"])
QUERY_VALUE = dict(target_modules=["query", "value"])
SAVE_LIN1 = dict(target_modules=["lin0"], modules_to_save=["lin1"])
BOTH = [["default"], ["other"], ["default", "other"], ["other", "default"]]
WRITTEN = [
    ("bone", "mlp", {"default": dict(r=4, **LIN)}, [["default"]]),
    ("bone, r does not divide in", "mlp", {"default": dict(r=5, **LIN)}, [["default"]]),
    ("bone, BAT", "mlp", {"default": dict(r=4, init_weights="bat", **LIN)}, [["default"]]),
    ("bone, lin1 saved in full", "mlp", {"default": dict(r=4, **SAVE_LIN1)}, [["default"]]),
    ("bone, adapter named mine", "mlp", {"mine": dict(r=4, **LIN)}, [["mine"]]),
    ("bone, two adapters", "mlp", {"default": dict(r=4, **LIN), "other": dict(r=3, **LIN)}, BOTH),
    ("bone, two BAT adapters", "mlp", {n: dict(r=r, init_weights="bat", **LIN) for n, r in (("default", 4), ("other", 2))}, BOTH),
    ("bone, SEQ_CLS", "bert", {"default": dict(r=8, task_type="SEQ_CLS", **QUERY_VALUE)}, [["default"]]),
    ("bone, layer 1 by regex", "bert", {"default": dict(r=8, target_modules=r".*layer\.1\..*(key|dense)")}, [["default"]]),
    ("miss", "mlp", {"default": dict(r=4, **LIN)}, [["default"]]),
    ("miss, mini", "mlp", {"default": dict(r=4, init_weights="mini", mini_r=2, **LIN)}, [["default"]]),
    ("miss, BAT, every bias", "mlp", {"default": dict(r=4, init_weights="bat", bias="all", **LIN)}, [["default"]]),
    ("miss, its own biases", "mlp", {"default": dict(r=4, bias="miss_only", target_modules=["lin0"])}, [["default"]]),
    ("miss, adapter named mine", "mlp", {"mine": dict(r=5, **LIN)}, [["mine"]]),
    ("miss, two adapters", "mlp", {"default": dict(r=4, **LIN), "other": dict(r=3, **LIN)}, BOTH),
    ("miss, all-linear, SEQ_CLS", "bert", {"default": dict(r=5, target_modules="all-linear", task_type="SEQ_CLS")}, [["default"]]),
]


class Checks:
    """All checks as (line, function); a function takes a folder of its own and a Worst, and raises Failed."""

    def __init__(self, settings, folder):
        self.goldens = Path(settings["goldens"])
        self.cli = Cli(settings["binary"])
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

    # -- data

    def base(self, onnx):
        return self.goldens / f"{onnx}.onnx"

    @lru_cache(maxsize=None)
    def feeds(self, onnx):
        stored = load_file(self.goldens / onnx.partition("/")[0] / "base.safetensors")
        if onnx.startswith("bert"):
            return {name: stored[f"data.{name}"] for name in ("input_ids", "attention_mask")}
        return {"x": stored["x"].reshape(4, 4, 12) if onnx.endswith("matmul") else stored["x"]}

    @lru_cache(maxsize=None)
    def data(self, model):
        """The training data, as a file."""
        stored = load_file(self.goldens / model / "base.safetensors")
        path = self.folder / f"{model}-data.safetensors"
        if model == "bert":
            save_file({name: stored[f"data.{name}"] for name in ("input_ids", "attention_mask", "labels")}, path)
        else:
            save_file({"x": stored["x"], "target": stored["y"]}, path)
        return path

    def train(self, model, injected, folder, flags=None):
        """The trained model's file."""
        self.cli("train", flags or TRAIN_FLAGS[model], model=injected, out=folder, data=self.data(model))
        return folder / "injected.onnx"

    @lru_cache(maxsize=None)
    def make(self, case):
        """The case's model, its file."""
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder))
        injected = folder / "injected.onnx"
        self.cli("inject", case.flags, model=self.base(case.onnx), out=injected)
        return self.train(case.model, injected, folder / "trained") if case.trained else injected

    def load(self, peft_type, model, directory, folder, clean=True):
        """What peft makes of a directory: its arrays. `clean`: peft must miss nothing and find nothing it does not know."""
        peft = self.pefts[READERS[peft_type]]
        directory = the_directory(directory)
        answer, arrays = peft("load", folder / f"peft-{peft_type}.npz", model=model, directory=directory)
        for what in ("missing", "unexpected") if clean else ():
            if answer[what]:
                raise Failed(f"peft {peft.version} calls {', '.join(answer[what])[:200]} {what}")
        return arrays

    # -- what bone-onnx exports, peft loads

    def exports(self):
        for case in CASES:
            for peft_type in case.types:
                line = f"export   {case.onnx}: {case.name}, as {peft_type} -> peft {READERS[peft_type]}"
                if peft_type == "LORA" and "--init-weights bat" in case.flags:
                    yield line, lambda folder, worst, case=case: self.export_bat_as_lora(case, folder, worst)
                else:
                    yield line, lambda folder, worst, case=case, kind=peft_type: self.export(case, kind, folder, worst)

    def export(self, case, peft_type, folder, worst):
        injected = self.make(case)
        expected = run(injected, self.feeds(case.onnx))
        name = re.search(r"--adapter-name \S+", case.flags)
        flags = f"--peft-type {peft_type} {name.group() if name else ''}"
        self.cli("export", flags, model=injected, out=folder / peft_type)
        arrays = self.load(peft_type, case.model, folder / peft_type, folder)
        differ("the adapter", arrays["base"], expected)
        worst.agree("peft's output and the injected model's", expected, arrays["y"])
        worst.agree("peft's merged output and the injected model's", expected, arrays["merged"])

    def export_bat_as_lora(self, case, folder, worst):
        """BAT is no LoRA: what bone-onnx says is lost must be the most that is lost, layer by layer."""
        raise Failed("not written yet")

    # -- peft's golden directories

    def golden_directories(self):
        stored = {}
        for file in ("mlp/train_bone", "mlp/train_miss", "bert/train"):
            model = file.partition("/")[0]
            stored.update({f"{model}/{key}": value for key, value in load_file(self.goldens / f"{file}.safetensors").items()})
        for config in sorted(self.goldens.glob("*/*/adapter_config.json")):
            directory = config.parent
            model, name = directory.parent.name, directory.name
            kind = json.loads(config.read_text())["peft_type"]
            before = stored[f"{model}/{name}/{'logits_final' if model == 'bert' else 'pred_reloaded_from_disk'}"]
            yield (
                f"golden   {model}/{name} -> peft {READERS[kind]}",
                lambda folder, worst, a=(kind, model, directory, before): self.golden(*a, folder, worst),
            )
            for onnx in ["bert/base"] if model == "bert" else ["mlp/base_gemm", "mlp/base_matmul"]:
                for out in dict.fromkeys((kind, "MISS")):
                    yield (
                        f"golden   {model}/{name} -> {onnx} -> {out} -> peft {READERS[out]}",
                        lambda folder, worst, a=(kind, out, onnx, directory): self.golden_again(*a, folder, worst),
                    )

    def golden(self, kind, model, directory, before, folder, worst):
        """No bone-onnx: this environment's peft gives what was stored when the goldens were made."""
        worst.agree("peft's output and the stored one", before, self.load(kind, model, directory, folder)["y"])

    def golden_again(self, kind, out, onnx, directory, folder, worst):
        model = onnx.partition("/")[0]
        expected = self.load(kind, model, directory, folder)["y"]
        imported = folder / "imported.onnx"
        self.cli("import", model=self.base(onnx), directory=directory, out=imported)
        worst.agree("the imported model's output and peft's", expected, run(imported, self.feeds(onnx)))
        self.cli("export", f"--peft-type {out}", model=imported, out=folder / "exported")
        exported = self.load(out, model, folder / "exported", folder)
        worst.agree("peft's output after the way through bone-onnx and before", expected, exported["y"])

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
                    lambda folder, worst, a=(kind, version, onnx, adapters, order): self.imported(*a, folder, worst),
                )

    def imported(self, kind, version, onnx, adapters, order, folder, worst):
        request = dict(model=onnx.partition("/")[0], directory=folder / "peft", kind=kind, adapters=adapters, order=order, seed=3)
        answer, arrays = self.pefts[version]("write", folder / "write.npz", **request)
        if kind == "bone" and len(adapters) > 1 and not any(".bone_block." in key for keys in answer["keys"].values() for key in keys):
            raise Failed(f"peft {version} no longer leaks one adapter's tensors into another's file: this check is for that")
        differ("the adapter", arrays["base"], arrays["merged"])
        directory = lambda name: folder / "peft" if name == "default" else folder / "peft" / name
        feeds = self.feeds(onnx)

        # fold BASE --adapter DIR …
        merged = folder / "merged.onnx"
        self.cli("fold", " ".join(f"--adapter {directory(name)}" for name in order), model=self.base(onnx), out=merged)
        worst.agree("the folded model's output and merge_and_unload's", arrays["merged"], run(merged, feeds))

        # adapter import, one after the other, then fold
        model = self.base(onnx)
        for number, name in enumerate(adapters):
            out = folder / f"imported-{number}.onnx"
            self.cli("import", f"--adapter-name {name}", model=model, directory=directory(name), out=out)
            model = out
        again = folder / "merged-again.onnx"
        self.cli("fold", f"--adapter-names {','.join(order)}", model=model, out=again)
        worst.agree("the imported and folded model's output and merge_and_unload's", arrays["merged"], run(again, feeds))

    # -- stock ONNX Runtime swaps exported adapters

    def hot_swaps(self):
        for name, onnx, flags in (
            ("bone", "mlp/base_gemm", f"{MLP} --r 4"),
            ("bone, MatMul, r does not divide in", "mlp/base_matmul", f"{MLP} --r 5"),
            ("BAT", "mlp/base_gemm", f"{MLP} --r 4 --init-weights bat"),
            ("mini", "mlp/base_gemm", f"{MLP} --r 4 --init-weights mini --mini-r 2"),
            ("bone", "bert/base", f"{QV} --r 8"),
        ):
            yield (
                f"hot swap {onnx}: {name} -> onnxruntime {ort.__version__}",
                lambda folder, worst, a=(onnx, flags): self.hot_swap(*a, folder, worst),
            )

    def hot_swap(self, onnx, flags, folder, worst):
        model, feeds = onnx.partition("/")[0], self.feeds(onnx)
        injected = folder / "injected.onnx"
        self.cli("inject", f"{flags} --overridable", model=self.base(onnx), out=injected)
        expected = {None: run(self.base(onnx), feeds)}
        adapters = {None: None}
        for name, lr in (("a", "0.05"), ("b", "0.02")):
            train = TRAIN_FLAGS[model].replace("--lr 0.05", f"--lr {lr}")
            trained = self.train(model, injected, folder / name, train)
            self.cli("fold", model=trained, out=folder / f"{name}.onnx")
            expected[name] = run(folder / f"{name}.onnx", feeds)
            self.cli("export", "--format onnx_adapter", model=trained, out=folder / f"{name}.onnx_adapter")
            adapters[name] = ort.LoraAdapter()
            adapters[name].Load(str(folder / f"{name}.onnx_adapter"))
        for one, two in ((None, "a"), (None, "b"), ("a", "b")):
            differ("the adapters", expected[one], expected[two])
        on = session(injected)
        for name in (None, "a", "b", "a", None, "b", "b", None):
            what = f"the session with adapter {name} and its folded model" if name else "the session without an adapter and the base"
            worst.agree(what, expected[name], run(on, feeds, adapters[name]))


def the_directory(path):
    """Where adapter_config.json is: `path`, or the only folder in it (peft puts a named adapter into one)."""
    found = [config.parent for config in (*path.glob("adapter_config.json"), *path.glob("*/adapter_config.json"))]
    if len(found) != 1:
        raise Failed(f"{len(found)} adapter_config.json where one was expected")
    return found[0]


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
            results.append({"check": " ".join(line.split()), "passed": reason is None, "worst": worst.value, "reason": reason})
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
    sys.exit(main())
