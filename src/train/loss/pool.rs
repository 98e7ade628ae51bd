//! One vector for each text out of those of its tokens, before the loss: for a model that gives no more than tokens.

use super::super::data::Field;
use crate::adapter::Pool;
use crate::inject::Builder;
use crate::onnx::{AttributeProto, DataType, ModelProto, Names};
use crate::{Error, Result, did_you_mean};

/// How an output `[batch, sequence, features]` is pooled before the loss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pooling {
    pub pool: Pool,
    /// The model's input `[batch, sequence]` that is 1 where a token counts, for [`Pool::Mean`]; `None`: `attention_mask`
    /// where the model has it, else all tokens count.
    pub mask: Option<String>,
}

impl Default for Pooling {
    fn default() -> Self {
        Self { pool: Pool::None, mask: None }
    }
}

/// What a mask is called by exporters.
const MASK: &str = "attention_mask";

impl Pooling {
    /// What is known of the pooled output.
    ///
    /// # Errors
    /// An output that is no sequence of vectors, a mask that is no input.
    pub(in crate::train) fn checked(&self, output: &Field, inputs: &[Field]) -> Result<Field> {
        if self.pool == Pool::None {
            return Ok(output.clone());
        }
        let Some([batch, _, features]) = output.dims.as_deref() else {
            return Err(Error::config(format!(
                "pooling reads [batch, sequence, features], and output {} is not known to have these axes; leave out \
                 --pool",
                output.name
            )));
        };
        if let Some(mask) = &self.mask
            && !inputs.iter().any(|input| input.name == *mask)
        {
            let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
            return Err(Error::config(format!(
                "pool-mask {mask:?} is no input of the model; its inputs are {}.{}",
                names.join(", "),
                did_you_mean(mask, names.iter().copied())
            )));
        }
        Ok(Field { dims: Some(vec![batch.clone(), features.clone()]), ..output.clone() })
    }

    /// Adds the nodes that make `pooled` (as [`Pooling::checked`] gives it) of the output of that name, and gives it
    /// the name of their result.
    pub(in crate::train) fn append(&self, model: &mut ModelProto, pooled: &mut Field) {
        if self.pool == Pool::None {
            return;
        }
        let (mut names, opset) = (Names::of(model), model.opset());
        let graph = model.graph.get_or_insert_default();
        let prefix = names.fresh("pool");
        let mut nodes = Builder { opset, names: &mut names, name: &prefix, nodes: Vec::new(), constants: Vec::new() };
        let mut tokens = pooled.name.clone();
        if !matches!(pooled.data_type, None | Some(DataType::Float)) {
            let float = AttributeProto::int("to", DataType::Float as i64);
            tokens = nodes.op("Cast", "tokens", &[&tokens], vec![float]);
            pooled.data_type = Some(DataType::Float);
        }
        let mask = graph.input.iter().map(|input| input.name()).find(|name| *name == MASK);
        pooled.name = nodes.pool(self.pool, &tokens, self.mask.as_deref().or(mask));
        let Builder { nodes, constants, .. } = nodes;
        graph.node.extend(nodes);
        graph.initializer.extend(constants);
        graph.output.push(pooled.info());
    }
}
