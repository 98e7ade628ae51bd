//! Operators whose outputs do not move when their inputs do, and operators whose derivative is refused.

use super::ml::ML;
use super::{MICROSOFT, Rule, Rules};

const SHAPE: &str = "depends on the shape of its input alone";
const STEPS: &str = "is a step function: its derivative is zero wherever it exists";
const BOOLEAN: &str = "gives truth values";
const INTEGER: &str = "gives or takes integers";
const RANDOM: &str = "draws random numbers, whatever its input holds";

const STRINGS: &str = "takes strings or bytes";
const CATEGORIES: &str = "tells categories apart";

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
    ("ImageDecoder", STRINGS),
    ("IsInf", BOOLEAN),
    ("IsNaN", BOOLEAN),
    ("Less", BOOLEAN),
    ("LessOrEqual", BOOLEAN),
    ("MelWeightMatrix", "puts its triangles at whole frequencies: it is a step function of their edges"),
    ("Multinomial", RANDOM),
    ("NonMaxSuppression", INTEGER),
    ("NonZero", INTEGER),
    ("Not", BOOLEAN),
    ("OptionalHasElement", BOOLEAN),
    ("Or", BOOLEAN),
    ("RandomNormal", "has no inputs"),
    ("RandomNormalLike", RANDOM),
    ("RandomUniform", "has no inputs"),
    ("RandomUniformLike", RANDOM),
    ("RegexFullMatch", STRINGS),
    ("Round", STEPS),
    ("SequenceEmpty", "has no inputs"),
    ("SequenceLength", INTEGER),
    ("Shape", SHAPE),
    ("Sign", STEPS),
    ("Size", SHAPE),
    ("StringConcat", STRINGS),
    ("StringNormalizer", STRINGS),
    ("StringSplit", STRINGS),
    ("TfIdfVectorizer", "counts words"),
    ("Xor", BOOLEAN),
];

const ZERO_ML: &[(&str, &str)] = &[
    ("Binarizer", STEPS),
    ("CategoryMapper", CATEGORIES),
    ("LabelEncoder", CATEGORIES),
    ("OneHotEncoder", CATEGORIES),
    ("TreeEnsemble", STEPS),
    ("TreeEnsembleClassifier", STEPS),
    ("TreeEnsembleRegressor", STEPS),
];

const ROUNDS: &str = "rounds to a grid, which has no useful derivative; train the model before it is quantized";

const SEQUENCE: &str = "handles a sequence whose length or places only a run can tell (others are taken apart into \
                        their tensors); export the model with tensors alone";

const NEWER: &str = "came with an operator set that no engine here runs; export the model for operator set 26";
const MAPS: &str = "takes or gives maps, which have no adjoint; export the model with tensors alone";

/// Domain of what ONNX Runtime's optimizer writes at its highest level.
const NCHWC: &str = "com.microsoft.nchwc";
const BLOCKED: &str = "lies in the memory layout of one processor; save the optimized model at the level \"extended\"";

const PACKED: &str = "takes sequences without their padding; export the model without this fusion";

const REFUSED: &[(&str, &str, &str)] = &[
    ("", "BitCast", "gives the bits of its input another meaning"),
    ("", "CausalConvWithState", NEWER),
    ("", "DynamicQuantizeLinear", ROUNDS),
    ("", "LinearAttention", NEWER),
    ("", "MatMulInteger", ROUNDS),
    ("", "QLinearMatMul", ROUNDS),
    ("", "QuantizeLinear", ROUNDS),
    ("", "ConvInteger", ROUNDS),
    ("", "QLinearConv", ROUNDS),
    ("", "SequenceMap", SEQUENCE),
    ("", "SequenceAt", SEQUENCE),
    ("", "SequenceConstruct", SEQUENCE),
    ("", "SequenceErase", SEQUENCE),
    ("", "SequenceInsert", SEQUENCE),
    ("", "ConcatFromSequence", SEQUENCE),
    ("", "SplitToSequence", SEQUENCE),
    ("", "SwiGLU", NEWER),
    (ML, "CastMap", MAPS),
    (ML, "DictVectorizer", MAPS),
    (ML, "SVMClassifier", "counts votes between pairs of classes, which are steps; export its decision function"),
    (ML, "ZipMap", MAPS),
    (MICROSOFT, "ConvTransposeWithDynamicPads", "has pads that depend on its inputs"),
    (MICROSOFT, "DecoderMaskedMultiHeadAttention", "decodes one token at a time; export the model for whole sequences"),
    (MICROSOFT, "DynamicQuantizeLSTM", ROUNDS),
    (MICROSOFT, "DynamicQuantizeMatMul", ROUNDS),
    (MICROSOFT, "MatMulIntegerToFloat", ROUNDS),
    (MICROSOFT, "MoE", "is not written yet; export the model without this fusion"),
    (MICROSOFT, "PackedAttention", PACKED),
    (MICROSOFT, "PackedMultiHeadAttention", PACKED),
    (MICROSOFT, "QAttention", ROUNDS),
    (MICROSOFT, "QEmbedLayerNormalization", ROUNDS),
    (MICROSOFT, "QGemm", ROUNDS),
    (MICROSOFT, "QLinearAdd", ROUNDS),
    (MICROSOFT, "QLinearAveragePool", ROUNDS),
    (MICROSOFT, "QLinearConcat", ROUNDS),
    (MICROSOFT, "QLinearConv", ROUNDS),
    (MICROSOFT, "QLinearGlobalAveragePool", ROUNDS),
    (MICROSOFT, "QLinearLeakyRelu", ROUNDS),
    (MICROSOFT, "QLinearMul", ROUNDS),
    (MICROSOFT, "QLinearSigmoid", ROUNDS),
    (MICROSOFT, "QLinearSoftmax", ROUNDS),
    (MICROSOFT, "QLinearWhere", ROUNDS),
    (MICROSOFT, "QMoE", ROUNDS),
    (MICROSOFT, "QuantizeLinear", ROUNDS),
    (MICROSOFT, "SparseAttention", "is not written yet; export the model without this fusion"),
    (NCHWC, "AveragePool", BLOCKED),
    (NCHWC, "Conv", BLOCKED),
    (NCHWC, "GlobalAveragePool", BLOCKED),
    (NCHWC, "GlobalMaxPool", BLOCKED),
    (NCHWC, "MaxPool", BLOCKED),
    (NCHWC, "ReorderInput", BLOCKED),
    (NCHWC, "ReorderOutput", BLOCKED),
    (NCHWC, "Upsample", BLOCKED),
];

pub(super) fn add(rules: &mut Rules) {
    for (op, why) in ZERO {
        rules.insert("", op, Rule::Zero(why));
    }
    for (op, why) in ZERO_ML {
        rules.insert(ML, op, Rule::Zero(why));
    }
    for (domain, op, why) in REFUSED {
        rules.insert(domain, op, Rule::Refused(why));
    }
}
