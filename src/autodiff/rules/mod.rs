//! The table of rules: one row per operator, one file per family.
//!
//! Formulas follow the operator specifications of ONNX (<https://onnx.ai/onnx/operators/>) and, for the domain
//! `com.microsoft`, ONNX Runtime's `docs/ContribOperators.md`; derivatives are textbook ones, checked against finite
//! differences in `tests/autodiff`.

mod attention;
mod contrib;
mod contrib_attention;
mod control;
mod conv;
mod deform;
mod einsum;
mod elementwise;
mod fourier;
mod fused;
mod group_query;
mod gru;
mod index;
mod layout;
mod linear;
mod loops;
mod loss;
mod lstm;
mod matmul;
mod ml;
mod norm;
mod normalize;
mod pool;
mod quantized;
mod range;
mod recurrent;
mod reduce;
mod resize;
mod roi;
mod rotary;
mod sample;
mod scatter;
mod softmax;
mod straight;
mod window;
mod zero;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::vjp::{Adjoints, Vjp, is_float};
use crate::Result;
use crate::onnx::{DataType, NodeProto};

/// Emits the adjoints of a node's inputs.
pub type VjpRule = dyn Fn(&Vjp) -> Result<Adjoints> + Send + Sync;

/// What is known of an operator's derivative.
#[derive(Clone)]
pub enum Rule {
    /// The function that emits it.
    Vjp(Arc<VjpRule>),
    /// It is zero wherever it exists, for this reason.
    Zero(&'static str),
    /// It is not given, for this reason.
    Refused(&'static str),
}

impl Rule {
    pub fn vjp(rule: impl Fn(&Vjp) -> Result<Adjoints> + Send + Sync + 'static) -> Self {
        Rule::Vjp(Arc::new(rule))
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Rule::Vjp(_) => f.write_str("Vjp"),
            Rule::Zero(why) => write!(f, "Zero({why})"),
            Rule::Refused(why) => write!(f, "Refused({why})"),
        }
    }
}

/// Domain of ONNX Runtime's own operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// A table of rules by domain (`""` for the default one) and operator.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    rows: BTreeMap<(String, String), Rule>,
    /// Whether integers stand for real numbers and pass adjoints on.
    through_integers: bool,
}

impl Rules {
    /// The rules of this crate.
    pub fn standard() -> Self {
        let mut rules = Self::default();
        elementwise::add(&mut rules);
        matmul::add(&mut rules);
        reduce::add(&mut rules);
        layout::add(&mut rules);
        index::add(&mut rules);
        norm::add(&mut rules);
        softmax::add(&mut rules);
        conv::add(&mut rules);
        pool::add(&mut rules);
        normalize::add(&mut rules);
        scatter::add(&mut rules);
        linear::add(&mut rules);
        resize::add(&mut rules);
        einsum::add(&mut rules);
        loss::add(&mut rules);
        contrib::add(&mut rules);
        range::add(&mut rules);
        recurrent::add(&mut rules);
        control::add(&mut rules);
        loops::add(&mut rules);
        zero::add(&mut rules);
        attention::add(&mut rules);
        contrib_attention::add(&mut rules);
        group_query::add(&mut rules);
        fused::add(&mut rules);
        rotary::add(&mut rules);
        quantized::add(&mut rules);
        sample::add(&mut rules);
        deform::add(&mut rules);
        roi::add(&mut rules);
        fourier::add(&mut rules);
        ml::add(&mut rules);
        rules
    }

    /// The table that training uses: [`Rules::standard`], and what is rounded to a grid is passed straight through
    /// (`straight.rs`). Its gradients are estimates wherever a quantiser is on the way, and equal the others elsewhere.
    pub fn straight_through() -> Self {
        let mut rules = Self { through_integers: true, ..Self::standard() };
        straight::add(&mut rules);
        rules
    }

    /// Whether a value of this type can carry an adjoint.
    pub(super) fn carries(&self, element: DataType) -> bool {
        is_float(element) || self.through_integers && straight::is_integer(element)
    }

    /// The table with one row more, or another one in its place: for `op` of `domain` (`""` for the default one).
    /// [The module's documentation](crate::autodiff#a-rule-of-your-own) has an example.
    pub fn with(mut self, domain: &str, op: &str, rule: Rule) -> Self {
        self.insert(domain, op, rule);
        self
    }

    pub(super) fn insert(&mut self, domain: &str, op: &str, rule: Rule) {
        self.rows.insert((domain.into(), op.into()), rule);
    }

    /// Adds a rule of the default domain.
    fn vjp(&mut self, op: &str, rule: impl Fn(&Vjp) -> Result<Adjoints> + Send + Sync + 'static) {
        self.insert("", op, Rule::vjp(rule));
    }

    /// The row for `node`'s operator.
    pub fn get(&self, node: &NodeProto) -> Option<&Rule> {
        let domain = if node.domain() == "ai.onnx" { "" } else { node.domain() };
        self.rows.get(&(domain.to_string(), node.op_type().to_string()))
    }

    /// Every row: domain, operator, rule.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Rule)> {
        self.rows.iter().map(|((domain, op), rule)| (domain.as_str(), op.as_str(), rule))
    }
}
