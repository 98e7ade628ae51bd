//! The base inside an injected model: its graph as it was, and where each part of it stands in the file.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};

use crate::adapter::{BoneConfig, Folded, Injection, join_sizes};
use crate::onnx::{GraphProto, Model, ModelProto, Scope};
use crate::select::{self, Linear};
use crate::{Error, Result};

/// The base of a model. Scopes and indices of its graph are the base's own; [`Base::node`] and the like lead to the
/// file's. A head stays in it: it is a part of the model that no adapter stands on.
pub struct Base<'a> {
    pub proto: Cow<'a, ModelProto>,
    /// Nodes that are no layers of the model: those of a head, and of adapters that a fold left beside theirs.
    aside: HashSet<String>,
    /// What is known of each graph by its scope; empty for a plain model, which is its own base.
    graphs: BTreeMap<Scope, Origin>,
    /// Sizes of modules in packed layers, as the adapters' configs give them.
    packed_sizes: BTreeMap<String, usize>,
}

/// Where a graph of the base and its nodes are in the file.
struct Origin {
    scope: Scope,
    nodes: Vec<usize>,
    initializers: Vec<usize>,
}

/// What injection added and renamed, by name.
struct Added<'a> {
    nodes: HashSet<&'a str>,
    initializers: HashSet<&'a str>,
    outputs: HashMap<&'a str, &'a str>,
    inputs: HashMap<&'a str, &'a str>,
}

impl<'a> Base<'a> {
    /// The base of `model`, whose record is `record` (`None`: a plain model).
    ///
    /// # Errors
    /// Where another tool has changed the model since the injection, so that the base cannot be told.
    pub fn of(model: &'a Model, record: Option<&Injection>) -> Result<Self> {
        let mut graphs = BTreeMap::new();
        let Some(record) = record else {
            let aside = Folded::read(model).nodes.into_iter().collect();
            let packed_sizes = BTreeMap::new();
            return Ok(Self { proto: Cow::Borrowed(&model.proto), aside, graphs, packed_sizes });
        };
        let added = Added::by(record);
        let mut proto = model.proto.clone();
        let mut found = HashSet::new();
        if let Some(graph) = &mut proto.graph {
            restore(graph, &added, (&mut Scope::new(), &mut Scope::new()), &mut graphs, &mut found);
        }
        if found.len() < added.nodes.len() + added.outputs.len() + added.inputs.len() + added.initializers.len() {
            return Err(changed(model));
        }
        let mut aside: HashSet<String> = Folded::read(model).nodes.into_iter().collect();
        aside.extend(record.head.iter().flat_map(|h| &h.nodes).cloned());
        Ok(Self { proto: Cow::Owned(proto), aside, graphs, packed_sizes: sizes(record) })
    }

    /// A base that is at hand already, of a model with the record `record`.
    pub(crate) fn within(proto: &'a ModelProto, record: &Injection) -> Self {
        let aside = record.head.iter().flat_map(|h| &h.nodes).cloned().collect();
        Self { proto: Cow::Borrowed(proto), aside, graphs: BTreeMap::new(), packed_sizes: sizes(record) }
    }

    /// Notes the sizes of packed modules that a further adapter's config gives.
    ///
    /// # Errors
    /// One that is known as another.
    pub fn know(&mut self, config: &BoneConfig) -> Result<()> {
        join_sizes(&mut self.packed_sizes, &config.packed_sizes).map_err(Error::config)
    }

    /// The main graph.
    pub fn graph(&self) -> &GraphProto {
        self.proto.graph.as_ref().expect("checked when the model was read")
    }

    pub fn graph_at(&self, scope: &Scope) -> Result<&GraphProto> {
        scope
            .iter()
            .try_fold(self.graph(), |graph, (node, attribute)| {
                graph.node.get(*node)?.attribute.get(*attribute)?.g.as_ref()
            })
            .ok_or_else(|| Error::model("a subgraph is gone"))
    }

    /// The base's linear layers (a head is none of them, nor are the nodes of folded adapters).
    pub fn linears(&self) -> Vec<Linear> {
        let mut linears = select::linears_with(self.graph(), &self.packed_sizes);
        linears.retain(|l| !self.aside.contains(&l.node_name));
        linears
    }

    /// Where the graph at `scope` is in the file.
    pub fn scope(&self, scope: &Scope) -> Scope {
        self.graphs.get(scope).map_or_else(|| scope.clone(), |g| g.scope.clone())
    }

    /// Index of a node in the file's graph.
    pub fn node(&self, scope: &Scope, node: usize) -> usize {
        self.graphs.get(scope).and_then(|g| g.nodes.get(node)).copied().unwrap_or(node)
    }

    /// Index of an initializer in the file's graph.
    pub fn initializer(&self, scope: &Scope, index: usize) -> usize {
        self.graphs.get(scope).and_then(|g| g.initializers.get(index)).copied().unwrap_or(index)
    }
}

/// The sizes of packed modules in all configs of `record`, whose check has found them to agree.
fn sizes(record: &Injection) -> BTreeMap<String, usize> {
    record.adapters.iter().flat_map(|a| a.config.packed_sizes.clone()).collect()
}

impl<'a> Added<'a> {
    fn by(record: &'a Injection) -> Self {
        let written = &record.written;
        let names = |renamed: &'a [crate::adapter::Renamed]| {
            renamed.iter().map(|r| (r.now.as_str(), r.base.as_str())).collect()
        };
        let parameters = record.adapters.iter().flat_map(|a| a.parameters());
        Self {
            nodes: written.nodes.iter().map(String::as_str).collect(),
            initializers: parameters.chain(written.constants.iter().map(String::as_str)).collect(),
            outputs: names(&written.outputs),
            inputs: names(&written.inputs),
        }
    }
}

pub(crate) fn changed(model: &Model) -> Error {
    Error::file(
        &model.path,
        "another tool has changed this model since the adapters were injected: nodes or initializers of theirs are \
         gone, so they cannot be taken out; inject the base again",
    )
}

/// Takes what was added out of `graph` and the graphs below it; `scopes` are where it is in the file and in the base.
/// Counts in `found` what it came across at least once.
fn restore(
    graph: &mut GraphProto,
    added: &Added,
    scopes: (&mut Scope, &mut Scope),
    graphs: &mut BTreeMap<Scope, Origin>,
    found: &mut HashSet<(&'static str, String)>,
) {
    let (file, base) = scopes;
    let mut origin = Origin { scope: file.clone(), nodes: Vec::new(), initializers: Vec::new() };
    let main = file.is_empty();
    let mut index = 0;
    graph.initializer.retain(|tensor| {
        let keep = !(main && added.initializers.contains(tensor.name()));
        if keep {
            origin.initializers.push(index);
        } else {
            found.insert(("initializer", tensor.name().into()));
        }
        index += 1;
        keep
    });
    graph.input.retain(|input| !(main && added.initializers.contains(input.name())));
    let nodes = std::mem::take(&mut graph.node);
    for (index, mut node) in nodes.into_iter().enumerate() {
        if added.nodes.contains(node.name()) {
            found.insert(("node", node.name().into()));
            continue;
        }
        let renamed = [("output", &mut node.output, &added.outputs), ("input", &mut node.input, &added.inputs)];
        for (kind, names, renamed) in renamed {
            for name in names {
                if let Some(original) = renamed.get(name.as_str()) {
                    found.insert((kind, std::mem::replace(name, original.to_string())));
                }
            }
        }
        for (at, attribute) in node.attribute.iter_mut().enumerate() {
            if let Some(graph) = &mut attribute.g {
                file.push((index, at));
                base.push((origin.nodes.len(), at));
                restore(graph, added, (file, base), graphs, found);
                file.pop();
                base.pop();
            }
        }
        origin.nodes.push(index);
        graph.node.push(node);
    }
    graphs.insert(base.clone(), origin);
}
