//! A trainable linear layer at the end of a model that has none: pooling, product, bias, a new output.

use rand::distr::{Distribution, Uniform};
use rand_chacha::ChaCha8Rng;

use super::emission::add_initializer;
use crate::adapter::{HeadRecord, MAX_SIZE, Pool};
use crate::onnx::proto::tensor_shape_proto::dimension::Value as DimValue;
use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{
    AttributeProto, DataType, Model, Names, NodeProto, Patch, Scope, Tensor, TensorProto, ValueInfoProto, node,
    value_info,
};
use crate::{Error, Result, did_you_mean};

/// The layer to append.
#[derive(Debug, Clone)]
pub struct HeadOptions {
    /// Name of the new output, and of the layer.
    pub name: String,
    pub labels: usize,
    /// The value it reads: an output of the model (or any value inside), `[batch, sequence, features]` or, with
    /// [`Pool::None`], `[…, features]`.
    pub input: String,
    pub pool: Pool,
    /// Graph input `[batch, sequence]` that is 1 where a token counts; for [`Pool::Mean`].
    pub mask: Option<String>,
}

/// Adds the head to `patch`; returns its record and the number of its parameters.
pub(super) fn append(
    model: &Model,
    options: &HeadOptions,
    names: &mut Names,
    patch: &mut Patch,
    rng: &mut ChaCha8Rng,
) -> Result<(HeadRecord, usize)> {
    let graph = model.graph();
    let name = &options.name;
    if options.labels == 0 {
        return Err(Error::config(format!("head {name:?} needs at least one label")));
    }
    if names.contains(name) {
        return Err(Error::config(format!(
            "head name {name:?} is already the name of a value in the model; choose another"
        )));
    }
    let known = |value: &str| {
        graph.node.iter().flat_map(|n| &n.output).any(|o| o == value) || graph.input.iter().any(|i| i.name() == value)
    };
    if !known(&options.input) {
        let outputs: Vec<&str> = graph.output.iter().map(ValueInfoProto::name).collect();
        return Err(Error::config(format!(
            "head input {:?} is no value of the main graph; its outputs are {}.{}",
            options.input,
            outputs.join(", "),
            did_you_mean(&options.input, outputs.iter().copied())
        )));
    }
    if let Some(mask) = &options.mask
        && !graph.input.iter().any(|i| i.name() == mask)
    {
        let inputs: Vec<&str> = graph.input.iter().map(ValueInfoProto::name).collect();
        return Err(Error::config(format!(
            "pool mask {mask:?} is no input of the model; its inputs are {}",
            inputs.join(", ")
        )));
    }
    let dims = dims(model, &options.input);
    let features = match dims.last() {
        Some(Some(n)) if *n > 0 => *n as usize,
        _ => {
            return Err(Error::config(format!(
                "the last dimension of head input {:?} is not fixed in the model, so the size of the head cannot be told",
                options.input
            )));
        }
    };
    if options.pool != Pool::None && dims.len() != 3 {
        return Err(Error::config(format!(
            "pooling reads [batch, sequence, features], but {:?} has {} dimensions; use --pool none",
            options.input,
            dims.len()
        )));
    }

    if options.labels.saturating_mul(features) > MAX_SIZE {
        return Err(Error::config(format!(
            "head {name:?} of {} labels × {features} features is too large",
            options.labels
        )));
    }

    let mut head = Builder { opset: model.proto.opset(), names, name, nodes: Vec::new(), constants: Vec::new() };
    let pooled = head.pool(options.pool, &options.input, options.mask.as_deref());
    let weight = head.names.fresh(&format!("{name}.weight"));
    let bias = head.names.fresh(&format!("{name}.bias"));
    let transposed = head.op("Transpose", "transposed", &[&weight], vec![AttributeProto::ints("perm", &[1, 0])]);
    let product = head.op("MatMul", "product", &[&pooled, &transposed], Vec::new());
    let mut add = node("Add", &[&product, &bias], &[name]);
    add.name = Some(head.names.fresh(&format!("{name}/add")));
    head.nodes.push(add);
    head.names.fresh(name);
    let (nodes, constants) = (head.nodes, head.constants);

    let record = HeadRecord {
        name: name.clone(),
        input: options.input.clone(),
        labels: options.labels,
        pool: options.pool,
        mask: options.mask.clone(),
        weight: weight.clone(),
        bias: bias.clone(),
        nodes: nodes.iter().map(|n| n.name().to_string()).collect(),
        constants: constants.iter().map(|t| t.name().to_string()).collect(),
    };
    // As torch initialises a linear layer: both uniform in ±1/√in.
    let bound = 1.0 / (features as f32).sqrt();
    let uniform = Uniform::new(-bound, bound).map_err(|e| Error::config(format!("head {name:?}: {e}")))?;
    let mut random = |dims: &[usize]| {
        let len = dims.iter().product();
        Tensor::new(dims, uniform.sample_iter(&mut *rng).take(len).collect::<Vec<f32>>())
    };
    for tensor in constants {
        add_initializer(&model.proto, patch, tensor, false);
    }
    add_initializer(&model.proto, patch, random(&[options.labels, features]).to_proto(&weight), false);
    add_initializer(&model.proto, patch, random(&[options.labels]).to_proto(&bias), false);
    let main = patch.graph(&Scope::new());
    main.append_nodes.extend(nodes);
    let labels = options.labels.to_string();
    let leading = if options.pool == Pool::None { dims.len() - 1 } else { 1 };
    let mut shape = named_dims(model, &options.input, leading);
    shape.push(labels);
    let shape: Vec<&str> = shape.iter().map(String::as_str).collect();
    main.add_outputs.push(value_info(name, DataType::Float, &shape));
    Ok((record, options.labels * (features + 1)))
}

/// Collects the head's nodes, whose names begin with `name`.
pub(crate) struct Builder<'a> {
    pub opset: i64,
    pub names: &'a mut Names,
    pub name: &'a str,
    pub nodes: Vec<NodeProto>,
    pub constants: Vec<TensorProto>,
}

impl Builder<'_> {
    /// A vector for each row of `tokens`, `[batch, sequence, features]`; with [`Pool::None`], `tokens`.
    pub fn pool(&mut self, pool: Pool, tokens: &str, mask: Option<&str>) -> String {
        match pool {
            Pool::None => tokens.into(),
            Pool::Cls => {
                let first = self.constant("first", Tensor::scalar(0i64));
                self.op("Gather", "pooled", &[tokens, &first], vec![AttributeProto::int("axis", 1)])
            }
            Pool::Mean => self.mean(tokens, mask),
        }
    }

    pub fn op(&mut self, op: &str, what: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = self.names.fresh(&format!("{}/{what}", self.name));
        let mut node = node(op, inputs, &[&output]);
        node.attribute = attributes;
        self.nodes.push(node);
        output
    }

    fn constant(&mut self, what: &str, value: Tensor) -> String {
        let name = self.names.fresh(&format!("{}/{what}", self.name));
        self.constants.push(value.to_proto(&name));
        name
    }

    /// An operator that takes its axes as an attribute before opset 13 and as an input since.
    fn with_axes(&mut self, op: &str, what: &str, x: &str, axis: i64, since: i64, keep: Vec<AttributeProto>) -> String {
        if self.opset < since {
            let attributes = keep.into_iter().chain([AttributeProto::ints("axes", &[axis])]).collect();
            return self.op(op, what, &[x], attributes);
        }
        let axes = self.constant(&format!("{what}.axes"), Tensor::new(&[1], vec![axis]));
        self.op(op, what, &[x, &axes], keep)
    }

    /// Mean over the sequence; with a mask, over the tokens that count (at least one, so that an empty text gives zeros).
    fn mean(&mut self, tokens: &str, mask: Option<&str>) -> String {
        let keep = |flag| vec![AttributeProto::int("keepdims", flag)];
        let Some(mask) = mask else {
            return self.with_axes("ReduceMean", "pooled", tokens, 1, 18, keep(0));
        };
        let counts = self.op("Cast", "mask", &[mask], vec![AttributeProto::int("to", DataType::Float as i64)]);
        let column = self.with_axes("Unsqueeze", "column", &counts, 2, 13, Vec::new());
        let masked = self.op("Mul", "masked", &[tokens, &column], Vec::new());
        let sum = self.with_axes("ReduceSum", "sum", &masked, 1, 13, keep(0));
        let count = self.with_axes("ReduceSum", "count", &counts, 1, 13, keep(1));
        let one = self.constant("one", Tensor::scalar(1f32));
        let count = self.op("Max", "at_least_one", &[&count, &one], Vec::new());
        self.op("Div", "pooled", &[&sum, &count], Vec::new())
    }
}

/// Dimensions of a value as far as they are known: as the model declares them, else as inferred.
fn dims(model: &Model, value: &str) -> Vec<Option<i64>> {
    let inferred = Shapes::infer(&model.proto, &Default::default());
    let inferred: Option<Vec<_>> = inferred
        .dims(value)
        .map(|dims| dims.iter().map(|d| if let Dim::Known(n) = d { Some(*n) } else { None }).collect());
    let declared = declared(model, value).map(|dims| {
        dims.into_iter().map(|d| if let Some(DimValue::DimValue(n)) = d { Some(n) } else { None }).collect::<Vec<_>>()
    });
    match (declared, inferred) {
        (Some(a), Some(b)) if a.len() == b.len() => a.into_iter().zip(b).map(|(a, b)| a.or(b)).collect(),
        (a, b) => a.or(b).unwrap_or_default(),
    }
}

/// The first `leading` dimensions of a value as the model names them (`""` where it does not).
fn named_dims(model: &Model, value: &str, leading: usize) -> Vec<String> {
    let declared = declared(model, value).unwrap_or_default();
    (0..leading)
        .map(|i| match declared.get(i) {
            Some(Some(DimValue::DimValue(n))) => n.to_string(),
            Some(Some(DimValue::DimParam(name))) => name.clone(),
            _ => String::new(),
        })
        .collect()
}

fn declared(model: &Model, value: &str) -> Option<Vec<Option<DimValue>>> {
    let graph = model.graph();
    let info = graph.output.iter().chain(&graph.value_info).chain(&graph.input).find(|v| v.name() == value)?;
    Some(info.tensor()?.shape.as_ref()?.dim.iter().map(|d| d.value.clone()).collect())
}
