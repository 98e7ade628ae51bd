"""Does with the real peft what scripts/interop.py asks for: one JSON object a line in, one a line out.

Runs in the environment's Python with one peft on PYTHONPATH. Arrays go through .npz files, named in the request as
`arrays`. An answer holds `error` where the request failed.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

GOLDENS = Path(sys.argv[1])
torch.set_num_threads(1)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(12, 20)
        self.act = nn.ReLU()
        self.lin1 = nn.Linear(20, 4)

    def forward(self, x):
        return self.lin1(self.act(self.lin0(x)))


def mlp():
    return MLP()


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = json.loads((GOLDENS / "bert" / "train.json").read_text())["bert_config"]
    return BertForSequenceClassification(BertConfig(**config))


# model -> (how to make it, names of its inputs among the arrays of base.safetensors)
MODELS = {
    "mlp": (mlp, {"x": "x"}),
    "bert": (bert, {"input_ids": "data.input_ids", "attention_mask": "data.attention_mask"}),
}


def base(model):
    module = MODELS[model][0]()
    stored = load_file(GOLDENS / model / "base.safetensors")
    module.load_state_dict({name: stored[name] for name in module.state_dict()})
    return module.eval()


def outputs(model, module):
    stored = load_file(GOLDENS / model / "base.safetensors")
    with torch.no_grad():
        out = module.eval()(**{name: stored[key] for name, key in MODELS[model][1].items()})
    return getattr(out, "logits", out).numpy().copy()


def weights(module):
    return {f"weight.{name}": value.detach().numpy().copy() for name, value in module.named_parameters()}


def load(model, directory, arrays):
    """PeftModel.from_pretrained of a directory.

    Arrays: `base`, `y`, `merged` (the output after merge_and_unload) and the merged model's parameters `weight.<name>`.
    Answers what peft said of the file: `missing` (tensors it wanted), `unexpected` (tensors it did not want).
    """
    results = []
    real = peft.peft_model.set_peft_model_state_dict

    def spy(*args, **kwargs):
        results.append(real(*args, **kwargs))
        return results[-1]

    peft.peft_model.set_peft_model_state_dict = spy
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded = peft.PeftModel.from_pretrained(base(model), directory)
    finally:
        peft.peft_model.set_peft_model_state_dict = real
    with safe_open(os.path.join(directory, "adapter_model.safetensors"), "np") as file:
        held = set(file.keys())
    missing = set(peft.get_peft_model_state_dict(loaded)) - held  # peft's own warning leaves modules_to_save out
    missing.update(str(w.message) for w in said if "missing adapter keys" in str(w.message))
    y = outputs(model, loaded)
    merged = loaded.merge_and_unload()
    np.savez(arrays, base=outputs(model, base(model)), y=y, merged=outputs(model, merged), **weights(merged))
    unexpected = sorted(key for result in results for key in result.unexpected_keys)
    return {"missing": sorted(missing), "unexpected": unexpected}


def write(model, directory, arrays, kind, adapters, order, seed):
    """A fresh model with these adapters ({name: config}), its trainable values made random, saved by save_pretrained.

    Arrays: `base`, and `merged`, the output after merge_and_unload of the adapters of `order`. Answers the `keys` of
    all files.
    """
    config = {"bone": "BoneConfig", "miss": "MissConfig"}[kind]
    names = list(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [getattr(peft, config)(**adapters[name]) for name in names]
    wrapped = peft.get_peft_model(base(model), made[0], adapter_name=names[0])
    for name, its in zip(names[1:], made[1:], strict=True):
        wrapped.add_adapter(name, its)
    generator = torch.Generator().manual_seed(seed)
    trainable = set()
    for name in names:
        wrapped.set_adapter(name)
        trainable.update(key for key, value in wrapped.named_parameters() if value.requires_grad)
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if key in trainable:
                value.add_(torch.randn(value.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(directory)
    keys = []
    for path in Path(directory).rglob("adapter_model.safetensors"):
        with safe_open(path, "np") as file:
            keys.extend(file.keys())
    wrapped.base_model.set_adapter(order)
    merged = wrapped.merge_and_unload(adapter_names=order)
    np.savez(arrays, base=outputs(model, base(model)), merged=outputs(model, merged))
    return {"keys": sorted(keys)}


REQUESTS = {"load": load, "write": write}


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a package prints goes to stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = REQUESTS[request.pop("do")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
