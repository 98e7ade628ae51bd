//! The nodes of a model's active adapters: what is added around each adapted node of the base, in the form that is
//! served or in the form that is trained.

use std::collections::BTreeMap;

use crate::adapter::Written;
use crate::base::Base;
use crate::onnx::{DataType, GraphProto, ModelProto, NewTensor, NodeProto, Patch, Scope, TensorProto, value_info};

/// What the adapters' nodes are for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Form<'a> {
    /// A file that runtimes load: standard operators, blocks beside the layers they adapt.
    Served,
    /// A graph to derive gradients of: weights take in their blocks once a step (see `train/graph/form.rs`), and the inputs
    /// of `trained` adapters' blocks drop out where there is a seed for it.
    Trained { trained: &'a [String], dropout: Option<u64> },
}

/// Changes around one node of the base.
#[derive(Default)]
pub(crate) struct Edit {
    pub(super) before: Vec<NodeProto>,
    pub(super) after: Vec<NodeProto>,
    /// New names of inputs and outputs, by position.
    pub(super) inputs: Vec<(usize, String)>,
    pub(super) output: Option<String>,
    /// The node as one that knows its blocks (training form): operator and further inputs.
    pub(super) tiled: Option<(&'static str, Vec<String>)>,
}

/// All changes, by the node's place in the base.
#[derive(Default)]
pub(crate) struct Emission {
    pub(super) edits: BTreeMap<(Scope, usize), Edit>,
    pub constants: Vec<TensorProto>,
    pub written: Written,
}

/// Domain and operators of the training form.
pub(crate) const DOMAIN: &str = "org.bone-onnx";
pub(crate) const TILED_MATMUL: &str = "TiledMatMul";
pub(crate) const TILED_GEMM: &str = "TiledGemm";

impl Emission {
    /// Puts the changes into a patch of the file that `base` was read from.
    pub(crate) fn patch(&self, base: &Base, patch: &mut Patch) {
        for ((scope, node), edit) in &self.edits {
            let index = base.node(scope, *node);
            let graph = patch.graph(&base.scope(scope));
            for (input, name) in &edit.inputs {
                graph.rename_input(index, *input, name);
            }
            if let Some(name) = &edit.output {
                graph.rename_output(index, 0, name);
            }
            if !edit.before.is_empty() {
                graph.insert_before.insert(index, edit.before.clone());
            }
            if !edit.after.is_empty() {
                graph.insert_after.insert(index, edit.after.clone());
            }
        }
    }

    /// Makes the changes in a base held in memory.
    pub(crate) fn apply(self, model: &mut ModelProto) {
        let Some(graph) = &mut model.graph else { return };
        let mut edits = self.edits;
        apply(graph, &mut Scope::new(), &mut edits);
        graph.initializer.extend(self.constants);
    }
}

fn apply(graph: &mut GraphProto, scope: &mut Scope, edits: &mut BTreeMap<(Scope, usize), Edit>) {
    let nodes = std::mem::take(&mut graph.node);
    for (index, mut node) in nodes.into_iter().enumerate() {
        for (at, attribute) in node.attribute.iter_mut().enumerate() {
            if let Some(graph) = &mut attribute.g {
                scope.push((index, at));
                apply(graph, scope, edits);
                scope.pop();
            }
        }
        let edit = edits.remove(&(scope.clone(), index)).unwrap_or_default();
        graph.node.extend(edit.before);
        for (input, name) in edit.inputs {
            node.input[input] = name;
        }
        if let Some(name) = edit.output {
            node.output[0] = name;
        }
        if let Some((op, blocks)) = edit.tiled {
            node.domain = Some(DOMAIN.into());
            node.op_type = Some(op.into());
            node.input.resize(3, String::new());
            node.input.extend(blocks);
        }
        graph.node.push(node);
        graph.node.extend(edit.after);
    }
}

/// Adds an initializer to the main graph; before IR 4 every initializer has to be a graph input as well, and one that
/// callers may override is in any version.
pub(crate) fn add_initializer(model: &ModelProto, patch: &mut Patch, tensor: impl Into<NewTensor>, overridable: bool) {
    let tensor = tensor.into();
    let main = patch.graph(&Scope::new());
    if overridable || model.ir_version() < 4 {
        let dims: Vec<String> = tensor.header.dims.iter().map(i64::to_string).collect();
        let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
        let element = DataType::try_from(tensor.header.data_type()).unwrap_or(DataType::Float);
        main.add_inputs.push(value_info(tensor.header.name(), element, &dims));
    }
    main.add_initializers.push(tensor);
}
