//! Reverse-mode differentiation, ONNX → ONNX.

use std::collections::BTreeMap;

use crate::Result;
use crate::onnx::ModelProto;

/// What to differentiate.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Values to differentiate, each with its seed.
    pub of: Vec<(String, Seed)>,
    /// Graph inputs or initializers to differentiate by.
    pub wrt: Vec<String>,
    /// Concrete shapes of graph inputs, where the caller knows them: the gradient graph gets smaller by it.
    pub input_dims: BTreeMap<String, Vec<i64>>,
}

/// The adjoint that differentiation starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seed {
    /// Ones (for a scalar loss).
    One,
    /// A new graph input `<value>.seed` of the value's type and shape.
    Input,
}

/// A model that computes what the original did and the gradients asked for.
#[derive(Debug, Clone)]
pub struct Gradient {
    /// Original inputs (and seeds); original outputs first, then the gradients.
    pub model: ModelProto,
    /// Output name of the gradient for each name in [`Request::wrt`], in that order.
    pub gradients: Vec<String>,
}

/// Extends `model` (tensors may be external) by the gradient of `request.of` with respect to `request.wrt`.
///
/// # Errors
/// Names every operator on the way that has no rule, with its node, before any work is done.
pub fn gradient(_model: &ModelProto, _request: &Request) -> Result<Gradient> {
    Err(crate::Error::model("not written yet"))
}
