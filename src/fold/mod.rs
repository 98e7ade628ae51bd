//! Injected (or base and adapter) → merged: each adapted weight takes its blocks in, what trained in full replaces what
//! it was copied from, the adapters' nodes go, and what remains is a plain ONNX model of the base's shape. Weights are
//! made one at a time, while the file is written. The same way back: a merged model gives its adapters up again.

pub(crate) mod chain;
mod dead;
mod grid;
mod merge;
mod part;
mod quantized;
mod values;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::adapter::{Adapter, Injection};
use crate::base::Base;
use crate::inject::place::Site;
use crate::inject::{check_shared, extract, fit};
use crate::inline;
use crate::onnx::{Model, Names, NewValues, Patch, Store, Stored, Tensor};
use crate::select::{self, Linear, Source, Values};
use crate::unload::strip;
use crate::{Error, Result, did_you_mean};
use chain::Chained;
use dead::Cut;
use merge::Merger;
pub use quantized::{QuantizedFold, RequantizedLayer};

/// Called with the name of each module or parameter whose merged value is being written.
pub type Progress = Arc<dyn Fn(&str) + Send + Sync>;

/// How to fold.
#[derive(Clone, Default)]
pub struct FoldOptions {
    /// Refuse a merged weight with a value that is not finite, before anything appears under the final name.
    pub safe: bool,
    /// The adapters to merge, in this order; `None`: the active ones in theirs, then `extra`.
    pub adapters: Option<Vec<String>>,
    /// Adapters from outside the model (PEFT directories).
    pub extra: Vec<Adapter>,
    /// Take adapters that were merged into this model out of its weights again, in the reverse order.
    pub undo: bool,
    /// Go on with what of the `extra` adapters fits the model.
    pub allow_partial: bool,
    /// What becomes of layers whose weight is quantised.
    pub quantized: QuantizedFold,
    /// Where the merged model keeps its tensors, and whether to wait until it is on the disk.
    pub store: Store,
    pub progress: Option<Progress>,
}

/// A finished fold, not yet written.
pub struct Folded {
    patch: Patch,
    values: NewValues,
    store: Store,
    pub summary: FoldSummary,
    opened: Option<Model>,
}

/// What a fold did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FoldSummary {
    pub adapters: Vec<String>,
    /// Modules whose stored weight was changed.
    pub merged: Vec<String>,
    /// Modules that got a weight of their own, because others read the stored one.
    pub copied: Vec<String>,
    /// Parameters that were trained in full and replaced the base's.
    pub replaced: Vec<String>,
    /// Modules whose weight is quantised: their adapters are nodes beside them.
    pub kept: Vec<String>,
    /// Modules whose weight was quantised again.
    pub requantized: Vec<RequantizedLayer>,
    /// Modules that got a weight of floats in place of a quantised one.
    pub dequantized: Vec<String>,
    pub head: Option<String>,
    /// Data files of the merged model.
    pub data: Stored,
    pub warnings: Vec<String>,
}

impl FoldSummary {
    /// The modules whose adapters were folded.
    fn adapted(&self) -> impl Iterator<Item = &str> {
        let plain = self.merged.iter().chain(&self.copied).chain(&self.kept).chain(&self.dequantized);
        plain.chain(self.requantized.iter().map(|l| &l.module)).map(String::as_str)
    }
}

/// One adapted layer: its nodes in the base, and what its weight takes in, in order.
struct Layer<'a> {
    module: &'a str,
    calls: Vec<&'a Linear>,
    stack: Vec<Stacked<'a>>,
}

/// An adapter on a layer, or on a part of one.
struct Stacked<'a> {
    adapter: &'a Arc<Adapter>,
    on: &'a Linear,
}

impl Layer<'_> {
    /// Whether its calls read one weight in one way, so that it can change for all of them where it is stored.
    fn reads_one_weight(&self) -> bool {
        let first = self.calls[0];
        let way = |l: &Linear| (l.trans_b, l.alpha.to_bits(), l.is_stored_out_in());
        self.calls.iter().all(|call| match call.weight.is_matrix() && first.weight.is_matrix() {
            true => call.is_stored_out_in() == first.is_stored_out_in() && call.alpha == first.alpha,
            false => way(call) == way(first) && call.weight.chain == first.weight.chain,
        })
    }

    fn is_additive(&self) -> bool {
        self.stack.iter().all(|s| s.adapter.config.init_weights.variant().is_additive())
    }

    /// The modules that change: the layer, or parts of it.
    fn changed(&self) -> impl Iterator<Item = String> {
        let mut names: Vec<String> = self.stack.iter().map(|s| s.on.path.clone()).collect();
        names.sort_unstable();
        names.dedup();
        names.into_iter()
    }
}

/// Plans the fold. Adapters are read, weights are not.
///
/// # Errors
/// No adapter, an unknown one, or one that does not fit; layers where adapters of two kinds meet; a merge that has no
/// way back.
pub fn fold(model: &Model, options: &FoldOptions) -> Result<Folded> {
    let (mut folded, opened) = inline::opened(model, |model, _| {
        let folded = fold_into(model, options)?;
        let modules = folded.summary.adapted().map(str::to_string).collect();
        Ok((folded, modules))
    })?;
    folded.opened = opened;
    Ok(folded)
}

fn fold_into(model: &Model, options: &FoldOptions) -> Result<Folded> {
    let record = match Injection::read(model)? {
        None if options.extra.is_empty() => Some(Injection::expect(model)?),
        record => record,
    };
    record.iter().try_for_each(|record| check_shared(model, record, false))?;
    let mut summary = FoldSummary::default();
    let mut base = Base::of(model, record.as_ref())?;
    options.extra.iter().try_for_each(|adapter| base.know(&adapter.config))?;
    let linears = base.linears();
    let site = Site { model, base: &base, linears: &linears };
    let adapters = chosen(&site, record.as_ref(), options, &mut summary.warnings)?;
    let mut patch = match &record {
        Some(record) => strip(model, record, &HashSet::new())?,
        None => Patch::default(),
    };
    let layers = layers(&adapters, &linears)?;
    let quantized: Vec<&Layer> = layers.iter().filter(|l| l.calls.iter().any(|c| c.quantized.is_some())).collect();
    if let Some(first) = quantized.first().filter(|_| options.undo) {
        return Err(Error::config(format!(
            "module {}: its weight is quantized, and what was merged into it cannot be taken out again; keep the model \
             as it was before",
            first.module
        )));
    }

    // How many of a stored weight's readers are adapted.
    let mut ours: HashMap<&Source, usize> = HashMap::new();
    for linear in layers.iter().flat_map(|l| &l.calls) {
        *ours.entry(&linear.weight.source).or_default() += 1;
    }
    summary.adapters = adapters.iter().map(|a| a.name.clone()).collect();
    summary.head = record.as_ref().and_then(|r| r.head.as_ref()).map(|h| h.name.clone());
    let index = Values::of(base.graph());
    let mut merge = Merger {
        model,
        base: &base,
        options,
        patch: &mut patch,
        values: NewValues::default(),
        index: &index,
        // The adapters' own names are free again.
        names: Names::of(&base.proto),
        cut: Cut::default(),
    };

    // Weights whose every reader is adapted can change in place, once: for the first module that reads them.
    let mut taken: HashSet<&Source> = HashSet::new();
    for layer in layers.iter().filter(|l| l.calls.iter().all(|c| c.quantized.is_none())) {
        let first = layer.calls[0];
        let root = &first.weight.source;
        let alone = ours.get(root) == Some(&first.weight.uses) && layer.reads_one_weight();
        let lost = match alone && !first.weight.is_matrix() {
            true => Chained::of(model, &base, first)?.obstacle(),
            false => None,
        };
        summary.warnings.extend(lost.iter().map(|why| format!("{}: it gets a weight of its own: {why}", layer.module)));
        if alone && lost.is_none() && taken.insert(root) {
            merge.in_place(layer)?;
            summary.merged.extend(layer.changed());
        } else {
            merge.as_copy(layer)?;
            summary.copied.extend(layer.changed());
        }
    }
    quantized::fold(&mut merge, &quantized, &adapters, &ours, &mut summary)?;
    std::mem::take(&mut merge.cut).drop(&base, &index, merge.patch);
    if adapters.iter().any(|a| !a.saved.is_empty()) {
        let parameters = select::parameters(base.graph(), &linears);
        for (path, value) in saved(&adapters, &layers)? {
            if options.undo {
                let what = format!("{path} was replaced by the merge, and its value before is not known");
                if !options.allow_partial {
                    return Err(Error::model(format!(
                        "{what}; --allow-partial takes only the adapted layers back and leaves such parameters"
                    )));
                }
                summary.warnings.push(what);
                continue;
            }
            let parameter = parameters
                .iter()
                .find(|p| p.path == path)
                .ok_or_else(|| Error::model(format!("the model has no parameter {path}")))?;
            merge.replace(parameter, value)?;
            summary.replaced.push(path.to_string());
        }
    }
    let values = merge.values;
    Ok(Folded { patch, values, store: options.store.clone(), summary, opened: None })
}

impl Folded {
    /// The changes to the graph and the merged values, for other uses than a file; and the model that they are changes of,
    /// where that is not the one that was folded.
    pub(crate) fn into_parts(self) -> (Patch, NewValues, Option<Model>) {
        (self.patch, self.values, self.opened)
    }

    /// Writes the merged model to `out` (which may be the injected model's own path: see [`Store::write`]).
    pub fn write(mut self, model: &Model, out: &Path) -> Result<FoldSummary> {
        let model = self.opened.as_ref().unwrap_or(model);
        self.summary.data = self.store.write(model, self.patch, self.values, out)?;
        Ok(self.summary)
    }
}

/// The adapters to merge, with their values.
fn chosen(
    site: &Site,
    record: Option<&Injection>,
    options: &FoldOptions,
    warnings: &mut Vec<String>,
) -> Result<Vec<Arc<Adapter>>> {
    let mut extra = Vec::new();
    for adapter in &options.extra {
        let mut adapter = adapter.clone();
        fit(site, &mut adapter, options.allow_partial, warnings)?;
        extra.push(adapter);
    }
    let active: &[String] = record.map_or(&[], |r| &r.active);
    let all = || active.iter().chain(extra.iter().map(|a| &a.name)).cloned().collect();
    let wanted: Vec<String> = options.adapters.clone().unwrap_or_else(all);
    if wanted.is_empty() {
        return Err(Error::config("no adapter of this model is active; name those to merge with --adapter-names"));
    }
    let mut adapters: Vec<Arc<Adapter>> = Vec::new();
    for name in &wanted {
        if adapters.iter().any(|a| a.name == *name) {
            return Err(Error::config(format!("adapter {name} is named twice")));
        }
        adapters.push(match (extra.iter().find(|a| a.name == *name), record) {
            (Some(adapter), _) => Arc::new(adapter.clone()),
            (None, Some(record)) => Arc::new(extract(site.model, record, name)?),
            (None, None) => {
                let known: Vec<&str> = extra.iter().map(|a| a.name.as_str()).collect();
                return Err(Error::config(format!(
                    "Adapter {name} does not exist; there is {}.{}",
                    known.join(", "),
                    did_you_mean(name, known.iter().copied())
                )));
            }
        });
    }
    Ok(adapters)
}

/// The adapted layers, each with the adapters on it (and on parts of it) in their order.
fn layers<'a>(adapters: &'a [Arc<Adapter>], linears: &'a [Linear]) -> Result<Vec<Layer<'a>>> {
    let mut modules: HashMap<&str, Vec<&Linear>> = HashMap::new();
    for linear in linears {
        let known = modules.entry(linear.whole()).or_default();
        if known.iter().all(|l| l.path != linear.path) {
            known.push(linear);
        }
    }
    let mut layers: Vec<Layer> = Vec::new();
    let mut at: HashMap<&str, usize> = HashMap::new();
    for linear in linears.iter().filter(|l| l.part.is_none()) {
        if let Some(index) = at.get(linear.path.as_str()) {
            layers[*index].calls.push(linear);
            continue;
        }
        let mut stack: Vec<Stacked> = Vec::new();
        for adapter in adapters {
            let on = modules.get(linear.path.as_str()).into_iter().flatten();
            stack.extend(on.filter(|l| adapter.blocks.contains_key(&l.path)).map(|on| Stacked { adapter, on }));
        }
        let Some(first) = stack.first() else { continue };
        let kind = |s: &Stacked| s.adapter.config.init_weights.variant().name();
        if let Some(other) = stack.iter().find(|s| kind(s) != kind(first)) {
            return Err(Error::config(format!(
                "module {}: adapter {} is {}, but {} is {}; only adapters of one kind are merged into a layer \
                 together. Choose with --adapter-names",
                linear.path,
                first.adapter.name,
                kind(first),
                other.adapter.name,
                kind(other)
            )));
        }
        at.insert(&linear.path, layers.len());
        layers.push(Layer { module: &linear.path, calls: vec![linear], stack });
    }
    Ok(layers)
}

/// What the adapters replace, by path.
fn saved<'a>(adapters: &'a [Arc<Adapter>], layers: &[Layer]) -> Result<BTreeMap<&'a str, &'a Tensor>> {
    let mut saved: BTreeMap<&str, (&str, &Tensor)> = BTreeMap::new();
    for adapter in adapters {
        for (path, value) in &adapter.saved {
            let clash = match saved.insert(path, (&adapter.name, value)) {
                Some((other, _)) => Some(format!("trained in full by {other}")),
                None => layers
                    .iter()
                    .find(|l| path.strip_suffix(".weight") == Some(l.module))
                    .map(|l| format!("adapted by {}", l.stack[0].adapter.name)),
            };
            if let Some(clash) = clash {
                return Err(Error::config(format!(
                    "{path} is trained in full by {} and {clash}: they cannot be merged together. Choose with \
                     --adapter-names",
                    adapter.name
                )));
            }
        }
    }
    Ok(saved.into_iter().map(|(path, (_, value))| (path, value)).collect())
}
