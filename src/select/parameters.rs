//! The stored parameters of a model by their PyTorch paths (`bert.pooler.dense.weight`): what `modules_to_save` and
//! `bias` choose from.

use std::collections::{HashMap, HashSet};

use super::constant::{Source, final_readers, readers_behind, trace};
use super::linears::{FLOATS, Linear};
use super::module_path::unmerged;
use super::values::{Definition, Reader, ValueId, Values};
use crate::onnx::{DataType, GraphProto, NodeProto, Scope};

/// A stored tensor as one module's parameter. Where several modules share the tensor (tied weights, biases that the
/// exporter merged), each has its own entry with its own uses.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// As in PyTorch's `named_parameters`, where the file still tells.
    pub path: String,
    pub source: Source,
    /// Name of the stored tensor.
    pub stored: String,
    /// The node inputs that read it for this module.
    pub uses: Vec<Use>,
    /// Shape as those inputs see it.
    pub dims: Vec<usize>,
    pub data_type: DataType,
    /// The inputs see the transpose of PyTorch's tensor.
    pub transposed: bool,
    /// The stored tensor is the transpose of PyTorch's.
    pub stored_transposed: bool,
    /// Nothing but `uses` reads the stored tensor in the end, and only Identity and Transpose stand between.
    pub exclusive: bool,
    /// PEFT's `bias = "all"` means it: its path contains `bias`.
    pub is_bias: bool,
}

/// One node input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    pub scope: Scope,
    pub node: usize,
    pub input: usize,
}

/// The parameters of `graph`, whose linear layers are `linears`: weight and bias of each layer (all calls of one path
/// together), then every other float initializer that bears a PyTorch path.
///
/// Left out is what is no float of its own: quantized weights, and a layer's weight that is converted or scaled on its
/// way, unless its name tells the path (its use is then the converting node's input). So are the buffers in
/// [`BUFFERS`], which PyTorch does not train.
pub fn parameters(graph: &GraphProto, linears: &[Linear]) -> Vec<Parameter> {
    let values = Values::of(graph);
    let numbers: HashMap<&Scope, usize> = values.graphs.iter().enumerate().map(|(i, view)| (&view.scope, i)).collect();
    let mut collector = Collector::new(&values);
    for linear in linears.iter().filter(|l| l.part.is_none()) {
        if let Some(number) = numbers.get(&linear.scope) {
            collector.add_of_layer(linear, (*number, linear.node, linear.matrix), true);
        }
        if let Some(bias) = &linear.bias
            && let Some(number) = numbers.get(&bias.scope)
        {
            collector.add_of_layer(linear, (*number, bias.node, bias.input), false);
        }
    }
    for index in 0..graph.initializer.len() {
        collector.add_named(graph, index);
    }
    collector.finish()
}

/// Which of `parameters` lie in a module that `modules_to_save` names: `classifier` means `classifier.weight` and
/// `bert.classifier.out.weight`, `pooler.dense` means `bert.pooler.dense.bias`. Names are whole segments; PEFT's
/// `endswith` takes `my_head` for `head` as well, a bug that is not copied.
pub fn saved(parameters: &[Parameter], names: &[String]) -> Vec<usize> {
    let names: Vec<Vec<&str>> = names.iter().map(|name| name.split('.').collect()).collect();
    let is_saved = |parameter: &Parameter| {
        let mut module: Vec<&str> = parameter.path.split('.').collect();
        module.pop();
        names.iter().any(|name| module.windows(name.len()).any(|segments| segments == name.as_slice()))
    };
    (0..parameters.len()).filter(|i| parameters.get(*i).is_some_and(is_saved)).collect()
}

/// Last segments of float tensors that a PyTorch module stores beside its parameters.
pub const BUFFERS: [&str; 4] = ["inv_freq", "original_inv_freq", "running_mean", "running_var"];

/// Parts of operators' names whose float constants are scales of quantized values.
const QUANTIZERS: [&str; 6] = ["QuantizeLinear", "DequantizeLinear", "QLinear", "QGemm", "Integer", "NBits"];

/// A node input: graph, node, input.
type Input = (usize, usize, usize);

/// A parameter as it is put together.
struct Draft<'a> {
    parameter: Parameter,
    root: ValueId<'a>,
    /// Only Identity and Transpose stand between.
    is_plain: bool,
    /// How many of the root's final readers `uses` stand for.
    readers: usize,
}

struct Collector<'v, 'a> {
    values: &'v Values<'a>,
    drafts: Vec<Draft<'a>>,
    by_path: HashMap<String, usize>,
    /// Node inputs that are a layer's weight or bias.
    claimed: HashSet<Input>,
}

impl<'v, 'a> Collector<'v, 'a> {
    fn new(values: &'v Values<'a>) -> Self {
        Self { values, drafts: Vec::new(), by_path: HashMap::new(), claimed: HashSet::new() }
    }

    /// The weight or bias of `linear` that `input` reads.
    fn add_of_layer(&mut self, linear: &Linear, input: Input, is_weight: bool) -> Option<()> {
        let (graph, node, i) = input;
        let name = self.values.node(graph, node)?.input_at(i)?;
        let constant = trace(self.values, graph, name)?;
        let data_type = float(constant.tensor.data_type())?;
        let rank = if is_weight { 2 } else { 1 };
        if !constant.is_as_stored() || constant.reshaped || constant.dims.len() != rank {
            return None;
        }
        // A tensor that kept its PyTorch name is stored as PyTorch does, be it [out, in] or Conv1D's [in, out].
        let own = [constant.root.1, name].into_iter().map(unmerged).find(|name| {
            let module = linear.module.as_deref().unwrap_or(&linear.path);
            name.strip_prefix(module).and_then(|rest| rest.strip_prefix('.')).is_some_and(|rest| !rest.contains('.'))
        });
        let (path, stored_transposed) = match own {
            Some(own) => (own.to_string(), false),
            None if is_weight => (format!("{}.weight", linear.path), !linear.is_stored_out_in()),
            None => (format!("{}.bias", linear.path), false),
        };
        let parameter = Parameter {
            is_bias: path.contains("bias"),
            path,
            source: constant.source,
            stored: constant.root.1.to_string(),
            uses: vec![self.describe(input)?],
            dims: constant.dims,
            data_type,
            transposed: stored_transposed != constant.transposed,
            stored_transposed,
            exclusive: false,
        };
        let is_plain = constant.via.iter().all(|step| matches!(step.op.as_str(), "Identity" | "Transpose"));
        if self.add(Draft { parameter, root: constant.root, is_plain, readers: 1 }) {
            self.claimed.insert(input);
        }
        Some(())
    }

    /// What the initializer's name, and those of Identities of it, say.
    fn add_named(&mut self, graph: &'a GraphProto, index: usize) -> Option<()> {
        let tensor = graph.initializer.get(index)?;
        let data_type = float(tensor.data_type())?;
        let dims: Vec<usize> = tensor.dims.iter().map(|d| usize::try_from(*d).ok()).collect::<Option<_>>()?;
        let (root, definition) = self.values.lookup(0, tensor.name())?;
        if dims.is_empty() || definition != Definition::Initializer(index) {
            return None;
        }
        let mut seen = HashSet::from([root]);
        let mut queue = vec![root];
        while let Some(value) = queue.pop() {
            let path = unmerged(value.1);
            let (mut uses, mut readers) = (Vec::new(), 0);
            for reader in self.values.readers(value) {
                let Reader::Node { graph, node, input } = *reader else { continue };
                let by = self.values.node(graph, node)?;
                if let Some(copy) = self.named_copy(graph, by) {
                    queue.extend(seen.insert(copy).then_some(copy));
                } else if is_path(path)
                    && is_parameter_of(by, input)
                    && let Some(behind) = self.unclaimed_behind(*reader)
                {
                    uses.push(self.describe((graph, node, input))?);
                    readers += behind;
                }
            }
            if !uses.is_empty() {
                let parameter = Parameter {
                    path: path.to_string(),
                    source: Source::Initializer { scope: Scope::default(), index },
                    stored: tensor.name().to_string(),
                    uses,
                    dims: dims.clone(),
                    data_type,
                    transposed: false,
                    stored_transposed: false,
                    exclusive: false,
                    is_bias: path.contains("bias"),
                };
                self.add(Draft { parameter, root, is_plain: true, readers });
            }
        }
        Some(())
    }

    /// The output of an Identity that bears a path of its own: equal parameters are stored once.
    fn named_copy(&self, graph: usize, node: &'a NodeProto) -> Option<ValueId<'a>> {
        let copy = node.is("Identity").then(|| node.output_at(0)).flatten()?;
        is_path(unmerged(copy)).then(|| self.values.lookup(graph, copy)).flatten().map(|(value, _)| value)
    }

    /// How many final readers there are behind `reader`; `None` where one of them is a layer's, or there is none.
    fn unclaimed_behind(&self, reader: Reader) -> Option<usize> {
        let behind = readers_behind(self.values, reader);
        let is_claimed = |reader: &Reader| match reader {
            Reader::Node { graph, node, input } => self.claimed.contains(&(*graph, *node, *input)),
            Reader::Output => false,
        };
        (!behind.is_empty() && !behind.iter().any(is_claimed)).then_some(behind.len())
    }

    fn describe(&self, (graph, node, input): Input) -> Option<Use> {
        Some(Use { scope: self.values.graphs.get(graph)?.scope.clone(), node, input })
    }

    /// Adds a parameter, or a further call's use of one; false where its path means another tensor already.
    fn add(&mut self, draft: Draft<'a>) -> bool {
        let Some(known) = self.by_path.get(&draft.parameter.path).and_then(|i| self.drafts.get_mut(*i)) else {
            self.by_path.insert(draft.parameter.path.clone(), self.drafts.len());
            self.drafts.push(draft);
            return true;
        };
        let same = |p: &Parameter| (p.source.clone(), p.dims.clone(), p.transposed);
        if same(&known.parameter) != same(&draft.parameter) {
            return false;
        }
        known.parameter.uses.extend(draft.parameter.uses);
        known.readers += draft.readers;
        known.is_plain &= draft.is_plain;
        true
    }

    fn finish(self) -> Vec<Parameter> {
        let mut totals: HashMap<ValueId, usize> = HashMap::new();
        let parameters = self.drafts.into_iter().map(|draft| {
            let total = totals.entry(draft.root).or_insert_with(|| final_readers(self.values, draft.root).len());
            Parameter { exclusive: draft.is_plain && draft.readers == *total, ..draft.parameter }
        });
        parameters.collect()
    }
}

fn float(data_type: i32) -> Option<DataType> {
    DataType::try_from(data_type).ok().filter(|t| FLOATS.contains(t))
}

/// True for a name that is a PyTorch path: dotted, and not one that an exporter made up (`onnx::…`, `/a/b.0/Add_…`).
fn is_path(name: &str) -> bool {
    name.contains('.') && !name.contains(['/', ':']) && !BUFFERS.iter().any(|b| name.ends_with(&format!(".{b}")))
}

/// False for scales of quantized values and for the running statistics of a BatchNormalization.
fn is_parameter_of(node: &NodeProto, input: usize) -> bool {
    let is_statistic = node.is("BatchNormalization") && input > 2;
    !is_statistic && !QUANTIZERS.iter().any(|part| node.op_type().contains(part))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ndarray::ArrayD;

    use super::super::linears::linears_of;
    use super::super::tests::shared;
    use super::*;
    use crate::onnx::{Element, Model, Tensor, node, value_info};

    fn parameters_in(path: &str) -> Vec<Parameter> {
        let model = Model::open(shared(path)).unwrap();
        parameters(model.graph(), &linears_of(model.graph()))
    }

    fn by_path<'p>(parameters: &'p [Parameter], path: &str) -> &'p Parameter {
        let mut found = parameters.iter().filter(|p| p.path == path);
        let one = found.next().unwrap_or_else(|| panic!("no {path}"));
        assert!(found.next().is_none(), "{path} twice");
        one
    }

    /// The stored tensor, the inputs (node, input), their shape, and [transposed, stored_transposed, exclusive].
    type Facts<'p> = (&'p str, Vec<(usize, usize)>, &'p [usize], [bool; 3]);

    fn facts(p: &Parameter) -> Facts<'_> {
        let uses = p.uses.iter().map(|u| (u.node, u.input)).collect();
        (&p.stored, uses, &p.dims, [p.transposed, p.stored_transposed, p.exclusive])
    }

    fn saved_paths(parameters: &[Parameter], names: &[&str]) -> Vec<String> {
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        saved(parameters, &names).into_iter().map(|i| parameters[i].path.clone()).collect()
    }

    #[test]
    fn the_goldens_have_the_parameters_of_their_checkpoints() {
        for file in ["goldens/mlp/base_gemm.onnx", "goldens/mlp/base_matmul.onnx", "goldens/bert/base.onnx"] {
            let model = Model::open(shared(file)).unwrap();
            let found = parameters(model.graph(), &linears_of(model.graph()));
            let checkpoint = std::fs::read(shared(file).with_file_name("base.safetensors")).unwrap();
            let checkpoint = safetensors::SafeTensors::deserialize(&checkpoint).unwrap();
            for p in &found {
                let truth = checkpoint.tensor(&p.path).unwrap();
                let truth = Tensor::from_bytes(DataType::Float, truth.shape(), truth.data()).unwrap();
                let (truth, transpose) =
                    (f32::view(&truth).unwrap(), |is: bool, a: ArrayD<f32>| if is { a.reversed_axes() } else { a });
                let Source::Initializer { index, .. } = p.source else { panic!("{}", p.path) };
                let stored = model.tensor(&model.graph().initializer[index]).unwrap();
                let stored = transpose(p.stored_transposed, f32::view(&stored).unwrap().clone());
                assert_eq!(&stored, truth, "{file}: {}", p.path);
                assert_eq!(p.dims, transpose(p.transposed, truth.clone()).shape(), "{file}: {}", p.path);
            }
            let paths: BTreeSet<_> = found.iter().map(|p| p.path.as_str()).collect();
            // The files hold the training data as well.
            let names = checkpoint.names().into_iter().filter(|n| n.contains('.') && !n.starts_with("data."));
            assert_eq!(paths, names.collect(), "{file}");
        }
    }

    #[test]
    fn modules_of_bert_are_found_by_whole_segments() {
        let found = parameters_in("models/bert.ts17.onnx");
        assert_eq!(saved_paths(&found, &["classifier", "score"]), ["classifier.weight", "classifier.bias"]);
        assert_eq!(saved_paths(&found, &["pooler"]), ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]);
        assert_eq!(saved_paths(&found, &["pooler.dense"]).len(), 2);
        assert_eq!(saved_paths(&found, &["LayerNorm"]).len(), 10);
        assert_eq!(saved_paths(&found, &["layer.1"]).len(), 16);
        assert_eq!(saved_paths(&found, &["lassifier", "dense.weight", "classifier.weight", ""]), Vec::<String>::new());
        assert!(found.iter().all(|p| p.exclusive && p.is_bias == p.path.ends_with(".bias")));
        let query = by_path(&found, "bert.encoder.layer.0.attention.self.query.weight");
        assert_eq!(facts(query), ("onnx::MatMul_412", vec![(129, 1)], &[32, 32][..], [true, true, true]));
        let norm = by_path(&found, "bert.embeddings.LayerNorm.weight");
        assert_eq!(facts(norm), ("bert.embeddings.LayerNorm.weight", vec![(51, 1)], &[32][..], [false, false, true]));
    }

    #[test]
    fn merged_biases_are_parameters_of_their_own() {
        let found = parameters_in("models/bert_zero.ts17.onnx");
        let plain: BTreeSet<_> = parameters_in("models/bert.ts17.onnx").into_iter().map(|p| p.path).collect();
        assert_eq!(found.iter().map(|p| p.path.clone()).collect::<BTreeSet<_>>(), plain);
        let pooler = by_path(&found, "bert.pooler.dense.bias");
        assert_eq!(facts(pooler), ("bert.embeddings.LayerNorm.bias", vec![(338, 2)], &[32][..], [false, false, false]));
        let norm = by_path(&found, "bert.encoder.layer.1.output.LayerNorm.bias");
        assert_eq!(facts(norm), ("bert.embeddings.LayerNorm.bias", vec![(336, 2)], &[32][..], [false, false, false]));
        let kept = by_path(&found, "bert.embeddings.LayerNorm.bias");
        assert_eq!((kept.uses.len(), kept.exclusive), (1, false));
        assert!(by_path(&found, "classifier.bias").exclusive);
    }

    #[test]
    fn two_calls_are_one_parameter() {
        let found = parameters_in("models/seqnest.ts17.onnx");
        let weight = by_path(&found, "lin.weight");
        assert_eq!(facts(weight), ("onnx::MatMul_115", vec![(39, 1), (41, 1)], &[12, 12][..], [true, true, true]));
        let bias = by_path(&found, "lin.bias");
        assert_eq!(facts(bias), ("lin.bias", vec![(40, 0), (42, 0)], &[12][..], [false, false, true]));
        assert_eq!(saved_paths(&found, &["lin_1"]), ["lin_1.weight", "lin_1.bias"]);
    }

    #[test]
    fn a_tied_weight_is_two_parameters() {
        let found = parameters_in("models/qwen2_tied_nofold.ts17.onnx");
        let head = by_path(&found, "lm_head.weight");
        assert_eq!(facts(head), ("model.embed_tokens.weight", vec![(682, 1)], &[32, 96][..], [true, false, false]));
        let table = by_path(&found, "model.embed_tokens.weight");
        assert_eq!(facts(table), ("model.embed_tokens.weight", vec![(1, 0)], &[96, 32][..], [false, false, false]));
        let query = by_path(&found, "model.layers.0.self_attn.q_proj.weight");
        assert!(query.exclusive && query.transposed && !query.stored_transposed);
    }

    #[test]
    fn other_exporters_and_element_types() {
        let llama = parameters_in("models/llama.dyn18.onnx");
        assert!(!llama.iter().any(|p| p.path.contains("inv_freq")));
        assert_eq!(facts(by_path(&llama, "lm_head.weight")).0, "val_451");
        assert_eq!(by_path(&llama, "model.norm.weight").uses.len(), 1);
        assert_eq!(llama.len(), 15 + 6);
        let half = parameters_in("models/bert_fp16.dyn18.onnx");
        assert!(half.iter().all(|p| p.data_type == DataType::Float16 && p.exclusive));
        assert_eq!(half.len(), parameters_in("models/bert.dyn18.onnx").len());
        // Conv1D keeps its matrix as [in, out].
        let gpt2 = parameters_in("models/gpt2.ts17.onnx");
        let attention = by_path(&gpt2, "transformer.h.0.attn.c_attn.weight");
        assert_eq!(facts(attention).2, [32, 96]);
        assert!(!attention.transposed && !attention.stored_transposed);
        // Both branches of an If read it.
        let t5 = parameters_in("models/t5_decoder_merged.optimum18.onnx");
        let norm = by_path(&t5, "decoder.final_layer_norm.weight");
        assert_eq!(norm.uses.iter().map(|u| u.scope.clone()).collect::<Vec<_>>(), [vec![(0, 0)], vec![(0, 1)]]);
        assert!(by_path(&t5, "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight").is_bias);
        // What is left after quantization are scales.
        let quantized = parameters_in("models/bert.ts17.qdq.onnx");
        assert_eq!(quantized.iter().map(|p| &p.path).collect::<Vec<_>>(), Vec::<&String>::new());
    }

    #[test]
    fn a_converted_weight_is_what_the_conversion_reads() {
        let mut cast = node("Cast", &["m.lin.weight"], &["wide"]);
        cast.attribute = vec![crate::onnx::AttributeProto::int("to", 1)];
        let stored = |name, t| Tensor::zeros(t, &[3, 4]).unwrap().to_proto(name);
        let graph = GraphProto {
            node: vec![
                cast,
                node("MatMul", &["x", "wide"], &["y"]),
                node("Identity", &["m.a"], &["m.a"]),
                node("Identity", &["m.a"], &["loop.b"]),
                node("Identity", &["loop.b"], &["loop.b"]),
            ],
            initializer: vec![
                stored("m.lin.weight", DataType::Float16),
                stored("m.a", DataType::Float),
                stored("m.table", DataType::Int8),
            ],
            input: vec![value_info("x", DataType::Float, &["n", "3"])],
            ..Default::default()
        };
        let found = parameters(&graph, &linears_of(&graph));
        let [weight] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((weight.path.as_str(), weight.data_type), ("m.lin.weight", DataType::Float16));
        assert_eq!(facts(weight), ("m.lin.weight", vec![(0, 0)], &[3, 4][..], [false, false, true]));
    }
}
