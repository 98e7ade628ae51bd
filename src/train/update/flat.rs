//! Parameters of the same settings as one vector: an update is then a few operators for each group of them, however
//! many layers there are, and a graph takes and gives one vector where it had a tensor for each parameter.

use super::optimizer::Group;
use crate::onnx::{AttributeProto, DataType, ModelProto, Names, NodeProto, Tensor, constant_i64, node, value_info};
use crate::train::graph::Parameter;
use crate::{Error, Result};

/// The parameters of one group, one behind the other.
#[derive(Debug, Clone)]
pub(in crate::train) struct Flat {
    pub group: Group,
    /// Places among the parameters.
    members: Vec<usize>,
    /// Numbers in all of them.
    pub len: usize,
}

impl Flat {
    /// A vector for each distinct group, in the order in which they first come.
    pub fn of(parameters: &[Parameter], group: impl Fn(&Parameter) -> Group) -> Vec<Self> {
        let mut flats: Vec<Self> = Vec::new();
        for (i, parameter) in parameters.iter().enumerate() {
            let group = group(parameter);
            let at = flats.iter().position(|f| f.group == group).unwrap_or_else(|| {
                flats.push(Self { group, members: Vec::new(), len: 0 });
                flats.len() - 1
            });
            flats[at].members.push(i);
            flats[at].len += parameter.value.len();
        }
        flats
    }

    /// The vector of what `values` has for each of all parameters.
    pub fn gather(&self, values: &[&[f32]]) -> Tensor {
        let all: Vec<f32> = self.members.iter().flat_map(|i| values[*i].iter().copied()).collect();
        Tensor::new(&[all.len()], all)
    }

    /// Undoes [`Flat::gather`].
    pub fn scatter(&self, vector: &Tensor, values: &mut [&mut [f32]]) -> Result<()> {
        let mut rest = vector.values::<f32>().unwrap_or_default();
        for i in &self.members {
            let (part, others) = rest
                .split_at_checked(values[*i].len())
                .ok_or_else(|| Error::model(format!("a vector of parameters has {:?} numbers", vector.dims())))?;
            values[*i].copy_from_slice(part);
            rest = others;
        }
        Ok(())
    }
}

/// What [`flatten`] made.
#[derive(Debug, Clone, Default)]
pub(in crate::train) struct FlatNames {
    /// The graph input of each vector.
    pub inputs: Vec<String>,
    /// The output of its gradient.
    pub gradients: Vec<String>,
}

/// Puts vectors in the place of `parameters` among the inputs of `model`, and in the place of their `gradients` among
/// its outputs.
pub(in crate::train) fn flatten(
    model: &mut ModelProto,
    flats: &[Flat],
    parameters: &[Parameter],
    gradients: &[String],
) -> Result<FlatNames> {
    let mut names = Names::of(model);
    let graph = model.graph.as_mut().ok_or_else(|| Error::model("the model holds no graph"))?;
    graph.input.retain(|i| !parameters.iter().any(|p| p.name == i.name()));
    graph.output.retain(|o| !gradients.iter().any(|g| g == o.name()));
    let mut made = FlatNames::default();
    let mut first: Vec<NodeProto> = Vec::new();
    for flat in flats {
        let len = flat.len.to_string();
        let (input, output) = (names.fresh("parameters"), names.fresh("parameters.grad"));
        graph.input.push(value_info(&input, DataType::Float, &[&len]));
        graph.output.push(value_info(&output, DataType::Float, &[&len]));
        let members = || flat.members.iter().map(|i| (&parameters[*i], gradients.get(*i)));
        let parts: Vec<String> = members().map(|(p, _)| names.fresh(&format!("{}.flat", p.name))).collect();
        let sizes: Vec<i64> = members().map(|(p, _)| p.value.len() as i64).collect();
        let sizes_name = names.fresh("parameters.sizes");
        constant_i64(graph, &sizes_name, &sizes);
        first.push(NodeProto { output: parts.clone(), ..node("Split", &[&input, &sizes_name], &[&parts[0]]) });
        let one_row = names.fresh("parameters.row");
        constant_i64(graph, &one_row, &[-1]);
        let mut rows = Vec::new();
        for ((parameter, gradient), part) in members().zip(&parts) {
            let dims: Vec<i64> = parameter.value.dims().iter().map(|d| *d as i64).collect();
            let shape = names.fresh(&format!("{}.shape", parameter.name));
            constant_i64(graph, &shape, &dims);
            first.push(node("Reshape", &[part, &shape], &[&parameter.name]));
            let Some(gradient) = gradient else { continue };
            let row = names.fresh(&format!("{gradient}.flat"));
            graph.node.push(node("Reshape", &[gradient, &one_row], &[&row]));
            rows.push(row);
        }
        if gradients.is_empty() {
            graph.output.pop();
            continue;
        }
        let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
        let mut concat = node("Concat", &rows, &[&output]);
        concat.attribute = vec![AttributeProto::int("axis", 0)];
        graph.node.push(concat);
        made.inputs.push(input);
        made.gradients.push(output);
    }
    graph.node.splice(0..0, first);
    Ok(made)
}
