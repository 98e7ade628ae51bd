//! What is done to adapters that are in a model: activate, delete, rename, take in from outside, read out.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::place::{Site, turned};
use super::{InjectSummary, Injected, check_free, check_name, rewrite};
use crate::adapter::{Adapter, AdapterRecord, Injection, Inlined};
use crate::base::Base;
use crate::onnx::{Model, Patch, Tensor};
use crate::select::{self, Version};
use crate::{Error, Result};

/// Makes `names` the active adapters, in this order (none: the model computes what its base does).
pub fn activate(model: &Model, names: &[String]) -> Result<Patch> {
    change(model, |record| {
        for (i, name) in names.iter().enumerate() {
            record.named(name)?;
            if names[..i].contains(name) {
                return Err(Error::config(format!("adapter {name} is named twice")));
            }
        }
        record.active = names.to_vec();
        Ok(())
    })
}

/// Deletes an adapter without a trace. Where it was the only active one, the first that remains becomes active (PEFT's
/// rule); the last one can go as well.
pub fn delete(model: &Model, name: &str) -> Result<Patch> {
    change(model, |record| {
        record.named(name)?;
        record.adapters.retain(|a| a.name != name);
        let was_active = record.active.iter().any(|a| a == name);
        record.active.retain(|a| a != name);
        if was_active && record.active.is_empty() {
            record.active.extend(record.adapters.iter().map(|a| a.name.clone()).min());
        }
        Ok(())
    })
}

/// Gives an adapter another name, and its parameters with it.
pub fn rename(model: &Model, from: &str, to: &str) -> Result<Patch> {
    check_name(to)?;
    let old = Injection::expect(model)?;
    old.named(from)?;
    check_free(model, &old, to)?;
    let mut adapter = extract(model, &old, from)?;
    adapter.name = to.into();
    let place = |names: &[String]| names.iter().position(|n| n == from);
    let (at, active) = (old.adapters.iter().position(|a| a.name == from), place(&old.active));

    let mut record = old.clone();
    record.adapters.retain(|a| a.name != from);
    record.active.retain(|a| a != from);
    let base = Base::of(model, Some(&old))?;
    // Placed once to get its record, and then where the old one stood.
    let mut names = super::taken_names(&base, &record);
    let linears = base.linears();
    let (placed, _) = Site { model, base: &base, linears: &linears }.place(adapter, &mut names)?;
    let renames: HashMap<String, String> =
        old.named(from)?.parameters().map(str::to_string).zip(placed.parameters().map(str::to_string)).collect();
    record.adapters.insert(at.unwrap_or(0), placed);
    if let Some(active) = active {
        record.active.insert(active, to.into());
    }
    let mut patch = rewrite(model, &base, Some(&old), &mut record, Vec::new(), &mut InjectSummary::default())?;
    for (index, tensor) in model.graph().initializer.iter().enumerate() {
        if let Some(name) = renames.get(tensor.name()) {
            patch.graph(&Vec::new()).drop_initializers.insert(index);
            let value = model.tensor(tensor)?.to_proto(name);
            super::add_initializer(&model.proto, &mut patch, value, record.overridable);
        }
    }
    Ok(patch)
}

/// Puts an adapter from outside (a PEFT directory) into a model, plain or injected; it is active from then on.
///
/// # Errors
/// Everything that does not fit, listed; with `allow_partial` that goes into the summary's warnings instead, and the
/// rest is taken.
pub fn import(model: &Model, adapter: Adapter, allow_partial: bool, overridable: bool) -> Result<Injected> {
    Injected::with_calls(model, &|model, calls| import_into(model, adapter.clone(), allow_partial, overridable, calls))
}

fn import_into(
    model: &Model,
    mut adapter: Adapter,
    allow_partial: bool,
    overridable: bool,
    calls: &[Inlined],
) -> Result<Injected> {
    check_name(&adapter.name)?;
    adapter.config.validate()?;
    let old = Injection::read(model)?;
    let mut record = old.clone().unwrap_or_default();
    check_free(model, &record, &adapter.name)?;
    record.overridable |= overridable;
    record.inlined.extend_from_slice(calls);
    let mut base = Base::of(model, old.as_ref())?;
    base.know(&adapter.config)?;
    let mut summary = InjectSummary { adapter: adapter.name.clone(), ..Default::default() };
    let linears = base.linears();
    let site = Site { model, base: &base, linears: &linears };
    fit(&site, &mut adapter, allow_partial, &mut summary.warnings)?;
    let patch = rewrite(model, &base, old.as_ref(), &mut record, vec![adapter], &mut summary)?;
    Ok(Injected { patch, summary, record, opened: None })
}

/// Holds an adapter against a model: takes out what does not fit, or fails with a list of it.
pub(crate) fn fit(site: &Site, adapter: &mut Adapter, allow_partial: bool, warnings: &mut Vec<String>) -> Result<()> {
    let misfits = site.misfits(adapter);
    let missing = without_values(site, adapter);
    let mut complaints: Vec<String> = misfits.iter().map(|m| m.why.clone()).collect();
    complaints
        .extend(missing.iter().map(|m| format!("{m}: the config targets it, but the adapter has no tensor for it")));
    for misfit in &misfits {
        match misfit.is_block {
            true => adapter.blocks.remove(&misfit.path),
            false => adapter.saved.remove(&misfit.path),
        };
    }
    if complaints.is_empty() {
        return Ok(());
    }
    if !allow_partial || (adapter.blocks.is_empty() && adapter.saved.is_empty()) {
        return Err(Error::model(format!(
            "adapter {} does not fit this model; --allow-partial takes what does:\n  {}",
            adapter.name,
            complaints.join("\n  ")
        )));
    }
    warnings.extend(complaints);
    Ok(())
}

/// Layers that the adapter's config means but that it has no values for.
fn without_values(site: &Site, adapter: &Adapter) -> Vec<String> {
    // A config that means nothing here says nothing of what is missing; the tensors' own names decide then.
    let Ok(selection) = select::select_as(site.linears, &adapter.config, Version::of(&adapter.config)) else {
        return Vec::new();
    };
    let mut seen = HashSet::new();
    let paths = selection.chosen.iter().map(|i| &site.linears[*i].path);
    paths.filter(|p| !adapter.blocks.contains_key(*p) && seen.insert(*p)).cloned().collect()
}

/// The values of an adapter in an injected model.
pub fn extract(model: &Model, record: &Injection, name: &str) -> Result<Adapter> {
    let adapter = record.named(name)?;
    let mut values: HashMap<&str, Tensor> = HashMap::new();
    let wanted: HashSet<&str> = adapter.parameters().collect();
    for tensor in model.graph().initializer.iter().filter(|t| wanted.contains(t.name())) {
        values.insert(tensor.name(), model.tensor(tensor)?);
    }
    collect(adapter, |parameter| values.remove(parameter)).map_err(|e| Error::file(&model.path, e))
}

/// An adapter from its record and the values of its initializers.
pub(crate) fn collect(
    record: &AdapterRecord,
    mut value: impl FnMut(&str) -> Option<Tensor>,
) -> Result<Adapter, String> {
    let mut take = |parameter: &str, shape: Option<Vec<usize>>| match value(parameter) {
        Some(value @ Tensor::F32(_)) if shape.as_ref().is_none_or(|s| s == value.dims()) => Ok(value),
        Some(other) => Err(format!(
            "parameter {parameter} has shape {:?} of {}, where {shape:?} of float32 belongs; another tool has changed \
             this model since it was injected",
            other.dims(),
            crate::onnx::data_type_name(other.data_type())
        )),
        None => Err(format!(
            "parameter {parameter} of adapter {} is gone; another tool has changed this model since it was injected",
            record.name
        )),
    };
    let variant = record.config.init_weights.variant();
    let mut blocks = BTreeMap::new();
    for target in &record.targets {
        let dims = record.config.dims(target.in_features, target.out_features)?;
        blocks.insert(target.module.clone(), take(&target.parameter, Some(variant.shape(&dims)))?);
    }
    let mut saved = BTreeMap::new();
    for entry in &record.saved {
        let value = take(&entry.parameter, None)?;
        saved.insert(entry.path.clone(), if entry.transposed { turned(value) } else { value });
    }
    Ok(Adapter { name: record.name.clone(), config: record.config.clone(), blocks, saved })
}

/// A rewrite of a model's record that adds no adapter.
fn change(model: &Model, edit: impl FnOnce(&mut Injection) -> Result<()>) -> Result<Patch> {
    let old = Injection::expect(model)?;
    let mut record = old.clone();
    edit(&mut record)?;
    let base = Base::of(model, Some(&old))?;
    rewrite(model, &base, Some(&old), &mut record, Vec::new(), &mut InjectSummary::default())
}
