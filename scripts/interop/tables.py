"""What is tried: the models that bone-onnx makes, the directories that peft writes, the adapters that are swapped."""

from dataclasses import dataclass

# peft_type -> the release that reads it here
READERS = {"BONE": "0.18.1", "MISS": "0.21.2", "LORA": "0.21.2"}

# At this rank a LoRA holds any change of the layers here.
FULL_RANK = 32

MLP = "--target-modules lin0,lin1"
QV = "--target-modules query,value"
TRAINED = True  # five steps: for values where the initial ones are zeros


@dataclass(frozen=True)
class Case:
    """A model that bone-onnx makes: injected with these flags, then perhaps trained."""

    name: str
    onnx: str
    flags: str
    trained: bool = False
    types: tuple = ("BONE", "MISS", "LORA")
    full: tuple = ()  # parameters that the training must have changed, too

    @property
    def model(self):
        return self.onnx.partition("/")[0]


BAT = "--init-weights bat"
MINI = "--init-weights mini --mini-r 2"
NO_BONE = ("MISS", "LORA")  # PEFT's BONE has no mini, and does not save biases
LIN0 = "--target-modules lin0 --r 4"
LIN1, BIASES = ("lin1.weight", "lin1.bias"), ("lin0.bias", "lin1.bias")
RANDOM = "--init-weights false --seed 7"
CASES = [
    Case("random", "mlp/base_gemm", f"{MLP} --r 4 {RANDOM}"),
    Case("random, MatMul", "mlp/base_matmul", f"{MLP} --r 4 {RANDOM}"),
    Case("random, r does not divide in", "mlp/base_gemm", f"{MLP} --r 5 {RANDOM}"),
    Case("random, adapter named mine", "mlp/base_gemm", f"{MLP} --r 4 {RANDOM} --adapter-name mine"),
    Case("trained", "mlp/base_gemm", f"{MLP} --r 4", TRAINED),
    Case("trained BAT", "mlp/base_gemm", f"{MLP} --r 4 {BAT}", TRAINED),
    Case("trained mini", "mlp/base_gemm", f"{MLP} --r 4 {MINI}", TRAINED, NO_BONE),
    Case("trained, lin1 saved in full", "mlp/base_gemm", f"{LIN0} --modules-to-save lin1", TRAINED, full=LIN1),
    Case("trained, every bias", "mlp/base_gemm", f"{MLP} --r 4 --bias all", TRAINED, NO_BONE, BIASES),
    Case("trained BAT, every bias", "mlp/base_gemm", f"{MLP} --r 4 --bias all {BAT}", TRAINED, ("MISS",), BIASES),
    Case("trained, its own biases", "mlp/base_gemm", f"{LIN0} --bias bone_only", TRAINED, NO_BONE, ("lin0.bias",)),
    Case("random, SEQ_CLS", "bert/base", f"{QV} --r 8 {RANDOM} --task-type SEQ_CLS"),
    Case("random, all-linear, padded", "bert/base", f"--target-modules all-linear --r 5 {RANDOM} --task-type SEQ_CLS"),
    Case("trained BAT", "bert/base", f"{QV} --r 4 {BAT}", TRAINED),
    Case(
        "trained mini, classifier saved",
        "bert/base",
        f"{QV} --r 4 {MINI} --modules-to-save classifier",
        TRAINED,
        NO_BONE,
        ("classifier.weight", "classifier.bias"),
    ),
]
MSE = "--labels target --loss mse"
TRAIN = {
    "mlp/base_gemm": f"{MSE} --batch-size 16",
    "mlp/base_matmul": f"{MSE} --batch-size 4",
    "bert/base": "--labels labels --loss cross-entropy --batch-size 8",
}

# What peft writes here: (name, model, {adapter: config}, orders to merge in). The release is that of the first word.
LIN = dict(target_modules=["lin0", "lin1"])
SEQ_CLS = dict(r=8, task_type="SEQ_CLS", target_modules=["query", "value"])
ALL_LINEAR = dict(r=5, task_type="SEQ_CLS", target_modules="all-linear")
LAYER_1 = dict(r=8, target_modules=r".*layer\.1\..*(key|dense)")
TWO_BATS = {"default": dict(r=4, init_weights="bat", **LIN), "other": dict(r=2, init_weights="bat", **LIN)}
SAVE_LIN1 = dict(target_modules=["lin0"], modules_to_save=["lin1"])
BOTH = [["default"], ["other"], ["default", "other"], ["other", "default"]]
WRITTEN = [
    ("bone", "mlp", {"default": dict(r=4, **LIN)}, [["default"]]),
    ("bone, r does not divide in", "mlp", {"default": dict(r=5, **LIN)}, [["default"]]),
    ("bone, BAT", "mlp", {"default": dict(r=4, init_weights="bat", **LIN)}, [["default"]]),
    ("bone, lin1 saved in full", "mlp", {"default": dict(r=4, **SAVE_LIN1)}, [["default"]]),
    ("bone, adapter named mine", "mlp", {"mine": dict(r=4, **LIN)}, [["mine"]]),
    ("bone, two adapters", "mlp", {"default": dict(r=4, **LIN), "other": dict(r=3, **LIN)}, BOTH),
    ("bone, two BAT adapters", "mlp", TWO_BATS, BOTH),
    ("bone, SEQ_CLS", "bert", {"default": SEQ_CLS}, [["default"]]),
    ("bone, layer 1 by regex", "bert", {"default": LAYER_1}, [["default"]]),
    ("miss", "mlp", {"default": dict(r=4, **LIN)}, [["default"]]),
    ("miss, mini", "mlp", {"default": dict(r=4, init_weights="mini", mini_r=2, **LIN)}, [["default"]]),
    ("miss, BAT, every bias", "mlp", {"default": dict(r=4, init_weights="bat", bias="all", **LIN)}, [["default"]]),
    ("miss, its own biases", "mlp", {"default": dict(r=4, bias="miss_only", target_modules=["lin0"])}, [["default"]]),
    ("miss, adapter named mine", "mlp", {"mine": dict(r=5, **LIN)}, [["mine"]]),
    ("miss, two adapters", "mlp", {"default": dict(r=4, **LIN), "other": dict(r=3, **LIN)}, BOTH),
    ("miss, all-linear, SEQ_CLS", "bert", {"default": ALL_LINEAR}, [["default"]]),
]

# What ONNX Runtime swaps: (name, model, flags)
SWAPPED = [
    ("bone", "mlp/base_gemm", f"{MLP} --r 4"),
    ("bone, MatMul, r does not divide in", "mlp/base_matmul", f"{MLP} --r 5"),
    ("BAT", "mlp/base_gemm", f"{MLP} --r 4 {BAT}"),
    ("mini", "mlp/base_gemm", f"{MLP} --r 4 {MINI}"),
    ("bone, lin1 trained in full", "mlp/base_gemm", f"{LIN0} --modules-to-save lin1"),
    ("bone", "bert/base", f"{QV} --r 8"),
]

# The model of the runs whose events TensorBoard reads, and where the numbers of metrics.jsonl are then.
EVENTS = "mlp/base_gemm"
TAGS = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "eval_loss": "eval/loss",
    "eval_accuracy": "eval/accuracy",
}
