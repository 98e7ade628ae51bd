//! `--freeze-until`: everything before a node is constant, so the way back ends at its outputs.

use std::collections::{HashMap, HashSet};

use crate::adapter::Injection;
use crate::autodiff;
use crate::base::Base;
use crate::onnx::{GraphProto, Model, NodeProto};
use crate::{Error, Result, did_you_mean};

/// All values (inputs, initializers, results) that the outputs of the node `name` are made of, with these outputs. The
/// adapter of a layer that this node is lies before its output, too.
///
/// # Errors
/// No node of that name in the main graph.
pub(in crate::train) fn before(model: &Model, injection: &Injection, name: &str) -> Result<HashSet<String>> {
    let base = Base::of(model, Some(injection))?;
    let nodes = || base.proto.graph.iter().flat_map(|g| &g.node).chain(&model.graph().node);
    let node = nodes().find(|node| node.name() == name).ok_or_else(|| {
        let near = did_you_mean(name, nodes().map(NodeProto::name).filter(|name| !name.is_empty()));
        Error::config(format!("freeze-until {name:?} is no node of the model's main graph.{near}"))
    })?;
    Ok(made_of(model.graph(), &node.output))
}

/// `values` and all that goes into them.
fn made_of(graph: &GraphProto, values: &[String]) -> HashSet<String> {
    let makers: HashMap<&str, &NodeProto> =
        graph.node.iter().flat_map(|node| node.output.iter().map(move |output| (output.as_str(), node))).collect();
    let mut found: HashSet<String> = HashSet::new();
    let mut open: Vec<String> = values.to_vec();
    while let Some(value) = open.pop() {
        if let Some(node) = makers.get(value.as_str()) {
            open.extend(autodiff::inputs(node).into_iter().filter(|input| !found.contains(input)));
        }
        found.insert(value);
    }
    found.remove("");
    found
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::adapter::{BoneConfig, TargetModules};
    use crate::inject::{InjectOptions, inject};
    use crate::train::data::{Field, LabelKind, Target};
    use crate::train::graph::{Learners, LossModel, Task, parameters};
    use crate::train::{Loss, Pooling};

    #[test]
    fn no_node_of_the_way_back_looks_before_the_one_where_it_ends() {
        let shared = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/goldens/mlp/base_gemm.onnx");
        let base = Model::open(shared).unwrap();
        let target_modules = Some(TargetModules::parse("all-linear"));
        let config = BoneConfig { r: 4, target_modules, ..Default::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("injected.onnx");
        inject(&base, &InjectOptions { config, ..Default::default() }).unwrap().write(&base, &path).unwrap();
        let model = Model::open(&path).unwrap();
        let injection = Injection::expect(&model).unwrap();
        let node = base.graph().node.iter().find(|n| n.is("Relu")).unwrap();
        let frozen = before(&model, &injection, node.name()).unwrap();
        let all = parameters(&model, &injection, &injection.active, false).unwrap();
        let left: Vec<_> = all.iter().filter(|p| !frozen.contains(&p.name)).cloned().collect();
        assert!(left.len() < all.len() && !left.is_empty());

        let output = Field::of(&model.graph().output[0]);
        let columns = [Target::labels("labels", LabelKind::Number, &output).field(2)];
        let pooling = Pooling::default();
        let derived = |parameters: &[_]| {
            let learners = Learners { injection: &injection, trained: &injection.active, dropout: None };
            let task = Task::new(Loss::Mse, &pooling, &output, &columns);
            let (forward, gradient) = LossModel::new(&model, learners, parameters, task).unwrap().both();
            let known: HashSet<String> = forward.graph.unwrap().node.into_iter().flat_map(|n| n.output).collect();
            let nodes = gradient.graph.unwrap().node.into_iter();
            nodes.filter(|n| n.output.iter().any(|o| !known.contains(o))).collect::<Vec<_>>()
        };
        // What the node itself gives is the input of what is differentiated.
        let inside = |name: &String| frozen.contains(name) && !node.output.contains(name);
        let reaches = |nodes: &[NodeProto]| nodes.iter().any(|n| n.input.iter().any(inside));
        let (short, whole) = (derived(&left), derived(&all));
        assert!(reaches(&whole) && !reaches(&short));
        assert!(short.len() < whole.len(), "{} {}", short.len(), whole.len());
    }
}
