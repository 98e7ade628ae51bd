//! Base → injected: adapters beside (or in) the chosen linear layers, their parameters new initializers, and the record
//! of it all in the model's metadata. Every change of a model's adapters is one rewrite of what they added.

pub(crate) mod emission;
pub(crate) mod emit;
mod head;
mod manage;
pub(crate) mod place;
mod product;
mod share;

use std::collections::HashSet;
use std::path::Path;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

pub(crate) use head::Builder;
pub use head::HeadOptions;
pub use manage::{activate, delete, extract, import, rename};
pub(crate) use manage::{collect, fit};
pub use share::{SharedData, check_shared};

use crate::adapter::{Adapter, AdapterRecord, BoneConfig, HeadRecord, Injection, Inlined, METADATA_KEY, TargetModules};
use crate::base::Base;
use crate::inline;
use crate::onnx::{Durability, Model, Names, NewTensor, Patch, Tensor, write_beside};
use crate::select::{self, Version};
use crate::unload::strip;
use crate::{Error, Result};
use emission::{Form, add_initializer};
use emit::emit;

/// What to inject.
#[derive(Debug, Clone)]
pub struct InjectOptions {
    pub adapter_name: String,
    /// Without `target_modules`, PEFT's choice for the model's architecture; with a head, none.
    pub config: BoneConfig,
    /// Layers by the names of their nodes, beside `target_modules`.
    pub target_nodes: Option<TargetModules>,
    pub head: Option<HeadOptions>,
    /// Seed of random initial values.
    pub seed: u64,
    /// Makes the parameters inputs of the graph, too, so that ONNX Runtime can swap `.onnx_adapter` files at run time.
    pub overridable: bool,
    /// Whose reading of `layers_to_transform`.
    pub matching: Version,
}

impl Default for InjectOptions {
    fn default() -> Self {
        Self {
            adapter_name: "default".into(),
            config: BoneConfig::default(),
            target_nodes: None,
            head: None,
            seed: 0,
            overridable: false,
            matching: Version::default(),
        }
    }
}

/// A finished injection, not yet written.
pub struct Injected {
    /// The changes, of the model that was given, or of it with calls of functions written out.
    pub patch: Patch,
    pub summary: InjectSummary,
    opened: Option<Model>,
    record: Injection,
}

/// What an injection did, for people and pipelines.
#[derive(Debug, Clone, Default, Serialize)]
pub struct InjectSummary {
    pub adapter: String,
    /// The target modules and how they were chosen, where none were given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_targets: Option<String>,
    pub targets: Vec<InjectedLayer>,
    /// Parameters of the base that are trained in full, by path.
    pub saved: Vec<String>,
    /// Layers that `target_modules` covers but that were not adapted, and why.
    pub left_out: Vec<LeftOut>,
    pub head: Option<HeadRecord>,
    pub trainable_parameters: usize,
    /// The adapters that the written model computes with.
    pub active: Vec<String>,
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct InjectedLayer {
    pub module: String,
    pub nodes: Vec<String>,
    pub parameter: String,
    /// Shape of the parameter.
    pub shape: Vec<usize>,
    pub in_features: usize,
    pub out_features: usize,
}

#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    pub module: String,
    pub reason: String,
}

/// Plans the injection of a fresh adapter, which is active from then on; nothing is written, and no weight is read but
/// those that are trained in full.
///
/// # Errors
/// An unusable config; target modules that match nothing (with what there is instead); an adapter name that is taken;
/// a layer that holds an adapter of another kind.
pub fn inject(model: &Model, options: &InjectOptions) -> Result<Injected> {
    Injected::with_calls(model, &|model, calls| inject_into(model, options, calls))
}

fn inject_into(model: &Model, options: &InjectOptions, calls: &[Inlined]) -> Result<Injected> {
    let mut config = options.config.clone();
    config.validate()?;
    check_name(&options.adapter_name)?;
    let old = Injection::read(model)?;
    let mut record = old.clone().unwrap_or_default();
    check_free(model, &record, &options.adapter_name)?;
    record.overridable |= options.overridable;
    record.inlined.extend_from_slice(calls);

    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut summary = InjectSummary { adapter: options.adapter_name.clone(), ..Default::default() };
    let mut added = Vec::new();
    let mut base = Base::of(model, old.as_ref())?;
    base.know(&config)?;
    let linears = base.linears();
    select::check_sizes(&linears, &config.packed_sizes)?;
    if let Some(nodes) = &options.target_nodes {
        config.target_modules = Some(select::with_nodes(&linears, nodes, config.target_modules.as_ref())?);
    }
    if config.target_modules.is_none() && options.head.is_none() {
        let defaults = select::default_targets(model, &linears)?;
        let modules = defaults.modules.join(", ");
        summary.default_targets =
            Some(format!("{modules} (PEFT's choice for {}, told by {})", defaults.model_type, defaults.told_by));
        config.target_modules = Some(TargetModules::List(defaults.modules));
    }
    if config.target_modules.is_some() {
        let selection = select::select_as(&linears, &config, options.matching)?;
        summary.warnings = selection.warnings;
        let left_out = selection.left_out.iter();
        summary.left_out =
            left_out.map(|(i, reason)| LeftOut { module: linears[*i].path.clone(), reason: reason.clone() }).collect();
        let chosen: HashSet<&str> = selection.chosen.iter().map(|i| linears[*i].path.as_str()).collect();
        let site = place::Site { model, base: &base, linears: &linears };
        let adapter = site.fresh(&options.adapter_name, &config, &chosen, &mut rng, &mut summary.warnings)?;
        added.push(adapter);
    }
    let mut patch = rewrite(model, &base, old.as_ref(), &mut record, added, &mut summary)?;
    if let Some(head) = &options.head {
        if let Some(old) = &record.head {
            return Err(Error::file(&model.path, format!("it already has a head, {:?}", old.name)));
        }
        let mut names = taken_names(&base, &record);
        names.take(record.written.nodes.iter().chain(&record.written.constants).map(String::as_str));
        names.take(record.written.outputs.iter().map(|r| r.now.as_str()));
        let (head, parameters) = head::append(model, head, &mut names, &mut patch, &mut rng)?;
        summary.trainable_parameters += parameters;
        summary.head = Some(head.clone());
        record.head = Some(head);
        note(&mut patch, &record)?;
    }
    Ok(Injected { patch, summary, record, opened: None })
}

impl Injected {
    /// What `attempt` gives for a model of which some calls of functions may be written out.
    fn with_calls(model: &Model, attempt: &dyn Fn(&Model, &[Inlined]) -> Result<Self>) -> Result<Self> {
        let (mut injected, opened) = inline::opened(model, |model, calls| {
            let mut injected = attempt(model, calls)?;
            if !calls.is_empty() {
                let mut functions: Vec<&str> = calls.iter().map(|c| c.function.as_str()).collect();
                functions.sort_unstable();
                functions.dedup();
                injected.summary.warnings.push(format!(
                    "{} calls of functions are written out, since layers inside are adapted: {}",
                    calls.len(),
                    functions.join(", ")
                ));
            }
            let modules = injected.summary.targets.iter().map(|t| t.module.clone()).collect();
            Ok((injected, modules))
        })?;
        injected.opened = opened;
        Ok(injected)
    }

    /// Writes the injected model to `out` (which may be the base's own path), with its external data beside it.
    pub fn write(self, model: &Model, out: &Path) -> Result<InjectSummary> {
        write(self.opened.as_ref().unwrap_or(model), self.patch, out)?;
        Ok(self.summary)
    }
}

/// Writes a model whose adapters changed to `out` (which may be its own path), with its external data beside it.
pub fn write(model: &Model, patch: Patch, out: &Path) -> Result<()> {
    write_beside(model, patch, out, Durability::OnDisk)
}

/// The change from the adapters of `old` to those of `record` and `added`, which become active; `record` is brought up
/// to date with what the new file holds.
pub(crate) fn rewrite(
    model: &Model,
    base: &Base,
    old: Option<&Injection>,
    record: &mut Injection,
    added: Vec<Adapter>,
    summary: &mut InjectSummary,
) -> Result<Patch> {
    let linears = base.linears();
    let mut names = taken_names(base, record);
    let mut values: Vec<(String, Tensor)> = Vec::new();
    let new: Vec<String> = added.iter().map(|a| a.name.clone()).collect();
    for adapter in added {
        let site = place::Site { model, base, linears: &linears };
        let (placed, tensors) = site.place(adapter, &mut names)?;
        summary.describe(&placed, &tensors, &linears);
        values.extend(tensors);
        record.active.push(placed.name.clone());
        record.adapters.push(placed);
    }
    let keep: HashSet<&str> = record.adapters.iter().flat_map(AdapterRecord::parameters).collect();
    let mut patch = old.map(|old| strip(model, old, &keep)).transpose()?.unwrap_or_default();
    let emission = match emit(base, record, &mut names.clone(), Form::Served) {
        // An adapter that cannot work together with those that are active comes in all the same, and works alone.
        Err(clash @ Error::Config(_)) if !new.is_empty() && record.active.len() > new.len() => {
            record.active = new;
            summary.warnings.push(format!("only {} is active now: {clash}", record.active.join(", ")));
            emit(base, record, &mut names, Form::Served)?
        }
        emission => emission?,
    };
    emission.patch(base, &mut patch);
    for (name, value) in values {
        add_initializer(&model.proto, &mut patch, NewTensor::new(&name, value), record.overridable);
    }
    for tensor in emission.constants {
        add_initializer(&model.proto, &mut patch, tensor, false);
    }
    record.written = emission.written;
    summary.active = record.active.clone();
    if !record.adapters.is_empty() || record.head.is_some() {
        note(&mut patch, record)?;
    }
    Ok(patch)
}

/// Puts the record into the model's metadata.
fn note(patch: &mut Patch, record: &Injection) -> Result<()> {
    let json = serde_json::to_string(record).map_err(|e| Error::model(format!("the record cannot be written: {e}")))?;
    patch.set_metadata.retain(|(key, _)| key != METADATA_KEY);
    patch.set_metadata.push((METADATA_KEY.into(), json));
    Ok(())
}

/// Names in use in the base, by parameters and by a head.
fn taken_names(base: &Base, record: &Injection) -> Names {
    let mut names = Names::of(&base.proto);
    names.take(record.adapters.iter().flat_map(AdapterRecord::parameters));
    names
}

impl InjectSummary {
    fn describe(&mut self, record: &AdapterRecord, values: &[(String, Tensor)], linears: &[select::Linear]) {
        let value = |name: &str| values.iter().find(|(n, _)| n == name).map(|(_, v)| v);
        for target in &record.targets {
            let calls = linears.iter().filter(|l| l.path == target.module);
            self.targets.push(InjectedLayer {
                module: target.module.clone(),
                nodes: calls.map(|l| l.node_name.clone()).collect(),
                parameter: target.parameter.clone(),
                shape: value(&target.parameter).map(|v| v.dims().to_vec()).unwrap_or_default(),
                in_features: target.in_features,
                out_features: target.out_features,
            });
        }
        self.saved.extend(record.saved.iter().map(|s| s.path.clone()));
        self.trainable_parameters += values.iter().map(|(_, v)| v.len()).sum::<usize>();
    }
}

fn check_free(model: &Model, record: &Injection, name: &str) -> Result<()> {
    match record.adapter(name) {
        Some(taken) => Err(Error::file(
            &model.path,
            format!(
                "adapter {:?} is already in it (r = {}, {} layers); give this one a name of its own with \
                 --adapter-name, or delete that one first: `bone-onnx adapter delete`",
                taken.name,
                taken.config.r,
                taken.targets.len()
            ),
        )),
        None => Ok(()),
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(['/', '\\', '.', ',']) || name.chars().any(char::is_control) {
        return Err(Error::config(format!(
            "adapter name {name:?} cannot be used: it becomes part of parameter and file names, so no dot, comma, \
             slash or control character"
        )));
    }
    Ok(())
}
