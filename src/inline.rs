//! Calls of model-local functions that hold linear layers. To adapt such a layer its call is written out: the function's
//! nodes stand in its place. Other calls stay as they are, and so do the functions; unload puts the calls back.

use std::collections::HashSet;

use bytes::Bytes;
use prost::Message;

use crate::adapter::{Injection, Inlined};
use crate::base::Base;
use crate::onnx::functions::Functions;
use crate::onnx::proto::FunctionProto;
use crate::onnx::{Model, Names, Patch, Scope, walk_graphs};
use crate::select::{self, Linear};
use crate::{Error, Result};

/// A model whose calls are written out, in memory.
pub struct Opened {
    pub model: Model,
    pub calls: Vec<Inlined>,
}

/// The linear layers of a model, those inside of functions among them.
pub struct Layers {
    pub linears: Vec<Linear>,
    pub record: Option<Injection>,
    /// Set where the places of the layers are in this model instead: calls are written out.
    pub opened: Option<Opened>,
}

impl Layers {
    /// # Errors
    /// A record of an injection that makes no sense; a function that cannot be written out.
    pub fn of(model: &Model) -> Result<Self> {
        let opened = open(model, &|_| true)?;
        let of = opened.as_ref().map_or(model, |o| &o.model);
        let record = Injection::read(of)?;
        let linears = Base::of(of, record.as_ref())?.linears();
        Ok(Self { linears, record, opened })
    }

    /// The model that the layers' places are in; `model` is what they were asked of.
    pub fn model<'a>(&'a self, model: &'a Model) -> &'a Model {
        self.opened.as_ref().map_or(model, |o| &o.model)
    }

    /// The function whose call `linear` is inside of.
    pub fn function(&self, linear: &Linear) -> Option<&str> {
        let mut calls = self.opened.iter().flat_map(|o| &o.calls).chain(self.record.iter().flat_map(|r| &r.inlined));
        calls.find(|c| c.nodes.contains(&linear.node_name)).map(|c| c.function.as_str())
    }
}

/// Writes out each call that `wanted` holds for, of a function with a product in it; `None` where there is none.
fn open(model: &Model, wanted: &dyn Fn(&Inlined) -> bool) -> Result<Option<Opened>> {
    let functions = Functions::of(&model.proto);
    if functions.is_empty() {
        return Ok(None);
    }
    let holds = |f: &FunctionProto| functions.any(f, &select::is_product);
    let mut places: Vec<(Scope, usize)> = Vec::new();
    walk_graphs(model.graph(), &mut |scope, graph| {
        let calls = graph.node.iter().enumerate().filter(|(_, n)| functions.called_by(n).is_some_and(holds));
        places.extend(calls.map(|(index, _)| (scope.clone(), index)));
    });
    let mut names = Names::of(&model.proto);
    let mut patch = Patch::default();
    let mut calls = Vec::new();
    for (scope, index) in places {
        let gone = || Error::file(&model.path, "a subgraph is gone");
        let call = model.graph_at(&scope).and_then(|g| g.node.get(index)).ok_or_else(gone)?;
        let body = functions.body(call, &mut names, &holds).map_err(|e| Error::file(&model.path, e.to_string()))?;
        let inlined = Inlined {
            function: call.op_type().into(),
            nodes: body.iter().map(|n| n.name().to_string()).collect(),
            call: hex(&model.node_bytes(&scope, index)?),
        };
        if !wanted(&inlined) {
            continue;
        }
        let graph = patch.graph(&scope);
        let mut body = body.into_iter();
        if let Some(first) = body.next() {
            graph.replace_nodes.insert(index, first.encode_to_vec().into());
        }
        graph.insert_after.insert(index, body.collect());
        calls.push(inlined);
    }
    if calls.is_empty() {
        return Ok(None);
    }
    Ok(Some(Opened { model: model.edited(patch)?, calls }))
}

/// What `attempt` makes of a model, of which it gives the modules it changed: of the model itself, or with those calls
/// written out that hold one of these modules.
pub(crate) fn opened<T>(
    model: &Model,
    attempt: impl Fn(&Model, &[Inlined]) -> Result<(T, Vec<String>)>,
) -> Result<(T, Option<Model>)> {
    let Some(all) = open(model, &|_| true)? else { return Ok((attempt(model, &[])?.0, None)) };
    let (_, modules) = attempt(&all.model, &all.calls)?;
    let record = Injection::read(&all.model)?;
    let linears = Base::of(&all.model, record.as_ref())?.linears();
    let changed = linears.iter().filter(|l| modules.contains(&l.path));
    let nodes: HashSet<&str> = changed.map(|l| l.node_name.as_str()).collect();
    match open(model, &|call| call.nodes.iter().any(|n| nodes.contains(n.as_str())))? {
        Some(some) => Ok((attempt(&some.model, &some.calls)?.0, Some(some.model))),
        None => Ok((attempt(model, &[])?.0, None)),
    }
}

/// Puts the calls back in a patch that takes the adapters out of `model`.
pub(crate) fn restore(model: &Model, inlined: &[Inlined], patch: &mut Patch) -> Result<()> {
    for call in inlined {
        let nodes: HashSet<&str> = call.nodes.iter().map(String::as_str).collect();
        let mut places: Vec<(Scope, usize)> = Vec::new();
        walk_graphs(model.graph(), &mut |scope, graph| {
            let found = graph.node.iter().enumerate().filter(|(_, n)| nodes.contains(n.name()));
            places.extend(found.map(|(index, _)| (scope.clone(), index)));
        });
        if places.len() != nodes.len() {
            return Err(crate::base::changed(model));
        }
        let bytes = unhex(&call.call).ok_or_else(|| crate::base::changed(model))?;
        for (i, (scope, index)) in places.into_iter().enumerate() {
            // Whatever is changed in graphs below goes with the node.
            let below = |s: &Scope| s.len() > scope.len() && s.starts_with(&scope) && s[scope.len()].0 == index;
            patch.graphs.retain(|s, _| !below(s));
            let graph = patch.graph(&scope);
            match i {
                0 => graph.put_back(index, bytes.clone()),
                _ => drop(graph.drop_nodes.insert(index)),
            }
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Bytes> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let digits = digits.filter(|d| d.len().is_multiple_of(2))?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect::<Vec<u8>>().into())
}
