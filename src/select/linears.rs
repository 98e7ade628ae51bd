//! The linear layers of a model: nodes that multiply by a constant matrix, in the main graph and in every subgraph.
//!
//! A matrix that is fixed by design and not learned (a mel filter bank, say) looks like any other and is found as
//! well; leave such a node out with `exclude_modules`. Bodies of model-local functions are searched where their calls
//! are written out ([`crate::inline`]).

use std::collections::{BTreeMap, HashMap, HashSet};

use super::bias::{BiasUse, added_bias};
use super::chain::{Chain, Link};
use super::constant::{Constant, Source, Step, final_readers, trace};
use super::form::{Form, Sum, channels};
use super::module_path::{Clues, NameRule, is_call_of, module_path, scopes_of};
use super::packed::{self, Part};
use super::quantized::{self, Beside, Quantized};
use super::values::{Reader, ValueId, Values};
use crate::onnx::{DataType, GraphProto, Model, NodeProto, Scope, data_type_name};

/// A node that multiplies by a constant matrix: `y = alpha · op(x) · op(W) + beta · bias`.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// The graph the node is in.
    pub scope: Scope,
    /// Its index there.
    pub node: usize,
    pub node_name: String,
    /// `MatMul`, `Gemm`, ….
    pub op: String,
    pub form: Form,
    /// Which input of the node is the matrix.
    pub matrix: usize,
    /// The module path, where one can be read from the file. PEFT's rules match on it.
    pub module: Option<String>,
    /// How the path was found.
    pub rule: NameRule,
    /// What parameters of this layer are called after: the module path, else a stand-in made of the node's name.
    /// Layers of one path are calls of one module: they have one weight, stored one way.
    pub path: String,
    pub weight: Weight,
    pub in_features: usize,
    pub out_features: usize,
    /// Element type of the stored tensor.
    pub data_type: DataType,
    /// What it takes and gives: element type of x and y.
    pub element: DataType,
    /// How the stored tensor is quantised, where it is.
    pub quantized: Option<Quantized>,
    /// Where a float path beside the layer starts and ends.
    pub beside: Beside,
    pub trans_a: bool,
    /// The node reads its matrix as `[out, in]`.
    pub trans_b: bool,
    pub alpha: f32,
    pub beta: f32,
    /// The one-dimensional constant that is added.
    pub bias: Option<BiasUse>,
    /// Set where this is not the node's whole product but one of the modules that it packs together; its weight is the
    /// whole's.
    pub part: Option<Part>,
    /// Why no adapter can be put here, if so.
    pub adaptable: Result<(), String>,
}

/// The matrix of a [`Linear`], as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// The initializer, or the output of the Constant node.
    pub name: String,
    pub source: Source,
    /// Nodes between the stored tensor and the product, in that order.
    pub via: Vec<Step>,
    /// What they do to a tensor of floats.
    pub chain: Chain,
    /// Net effect of the Transposes on a matrix.
    pub transposed: bool,
    /// True where its elements are moved in another way than that of one Transpose.
    pub moved: bool,
    /// How many node inputs and graph outputs see the value in the end (chains such as `via` looked through, all
    /// graphs together). More than the calls of one module: the value is shared, and must be copied to be changed.
    pub uses: usize,
}

impl Weight {
    /// Whether what is stored can be changed a few rows at a time: its elements are read row after row, or column after
    /// column, and as they are but for their type.
    pub fn is_matrix(&self) -> bool {
        !self.moved && !self.chain.iter().any(Link::is_scale)
    }

    /// Whether the product reads the elements that are stored, in rows or columns.
    pub fn is_read_as_stored(&self) -> bool {
        !self.moved && self.chain.iter().all(Link::moves)
    }
}

impl Linear {
    /// True where the stored matrix is `[out_features, in_features]`, false where `[in_features, out_features]`.
    pub fn is_stored_out_in(&self) -> bool {
        self.trans_b != self.weight.transposed
    }

    /// Whether its node reads the matrix in floating point, so that an adapted one can take its place in the graph.
    pub fn reads_floats(&self) -> bool {
        matches!(self.op.as_str(), "MatMul" | "Gemm" | "FusedMatMul" | "Conv" | "Einsum" | "Attention")
    }

    /// Path of the layer that the node computes: its own, or that of which it is a part.
    pub fn whole(&self) -> &str {
        self.part.as_ref().map_or(&self.path, |part| &part.of)
    }

    /// What the matching rules see: the module path, else the node's name (else the path made for it).
    pub fn key(&self) -> &str {
        match &self.module {
            Some(module) => module,
            None if self.node_name.is_empty() => &self.path,
            None => &self.node_name,
        }
    }
}

/// Domain of ONNX Runtime's own operators.
const MICROSOFT: &str = "com.microsoft";

/// An operator that multiplies by a matrix, and where its inputs are.
struct Product {
    op: &'static str,
    domain: &'static str,
    /// Index of the matrix among the inputs.
    matrix: usize,
    /// Index of the bias, where the operator has one.
    bias: Option<usize>,
    /// Whether it multiplies integers.
    quantized: bool,
    /// Why it takes no adapter.
    refused: Option<&'static str>,
}

/// Element types of what can be adapted or trained.
pub const FLOATS: [DataType; 4] = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
const FUSED: Option<&str> =
    Some("has its activation fused in; save the model without ONNX Runtime's extended optimizations");

const INSIDE: Option<&str> =
    Some("multiplies by a quantized weight inside of attention; use the model before quantization");

const PRODUCTS: [Product; 14] = [
    Product { op: "MatMul", domain: "", matrix: 1, bias: None, quantized: false, refused: None },
    Product { op: "Gemm", domain: "", matrix: 1, bias: Some(2), quantized: false, refused: None },
    Product { op: "Conv", domain: "", matrix: 1, bias: Some(2), quantized: false, refused: None },
    Product { op: "Einsum", domain: "", matrix: 1, bias: None, quantized: false, refused: None },
    Product { op: "Attention", domain: MICROSOFT, matrix: 1, bias: Some(2), quantized: false, refused: None },
    Product { op: "QAttention", domain: MICROSOFT, matrix: 1, bias: Some(2), quantized: false, refused: INSIDE },
    Product { op: "FusedMatMul", domain: MICROSOFT, matrix: 1, bias: None, quantized: false, refused: None },
    Product { op: "FusedGemm", domain: MICROSOFT, matrix: 1, bias: Some(2), quantized: false, refused: FUSED },
    Product { op: "MatMulNBits", domain: MICROSOFT, matrix: 1, bias: Some(5), quantized: true, refused: None },
    Product { op: "MatMulInteger", domain: "", matrix: 1, bias: None, quantized: true, refused: None },
    Product { op: "MatMulIntegerToFloat", domain: MICROSOFT, matrix: 1, bias: Some(6), quantized: true, refused: None },
    Product {
        op: "DynamicQuantizeMatMul",
        domain: MICROSOFT,
        matrix: 1,
        bias: Some(4),
        quantized: true,
        refused: None,
    },
    Product { op: "QLinearMatMul", domain: "", matrix: 3, bias: None, quantized: true, refused: None },
    Product { op: "QGemm", domain: MICROSOFT, matrix: 3, bias: Some(6), quantized: true, refused: None },
];

impl Product {
    fn of(node: &NodeProto) -> Option<&'static Self> {
        let domain = if node.domain() == "ai.onnx" { "" } else { node.domain() };
        PRODUCTS.iter().find(|p| p.op == node.op_type() && p.domain == domain)
    }
}

/// True for an operator that can be a linear layer.
pub(crate) fn is_product(node: &NodeProto) -> bool {
    Product::of(node).is_some()
}

/// A linear layer before it has a name, with what the naming rules need.
struct Found<'a> {
    linear: Linear,
    root: ValueId<'a>,
    bias: Option<ValueId<'a>>,
    scopes: Option<&'a str>,
    first_output: &'a str,
}

/// All linear layers of `model`: graph by graph (depth first), in the order of the nodes; then the parts of those that
/// are several modules in one.
pub fn linears(model: &Model) -> Vec<Linear> {
    linears_of(model.graph())
}

/// As [`linears`], of a graph that was not read from a file.
pub fn linears_of(main: &GraphProto) -> Vec<Linear> {
    linears_with(main, &BTreeMap::new())
}

/// As [`linears_of`]. `packed_sizes`: how many outputs the modules in a packed layer have, where the graph does not say.
pub fn linears_with(main: &GraphProto, packed_sizes: &BTreeMap<String, usize>) -> Vec<Linear> {
    let values = Values::of(main);
    let mut found = Vec::new();
    for graph in 0..values.graphs.len() {
        for (n, node) in values.graphs[graph].graph.node.iter().enumerate() {
            found.extend(Product::of(node).and_then(|product| examine(&values, graph, n, node, product)));
        }
    }
    name(&values, &mut found);
    let mut linears: Vec<Linear> = found.into_iter().map(|f| f.linear).collect();
    linears.extend(packed::parts(&values, &linears, packed_sizes));
    linears
}

/// The layer that `node` is, or `None` where it multiplies two values that the model computes, or two constants.
fn examine<'a>(
    values: &Values<'a>,
    graph: usize,
    n: usize,
    node: &'a NodeProto,
    product: &Product,
) -> Option<Found<'a>> {
    // An Einsum may have its matrix first.
    let is_sum = product.op == "Einsum";
    let is_constant = |i: usize| trace(values, graph, node.input_at(i)?);
    let (data, matrix) = if is_sum && is_constant(1).is_none() { (1, 0) } else { (0, product.matrix) };
    let weight = is_constant(matrix)?;
    node.input_at(data)?;
    if is_constant(data).is_some() {
        return None;
    }
    let (trans_a, mut trans_b) = match product.op {
        "Gemm" | "FusedGemm" | "FusedMatMul" | "QGemm" => {
            (node.attr_i("transA", 0) != 0, node.attr_i("transB", 0) != 0)
        }
        _ => (false, false),
    };
    let (mut form, mut unfit) = (Form::Rows, None);
    let (in_features, out_features) = match product.op {
        "MatMulNBits" => (usize::try_from(node.attr_i("K", 0)).ok()?, usize::try_from(node.attr_i("N", 0)).ok()?),
        "Conv" => {
            form = channels(node, &weight.dims)?;
            trans_b = true;
            (weight.dims[1], weight.dims[0])
        }
        "Einsum" => match Sum::of(node.attr_s("equation")?, matrix, &weight.dims) {
            Ok((sum, out_in)) => {
                trans_b = out_in;
                let size = |labels: &[(char, usize)]| labels.iter().try_fold(1usize, |n, l| n.checked_mul(l.1));
                let sizes = (size(&sum.summed)?, size(&sum.kept)?);
                form = Form::Sum(sum);
                sizes
            }
            Err(why) => {
                unfit = Some(why?);
                let [.., rows, columns] = weight.dims.as_slice() else { return None };
                (*rows, *columns)
            }
        },
        _ => {
            if product.op.ends_with("Attention") {
                form = Form::Within;
            }
            let [.., rows, columns] = weight.dims.as_slice() else { return None };
            if trans_b { (*columns, *rows) } else { (*rows, *columns) }
        }
    };
    let data_type = DataType::try_from(weight.tensor.data_type()).unwrap_or(DataType::Undefined);
    let has_alpha = matches!(product.op, "Gemm" | "FusedGemm" | "FusedMatMul" | "QGemm");
    let alpha = if has_alpha { node.attr_f("alpha", 1.0) } else { 1.0 };
    // A vector that is added behind a convolution meets its last axis, not its channels.
    let follows = !matches!(form, Form::Channels(_) | Form::Within);
    let added = added_bias(values, graph, n, product.bias, product.quantized, out_features, follows);
    let plain = Beside::of(node.input_at(data)?, n);
    let found = match product.quantized {
        true => quantized::product(values, graph, n, node, &weight).map(|(beside, how, ty)| (beside, Some(how), ty)),
        false => Ok(match quantized::dequantized(values, &weight) {
            Some((how, element)) => (plain.clone(), Some(how), element),
            None => (plain.clone(), None, weight.element),
        }),
    };
    let adaptable = match (&unfit, &found) {
        (Some(why), _) => Err(format!("{} {why}", product.op)),
        (None, Err(why)) => Err(format!("{}: {why}", product.op)),
        (None, Ok((_, how, element))) => {
            adaptable(node, product, &weight, &form, (trans_a, alpha), how.is_some(), *element)
        }
    };
    let (beside, mut quantized, element) = found.unwrap_or((plain, None, data_type));
    if let Some(how) = quantized.as_mut().filter(|_| form != Form::Rows) {
        how.scheme = Err(format!("{} is no plain product", product.op));
    }
    // An operator that takes the bias as integers scales them by its weight's scale, which must stay what it is.
    let has_integer_bias = added.as_ref().is_some_and(|a| a.constant.tensor.data_type() == DataType::Int32 as i32);
    if let Some(Ok(scheme)) = quantized.as_mut().map(|q| q.scheme.as_mut()).filter(|_| has_integer_bias) {
        scheme.scale.iter_mut().for_each(|scale| scale.own = false);
    }
    let linear = Linear {
        scope: values.graphs.get(graph)?.scope.clone(),
        node: n,
        node_name: node.name().to_string(),
        op: node.op_type().to_string(),
        module: None,
        rule: NameRule::None,
        path: String::new(),
        adaptable,
        form,
        matrix,
        weight: Weight {
            name: weight.root.1.to_string(),
            source: weight.source,
            via: weight.via,
            chain: weight.chain,
            moved: weight.moved,
            // MatMulNBits stores [out, in] and multiplies by the transpose.
            transposed: weight.transposed || product.op == "MatMulNBits",
            uses: 0,
        },
        in_features,
        out_features,
        data_type,
        element,
        quantized,
        beside,
        trans_a,
        trans_b,
        alpha,
        beta: if product.op == "Gemm" || product.op == "FusedGemm" { node.attr_f("beta", 1.0) } else { 1.0 },
        bias: added.as_ref().and_then(|a| a.describe(values)),
        part: None,
    };
    let scopes = name_scopes(node).or_else(|| added.as_ref().and_then(|a| name_scopes(a.by(values)?)));
    let first_output = node.output_at(0).unwrap_or_default();
    Some(Found { linear, root: weight.root, bias: added.map(|a| a.constant.root), scopes, first_output })
}

fn name_scopes(node: &NodeProto) -> Option<&str> {
    node.metadata_props.iter().find(|p| p.key() == "pkg.torch.onnx.name_scopes").map(|p| p.value())
}

fn adaptable(
    node: &NodeProto,
    product: &Product,
    weight: &Constant,
    form: &Form,
    (trans_a, alpha): (bool, f32),
    is_quantized: bool,
    element: DataType,
) -> Result<(), String> {
    if let Some(why) = product.refused {
        return Err(format!("{} {why}", product.op));
    }
    let stored = DataType::try_from(weight.tensor.data_type()).unwrap_or(DataType::Undefined);
    if let Some(how) = weight.changed.filter(|_| !is_quantized) {
        let stored = data_type_name(stored);
        return Err(format!("its weight {} (stored as {stored}) {how} before it is used", weight.root.1));
    }
    if !FLOATS.contains(&element) {
        let (element, weight) = (data_type_name(element), weight.root.1);
        return Err(format!(
            "its weight {weight} is {element}, and only float32, float16, bfloat16 or float64 are adapted"
        ));
    }
    if matches!(form, Form::Rows | Form::Within) && weight.dims.len() != 2 && product.op != "MatMulNBits" {
        return Err(format!("its weight {} has shape {:?}, and only matrices are adapted", weight.root.1, weight.dims));
    }
    let bytes = weight.dims.iter().try_fold(size_of::<f64>(), |n, d| n.checked_mul(*d));
    if !bytes.is_some_and(|n| n > 0 && isize::try_from(n).is_ok()) {
        return Err(format!("its weight {} has the impossible shape {:?}", weight.root.1, weight.dims));
    }
    if alpha == 0.0 || !alpha.is_finite() {
        return Err(format!("its alpha is {alpha}, so that no change of its weight can have an effect"));
    }
    if product.op == "FusedMatMul" && (trans_a || node.attr_i("transBatchA", 0) != 0) {
        return Err("FusedMatMul transposes its input, which may have a batch dimension".into());
    }
    Ok(())
}

/// Who reads one stored tensor.
#[derive(Default)]
struct Use {
    /// Linear layers whose matrix or bias it is.
    targets: usize,
    readers: usize,
    is_embedding: bool,
}

/// Gives every layer its module path and parameter path, and counts the uses of its weight.
fn name(values: &Values, found: &mut [Found]) {
    let mut uses: HashMap<ValueId, Use> = HashMap::new();
    for tensor in found.iter().flat_map(|f| [f.root].into_iter().chain(f.bias)) {
        uses.entry(tensor).or_insert_with(|| read_by(values, tensor)).targets += 1;
    }
    let unused = Use::default();
    for f in found.iter_mut() {
        let weight = uses.get(&f.root).unwrap_or(&unused);
        let bias = f.bias.and_then(|b| uses.get(&b)).unwrap_or(&unused);
        (f.linear.module, f.linear.rule) = module_path(&Clues {
            node_name: &f.linear.node_name,
            scopes: f.scopes,
            weight: f.root.1,
            weight_targets: weight.targets,
            is_embedding: weight.is_embedding,
            bias: f.bias.map(|b| b.1),
            bias_targets: bias.targets,
            bias_uses: bias.readers,
        });
        f.linear.weight.uses = weight.readers;
        if let Some(added) = &mut f.linear.bias {
            added.uses = bias.readers;
        }
    }
    let mut by_root: HashMap<ValueId, Vec<usize>> = HashMap::new();
    for (i, f) in found.iter().enumerate() {
        by_root.entry(f.root).or_default().push(i);
    }
    for mut members in by_root.into_values().filter(|members| members.len() > 1) {
        members.sort_by_key(|i| found[*i].linear.node_name.len());
        name_calls(found, &members);
    }
    name_parameters(found);
}

fn read_by(values: &Values, tensor: ValueId) -> Use {
    let readers = final_readers(values, tensor);
    let is_embedding = readers.iter().any(|reader| match reader {
        Reader::Node { graph, node, input: 0 } => {
            values.node(*graph, *node).is_some_and(|n| n.op_type().starts_with("Gather"))
        }
        _ => false,
    });
    Use { targets: 0, readers: readers.len(), is_embedding }
}

/// Among layers with one weight (`members`, by length of the node's name), finds those that are further calls of
/// another.
fn name_calls(found: &mut [Found], members: &[usize]) {
    let scopes: Vec<_> = members.iter().filter_map(|i| Some((*i, scopes_of(&found[*i].linear.node_name)?))).collect();
    let length = |i: usize| found[i].linear.node_name.len();
    let calls: Vec<(usize, usize)> = scopes
        .iter()
        .filter(|(call, _)| found[*call].linear.rule == NameRule::Node)
        .filter_map(|(call, name)| {
            let mut shorter = scopes.iter().take_while(|(first, _)| length(*first) < length(*call));
            shorter.find(|(_, first)| is_call_of(name, first)).map(|(first, _)| (*call, *first))
        })
        .collect();
    // A call's first may itself be a call (`lin_1_1` of `lin_1` of `lin`): follow to the end. Names get shorter.
    let firsts: HashMap<usize, usize> = calls.iter().copied().collect();
    for (call, mut first) in calls {
        while let Some(earlier) = firsts.get(&first) {
            first = *earlier;
        }
        found[call].linear.module = found[first].linear.module.clone();
        found[call].linear.rule = NameRule::Call;
    }
}

/// Sets [`Linear::path`]: equal for the calls of one module, different for all else.
fn name_parameters(found: &mut [Found]) {
    let identity = |f: &Found| {
        // Where the nodes between make other values of it, it is another matrix.
        let weight = &f.linear.weight;
        let chain = if weight.is_matrix() { Chain::new() } else { weight.chain.clone() };
        (f.root.0, f.root.1.to_string(), f.linear.is_stored_out_in(), chain)
    };
    let mut weights_of: HashMap<String, HashSet<(usize, String, bool, Chain)>> = HashMap::new();
    for f in found.iter() {
        if let Some(module) = &f.linear.module {
            weights_of.entry(module.clone()).or_default().insert(identity(f));
        }
    }
    let mut taken: HashSet<String> = HashSet::new();
    let mut given = HashMap::new();
    let mut counts: HashMap<String, usize> = HashMap::new();
    for f in found.iter_mut() {
        let name = if f.linear.node_name.is_empty() { f.first_output } else { &f.linear.node_name };
        let wanted = match &f.linear.module {
            Some(module) if weights_of.get(module).is_none_or(|weights| weights.len() == 1) => module.clone(),
            // Several matrices used directly in one module (bare parameters): the node tells them apart.
            Some(module) => format!("{module}.{}", parameter_safe(name.rsplit('/').next().unwrap_or(name))),
            None => parameter_safe(name),
        };
        f.linear.path = given
            .entry((wanted.clone(), identity(f)))
            .or_insert_with(|| {
                let mut path = wanted.clone();
                while !taken.insert(path.clone()) {
                    let count = counts.entry(wanted.clone()).or_insert(1);
                    *count += 1;
                    path = format!("{wanted}_{count}");
                }
                path
            })
            .clone();
    }
}

/// A node's name as part of a parameter's: scopes become dots, and only letters, digits, `_`, `-` and `.` are kept.
fn parameter_safe(name: &str) -> String {
    let safe: String = name
        .trim_matches('/')
        .chars()
        .map(|c| match c {
            '/' => '.',
            c if c.is_alphanumeric() || matches!(c, '_' | '-' | '.') => c,
            _ => '_',
        })
        .collect();
    if safe.is_empty() { "linear".into() } else { safe }
}
