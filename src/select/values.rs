//! Who defines and who reads each value, over a model's nested graphs: names are looked up in the graph that uses
//! them, then outward (ONNX IR, "Names Within a Graph"), so that two branches of an `If` may use one name for two
//! things.

use std::collections::HashMap;

use crate::onnx::{GraphProto, NodeProto, Scope, TensorProto, walk_graphs};

/// A value: the graph that defines it (its number in [`Values::graphs`]) and its name there.
pub type ValueId<'a> = (usize, &'a str);

/// What gives a value its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Definition {
    Input,
    Initializer(usize),
    Node(usize),
}

/// One use of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// Input `input` of a node.
    Node { graph: usize, node: usize, input: usize },
    /// An output of the graph it is defined in or of one below.
    Output,
}

/// One graph of the model.
pub struct View<'a> {
    pub scope: Scope,
    pub graph: &'a GraphProto,
    parent: Option<usize>,
    definitions: HashMap<&'a str, Definition>,
}

/// The index.
pub struct Values<'a> {
    pub graphs: Vec<View<'a>>,
    readers: HashMap<ValueId<'a>, Vec<Reader>>,
}

impl<'a> Values<'a> {
    pub fn of(main: &'a GraphProto) -> Self {
        let mut numbers: HashMap<Scope, usize> = HashMap::new();
        let mut graphs: Vec<View<'a>> = Vec::new();
        walk_graphs(main, &mut |scope, graph| {
            numbers.insert(scope.clone(), graphs.len());
            let parent = scope.split_last().and_then(|(_, outer)| numbers.get(outer).copied());
            graphs.push(View { scope: scope.clone(), graph, parent, definitions: definitions(graph) });
        });
        let mut values = Self { graphs, readers: HashMap::new() };
        for number in 0..values.graphs.len() {
            let graph = values.graphs[number].graph;
            for (n, node) in graph.node.iter().enumerate() {
                for (i, name) in node.input.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
                    values.note(number, name, Reader::Node { graph: number, node: n, input: i });
                }
            }
            for output in &graph.output {
                values.note(number, output.name(), Reader::Output);
            }
        }
        values
    }

    fn note(&mut self, graph: usize, name: &'a str, reader: Reader) {
        if let Some((value, _)) = self.lookup(graph, name) {
            self.readers.entry(value).or_default().push(reader);
        }
    }

    /// What `name` means when a node of `graph` uses it.
    pub fn lookup<'n>(&self, graph: usize, name: &'n str) -> Option<(ValueId<'n>, Definition)> {
        let mut at = Some(graph);
        while let Some(number) = at {
            let view = self.graphs.get(number)?;
            if let Some(definition) = view.definitions.get(name) {
                return Some(((number, name), *definition));
            }
            at = view.parent;
        }
        None
    }

    pub fn readers(&self, value: ValueId<'a>) -> &[Reader] {
        self.readers.get(&value).map_or(&[], Vec::as_slice)
    }

    pub fn node(&self, graph: usize, node: usize) -> Option<&'a NodeProto> {
        self.graphs.get(graph)?.graph.node.get(node)
    }

    pub fn initializer(&self, graph: usize, index: usize) -> Option<&'a TensorProto> {
        self.graphs.get(graph)?.graph.initializer.get(index)
    }
}

fn definitions(graph: &GraphProto) -> HashMap<&str, Definition> {
    // An initializer that is also listed as an input (`keep_initializers_as_inputs`) counts as the initializer.
    let inputs = graph.input.iter().map(|v| (v.name(), Definition::Input));
    let initializers = graph.initializer.iter().enumerate().map(|(i, t)| (t.name(), Definition::Initializer(i)));
    let outputs = graph
        .node
        .iter()
        .enumerate()
        .flat_map(|(n, node)| node.output.iter().map(move |name| (name.as_str(), Definition::Node(n))));
    inputs.chain(initializers).chain(outputs).filter(|(name, _)| !name.is_empty()).collect()
}
