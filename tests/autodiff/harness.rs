//! One-operator models and the comparison of their gradients with central differences.
//!
//! For y = f(x), a random seed s and a direction d, ⟨∇⟨s, f⟩, d⟩ must be the derivative of ⟨s, f(x + t·d)⟩ at 0,
//! taken with the fourth-order central difference (8(f₊₁ - f₋₁) - (f₊₂ - f₋₂)) / 12h. Directions are random, and the
//! gradient itself, along which nothing cancels.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use bone_onnx::autodiff::{Gradient, Request, Rules, Seed, gradient_with};
use bone_onnx::engine::{Device, Engine, EngineKind, LoadOptions, Session, open};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, NodeProto, Tensor, value_info};

pub fn engine() -> &'static dyn Engine {
    static ENGINE: OnceLock<Box<dyn Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| open(EngineKind::OnnxRuntime, Device::Cpu).expect("ONNX Runtime")).as_ref()
}

pub fn load(model: &ModelProto, optimize: bool) -> Result<Box<dyn Session>, String> {
    engine().load(model, &LoadOptions { threads: Some(1), optimize }).map_err(|e| e.to_string())
}

/// A small generator of numbers (SplitMix64), the same on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [lo, hi).
    pub fn uniform(&mut self, lo: f64, hi: f64) -> f64 {
        lo + (hi - lo) * (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn values(&mut self, n: usize, lo: f64, hi: f64) -> Vec<f64> {
        (0..n).map(|_| self.uniform(lo, hi)).collect()
    }
}

/// An input of the operator under test.
#[derive(Clone)]
pub enum Arg {
    /// A float input to differentiate by.
    By(Vec<usize>, Vec<f64>),
    /// A float input that is given at run time and not differentiated.
    Float(Vec<usize>, Vec<f64>),
    /// A float initializer.
    FloatConst(Vec<usize>, Vec<f64>),
    /// Given at run time.
    Given(Tensor),
    /// An initializer.
    Const(Tensor),
    /// An optional input that is not given.
    Missing,
}

/// An operator, its inputs and attributes.
#[derive(Clone)]
pub struct Case {
    pub domain: &'static str,
    pub op: &'static str,
    pub what: &'static str,
    pub args: Vec<Arg>,
    pub attributes: Vec<AttributeProto>,
    /// Which outputs exist and are differentiated.
    pub outputs: Vec<bool>,
    /// ONNX Runtime has the operator in single precision only.
    pub single: bool,
    pub opsets: Vec<i64>,
}

pub fn case(op: &'static str, args: Vec<Arg>) -> Case {
    Case {
        domain: "",
        op,
        what: "",
        args,
        attributes: vec![],
        outputs: vec![true],
        single: false,
        opsets: vec![17, 21],
    }
}

impl Case {
    pub fn what(mut self, what: &'static str) -> Self {
        self.what = what;
        self
    }
    pub fn domain(mut self, domain: &'static str) -> Self {
        self.domain = domain;
        self
    }
    pub fn attr(mut self, attribute: AttributeProto) -> Self {
        self.attributes.push(attribute);
        self
    }
    pub fn int(self, name: &str, value: i64) -> Self {
        self.attr(AttributeProto::int(name, value))
    }
    pub fn float(self, name: &str, value: f32) -> Self {
        self.attr(AttributeProto::float(name, value))
    }
    pub fn ints(self, name: &str, values: &[i64]) -> Self {
        self.attr(AttributeProto::ints(name, values))
    }
    pub fn floats(self, name: &str, values: &[f32]) -> Self {
        use bone_onnx::onnx::proto::attribute_proto::AttributeType::Floats;
        let floats = values.to_vec();
        self.attr(AttributeProto { name: Some(name.into()), floats, r#type: Some(Floats as i32), ..Default::default() })
    }
    pub fn strings(self, name: &str, values: &[&str]) -> Self {
        use bone_onnx::onnx::proto::attribute_proto::AttributeType::Strings;
        let strings = values.iter().map(|s| s.to_string().into()).collect();
        self.attr(AttributeProto {
            name: Some(name.into()),
            strings,
            r#type: Some(Strings as i32),
            ..Default::default()
        })
    }
    pub fn string(self, name: &str, value: &str) -> Self {
        self.attr(AttributeProto::string(name, value))
    }
    pub fn single(mut self) -> Self {
        self.single = true;
        self
    }
    pub fn opsets(mut self, opsets: &[i64]) -> Self {
        self.opsets = opsets.to_vec();
        self
    }
    pub fn outputs(mut self, outputs: &[bool]) -> Self {
        self.outputs = outputs.to_vec();
        self
    }

    fn name(&self, i: usize) -> String {
        format!("x{i}")
    }

    fn number(&self, dims: &[usize], values: &[f64], single: bool) -> Tensor {
        match single {
            true => Tensor::new(dims, values.iter().map(|v| *v as f32).collect()),
            false => Tensor::new(dims, values.to_vec()),
        }
    }

    /// Names to differentiate by.
    pub fn wrt(&self) -> Vec<String> {
        (0..self.args.len()).filter(|i| matches!(self.args[*i], Arg::By(..))).map(|i| self.name(i)).collect()
    }

    pub fn feeds(&self) -> BTreeMap<String, Tensor> {
        let tensors = self.args.iter().enumerate().filter_map(|(i, arg)| {
            Some((
                self.name(i),
                match arg {
                    Arg::By(dims, values) | Arg::Float(dims, values) => self.number(dims, values, self.single),
                    Arg::Given(tensor) => tensor.clone(),
                    _ => return None,
                },
            ))
        });
        tensors.collect()
    }

    /// The model. `dynamic`: inputs declare their rank alone.
    pub fn model(&self, dynamic: bool, opset: i64) -> ModelProto {
        let mut graph = GraphProto { name: Some("case".into()), ..Default::default() };
        let mut node = NodeProto {
            op_type: Some(self.op.into()),
            domain: Some(self.domain.into()),
            name: Some(format!("the_{}", self.op)),
            attribute: self.attributes.clone(),
            ..Default::default()
        };
        for (i, arg) in self.args.iter().enumerate() {
            let name = self.name(i);
            match arg {
                Arg::Missing => {
                    node.input.push(String::new());
                    continue;
                }
                Arg::Const(tensor) => graph.initializer.push(tensor.to_proto(&name)),
                Arg::FloatConst(dims, values) => {
                    graph.initializer.push(self.number(dims, values, self.single).to_proto(&name));
                }
                _ => {
                    let tensor = &self.feeds()[&name];
                    let dims: Vec<String> =
                        tensor.dims().iter().map(|d| if dynamic { String::new() } else { d.to_string() }).collect();
                    let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
                    graph.input.push(value_info(&name, tensor.data_type(), &dims));
                }
            }
            node.input.push(name);
        }
        let element = if self.single { DataType::Float } else { DataType::Double };
        for (k, used) in self.outputs.iter().enumerate() {
            let needed = *used || k == 0 || matches!(self.op, "TopK" | "BatchNormalization" | "LinearClassifier");
            node.output.push(if needed { format!("y{k}") } else { String::new() });
            if *used {
                let mut info = value_info(&format!("y{k}"), element, &[]);
                if let Some(bone_onnx::onnx::proto::type_proto::Value::TensorType(tensor)) =
                    info.r#type.as_mut().and_then(|t| t.value.as_mut())
                {
                    tensor.shape = None;
                }
                graph.output.push(info);
            }
        }
        graph.node.push(node);
        let import = |domain: &str, version| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) };
        let mut opset_import = vec![import("", opset)];
        if !self.domain.is_empty() {
            let version = match (self.domain, self.op) {
                ("ai.onnx.ml", "TreeEnsemble") => 5,
                ("ai.onnx.ml", _) => 3,
                _ => 1,
            };
            opset_import.push(import(self.domain, version));
        }
        ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..Default::default() }
    }

    /// Compares gradient and differences in every form of the model; the text says what differs.
    pub fn check(&self) -> Result<(), String> {
        for opset in &self.opsets {
            for dynamic in [false, true] {
                // ONNX Runtime does not load these without the sizes of the tables, or of the bias.
                let sized = self.op == "EmbedLayerNormalization" || (self.op == "MatMulNBits" && self.args.len() > 5);
                if dynamic && sized {
                    continue;
                }
                let model = self.model(dynamic, *opset);
                let wrt = self.wrt();
                let of: Vec<String> =
                    model.graph.iter().flat_map(|g| &g.output).map(|o| o.name().to_string()).collect();
                for optimize in [false, true] {
                    let tolerance = if self.single { Tolerance::SINGLE } else { Tolerance::DOUBLE };
                    compare(&model, &of, &wrt, &self.feeds(), optimize, tolerance).map_err(|e| {
                        format!(
                            "{} {} [opset {opset}, dynamic {dynamic}, optimize {optimize}]: {e}",
                            self.op, self.what
                        )
                    })?;
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
pub struct Tolerance {
    /// Step of the differences, relative to the largest element of the value.
    pub step: f64,
    /// Relative to Σ|gradient·direction|.
    pub relative: f64,
}

impl Tolerance {
    pub const DOUBLE: Self = Self { step: 1e-3, relative: 1e-8 };
    /// Whole models: small steps, so that no ReLU turns over on the way.
    pub const MODEL_DOUBLE: Self = Self { step: 1e-5, relative: 1e-6 };
    pub const MODEL_SINGLE: Self = Self { step: 1e-2, relative: 1e-2 };
    pub const SINGLE: Self = Self { step: 1e-2, relative: 2e-3 };
}

fn with(tensor: &Tensor, values: &[f64]) -> Tensor {
    match tensor {
        Tensor::F32(_) => Tensor::new(tensor.dims(), values.iter().map(|v| *v as f32).collect()),
        _ => Tensor::new(tensor.dims(), values.to_vec()),
    }
}

fn lend(feeds: &BTreeMap<String, Tensor>) -> Vec<(&str, &Tensor)> {
    feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect()
}

/// Gradients of ⟨seed, `of`⟩ by every one of `wrt` (all given in `feeds`), against differences on `model` itself.
pub fn compare(
    model: &ModelProto,
    of: &[String],
    wrt: &[String],
    feeds: &BTreeMap<String, Tensor>,
    optimize: bool,
    tolerance: Tolerance,
) -> Result<(), String> {
    let request = Request {
        of: of.iter().map(|y| (y.clone(), Seed::Input)).collect(),
        wrt: wrt.to_vec(),
        input_dims: BTreeMap::new(),
    };
    let Gradient { model: derived, gradients, .. } =
        gradient_with(model, &request, &Rules::standard()).map_err(|e| e.to_string())?;
    // ONNX Runtime's fused operators round to single precision inside: differences are taken of the plain graph.
    let mut forward = load(model, false)?;
    let mut backward = load(&derived, optimize)?;
    let outputs: Vec<&str> = of.iter().map(String::as_str).collect();
    let mut random = Random(7);

    let values = forward.run(&lend(feeds), &outputs).map_err(|e| e.to_string())?;
    let mut seeded = feeds.clone();
    let mut seeds = Vec::new();
    for (name, value) in of.iter().zip(&values) {
        let seed = with(value, &random.values(value.len(), -1.0, 1.0));
        seeds.push(seed.to_f64());
        seeded.insert(format!("{name}.seed"), seed);
    }
    let size_of_value: f64 =
        values.iter().zip(&seeds).flat_map(|(y, s)| y.to_f64().into_iter().zip(s)).map(|(y, s)| (y * s).abs()).sum();
    let names: Vec<&str> = gradients.iter().map(String::as_str).collect();
    let results = backward.run(&lend(&seeded), &names).map_err(|e| e.to_string())?;

    for (name, result) in wrt.iter().zip(&results) {
        let at = &feeds[name];
        if result.dims() != at.dims() || result.data_type() != at.data_type() {
            return Err(format!("gradient of {name} has shape {:?} for {:?}", result.dims(), at.dims()));
        }
        let point = at.to_f64();
        let scale = point.iter().fold(0.0f64, |m, v| m.max(v.abs())).max(1e-3);
        let largest = result.to_f64().iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for along_gradient in [false, false, largest > 0.0] {
            let direction: Vec<f64> = match along_gradient {
                true => result.to_f64().iter().map(|g| g / largest * scale).collect(),
                false => random.values(point.len(), -1.0, 1.0).iter().map(|v| v * scale).collect(),
            };
            // Steep functions bend: a step moves the value by no larger a part than the step itself.
            let change: f64 = result.to_f64().iter().zip(&direction).map(|(g, d)| (g * d).abs()).sum();
            let shorter = (size_of_value / change).min(1.0);
            let direction: Vec<f64> = direction.into_iter().map(|d| d * shorter).collect();
            let mut along = |t: f64| -> Result<f64, String> {
                let moved: Vec<f64> = point.iter().zip(&direction).map(|(x, d)| x + t * d).collect();
                let mut feeds = feeds.clone();
                feeds.insert(name.clone(), with(at, &moved));
                let outputs = forward.run(&lend(&feeds), &outputs).map_err(|e| e.to_string())?;
                Ok(outputs
                    .iter()
                    .zip(&seeds)
                    .map(|(y, seed)| y.to_f64().iter().zip(seed).map(|(y, s)| y * s).sum::<f64>())
                    .sum())
            };
            let h = tolerance.step;
            let difference = (8.0 * (along(h)? - along(-h)?) - (along(2.0 * h)? - along(-2.0 * h)?)) / (12.0 * h);
            let products = || result.to_f64().into_iter().zip(&direction).map(|(g, d)| g * d).collect::<Vec<_>>();
            let claimed: f64 = products().iter().sum();
            let size: f64 = products().iter().map(|p| p.abs()).sum::<f64>() + difference.abs();
            let error = (claimed - difference).abs();
            if error.is_nan() || error > tolerance.relative * size + 1e-9 * scale {
                return Err(format!("gradient of {name} is {claimed}, differences say {difference} (scale {size})"));
            }
        }
    }
    Ok(())
}
