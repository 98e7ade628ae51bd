//! Operators whose outputs do not move when their inputs do, and operators whose derivative is refused.

use super::{MICROSOFT, Rule, Rules};

const SHAPE: &str = "depends on the shape of its input alone";
const STEPS: &str = "is a step function: its derivative is zero wherever it exists";
const BOOLEAN: &str = "gives truth values";
const INTEGER: &str = "gives or takes integers";
const RANDOM: &str = "draws random numbers, whatever its input holds";

const ZERO: &[(&str, &str)] = &[
    ("And", BOOLEAN),
    ("ArgMax", INTEGER),
    ("ArgMin", INTEGER),
    ("Bernoulli", STEPS),
    ("BitShift", INTEGER),
    ("BitwiseAnd", INTEGER),
    ("BitwiseNot", INTEGER),
    ("BitwiseOr", INTEGER),
    ("BitwiseXor", INTEGER),
    ("BlackmanWindow", "takes an integer"),
    ("Ceil", STEPS),
    ("Constant", "has no inputs"),
    ("ConstantOfShape", SHAPE),
    ("Equal", BOOLEAN),
    ("EyeLike", SHAPE),
    ("Floor", STEPS),
    ("Greater", BOOLEAN),
    ("GreaterOrEqual", BOOLEAN),
    ("HammingWindow", "takes an integer"),
    ("HannWindow", "takes an integer"),
    ("Hardmax", STEPS),
    ("IsInf", BOOLEAN),
    ("IsNaN", BOOLEAN),
    ("Less", BOOLEAN),
    ("LessOrEqual", BOOLEAN),
    ("Multinomial", RANDOM),
    ("NonMaxSuppression", INTEGER),
    ("NonZero", INTEGER),
    ("Not", BOOLEAN),
    ("Or", BOOLEAN),
    ("RandomNormal", "has no inputs"),
    ("RandomNormalLike", RANDOM),
    ("RandomUniform", "has no inputs"),
    ("RandomUniformLike", RANDOM),
    ("Round", STEPS),
    ("Shape", SHAPE),
    ("Sign", STEPS),
    ("Size", SHAPE),
    ("Xor", BOOLEAN),
];

const ROUNDS: &str = "rounds to a grid, which has no useful derivative; train the model before it is quantized";

const SAMPLES: &str = "reads at places that depend on its inputs, and its rule is not written yet";
const SEQUENCE: &str =
    "holds tensors in a sequence or optional, which has no adjoint; export the model with tensors alone";

const PACKED: &str = "takes sequences without their padding; export the model without this fusion";

const REFUSED: &[(&str, &str, &str)] = &[
    (
        "",
        "DequantizeLinear",
        "reads what was rounded to a grid, and its scale belongs to the quantization: freeze both",
    ),
    ("", "DynamicQuantizeLinear", ROUNDS),
    ("", "MatMulInteger", ROUNDS),
    ("", "QLinearMatMul", ROUNDS),
    ("", "QuantizeLinear", ROUNDS),
    ("", "ConvInteger", ROUNDS),
    ("", "DFT", "is not written yet; start after the transform, or train what comes behind it"),
    ("", "DeformConv", SAMPLES),
    ("", "GridSample", SAMPLES),
    ("", "MaxRoiPool", SAMPLES),
    ("", "QLinearConv", ROUNDS),
    ("", "RoiAlign", SAMPLES),
    ("", "STFT", "is not written yet; start after the transform, or train what comes behind it"),
    ("", "SequenceMap", SEQUENCE),
    ("", "SequenceAt", SEQUENCE),
    ("", "SequenceConstruct", SEQUENCE),
    ("", "SequenceErase", SEQUENCE),
    ("", "SequenceInsert", SEQUENCE),
    ("", "ConcatFromSequence", SEQUENCE),
    ("", "SplitToSequence", SEQUENCE),
    ("", "Optional", SEQUENCE),
    ("", "OptionalGetElement", SEQUENCE),
    ("", "TensorScatter", "is not written yet; export the model without its cache"),
    ("", "Unique", "gives as many elements as there are distinct values: it has no fixed shape to differentiate"),
    (MICROSOFT, "Attention", "is not written yet; export the model without this fusion"),
    (MICROSOFT, "ConvTransposeWithDynamicPads", "has pads that depend on its inputs"),
    (MICROSOFT, "DynamicQuantizeLSTM", ROUNDS),
    (MICROSOFT, "DynamicQuantizeMatMul", ROUNDS),
    (MICROSOFT, "MatMulIntegerToFloat", ROUNDS),
    (MICROSOFT, "PackedAttention", PACKED),
    (MICROSOFT, "PackedMultiHeadAttention", PACKED),
    (MICROSOFT, "QAttention", ROUNDS),
    (MICROSOFT, "QGemm", ROUNDS),
    (MICROSOFT, "QLinearAdd", ROUNDS),
    (MICROSOFT, "QLinearMul", ROUNDS),
    (MICROSOFT, "QuantizeLinear", ROUNDS),
];

pub(super) fn add(rules: &mut Rules) {
    for (op, why) in ZERO {
        rules.insert("", op, Rule::Zero(why));
    }
    for (domain, op, why) in REFUSED {
        rules.insert(domain, op, Rule::Refused(why));
    }
}
