//! Base → injected: a side branch beside each chosen linear layer, its block a new initializer, and the record of it
//! all in the model's metadata.

mod head;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

pub use head::HeadOptions;

use crate::adapter::{
    AdapterRecord, BoneConfig, CallRecord, HeadRecord, Injection, MAX_SIZE, METADATA_KEY, TargetRecord, bone,
};
use crate::onnx::{DataType, Durability, Model, Names, Patch, Scope, Tensor, copy_external, external, value_info};
use crate::select::{self, Linear};
use crate::{Error, Result};

/// What to inject.
#[derive(Debug, Clone)]
pub struct InjectOptions {
    pub adapter_name: String,
    /// Without `target_modules` no layer is adapted, which needs a head.
    pub config: BoneConfig,
    pub head: Option<HeadOptions>,
    /// Seed of random initial values.
    pub seed: u64,
}

impl Default for InjectOptions {
    fn default() -> Self {
        Self { adapter_name: "default".into(), config: BoneConfig::default(), head: None, seed: 0 }
    }
}

/// A finished injection, not yet written.
pub struct Injected {
    pub patch: Patch,
    pub summary: InjectSummary,
}

/// What an injection did, for people and pipelines.
#[derive(Debug, Clone, Serialize)]
pub struct InjectSummary {
    pub adapter: String,
    pub targets: Vec<InjectedLayer>,
    /// Layers that `target_modules` covers but that were not adapted, and why.
    pub left_out: Vec<LeftOut>,
    pub head: Option<HeadRecord>,
    pub trainable_parameters: usize,
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct InjectedLayer {
    pub module: String,
    pub nodes: Vec<String>,
    pub parameter: String,
    pub r: usize,
    pub in_features: usize,
    pub out_features: usize,
}

#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    pub module: String,
    pub reason: String,
}

/// Plans the injection; nothing is written and no weight is read.
///
/// # Errors
/// An unusable config; target modules that match nothing (with what there is instead); an adapter name that is taken.
pub fn inject(model: &Model, options: &InjectOptions) -> Result<Injected> {
    let config = &options.config;
    config.validate()?;
    check_name(&options.adapter_name)?;
    let mut record = Injection::read(model)?.unwrap_or(Injection { format: 1, adapters: Vec::new(), head: None });
    if let Some(taken) = record.adapters.iter().find(|a| a.name == options.adapter_name) {
        return Err(Error::file(
            &model.path,
            format!(
                "adapter {:?} is already injected (r = {}, {} layers); inject the base model instead, or give this one \
                 a name of its own with --adapter-name",
                taken.name,
                taken.config.r,
                taken.targets.len()
            ),
        ));
    }
    if config.target_modules.is_none() && options.head.is_none() {
        return Err(Error::config("target_modules is not given: name the layers to adapt, or use all-linear"));
    }

    let mut names = Names::of(&model.proto);
    let mut patch = Patch::default();
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut summary = InjectSummary {
        adapter: options.adapter_name.clone(),
        targets: Vec::new(),
        left_out: Vec::new(),
        head: None,
        trainable_parameters: 0,
        warnings: Vec::new(),
    };

    if config.target_modules.is_some() {
        let added: HashSet<&str> = record.added_nodes().collect();
        let mut linears = select::linears(model);
        linears.retain(|l| !added.contains(l.node_name.as_str()));
        let selection = select::select(&linears, config)?;
        summary.warnings = selection.warnings;
        summary.left_out = selection
            .left_out
            .into_iter()
            .map(|(i, reason)| LeftOut { module: linears[i].path.clone(), reason })
            .collect();
        let chosen: Vec<&Linear> = selection.chosen.iter().map(|i| &linears[*i]).collect();
        let adapter = adapt(model, options, &chosen, &mut names, &mut patch, &mut rng)?;
        for target in &adapter.targets {
            summary.trainable_parameters += config.r * target.out_features;
            summary.targets.push(InjectedLayer {
                module: target.module.clone(),
                nodes: chosen.iter().filter(|l| l.path == target.module).map(|l| l.node_name.clone()).collect(),
                parameter: target.parameter.clone(),
                r: config.r,
                in_features: target.in_features,
                out_features: target.out_features,
            });
        }
        record.adapters.push(adapter);
    }
    if let Some(head) = &options.head {
        if let Some(old) = &record.head {
            return Err(Error::file(&model.path, format!("it already has a head, {:?}", old.name)));
        }
        let (head, parameters) = head::append(model, head, &mut names, &mut patch, &mut rng)?;
        summary.trainable_parameters += parameters;
        summary.head = Some(head.clone());
        record.head = Some(head);
    }
    let json =
        serde_json::to_string(&record).map_err(|e| Error::model(format!("the record cannot be written: {e}")))?;
    patch.set_metadata.push((METADATA_KEY.into(), json));
    Ok(Injected { patch, summary })
}

impl Injected {
    /// Writes the injected model to `out` (which may be the base's own path), with its external data beside it.
    pub fn write(self, model: &Model, out: &Path) -> Result<InjectSummary> {
        copy_external(model, &external::locations(model)?, out, Durability::OnDisk)?;
        model.write(model.patched(self.patch)?, out)?;
        Ok(self.summary)
    }
}

/// Adds the branches of one adapter to `patch`.
fn adapt(
    model: &Model,
    options: &InjectOptions,
    chosen: &[&Linear],
    names: &mut Names,
    patch: &mut Patch,
    rng: &mut ChaCha8Rng,
) -> Result<AdapterRecord> {
    let (adapter, r) = (options.adapter_name.as_str(), options.config.r);
    let mut record = AdapterRecord {
        name: adapter.into(),
        config: options.config.clone(),
        targets: Vec::new(),
        constants: Vec::new(),
    };
    let main = Scope::new();
    // One selection constant for each input width, one block for each module (its calls share it).
    let mut selections: BTreeMap<usize, String> = BTreeMap::new();
    for (module, calls) in by_module(chosen) {
        let first = calls[0];
        let (inputs, outputs) = (first.in_features, first.out_features);
        if r.saturating_mul(inputs.max(outputs)) > MAX_SIZE {
            return Err(Error::config(format!("r = {r} is too large for module {module} ({inputs} → {outputs})")));
        }
        let prefix = format!("{module}.bone.{adapter}");
        let selection = match selections.get(&inputs) {
            Some(name) => name.clone(),
            None => {
                let name = names.fresh(&format!("bone.{adapter}.select.{inputs}x{r}"));
                add_initializer(model, patch, bone::selection(&name, inputs, r), &[inputs, r]);
                record.constants.push(name.clone());
                selections.insert(inputs, name.clone());
                name
            }
        };
        let parameter = names.fresh(&format!("{module}.bone_block.{adapter}"));
        let block = bone::init(options.config.init_weights, r, outputs, rng);
        add_initializer(model, patch, Tensor::from(block.into_dyn()).to_proto(&parameter), &[r, outputs]);
        let mut target = TargetRecord {
            module: module.clone(),
            parameter,
            in_features: inputs,
            out_features: outputs,
            calls: Vec::new(),
        };
        for linear in calls {
            let graph = model.graph_at(&linear.scope).ok_or_else(|| Error::model("a graph is gone"))?;
            let base = &graph.node[linear.node];
            let (Some(x), Some(output)) = (base.input_at(0), base.output_at(0)) else { continue };
            let base_output = names.fresh(&format!("{output}.base"));
            let nodes = bone::branch(
                &bone::Branch {
                    prefix: &prefix,
                    x,
                    transposed: linear.trans_a,
                    selection: &selection,
                    block: &target.parameter,
                    base_output: &base_output,
                    output,
                },
                names,
            );
            target.calls.push(CallRecord {
                output: output.into(),
                base_output: base_output.clone(),
                nodes: nodes.iter().map(|n| n.name().to_string()).collect(),
            });
            let graph = patch.graph(&linear.scope);
            graph.rename_output(linear.node, 0, &base_output);
            graph.insert_after.insert(linear.node, nodes);
        }
        record.targets.push(target);
    }
    patch.graph(&main);
    Ok(record)
}

/// Chosen layers by module, in file order. Nodes that call one module share a weight; should two layers have the same
/// path but different weights, they stay apart.
fn by_module<'a>(chosen: &[&'a Linear]) -> Vec<(String, Vec<&'a Linear>)> {
    let mut groups: Vec<(String, Vec<&Linear>)> = Vec::new();
    for linear in chosen {
        let same = |group: &&mut (String, Vec<&Linear>)| {
            let first = group.1[0];
            group.0 == linear.path
                && first.weight.source == linear.weight.source
                && (first.in_features, first.out_features) == (linear.in_features, linear.out_features)
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.1.push(linear),
            None => groups.push((linear.path.clone(), vec![linear])),
        }
    }
    groups
}

/// Adds an initializer to the main graph; before IR 4 every initializer has to be a graph input as well.
fn add_initializer(model: &Model, patch: &mut Patch, tensor: crate::onnx::TensorProto, dims: &[usize]) {
    let main = patch.graph(&Scope::new());
    if model.proto.ir_version() < 4 {
        let dims: Vec<String> = dims.iter().map(usize::to_string).collect();
        let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
        main.add_inputs.push(value_info(tensor.name(), DataType::Float, &dims));
    }
    main.add_initializers.push(tensor.into());
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(['/', '\\', '.']) || name.chars().any(char::is_control) {
        return Err(Error::config(format!(
            "adapter name {name:?} cannot be used: it becomes part of parameter and file names, so no dot, slash or \
             control character"
        )));
    }
    Ok(())
}
