//! tract: the engine that is built in. Pure Rust, one thread, nothing to install; it plans for concrete shapes, so a
//! plan is made for each set of input shapes and the last few are kept.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use ndarray::{ArrayD, IxDyn};
use prost::Message;
use tract_onnx::prelude::{
    DatumType, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, IntoTValue, OutletId, SpecialOps,
    TValue, TVec, Tensor as TractTensor, TractError, TractResult, TypedRunnableModel,
};

use super::log_softmax::spelled_out;
use super::signature::Signature;
use super::{Engine, LoadOptions, Session, guard};
use crate::onnx::{ModelProto, Tensor, walk_graphs};
use crate::{Error, Result};

const NAME: &str = "tract";

/// The version in Cargo.lock (tract itself does not tell; a test compares).
pub(super) const VERSION: &str = "0.23.9";

/// Plans kept: each holds its own packed copy of the weights.
const PLANS: usize = 4;

/// Longest message passed on: some of tract's print whole tensors.
const LONGEST_MESSAGE: usize = 1500;

fn error(what: impl Into<String>) -> Error {
    Error::Engine { engine: NAME, what: what.into() }
}

/// tract, on the CPU.
#[derive(Debug, Default)]
pub struct Tract;

impl Engine for Tract {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> String {
        format!("tract {VERSION} on cpu (built in, one thread)")
    }

    fn load(&self, model: &ModelProto, options: &LoadOptions) -> Result<Box<dyn Session>> {
        let model = &*spelled_out(model);
        let signature = Signature::of(model)?;
        // What the file declares of outputs and inner values may be symbolic or wrong; it is all inferred anew.
        let framework = tract_onnx::onnx().with_ignore_output_types(true).with_ignore_value_info(true);
        refuse_unknown_operators(model, |op| framework.op_register.0.contains_key(op))?;
        let proto = tract_onnx::pb::ModelProto::decode(Bytes::from(model.encode_to_vec()))
            .map_err(|e| error(format!("the model cannot be passed on: {e}")))?;
        let parsed = guarded(|| framework.parse(&proto, None))?;
        if let Some(name) = parsed.unresolved_inputs.first() {
            return Err(Error::model(format!("value {name:?} is used, but no node, input or initializer makes it")));
        }
        Ok(Box::new(Loaded {
            signature,
            model: parsed.model,
            outlets: parsed.outlets_by_name,
            optimize: options.optimize,
            plans: Vec::new(),
        }))
    }
}

/// tract looks operators up by type alone; one of a foreign domain would run as its namesake, and one that it lacks
/// would fail only at the first run.
fn refuse_unknown_operators(model: &ModelProto, known: impl Fn(&str) -> bool) -> Result<()> {
    let mut missing: Vec<String> = Vec::new();
    walk_graphs(model.graph.as_ref().ok_or_else(|| Error::model("the model holds no graph"))?, &mut |_, graph| {
        for node in &graph.node {
            let op = node.op_type();
            let domain_known = match node.domain() {
                "" | "ai.onnx" | "ai.onnx.ml" => true,
                // Its Attention is another operator than ONNX's.
                "com.microsoft" => op != "Attention",
                _ => false,
            };
            if !domain_known || !known(op) {
                let domain = if node.domain().is_empty() { "" } else { ":" };
                missing.push(format!("{}{domain}{op} (node {:?})", node.domain(), node.name()));
            }
        }
    });
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let more = missing.len().saturating_sub(8);
    missing.truncate(8);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Err(error(format!("there is no operator {}{more}; ONNX Runtime may have it", missing.join(", "))))
}

/// Element type and shape of every input by name, and the outputs: what a plan is made for.
type Key = (Vec<(String, DatumType, Vec<usize>)>, Vec<String>);

struct Loaded {
    signature: Signature,
    model: InferenceModel,
    /// Where each value of the main graph is made.
    outlets: HashMap<String, OutletId>,
    optimize: bool,
    /// The last used is last.
    plans: Vec<(Key, Arc<TypedRunnableModel>)>,
}

impl Session for Loaded {
    fn inputs(&self) -> &[String] {
        &self.signature.inputs
    }

    fn outputs(&self) -> &[String] {
        &self.signature.outputs
    }

    fn run(&mut self, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Result<Vec<Tensor>> {
        self.signature.check(inputs, wanted)?;
        let mut inputs = inputs.to_vec();
        inputs.sort_by_key(|(name, _)| *name);
        let values = inputs.iter().map(|(name, t)| from_host(name, t)).collect::<Result<TVec<TractTensor>>>()?;
        let facts = inputs.iter().zip(&values);
        let facts = facts.map(|((name, _), v)| (name.to_string(), v.datum_type(), v.shape().to_vec())).collect();
        let plan = self.plan((facts, wanted.iter().map(|w| w.to_string()).collect()))?;
        let values: TVec<TValue> = values.into_iter().map(IntoTValue::into_tvalue).collect();
        let outputs = guarded(|| plan.run(values))?;
        outputs.iter().zip(wanted).map(|(value, name)| to_host(name, value)).collect()
    }
}

impl Loaded {
    fn plan(&mut self, key: Key) -> Result<Arc<TypedRunnableModel>> {
        let plan = match self.plans.iter().position(|(k, _)| *k == key) {
            Some(at) => self.plans.remove(at).1,
            None => guarded(|| self.make_plan(&key))?,
        };
        if self.plans.len() >= PLANS {
            self.plans.remove(0);
        }
        self.plans.push((key, plan.clone()));
        Ok(plan)
    }

    fn make_plan(&self, (inputs, wanted): &Key) -> TractResult<Arc<TypedRunnableModel>> {
        let mut model = self.model.clone();
        let outlet = |name: &String| {
            let outlet = self.outlets.get(name).copied();
            outlet.ok_or_else(|| TractError::msg(format!("no node makes the value {name:?}")))
        };
        let mut sources = Vec::with_capacity(inputs.len());
        for (name, datum_type, shape) in inputs {
            let source = outlet(name)?;
            let fact = InferenceFact::dt_shape(*datum_type, shape.as_slice());
            // An initializer that is also an input was read as a constant; it is given a value here.
            let op = model.create_source(fact.clone());
            model.node_mut(source.node).op = op;
            model.set_outlet_fact(source, fact)?;
            sources.push(source);
        }
        model.set_input_outlets(&sources)?;
        model.select_output_outlets(&wanted.iter().map(outlet).collect::<TractResult<Vec<_>>>()?)?;
        if self.optimize { model.into_optimized()?.into_runnable() } else { model.into_typed()?.into_runnable() }
    }
}

macro_rules! tensors {
    ($($variant:ident $type:ty;)*) => {
        fn from_host(name: &str, tensor: &Tensor) -> Result<TractTensor> {
            let made = match tensor {
                $(Tensor::$variant(array) => {
                    let array = array.as_standard_layout();
                    TractTensor::from_shape(array.shape(), array.as_slice().unwrap_or(&[]))
                })*
                Tensor::Bf16(_) => {
                    return Err(error(format!("input {name:?} is bfloat16, which tract lacks; ONNX Runtime has it")));
                }
            };
            made.map_err(|e| error(format!("input {name:?}: {e}")))
        }

        fn to_host(name: &str, value: &TractTensor) -> Result<Tensor> {
            let failed = |what: String| error(format!("output {name:?}: {what}"));
            // Dimensions computed in the graph are symbolic integers to tract.
            let value = if value.datum_type() == DatumType::TDim {
                value.cast_to::<i64>().map_err(|e| failed(e.to_string()))?
            } else {
                std::borrow::Cow::Borrowed(value)
            };
            $(if value.datum_type().unquantized() == <$type as tract_onnx::prelude::Datum>::datum_type() {
                let view = value.to_plain_array_view::<$type>().map_err(|e| failed(e.to_string()))?;
                let array = ArrayD::from_shape_vec(IxDyn(value.shape()), view.iter().copied().collect());
                return array.map(Tensor::$variant).map_err(|e| failed(e.to_string()));
            })*
            Err(failed(format!("elements of type {:?} are not supported", value.datum_type())))
        }
    };
}

tensors! {
    F32 f32;
    F64 f64;
    F16 half::f16;
    I64 i64;
    I32 i32;
    I16 i16;
    I8 i8;
    U64 u64;
    U32 u32;
    U16 u16;
    U8 u8;
    Bool bool;
}

/// Runs a piece of tract, and keeps its errors short.
fn guarded<T>(work: impl FnOnce() -> TractResult<T>) -> Result<T> {
    let what = match guard::guarded(work) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(e)) => format!("{e:#}"),
        Err(panic) => panic,
    };
    let cut = what.char_indices().nth(LONGEST_MESSAGE).map_or(what.len(), |(at, _)| at);
    Err(error(if cut < what.len() { format!("{} …", &what[..cut]) } else { what }))
}
