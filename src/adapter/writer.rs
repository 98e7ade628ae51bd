//! Writes the nodes of adapters: fresh names under a prefix, and the constants that all adapters of a model share.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2};

use super::tile;
use crate::onnx::{AttributeProto, DataType, Names, NodeProto, Tensor, TensorProto, node};

/// Constants that the written nodes read; equal ones are one initializer.
#[derive(Default)]
pub struct Constants {
    names: BTreeMap<String, String>,
    pub tensors: Vec<TensorProto>,
}

impl Constants {
    fn get(&mut self, wanted: &str, names: &mut Names, value: impl FnOnce() -> Tensor) -> String {
        if let Some(name) = self.names.get(wanted) {
            return name.clone();
        }
        let name = names.fresh(wanted);
        self.tensors.push(value().to_proto(&name));
        self.names.insert(wanted.into(), name.clone());
        name
    }
}

/// Collects the nodes of one adapter on one layer.
pub struct Writer<'a> {
    pub names: &'a mut Names,
    pub constants: &'a mut Constants,
    /// What new names begin with: `<module>.bone.<adapter>`.
    pub prefix: String,
    pub nodes: Vec<NodeProto>,
}

impl Writer<'_> {
    /// One node, its output (and itself) called `<prefix>.<what>`.
    pub fn op(&mut self, op: &str, what: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = self.names.fresh(&format!("{}.{what}", self.prefix));
        self.op_to(op, inputs, &output, attributes);
        output
    }

    /// One node whose output has a name already; the node's own is `<prefix>.<op in small letters>`.
    pub fn op_to(&mut self, op: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) {
        let mut made = node(op, inputs, &[output]);
        if !output.starts_with(&self.prefix) {
            made.name = Some(self.names.fresh(&format!("{}.{}", self.prefix, op.to_lowercase())));
        }
        made.attribute = attributes;
        self.nodes.push(made);
    }

    pub fn transposed(&mut self, matrix: &str) -> String {
        self.op("Transpose", "turned", &[matrix], vec![AttributeProto::ints("perm", &[1, 0])])
    }

    pub fn reshaped(&mut self, value: &str, what: &str, dims: &[usize]) -> String {
        let dims: Vec<i64> = dims.iter().map(|d| *d as i64).collect();
        let shape = self.ints(&dims);
        self.op("Reshape", what, &[value, &shape], Vec::new())
    }

    pub fn cast(&mut self, value: &str, what: &str, to: DataType) -> String {
        self.op("Cast", what, &[value], vec![AttributeProto::int("to", to as i64)])
    }

    /// A 1-D int64 constant.
    pub fn ints(&mut self, values: &[i64]) -> String {
        let text = values.iter().map(i64::to_string).collect::<Vec<_>>().join("x");
        self.constants
            .get(&format!("bone.dims.{text}"), self.names, || Tensor::from(Array1::from(values.to_vec()).into_dyn()))
    }

    pub fn scalar(&mut self, value: f32) -> String {
        self.constants.get(&format!("bone.scalar.{value}"), self.names, || Tensor::scalar(value))
    }

    pub fn flag(&mut self, value: bool) -> String {
        self.constants.get(&format!("bone.flag.{value}"), self.names, || Tensor::from(ndarray::arr0(value).into_dyn()))
    }

    /// A float32 matrix of zeros.
    pub fn zeros(&mut self, rows: usize, columns: usize) -> String {
        let name = format!("bone.zeros.{rows}x{columns}");
        self.constants.get(&name, self.names, || Tensor::from(Array2::<f32>::zeros((rows, columns)).into_dyn()))
    }

    /// [`tile::selection`]
    pub fn selection(&mut self, inputs: usize, r: usize) -> String {
        let name = format!("bone.select.{inputs}x{r}");
        self.constants.get(&name, self.names, || Tensor::from(tile::selection(inputs, r).into_dyn()))
    }

    /// `[columns, outputs]`, column o has its one in row `o mod columns`.
    pub fn repetition(&mut self, columns: usize, outputs: usize) -> String {
        self.constants.get(&format!("bone.repeat.{columns}x{outputs}"), self.names, || {
            let one = |(m, o): (usize, usize)| if o % columns == m { 1.0f32 } else { 0.0 };
            Tensor::from(Array2::from_shape_fn((columns, outputs), one).into_dyn())
        })
    }
}
