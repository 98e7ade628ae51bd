//! Quantised layers: where a float path can stand beside one, and what the stored integers of its weight stand for.
//!
//! Three forms are told apart. *Dequantised*: a product reads a matrix that `DequantizeLinear`, or a Cast with a Sub and
//! a Mul, makes of the integers. *Mixed*: one operator takes floats and integers (`MatMulNBits`, `DynamicQuantizeMatMul`,
//! `MatMulIntegerToFloat`). *Integer*: the product is one of integers, and its float input and output are a few nodes
//! away (`MatMulInteger` between `DynamicQuantizeLinear` and `Mul`; `QLinearMatMul` and `QGemm` before
//! `DequantizeLinear`).

use super::constant::{Constant, Source, reshaped, shape_of, trace};
use super::values::{Definition, Reader, Values};
use crate::onnx::{DataType, NodeProto, data_type_name};

/// How a layer's weight is quantised.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// The operator that reads the integers.
    pub by: String,
    pub bits: u32,
    pub signed: bool,
    /// What the integers stand for, or why that is not looked into.
    pub scheme: Result<Scheme, String>,
}

/// What stored integers stand for: `(q − zero)·scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    /// Shape that scale and zero point lie over. The integers stand in its order.
    pub dims: Vec<usize>,
    /// The matrix in the same order: its rows and columns, before any Transpose.
    pub matrix: [usize; 2],
    /// Without it, 1.
    pub scale: Option<Laid>,
    pub zero: Option<Laid>,
    /// The zero point where none is stored.
    pub origin: i32,
    pub packing: Packing,
}

/// A stored tensor of scales or zero points.
#[derive(Debug, Clone, PartialEq)]
pub struct Laid {
    pub source: Source,
    pub data_type: DataType,
    /// Along each axis of [`Scheme::dims`], how many elements have one number.
    pub blocks: Vec<usize>,
    /// Nothing else reads it: it may change with the weight.
    pub own: bool,
}

/// How integers lie in the bytes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Packing {
    /// Element after element; those of 4 bits in pairs, the lower half first (ONNX).
    Dense,
    /// `MatMulNBits`: each row in whole blocks of this many, the last one filled up.
    Blocks(usize),
}

impl Quantized {
    /// `int8, per channel (DequantizeLinear)`.
    pub fn describe(&self) -> String {
        let sign = if self.signed { "" } else { "u" };
        let grain = match &self.scheme {
            Ok(scheme) => format!(", {}", scheme.grain()),
            Err(_) => String::new(),
        };
        format!("{sign}int{}{grain} ({})", self.bits, self.by)
    }
}

impl Scheme {
    fn grain(&self) -> String {
        let Some(scale) = &self.scale else { return "unscaled".into() };
        let whole = |d: usize| scale.blocks[d] >= self.dims[d];
        let parts: Vec<usize> = (0..self.dims.len()).filter(|d| !whole(*d)).collect();
        match parts.as_slice() {
            [] => "per tensor".into(),
            [one] if scale.blocks[*one] == 1 => "per channel".into(),
            _ => match scale.blocks.iter().find(|b| **b > 1) {
                Some(block) => format!("in blocks of {block}"),
                None => "per element".into(),
            },
        }
    }
}

/// Where a float path beside a layer starts and ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Beside {
    /// The value it starts from.
    pub input: String,
    /// Scale and zero point of that value, where it is one of integers.
    pub dequantize: Option<(String, Option<String>)>,
    /// The node whose first output is the layer's result.
    pub exit: usize,
    /// Scale and zero point of that result, where it goes on as integers.
    pub quantize: Option<(String, Option<String>)>,
}

impl Beside {
    /// Of a node that takes and gives floats.
    pub(super) fn of(input: &str, node: usize) -> Self {
        Self { input: input.to_string(), dequantize: None, exit: node, quantize: None }
    }
}

/// Places of a quantised operator's inputs.
struct Operands {
    scale: Option<usize>,
    zero: Option<usize>,
    /// Of the data: scale and zero point.
    data: Option<(usize, usize)>,
}

fn operands(op: &str) -> Option<Operands> {
    let of = |scale, zero, data| Some(Operands { scale, zero: Some(zero), data });
    match op {
        "MatMulNBits" => of(Some(2), 3, None),
        "DynamicQuantizeMatMul" => of(Some(2), 3, None),
        "MatMulIntegerToFloat" => of(Some(3), 5, Some((2, 4))),
        "MatMulInteger" => of(None, 3, None),
        "QLinearMatMul" | "QGemm" => of(Some(4), 5, Some((1, 2))),
        _ => None,
    }
}

/// The float path beside `node`, a product of integers or of floats and integers, and how its weight is quantised.
///
/// # Errors
/// Why there is none.
pub(super) fn product<'a>(
    values: &Values<'a>,
    graph: usize,
    n: usize,
    node: &'a NodeProto,
    weight: &Constant<'a>,
) -> Result<(Beside, Quantized, DataType), String> {
    let op = node.op_type();
    let operands = operands(op).ok_or_else(|| format!("{op} is not known"))?;
    let data = node.input_at(0).unwrap_or_default();
    let mut scale = operands.scale.and_then(|i| node.input_at(i));
    let mut element = scale.and_then(|s| trace(values, graph, s)).map(|c| element_of(&c));
    let mut beside = Beside::of(data, n);
    let pair = |scale: usize, zero: usize| {
        let scale = node.input_at(scale).ok_or(format!("its input {scale}, a scale, is missing"))?;
        Ok::<_, String>((scale.to_string(), node.input_at(zero).map(str::to_string)))
    };
    if let Some((scale, zero)) = operands.data {
        match quantized_from(values, graph, data) {
            Some((float, _)) if op == "MatMulIntegerToFloat" => beside.input = float.into(),
            _ => beside.dequantize = Some(pair(scale, zero)?),
        }
    }
    if op == "MatMulInteger" {
        let (float, of_data) = quantized_from(values, graph, data).ok_or_else(|| {
            format!("its input {data} is one of integers, and no QuantizeLinear or DynamicQuantizeLinear gives it")
        })?;
        beside.input = float.into();
        let scaled = scaled(values, graph, n, of_data)?;
        (beside.exit, scale, element) = (scaled.exit, scaled.weight, Some(scaled.element));
    } else if op == "QLinearMatMul" || (op == "QGemm" && node.input_at(7).is_some()) {
        match dequantized_by(values, graph, n) {
            Some(exit) => beside.exit = exit,
            None if op == "QGemm" => beside.quantize = Some(pair(7, 8)?),
            None => beside.quantize = Some(pair(6, 7)?),
        }
    }
    let zero = operands.zero.and_then(|i| node.input_at(i));
    let bits = if op == "MatMulNBits" { node.attr_i("bits", 4) } else { i64::from(bits_of(weight)) };
    let quantized = Quantized {
        by: op.to_string(),
        bits: u32::try_from(bits).unwrap_or_default(),
        signed: op != "MatMulNBits" && is_signed(element_of(weight)),
        scheme: match op {
            "MatMulNBits" => n_bits(values, graph, node, weight, bits),
            _ => direct(values, graph, node, weight, scale, zero),
        },
    };
    Ok((beside, quantized, element.unwrap_or(DataType::Float)))
}

/// Number of elements, where it can be counted.
fn count(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))
}

fn element_of(constant: &Constant) -> DataType {
    DataType::try_from(constant.tensor.data_type()).unwrap_or(DataType::Undefined)
}

fn is_signed(element: DataType) -> bool {
    matches!(element, DataType::Int4 | DataType::Int8 | DataType::Int16 | DataType::Int32)
}

fn bits_of(constant: &Constant) -> u32 {
    match element_of(constant) {
        DataType::Int4 | DataType::Uint4 => 4,
        DataType::Int16 | DataType::Uint16 => 16,
        DataType::Int32 => 32,
        _ => 8,
    }
}

/// The float that a quantiser makes `value` of, and the name of its scale.
fn quantized_from<'a>(values: &Values<'a>, graph: usize, value: &'a str) -> Option<(&'a str, &'a str)> {
    let ((at, _), Definition::Node(n)) = values.lookup(graph, value)? else { return None };
    let node = values.node(at, n).filter(|node| node.output_at(0) == Some(value))?;
    let (float, scale) = match node.op_type() {
        "DynamicQuantizeLinear" => (node.input_at(0)?, node.output_at(1)?),
        "QuantizeLinear" => (node.input_at(0)?, node.input_at(1)?),
        _ => return None,
    };
    // The names must mean the same where the product stands.
    let same = |name: &'a str| values.lookup(graph, name).map(|v| v.0) == values.lookup(at, name).map(|v| v.0);
    (same(float) && same(scale)).then_some((float, scale))
}

/// The end of `MatMulInteger → Cast → Mul(scales)`.
struct Scaled<'a> {
    exit: usize,
    /// The constant scale of the weight; where there are several, none is known.
    weight: Option<&'a str>,
    element: DataType,
}

fn scaled<'a>(values: &Values<'a>, graph: usize, n: usize, of_data: &'a str) -> Result<Scaled<'a>, String> {
    let (at, cast) = only_reader(values, graph, n)
        .filter(|(_, node, _)| node.is("Cast"))
        .map(|(at, node, _)| (at, node))
        .ok_or("its sum of integers is not converted by a Cast alone")?;
    let element = DataType::try_from(cast.attr_i("to", 0) as i32).unwrap_or(DataType::Undefined);
    let (mut exit, mut factors) = (at, Vec::new());
    while let Some((next, node, input)) = only_reader(values, graph, exit).filter(|(_, node, _)| node.is("Mul")) {
        let Some(other) = node.input_at(1 - input.min(1)) else { break };
        let Some(leaves) = leaves(values, graph, other, &mut 8) else { break };
        factors.extend(leaves);
        exit = next;
    }
    let before = factors.len();
    factors.retain(|name| *name != of_data);
    if factors.len() == before {
        return Err("no Mul with the scale of its input follows it".into());
    }
    Ok(Scaled { exit, weight: if let [one] = factors.as_slice() { Some(*one) } else { None }, element })
}

/// The factors of a product of scales: constants, and what quantisers found.
fn leaves<'a>(values: &Values<'a>, graph: usize, name: &'a str, budget: &mut usize) -> Option<Vec<&'a str>> {
    *budget = budget.checked_sub(1)?;
    if trace(values, graph, name).is_some() {
        return Some(vec![name]);
    }
    let ((at, _), Definition::Node(n)) = values.lookup(graph, name)? else { return None };
    let node = values.node(at, n)?;
    match node.op_type() {
        "DynamicQuantizeLinear" => Some(vec![name]),
        "Mul" if at == graph => {
            let mut both = leaves(values, graph, node.input_at(0)?, budget)?;
            both.extend(leaves(values, graph, node.input_at(1)?, budget)?);
            Some(both)
        }
        _ => None,
    }
}

/// The one node of the same graph that reads what node `n` computes, and by which input.
fn only_reader<'a>(values: &Values<'a>, graph: usize, n: usize) -> Option<(usize, &'a NodeProto, usize)> {
    let (value, _) = values.lookup(graph, values.node(graph, n)?.output_at(0)?)?;
    match values.readers(value) {
        [Reader::Node { graph: at, node, input }] if *at == graph => Some((*node, values.node(*at, *node)?, *input)),
        _ => None,
    }
}

/// The DequantizeLinear that makes floats of what node `n` computes, a constant being added before or not; `None` where
/// that goes on as integers.
fn dequantized_by(values: &Values, graph: usize, n: usize) -> Option<usize> {
    let mut at = n;
    for _ in 0..2 {
        let (next, node, input) = only_reader(values, graph, at)?;
        match node.op_type() {
            "DequantizeLinear" if input == 0 => return Some(next),
            "QLinearAdd" if [0, 3].contains(&input) => {
                trace(values, graph, node.input_at(3 - input)?)?;
                at = next;
            }
            _ => return None,
        }
    }
    None
}

/// The scheme of a matrix whose operator takes integers, scale and zero point.
fn direct<'a>(
    values: &Values<'a>,
    graph: usize,
    node: &'a NodeProto,
    weight: &Constant<'a>,
    scale: Option<&'a str>,
    zero: Option<&'a str>,
) -> Result<Scheme, String> {
    let &[rows, columns] = weight.dims.as_slice() else { return Err("its weight is no matrix".into()) };
    if weight.via.iter().any(|step| step.op != "Identity") {
        return Err("its integers are moved before they are multiplied".into());
    }
    let scale = scale.ok_or("the scale of its weight is not one constant")?;
    // One number, or one for each output.
    let turned = node.attr_i("transB", 0) != 0;
    let (by_output, outputs) = if turned { (vec![1, columns.max(1)], rows) } else { (vec![rows.max(1), 1], columns) };
    let lay = |name| {
        laid(values, graph, name, |dims| match count(dims)? {
            1 => Some(vec![rows.max(1), columns.max(1)]),
            n if n == outputs => Some(by_output.clone()),
            _ => None,
        })
    };
    Ok(Scheme {
        dims: vec![rows, columns],
        matrix: [rows, columns],
        scale: Some(lay(scale)?),
        zero: zero.map(lay).transpose()?,
        origin: 0,
        packing: Packing::Dense,
    })
}

/// `MatMulNBits` (`ContribOperators.md`).
fn n_bits<'a>(
    values: &Values<'a>,
    graph: usize,
    node: &'a NodeProto,
    weight: &Constant<'a>,
    bits: i64,
) -> Result<Scheme, String> {
    let size = |name: &str| usize::try_from(node.attr_i(name, 0)).ok().filter(|n| *n > 0).ok_or(name.to_string());
    let sizes = || -> Result<_, String> { Ok((size("K")?, size("N")?, size("block_size")?)) };
    let (columns, rows, block) = sizes().map_err(|name| format!("its attribute {name} is missing"))?;
    if !matches!(bits, 4 | 8) {
        return Err(format!("its weight has {bits} bits, and only 4 and 8 are looked into"));
    }
    if node.input_at(4).is_some() {
        return Err("it takes its blocks in another order (g_idx)".into());
    }
    if !weight.via.is_empty() {
        return Err("its integers are moved before they are multiplied".into());
    }
    let blocks = columns.div_ceil(block);
    let in_block = block.checked_mul(bits as usize).map(|n| n / 8);
    let bytes = in_block.and_then(|n| count(&[rows, blocks, n]));
    if bytes.is_none() || bytes != count(&weight.dims) {
        return Err(format!("its weight of shape {:?} does not hold {rows} × {columns} numbers", weight.dims));
    }
    let over = |dims: &[usize]| (count(dims)? == rows * blocks).then(|| vec![1, block]);
    let scale = node.input_at(2).ok_or("its scales are missing")?;
    let packed = |dims: &[usize]| {
        let bytes = (blocks * bits as usize).div_ceil(8);
        (count(dims)? == rows * bytes).then(|| vec![1, block])
    };
    let zero = match node.input_at(3) {
        None => None,
        Some(zero) => {
            let is_packed = trace(values, graph, zero).is_some_and(|c| element_of(&c) == DataType::Uint8);
            Some(if is_packed { laid(values, graph, zero, packed)? } else { laid(values, graph, zero, over)? })
        }
    };
    Ok(Scheme {
        dims: vec![rows, columns],
        matrix: [rows, columns],
        scale: Some(laid(values, graph, scale, over)?),
        zero,
        origin: 1 << (bits - 1),
        packing: Packing::Blocks(block),
    })
}

/// The stored tensor behind `name`; `lie`: how one of that shape lies over the weight.
fn laid<'a>(
    values: &Values<'a>,
    graph: usize,
    name: &'a str,
    lie: impl FnOnce(&[usize]) -> Option<Vec<usize>>,
) -> Result<Laid, String> {
    let constant =
        trace(values, graph, name).ok_or_else(|| format!("its scale or zero point {name} is no constant"))?;
    if constant.transposed
        || constant.via.iter().any(|step| matches!(step.op.as_str(), "Mul" | "Div" | "Sub" | "DequantizeLinear"))
    {
        return Err(format!("its scale or zero point {name} is computed"));
    }
    let blocks =
        lie(&constant.dims).ok_or_else(|| format!("its scale or zero point {name} has shape {:?}", constant.dims))?;
    let own = constant.via.is_empty() && values.readers(constant.root).len() == 1;
    Ok(Laid { data_type: element_of(&constant), source: constant.source, blocks, own })
}

/// How a matrix is quantised that a product reads as floats: what the nodes between do to its integers, and the type
/// that comes out. `None` for one that is stored in floating point, or that other operators make.
pub(super) fn dequantized<'a>(values: &Values<'a>, weight: &Constant<'a>) -> Option<(Quantized, DataType)> {
    use DataType::*;
    let stored = element_of(weight);
    if !matches!(stored, Int4 | Uint4 | Int8 | Uint8 | Int16 | Uint16 | Int32) {
        return None;
    }
    let mut chain = Chain::of(weight.tensor.dims.iter().map(|d| usize::try_from(*d).ok()).collect::<Option<_>>()?);
    for step in &weight.via {
        let graph = values.graphs.iter().position(|view| view.scope == step.scope)?;
        chain.pass(values, graph, values.node(graph, step.node)?, weight)?;
    }
    let element = chain.element?;
    let by = if chain.by.is_empty() { "Cast".to_string() } else { chain.by.clone() };
    let quantized = Quantized { by, bits: bits_of(weight), signed: is_signed(stored), scheme: chain.scheme(stored) };
    Some((quantized, element))
}

/// What a chain of nodes has made of stored integers so far.
struct Chain {
    dims: Vec<usize>,
    /// The shape over which scale and zero point lie, once there is one.
    grid: Option<Vec<usize>>,
    by: String,
    element: Option<DataType>,
    transposed: bool,
    scale: Option<Laid>,
    zero: Option<Laid>,
    problem: Option<String>,
}

impl Chain {
    fn of(dims: Vec<usize>) -> Self {
        let (by, element, transposed) = (String::new(), None, false);
        Self { dims, grid: None, by, element, transposed, scale: None, zero: None, problem: None }
    }

    fn pass<'a>(
        &mut self,
        values: &Values<'a>,
        graph: usize,
        node: &'a NodeProto,
        weight: &Constant<'a>,
    ) -> Option<()> {
        match node.op_type() {
            "Cast" => self.element = DataType::try_from(node.attr_i("to", 0) as i32).ok(),
            "Transpose" if self.dims.len() != 2 => {
                self.problem = Some("its integers are moved before they are multiplied".into())
            }
            "Transpose" if node.attr_ints("perm") != Some(&[0, 1]) => {
                self.transposed = !self.transposed;
                self.dims.reverse();
            }
            "Reshape" => {
                let dims = reshaped(&self.dims, &shape_of(values, graph, node)?)?;
                if self.transposed && dims != self.dims {
                    self.problem = Some("its integers are turned and then cut anew".into());
                }
                self.dims = dims;
            }
            "DequantizeLinear" => {
                self.by = "DequantizeLinear".into();
                let scale = node.input_at(1)?;
                let read = trace(values, graph, scale)?;
                let dtype = node.attr_i("output_dtype", 0);
                self.element =
                    Some(if dtype == 0 { element_of(&read) } else { DataType::try_from(dtype as i32).ok()? });
                let (dims, axis) = (self.dims.clone(), node.attr_i("axis", 1));
                let block = usize::try_from(node.attr_i("block_size", 0)).ok()?;
                let lie = |of: &[usize]| along(&dims, of, axis, block);
                let scale = laid(values, graph, scale, lie);
                let zero = node.input_at(2).map(|zero| laid(values, graph, zero, lie)).transpose();
                self.put(scale.map(Some), zero);
            }
            "Mul" | "Sub" => {
                let of_weight =
                    |i: usize| trace(values, graph, node.input_at(i)?).filter(|c| c.root == weight.root).map(|_| i);
                let at = of_weight(0).or_else(|| of_weight(1))?;
                self.by = if self.by.is_empty() { "Cast".into() } else { std::mem::take(&mut self.by) };
                self.by += &format!(" and {}", node.op_type());
                let dims = self.dims.clone();
                let other = laid(values, graph, node.input_at(1 - at)?, |of| broadcast(&dims, of));
                if node.is("Sub") && (at != 0 || self.scale.is_some()) {
                    self.problem = Some("something else than a zero point is subtracted from its weight".into());
                } else if node.is("Sub") {
                    self.put(Ok(None), other.map(Some));
                } else {
                    self.put(other.map(Some), Ok(None));
                }
            }
            _ => {}
        }
        Some(())
    }

    fn put(&mut self, scale: Result<Option<Laid>, String>, zero: Result<Option<Laid>, String>) {
        if self.transposed {
            self.problem = Some("its integers are turned before they are scaled".into());
        }
        if self.grid.as_ref().is_some_and(|grid| *grid != self.dims) {
            self.problem = Some("its integers are cut anew between zero point and scale".into());
        }
        self.grid = Some(self.dims.clone());
        for (part, slot) in [(scale, &mut self.scale), (zero, &mut self.zero)] {
            match part {
                Ok(None) => {}
                Ok(part) if slot.is_none() => *slot = part,
                Ok(_) => self.problem = Some("its weight is scaled or shifted twice".into()),
                Err(why) => self.problem = Some(why),
            }
        }
    }

    fn scheme(self, stored: DataType) -> Result<Scheme, String> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        if matches!(stored, DataType::Int16 | DataType::Uint16 | DataType::Int32) {
            return Err(format!(
                "its integers are {}, and only those of 4 and 8 bits are looked into",
                data_type_name(stored)
            ));
        }
        let mut matrix: [usize; 2] = self.dims.try_into().map_err(|_| "its weight is no matrix")?;
        if self.transposed {
            matrix.reverse();
        }
        let dims = self.grid.unwrap_or_else(|| matrix.to_vec());
        Ok(Scheme { dims, matrix, scale: self.scale, zero: self.zero, origin: 0, packing: Packing::Dense })
    }
}

/// Blocks of a `DequantizeLinear`: one number for all, one for each place along `axis`, or one for `block` such places.
fn along(dims: &[usize], of: &[usize], axis: i64, block: usize) -> Option<Vec<usize>> {
    let whole: Vec<usize> = dims.iter().map(|d| (*d).max(1)).collect();
    if of.is_empty() || (of == [1] && block == 0) {
        return Some(whole);
    }
    let rank = i64::try_from(dims.len()).ok()?;
    let axis = usize::try_from(if axis < 0 { axis + rank } else { axis }).ok()?;
    let length = *dims.get(axis)?;
    if block == 0 {
        let mut blocks = whole;
        blocks[axis] = 1;
        return (of == [length]).then_some(blocks);
    }
    let mut wanted = dims.to_vec();
    wanted[axis] = length.div_ceil(block);
    let mut blocks = vec![1; dims.len()];
    blocks[axis] = block;
    (of == wanted).then_some(blocks)
}

/// Blocks of an operand that is broadcast to `dims`.
fn broadcast(dims: &[usize], of: &[usize]) -> Option<Vec<usize>> {
    let missing = dims.len().checked_sub(of.len())?;
    let size = |d: usize| if d < missing { 1 } else { of[d - missing] };
    dims.iter()
        .enumerate()
        .map(|(d, n)| match size(d) {
            s if s == *n => Some(1),
            1 => Some((*n).max(1)),
            _ => None,
        })
        .collect()
}
