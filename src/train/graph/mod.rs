//! The models that training runs: parameters as inputs, the loss behind the output, the gradients.

mod form;
pub(super) mod freeze;
pub(super) mod merge;
pub(super) mod precision;
mod recompute;
pub mod scale;
mod split;
pub(super) mod teacher;

use std::collections::{BTreeMap, HashSet};

use crate::adapter::Injection;
use crate::autodiff::{self, Request, Rules, Seed};
use crate::base::Base;
use crate::engine::{Engine, LoadOptions, Resident, Session};
use crate::inject::place::to_f32;
use crate::onnx::functions;
use crate::onnx::upgrade::upgrade;
use crate::onnx::{DataType, Model, ModelProto, Tensor, value_info, walk_graphs};
use crate::train::data::{Batch, Field};
use crate::train::loss::{self, Loss, LossNames, OwnLoss, Pooling};
use crate::train::update::flat::{Flat, FlatNames, flatten};
use crate::{Error, Result};
use precision::Precision;
use recompute::recompute;
use scale::LossScale;
use teacher::TeacherModel;

/// Operator set that a model is lifted to for training, where it is older.
const OPSET: i64 = 17;

/// An initializer that is trained.
#[derive(Debug, Clone)]
pub struct Parameter {
    pub name: String,
    /// Its place among the main graph's initializers in the file.
    pub index: usize,
    /// True for a layer trained in full.
    pub full: bool,
    /// False for biases and norms, which weight decay leaves alone (as transformers' Trainer does).
    pub decays: bool,
    /// float32, its value by now.
    pub value: Tensor,
}

impl Parameter {
    /// The values, row-major.
    pub fn values_mut(&mut self) -> &mut [f32] {
        match &mut self.value {
            Tensor::F32(array) => array.as_slice_mut().unwrap_or_default(),
            _ => &mut [],
        }
    }

    pub fn is_finite(&self) -> bool {
        // Without a way out in the middle, the loop runs many values at a time.
        self.value.values::<f32>().is_some_and(|v| v.iter().fold(true, |all, v| all & v.is_finite()))
    }
}

/// All that training changes where the adapters `trained` learn, with the values that the file starts from. Weight
/// decay leaves vectors (biases, norms) alone unless `decay_all`.
///
/// # Errors
/// A parameter of the record that is no float32 initializer of the main graph.
pub fn parameters(model: &Model, injection: &Injection, trained: &[String], decay_all: bool) -> Result<Vec<Parameter>> {
    let graph = model.graph();
    injection
        .trainable(trained)
        .into_iter()
        .map(|trainable| {
            let name = trainable.name;
            let index = graph.initializer.iter().position(|t| t.name() == name).ok_or_else(|| {
                Error::file(&model.path, format!("parameter {name} of the injection record is no initializer"))
            })?;
            let value = model.tensor(&graph.initializer[index])?;
            if value.data_type() != DataType::Float {
                return Err(Error::file(&model.path, format!("parameter {name} is not float32; only that is trained")));
            }
            // Biases and norms are vectors; blocks and weights are not.
            let decays = decay_all || value.dims().len() > 1;
            Ok(Parameter { name, index, full: trainable.full, decays, value })
        })
        .collect()
}

/// Who learns in a model.
#[derive(Clone, Copy)]
pub struct Learners<'a> {
    pub injection: &'a Injection,
    /// The active adapters that train; others stay as they are.
    pub trained: &'a [String],
    /// Seed of the masks of `miss_dropout`; `None`: nothing drops out, as in an evaluation.
    pub dropout: Option<u64>,
}

/// What is made small, and of what.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    pub loss: Loss,
    pub pooling: &'a Pooling,
    /// The output, as it is after pooling.
    pub output: &'a Field,
    /// What the loss reads beside it.
    pub columns: &'a [Field],
    /// Parts of a sample.
    pub roles: usize,
    pub precision: Precision,
    /// Whether activations are computed again on the way back (`recompute.rs`).
    pub recompute: bool,
    pub(in crate::train) own: Option<&'a OwnLoss>,
    pub(in crate::train) teacher: Option<&'a TeacherModel<'a>>,
}

impl<'a> Task<'a> {
    /// A loss that is built in, of an output as it is.
    pub fn new(loss: Loss, pooling: &'a Pooling, output: &'a Field, columns: &'a [Field]) -> Self {
        let (precision, recompute) = (Precision::F32, false);
        Self { loss, pooling, output, columns, roles: 1, precision, recompute, own: None, teacher: None }
    }
}

/// A loss over a model whose parameters are inputs, ready to be loaded with or without gradients.
#[derive(Clone)]
pub struct LossModel {
    /// In training form (`form.rs`).
    model: ModelProto,
    rules: Rules,
    names: LossNames,
    output: String,
    parameters: Vec<String>,
    precision: Precision,
    pub(in crate::train) recompute: bool,
}

impl LossModel {
    /// Puts the loss of `task` behind its output of the injected model.
    pub fn new(model: &Model, learners: Learners, parameters: &[Parameter], task: Task) -> Result<Self> {
        let injection = learners.injection;
        let base = Base::of(model, Some(injection))?.proto.into_owned();
        let mut proto = model.inlined(base)?;
        // Frozen adapters stay constants.
        let held: HashSet<&str> = injection.adapters.iter().flat_map(|a| a.parameters()).collect();
        let held = model.graph().initializer.iter().filter(|t| held.contains(t.name()));
        proto.graph.iter_mut().for_each(|g| g.initializer.extend(held.clone().cloned()));
        functions::write_out(&mut proto)?;
        upgrade(&mut proto, OPSET)?;
        let rules = form::training_form(&mut proto, &learners, task.precision != Precision::F32)?;
        promote(&mut proto, parameters);
        precision::lower(&mut proto, task.precision)?;
        let mut output = task.output.clone();
        task.pooling.append(&mut proto, &mut output);
        let names = match task.own {
            Some(own) => own.append(&mut proto, (&task.output.name, &output), task.columns)?,
            None => {
                let teacher = task.teacher.map(|t| t.append(&mut proto, task.pooling)).transpose()?;
                loss::append(&mut proto, task.loss, &output, task.columns, task.roles, teacher.as_ref())?
            }
        };
        if let Some(graph) = &mut proto.graph {
            graph.output.retain(|o| o.name() == output.name || o.name() == names.loss);
        }
        let parameters = parameters.iter().map(|p| p.name.clone()).collect();
        let (output, precision, recompute) = (output.name, task.precision, task.recompute);
        Ok(Self { model: proto, rules, names, output, parameters, precision, recompute })
    }

    /// Derives the gradients and loads them with the loss.
    ///
    /// # Errors
    /// Every operator on the way from the loss to a parameter that has no derivative rule, by name.
    pub fn gradient(&self, engine: &dyn Engine, options: &LoadOptions) -> Result<GradientSession> {
        let derived = self.derive()?;
        let session = self.load(&derived.model, engine, options)?;
        Ok(self.session(session, derived.gradients, derived.scale))
    }

    /// The same over the vectors `flats` of `parameters` instead of a tensor for each, to be run on the engine's device.
    pub(in crate::train) fn resident(
        &self,
        engine: &dyn Engine,
        options: &LoadOptions,
        flats: &[Flat],
        parameters: &[Parameter],
    ) -> Result<(GradientSession, FlatNames)> {
        let mut derived = self.derive()?;
        let names = flatten(&mut derived.model, flats, parameters, &derived.gradients)?;
        let session = self.load(&derived.model, engine, options)?;
        Ok((self.session(session, names.gradients.clone(), derived.scale), names))
    }

    /// The gradient graph itself, with these values for what the loss reads (and the loss scale, where it has one) as
    /// inputs by name.
    pub(in crate::train) fn whole_gradient(&self, targets: Vec<Tensor>) -> Result<(ModelProto, Vec<(String, Tensor)>)> {
        let derived = self.derive()?;
        let scale = derived.scale.map(|name| (name, Tensor::scalar(LossScale::default().value)));
        Ok((derived.model, self.names.targets.iter().cloned().zip(targets).chain(scale).collect()))
    }

    fn load(&self, model: &ModelProto, engine: &dyn Engine, options: &LoadOptions) -> Result<Box<dyn Session>> {
        engine.load(model, options).map_err(|e| self.precision.explain(e, &engine.describe()))
    }

    fn derive(&self) -> Result<Derived> {
        let mut model = self.model.clone();
        if let Some(graph) = &mut model.graph {
            graph.output.retain(|o| o.name() == self.names.loss);
        }
        let seed = if computes_in_halves(&model) { Seed::Input } else { Seed::One };
        let request = Request {
            of: vec![(self.names.loss.clone(), seed)],
            wrt: self.parameters.clone(),
            input_dims: BTreeMap::new(),
        };
        let mut gradient = autodiff::gradient_with(&model, &request, &self.rules)?;
        gradient.model.graph.iter_mut().for_each(form::lower);
        if self.recompute {
            recompute(&mut gradient.model, &self.names.loss, &self.parameters)?;
        }
        // The seed is the last of the inputs.
        let last = gradient.model.graph.iter().flat_map(|g| &g.input).next_back().filter(|_| seed == Seed::Input);
        let scale = last.map(|i| i.name().into());
        Ok(Derived { model: gradient.model, gradients: gradient.gradients, scale })
    }

    fn session(&self, session: Box<dyn Session>, gradients: Vec<String>, scale: Option<String>) -> GradientSession {
        let scale = scale.map(|name| (name, LossScale::default()));
        let wanted = std::iter::once(self.names.loss.clone()).chain(gradients).collect();
        GradientSession { session, targets: self.names.targets.clone(), wanted, scale, runs: 0 }
    }

    /// The model with the loss, and with its gradients.
    #[cfg(test)]
    pub(in crate::train) fn both(self) -> (ModelProto, ModelProto) {
        let derived = self.derive().expect("a gradient").model;
        (self.model, derived)
    }

    /// Has every Dropout draw from its seed on what it would draw after `runs` runs: ONNX Runtime's on the CPU adds 1 to
    /// the seed in each.
    pub fn skip_runs(&mut self, runs: u64) {
        let seeds = self.model.graph.iter_mut().flat_map(|g| &mut g.node).filter(|n| n.is("Dropout"));
        for seed in seeds.flat_map(|n| &mut n.attribute).filter(|a| a.name() == "seed") {
            seed.i = seed.i.map(|i| i.wrapping_add_unsigned(runs));
        }
    }

    /// Loads the loss and the output it is made of, without gradients.
    pub fn forward(&self, engine: &dyn Engine, options: &LoadOptions) -> Result<ForwardSession> {
        let mut model = self.model.clone();
        model.graph.iter_mut().for_each(form::lower);
        let session = self.load(&model, engine, options)?;
        let wanted = [self.names.loss.clone(), self.output.clone()];
        Ok(ForwardSession { session, targets: self.names.targets.clone(), wanted })
    }
}

/// The gradient graph, and what is to be known of it.
struct Derived {
    model: ModelProto,
    /// Output by parameter.
    gradients: Vec<String>,
    /// The input for the loss scale, where the model has one.
    scale: Option<String>,
}

/// Whether a model has float16 or bfloat16 weights.
fn computes_in_halves(model: &ModelProto) -> bool {
    let is_half = |t: i32| t == DataType::Float16 as i32 || t == DataType::Bfloat16 as i32;
    let mut halves = false;
    if let Some(graph) = &model.graph {
        walk_graphs(graph, &mut |_, graph| halves |= graph.initializer.iter().any(|t| is_half(t.data_type())));
    }
    halves
}

/// Makes the parameters inputs of the graph instead of constants.
fn promote(model: &mut ModelProto, parameters: &[Parameter]) {
    let Some(graph) = &mut model.graph else { return };
    let promoted: HashSet<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
    graph.initializer.retain(|t| !promoted.contains(t.name()));
    graph.input.retain(|i| !promoted.contains(i.name()));
    for Parameter { name, value, .. } in parameters {
        let dims: Vec<String> = value.dims().iter().map(usize::to_string).collect();
        let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
        graph.input.push(value_info(name, DataType::Float, &dims));
    }
}

/// Loss and gradients of a batch.
pub struct GradientSession {
    session: Box<dyn Session>,
    targets: Vec<String>,
    /// The loss, then a gradient for each parameter.
    wanted: Vec<String>,
    /// For models that compute in halves: the input for it, and how large it is.
    scale: Option<(String, LossScale)>,
    runs: u64,
}

impl GradientSession {
    /// How often the graph was run.
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// What the loss is multiplied by, where it is.
    pub fn loss_scale(&self) -> Option<LossScale> {
        self.scale.as_ref().map(|(_, scale)| *scale)
    }

    /// Takes over from a session that had been run `runs` times and had come to `loss_scale`.
    pub fn go_on(&mut self, runs: u64, loss_scale: Option<LossScale>) {
        self.runs = runs;
        if let (Some((_, scale)), Some(then)) = (&mut self.scale, loss_scale) {
            *scale = then;
        }
    }

    /// Makes the loss scale smaller; false where that cannot be.
    pub(in crate::train) fn overflowed(&mut self) -> bool {
        self.scale.as_mut().is_some_and(|(_, scale)| scale.halve())
    }

    /// Takes note of a step whose gradients were finite.
    pub(in crate::train) fn stepped(&mut self) {
        self.scale.iter_mut().for_each(|(_, scale)| scale.count_step());
    }

    /// The inputs for what the loss reads beside the output.
    pub(in crate::train) fn targets(&self) -> &[String] {
        &self.targets
    }

    /// The input for the loss scale, where the model has one.
    pub(in crate::train) fn scale_input(&self) -> Option<&str> {
        self.scale.as_ref().map(|(name, _)| name.as_str())
    }

    /// The loss, and the gradients as many times as large as the loss scale says, on the engine's device.
    pub(in crate::train) fn run_resident(&mut self, inputs: &[(&str, &Resident)]) -> Result<(Resident, Vec<Resident>)> {
        let wanted: Vec<&str> = self.wanted.iter().map(String::as_str).collect();
        let mut out = self.session.run_resident(inputs, &wanted)?;
        self.runs += 1;
        Ok((out.remove(0), out))
    }

    /// The loss and, for each parameter in its order, the gradient in the parameter's shape.
    pub fn run(&mut self, parameters: &[Parameter], batch: &Batch) -> Result<(f64, Vec<Tensor>)> {
        let (loss, gradients) = self.scaled(parameters, batch)?;
        for (parameter, gradient) in parameters.iter().zip(&gradients) {
            if gradient.data_type() != DataType::Float || gradient.dims() != parameter.value.dims() {
                return Err(Error::model(format!(
                    "the gradient of {} came out as {:?} {:?} instead of float32 {:?}",
                    parameter.name,
                    gradient.data_type(),
                    gradient.dims(),
                    parameter.value.dims()
                )));
            }
        }
        Ok((loss, gradients))
    }

    /// The loss and the gradients of one run; where they overflow in the model's halves, of another one with a smaller
    /// scale.
    fn scaled(&mut self, parameters: &[Parameter], batch: &Batch) -> Result<(f64, Vec<Tensor>)> {
        let wanted: Vec<&str> = self.wanted.iter().map(String::as_str).collect();
        loop {
            let by = Tensor::scalar(self.scale.as_ref().map_or(1.0, |(_, scale)| scale.value));
            let mut given = inputs(parameters, batch, &self.targets);
            given.extend(self.scale.iter().map(|(name, _)| (name.as_str(), &by)));
            let mut gradients = self.session.run(&given, &wanted)?;
            self.runs += 1;
            let loss = scalar(gradients.remove(0))?;
            let Some((_, scale)) = &mut self.scale else { return Ok((loss, gradients)) };
            let by = scale.value;
            let is_finite = |g: &Tensor| g.values::<f32>().is_some_and(|v| v.iter().all(|v| v.is_finite()));
            if loss.is_finite() && !gradients.iter().all(is_finite) && scale.halve() {
                continue;
            }
            for gradient in &mut gradients {
                if let Tensor::F32(g) = gradient {
                    g.mapv_inplace(|v| v / by);
                }
            }
            return Ok((loss, gradients));
        }
    }
}

/// Loss and output of a batch.
pub struct ForwardSession {
    session: Box<dyn Session>,
    targets: Vec<String>,
    wanted: [String; 2],
}

impl ForwardSession {
    pub fn run(&mut self, parameters: &[Parameter], batch: &Batch) -> Result<(f64, Tensor)> {
        let wanted: Vec<&str> = self.wanted.iter().map(String::as_str).collect();
        let mut out = self.session.run(&inputs(parameters, batch, &self.targets), &wanted)?;
        let output = out.pop().ok_or_else(|| Error::model("the model gave no output"))?;
        Ok((scalar(out.remove(0))?, to_f32(output)?))
    }
}

fn inputs<'a>(parameters: &'a [Parameter], batch: &'a Batch, targets: &'a [String]) -> Vec<(&'a str, &'a Tensor)> {
    let parameters = parameters.iter().map(|p| (p.name.as_str(), &p.value));
    let data = batch.inputs.iter().map(|(name, value)| (name.as_str(), value));
    let targets = targets.iter().map(String::as_str).zip(&batch.targets);
    parameters.chain(data).chain(targets).collect()
}

fn scalar(loss: Tensor) -> Result<f64> {
    loss.as_f64()
        .ok_or_else(|| Error::model(format!("the loss came out with shape {:?}, not as one number", loss.dims())))
}
