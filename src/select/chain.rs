//! What nodes do to a stored tensor of floats on its way to the product, one link after another.

use super::constant::{Constant, Source};
use super::linears::FLOATS;
use crate::onnx::{DataType, NodeProto};

/// From the stored tensor on.
pub type Chain = Vec<Link>;

/// What one node does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Link {
    /// Converts to this type of floats.
    Cast(DataType),
    /// Multiplies by a constant, or `divides` by it.
    Scale {
        by: Source,
        chain: Chain,
        divides: bool,
    },
    Transpose(Vec<usize>),
    /// To this shape.
    Reshape(Vec<usize>),
}

impl Link {
    /// What `node` does, where that is to multiply or divide by `by`.
    pub(super) fn scale(node: &NodeProto, by: Constant) -> Option<Self> {
        let is_known = by.changed.is_none() && FLOATS.contains(&by.element);
        let divides = node.is("Div");
        (is_known && (divides || node.is("Mul"))).then_some(Self::Scale { by: by.source, chain: by.chain, divides })
    }

    /// Whether the elements stay what they are.
    pub fn moves(&self) -> bool {
        matches!(self, Self::Transpose(_) | Self::Reshape(_))
    }

    pub fn is_scale(&self) -> bool {
        matches!(self, Self::Scale { .. })
    }
}

/// `dims` in the order that a Transpose with `perm` gives them.
pub(super) fn turned(dims: &[usize], perm: &[usize]) -> Vec<usize> {
    perm.iter().map(|p| dims[*p]).collect()
}
