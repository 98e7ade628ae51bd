//! Do two models hold the same weights? Tensor by tensor, a piece of each at a time, so the size of the models does not
//! matter and no engine is needed. What the active adapters make of a weight counts as the weight.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;

use bytes::Bytes;
use serde::Serialize;

use crate::Result;
use crate::adapter::Injection;
use crate::fold::{FoldOptions, fold};
use crate::onnx::{DataType, Due, Model, Slot, Tensor, TensorProto, data_type_name};
use crate::verify::Tolerance;

/// The comparison of one tensor whose bytes are not the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WeightDifference {
    pub name: String,
    pub shape: Vec<i64>,
    /// Largest `|a − b|`; infinite where one of them is not a number.
    pub max_abs: f64,
    /// `‖a − b‖ / ‖b‖`.
    pub relative: f64,
    pub within: bool,
    /// Why the two cannot be compared, where they cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incomparable: Option<String>,
}

/// The comparison of all tensors.
#[derive(Debug, Clone, Default, Serialize)]
pub struct WeightComparison {
    /// Tensors that both models have.
    pub compared: usize,
    /// Those of them with the same bytes.
    pub identical: usize,
    pub differences: Vec<WeightDifference>,
    /// Tensors that only one of the two has.
    pub unmatched: Vec<String>,
}

impl WeightComparison {
    pub fn within(&self) -> bool {
        self.compared > 0 && self.unmatched.is_empty() && self.differences.iter().all(|d| d.within)
    }
}

/// A tensor without its value, and the value.
struct Weight {
    header: TensorProto,
    value: Value,
}

enum Value {
    Stored(Bytes),
    /// Made out of a stored one, by an adapter.
    Made(Due),
}

/// Bytes that are compared at a time: a whole number of elements of any type.
const CHUNK: usize = 1 << 18;

/// Compares the initializers and constants of `a` and `b` by name. `each` is called with every name.
///
/// # Errors
/// Tensors whose bytes are not where the model says; adapters that cannot be merged.
pub fn compare_weights(a: &Model, b: &Model, tolerance: Tolerance, each: impl Fn(&str)) -> Result<WeightComparison> {
    let (mut ours, theirs) = (weights(a)?, weights(b)?);
    let mut result = WeightComparison::default();
    for (key, b) in theirs {
        let Some(a) = ours.remove(&key) else {
            result.unmatched.push(key.0);
            continue;
        };
        each(&key.0);
        result.compared += 1;
        match difference(key.0, a, b, tolerance)? {
            None => result.identical += 1,
            Some(difference) => result.differences.push(difference),
        }
    }
    result.unmatched.extend(ours.into_keys().map(|(name, _)| name));
    Ok(result)
}

/// The tensors of `model` by name, and by how many of that name come before (in branches of its graph).
fn weights(model: &Model) -> Result<BTreeMap<(String, usize), Weight>> {
    let adapted = Injection::read(model)?.is_some_and(|record| !record.active.is_empty());
    let (patch, mut made, opened) = match adapted {
        true => fold(model, &FoldOptions::default())?.into_parts(),
        false => Default::default(),
    };
    let model = opened.as_ref().unwrap_or(model);
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut weights = BTreeMap::new();
    let mut add = |name: &str, header: TensorProto, value| {
        let count = seen.entry(name.into()).or_default();
        weights.insert((name.to_string(), *count), Weight { header, value });
        *count += 1;
    };
    for (slot, tensor) in model.slots() {
        // A constant is called as the value that its node makes.
        let name = match &slot {
            Slot::Initializer { .. } => tensor.name(),
            Slot::Attribute { scope, node, .. } => {
                let node = model.graph_at(scope).and_then(|g| g.node.get(*node));
                node.and_then(|n| n.output_at(0)).unwrap_or_default()
            }
        };
        if slot.is_dropped_by(&patch) || tensor.data_type() == DataType::String as i32 {
            continue;
        }
        let value = match made.replaced.remove(&slot) {
            Some(due) => Value::Made(due),
            None => Value::Stored(model.tensor_bytes(tensor)?),
        };
        let header = TensorProto { dims: tensor.dims.clone(), data_type: tensor.data_type, ..Default::default() };
        add(name, header, value);
    }
    for (header, due, _) in made.added {
        let name = header.name().to_string();
        add(&name, header, Value::Made(due));
    }
    Ok(weights)
}

/// `None` where the bytes are the same.
fn difference(name: String, a: Weight, b: Weight, tolerance: Tolerance) -> Result<Option<WeightDifference>> {
    let shape = b.header.dims.clone();
    let kind = |w: &Weight| {
        let data_type = DataType::try_from(w.header.data_type()).map_or("?", data_type_name);
        format!("{data_type} {:?}", w.header.dims)
    };
    let (ours, theirs) = (kind(&a), kind(&b));
    if ours != theirs {
        let incomparable = Some(format!("{ours} against {theirs}"));
        let infinite = f64::INFINITY;
        return Ok(Some(WeightDifference {
            name,
            shape,
            max_abs: infinite,
            relative: infinite,
            within: false,
            incomparable,
        }));
    }
    let data_type = DataType::try_from(b.header.data_type()).unwrap_or(DataType::Float);
    let mut compared = Compared::new(data_type, tolerance);
    match (a.value, b.value) {
        (Value::Stored(a), Value::Stored(b)) => compared.pieces(&a, &b),
        (Value::Made(a), Value::Stored(b)) => compared.stream(a, &b, false)?,
        (Value::Stored(a), Value::Made(b)) => compared.stream(b, &a, true)?,
        (Value::Made(a), Value::Made(b)) => {
            let mut whole = Vec::with_capacity(b.len);
            b.write_to(&mut whole).map_err(|e| e.at("a weight".as_ref()))?;
            compared.stream(a, &whole, false)?;
        }
    }
    Ok((!compared.same).then(|| compared.difference(name, shape)))
}

/// What was seen of two tensors so far.
struct Compared {
    data_type: DataType,
    tolerance: Tolerance,
    same: bool,
    /// False where values of this type cannot be told, so that only the bytes count.
    numbers: bool,
    max_abs: f64,
    within: bool,
    /// Sums of squares of a − b and of b.
    off: f64,
    norm: f64,
}

impl Compared {
    fn new(data_type: DataType, tolerance: Tolerance) -> Self {
        let numbers = Tensor::zeros(data_type, &[0]).is_ok();
        Self { data_type, tolerance, same: true, numbers, max_abs: 0.0, within: true, off: 0.0, norm: 0.0 }
    }

    fn pieces(&mut self, a: &[u8], b: &[u8]) {
        // Where nothing differs nothing has to be added up.
        if a != b {
            a.chunks(CHUNK).zip(b.chunks(CHUNK)).for_each(|(a, b)| self.piece(a, b));
        }
    }

    /// `made` against bytes that are there, the other way round where `swapped`.
    fn stream(&mut self, made: Due, stored: &[u8], swapped: bool) -> Result<()> {
        let mut stream = Stream { compared: self, made: Vec::new(), stored, swapped };
        made.write_to(&mut stream).map_err(|e| e.at("a weight".as_ref()))?;
        stream.piece(true);
        Ok(())
    }

    fn piece(&mut self, a: &[u8], b: &[u8]) {
        self.same &= a == b;
        let tensor = |bytes: &[u8]| {
            let size = Tensor::zeros(self.data_type, &[1]).map_or(1, |one| one.byte_len());
            Tensor::from_bytes(self.data_type, &[bytes.len() / size], bytes).ok()
        };
        let (Some(a), Some(b)) = (tensor(a), tensor(b)) else {
            self.within &= a == b;
            return;
        };
        match (a.values::<f32>(), b.values::<f32>()) {
            (Some(a), Some(b)) => self.values(a.iter().zip(b).map(|(a, b)| (f64::from(*a), f64::from(*b)))),
            _ => self.values(a.to_f64().into_iter().zip(b.to_f64())),
        }
    }

    fn values(&mut self, pairs: impl Iterator<Item = (f64, f64)>) {
        let Tolerance { atol, rtol } = self.tolerance;
        for (a, b) in pairs {
            if b.is_finite() {
                self.norm += b * b;
            }
            if a == b || (a.is_nan() && b.is_nan()) {
                continue;
            }
            let off = (a - b).abs();
            let off = if off.is_nan() { f64::INFINITY } else { off };
            self.max_abs = self.max_abs.max(off);
            self.off += off * off;
            self.within &= off <= atol + rtol * b.abs();
        }
    }

    fn difference(self, name: String, shape: Vec<i64>) -> WeightDifference {
        let relative = if self.off == 0.0 { 0.0 } else { (self.off / self.norm).sqrt() };
        let incomparable = (!self.numbers).then(|| "other bytes".to_string());
        WeightDifference { name, shape, max_abs: self.max_abs, relative, within: self.within, incomparable }
    }
}

/// Compares what is written to it with what is stored, in whole pieces.
struct Stream<'a> {
    compared: &'a mut Compared,
    made: Vec<u8>,
    stored: &'a [u8],
    swapped: bool,
}

impl Stream<'_> {
    fn piece(&mut self, last: bool) {
        while self.made.len() >= CHUNK || (last && !self.made.is_empty()) {
            let len = CHUNK.min(self.made.len());
            let (stored, rest) = self.stored.split_at(len.min(self.stored.len()));
            self.stored = rest;
            match self.swapped {
                false => self.compared.piece(&self.made[..len], stored),
                true => self.compared.piece(stored, &self.made[..len]),
            }
            self.made.drain(..len);
        }
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.made.extend_from_slice(bytes);
        self.piece(false);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
