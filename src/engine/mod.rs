//! Inference engines behind one small trait: ONNX Runtime (a shared library found at run time) and tract (built in).

use crate::Result;
use crate::onnx::{ModelProto, Tensor};

/// Something that runs ONNX models.
pub trait Engine: Send + Sync {
    /// `"onnxruntime"` or `"tract"`.
    fn name(&self) -> &'static str;

    /// One line for people: version, device, library path.
    fn describe(&self) -> String;

    /// Prepares `model`, whose tensors are all inline (see [`crate::onnx::Model::to_inline`]).
    fn load(&self, model: &ModelProto, options: &LoadOptions) -> Result<Box<dyn Session>>;
}

/// How a model is prepared.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Threads inside one operator; `None`: the physical cores.
    pub threads: Option<usize>,
    /// False: the engine runs the graph as it stands (to check a graph against its optimised form).
    pub optimize: bool,
}

/// A model ready to run.
pub trait Session: Send {
    /// Names of the inputs that have to be given.
    fn inputs(&self) -> &[String];

    /// Names of the outputs, in the model's order.
    fn outputs(&self) -> &[String];

    /// Runs the model on `inputs` (by name, any order) and returns the outputs named by `wanted`, in that order.
    /// Host tensors are lent, not copied, where the engine can.
    fn run(&mut self, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Result<Vec<Tensor>>;
}
