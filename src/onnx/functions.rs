//! Model-local functions: calls of them, and what stands in a call's place when its body is written out (ONNX IR,
//! "Functions").

use std::collections::HashMap;

use super::proto::FunctionProto;
use super::{GraphProto, ModelProto, Names, NodeProto, node};
use crate::{Error, Result};

/// Functions call functions, but none calls itself.
const DEEPEST: usize = 32;

/// The functions of a model by what calls them.
pub struct Functions<'a> {
    by_call: HashMap<(&'a str, &'a str, &'a str), &'a FunctionProto>,
    model: &'a ModelProto,
}

impl<'a> Functions<'a> {
    pub fn of(model: &'a ModelProto) -> Self {
        let key = |f: &'a FunctionProto| (f.domain(), f.name(), f.overload());
        Self { by_call: model.functions.iter().map(|f| (key(f), f)).collect(), model }
    }

    pub fn is_empty(&self) -> bool {
        self.by_call.is_empty()
    }

    /// The function that `call` calls.
    pub fn called_by(&self, call: &NodeProto) -> Option<&'a FunctionProto> {
        self.by_call.get(&(call.domain(), call.op_type(), call.overload())).copied()
    }

    /// True where `which` holds for a node of the function's body, or of a function that this one calls.
    pub fn any(&self, function: &FunctionProto, which: &dyn Fn(&NodeProto) -> bool) -> bool {
        fn within(
            functions: &Functions,
            nodes: &[NodeProto],
            which: &dyn Fn(&NodeProto) -> bool,
            depth: usize,
        ) -> bool {
            depth < DEEPEST
                && nodes.iter().any(|node| {
                    let below = |nodes: &[NodeProto]| within(functions, nodes, which, depth + 1);
                    which(node)
                        || functions.called_by(node).is_some_and(|f| below(&f.node))
                        || node.attribute.iter().filter_map(|a| a.g.as_ref()).any(|g| below(&g.node))
                })
        }
        within(self, &function.node, which, 0)
    }

    /// The nodes to stand in place of `call`, with names of their own; within them, calls of functions that `which`
    /// holds for are written out as well.
    ///
    /// # Errors
    /// A function written for other operator sets than the model's, or one that calls itself.
    pub fn body(
        &self,
        call: &NodeProto,
        names: &mut Names,
        which: &dyn Fn(&FunctionProto) -> bool,
    ) -> Result<Vec<NodeProto>> {
        self.body_at(call, names, which, 0)
    }

    fn body_at(
        &self,
        call: &NodeProto,
        names: &mut Names,
        which: &dyn Fn(&FunctionProto) -> bool,
        depth: usize,
    ) -> Result<Vec<NodeProto>> {
        let Some(function) = self.called_by(call) else { return Ok(vec![call.clone()]) };
        let refuse = |why: String| Error::model(format!("function {} cannot be written out: {why}", function.name()));
        if depth >= DEEPEST {
            return Err(refuse("functions call each other without an end".into()));
        }
        for wanted in &function.opset_import {
            let plain = |domain: &str| if domain == "ai.onnx" { String::new() } else { domain.to_string() };
            let mut imports = self.model.opset_import.iter();
            let has = imports.find(|o| plain(o.domain()) == plain(wanted.domain())).map(|o| o.version());
            let is_used = |n: &NodeProto| plain(n.domain()) == plain(wanted.domain());
            if has != Some(wanted.version()) && self.any(function, &is_used) {
                let domain = if wanted.domain().is_empty() { "ai.onnx" } else { wanted.domain() };
                let has = has.map_or("none".into(), |v| v.to_string());
                return Err(refuse(format!(
                    "it is written for operator set {} of {domain}, and the model imports {has}",
                    wanted.version()
                )));
            }
        }
        let prefix = if call.name().is_empty() { function.name() } else { call.name() };
        let mut writer = Inside { call, function, prefix, names, renamed: HashMap::new() };
        let mut nodes = Vec::new();
        for (i, formal) in function.input.iter().enumerate() {
            writer.renamed.insert(formal.clone(), call.input.get(i).cloned().unwrap_or_default());
        }
        for (formal, actual) in function.output.iter().zip(&call.output).filter(|(_, actual)| !actual.is_empty()) {
            match writer.renamed.get(formal) {
                Some(given) => nodes.push(node("Identity", &[given], &[actual])),
                None => drop(writer.renamed.insert(formal.clone(), actual.clone())),
            }
        }
        let body: Vec<NodeProto> = function.node.iter().map(|n| writer.node(n)).collect();
        for node in body {
            match self.called_by(&node).is_some_and(which) {
                true => nodes.extend(self.body_at(&node, names, which, depth + 1)?),
                false => nodes.push(node),
            }
        }
        for node in &mut nodes {
            for graph in node.attribute.iter_mut().filter_map(|a| a.g.as_mut()) {
                self.write_out(graph, names, which, depth + 1)?;
            }
        }
        Ok(nodes)
    }

    /// Writes out the calls in a graph, and in those below it, of the functions that `which` holds for.
    fn write_out(
        &self,
        graph: &mut GraphProto,
        names: &mut Names,
        which: &dyn Fn(&FunctionProto) -> bool,
        depth: usize,
    ) -> Result<()> {
        for mut node in std::mem::take(&mut graph.node) {
            for graph in node.attribute.iter_mut().filter_map(|a| a.g.as_mut()) {
                self.write_out(graph, names, which, depth)?;
            }
            match self.called_by(&node).is_some_and(which) {
                true => graph.node.extend(self.body_at(&node, names, which, depth)?),
                false => graph.node.push(node),
            }
        }
        Ok(())
    }
}

/// Writes all calls of functions out, in memory: engines' and derivatives' rules know operators only.
///
/// # Errors
/// As [`Functions::body`].
pub fn write_out(model: &mut ModelProto) -> Result<()> {
    if model.functions.is_empty() {
        return Ok(());
    }
    let source = model.clone();
    let mut names = Names::of(&source);
    if let Some(graph) = &mut model.graph {
        Functions::of(&source).write_out(graph, &mut names, &|_| true, 0)?;
    }
    model.functions.clear();
    Ok(())
}

/// A function's body on its way into the graph that calls it.
struct Inside<'a> {
    call: &'a NodeProto,
    function: &'a FunctionProto,
    prefix: &'a str,
    names: &'a mut Names,
    renamed: HashMap<String, String>,
}

impl Inside<'_> {
    fn rename(&mut self, name: &str) -> String {
        if name.is_empty() {
            return String::new();
        }
        if let Some(known) = self.renamed.get(name) {
            return known.clone();
        }
        let fresh = self.names.fresh(&format!("{}/{name}", self.prefix));
        self.renamed.insert(name.into(), fresh.clone());
        fresh
    }

    fn node(&mut self, inner: &NodeProto) -> NodeProto {
        let mut node = inner.clone();
        let own = if inner.name().is_empty() { inner.op_type() } else { inner.name() };
        node.name = Some(self.names.fresh(&format!("{}/{own}", self.prefix)));
        for name in node.input.iter_mut().chain(&mut node.output) {
            *name = self.rename(name);
        }
        node.attribute.clear();
        for attribute in &inner.attribute {
            // A reference takes the call's value, else the function's default; with neither, the operator's own holds.
            let mut value = match attribute.ref_attr_name().is_empty() {
                true => attribute.clone(),
                false => {
                    let wanted = attribute.ref_attr_name();
                    let default = || self.function.attribute_proto.iter().find(|a| a.name() == wanted);
                    let Some(given) = self.call.attr(wanted).or_else(default) else { continue };
                    let mut given = given.clone();
                    given.name = attribute.name.clone();
                    given
                }
            };
            if attribute.ref_attr_name().is_empty() {
                value.g.iter_mut().for_each(|g| self.graph(g));
            }
            node.attribute.push(value);
        }
        node
    }

    fn graph(&mut self, graph: &mut GraphProto) {
        let named = graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info);
        for info in named {
            info.name = Some(self.rename(info.name.as_deref().unwrap_or_default()));
        }
        for tensor in &mut graph.initializer {
            tensor.name = Some(self.rename(tensor.name.as_deref().unwrap_or_default()));
        }
        graph.node = graph.node.iter().map(|n| self.node(n)).collect();
    }
}
