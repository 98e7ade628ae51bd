//! Between an adapter's values and the layers of a model: fresh values for a config, and the initializers that hold
//! given ones.

use std::collections::{BTreeMap, HashMap, HashSet};

use rand_chacha::ChaCha8Rng;

use crate::adapter::{Adapter, AdapterRecord, Bias, BoneConfig, Dims, SavedRecord, TargetRecord};
use crate::base::Base;
use crate::onnx::{Model, Names, Tensor, TensorProto};
use crate::select::{self, Linear, Parameter, Source};
use crate::{Error, Result, did_you_mean};

/// A model that adapters are put on.
pub(crate) struct Site<'a> {
    pub model: &'a Model,
    pub base: &'a Base<'a>,
    pub linears: &'a [Linear],
}

impl Site<'_> {
    /// A new adapter on the layers `chosen` (by path): blocks as the config starts them, copies of what trains in full.
    pub(super) fn fresh(
        &self,
        name: &str,
        config: &BoneConfig,
        chosen: &HashSet<&str>,
        rng: &mut ChaCha8Rng,
        warnings: &mut Vec<String>,
    ) -> Result<Adapter> {
        let variant = config.init_weights.variant();
        let mut blocks = BTreeMap::new();
        let mut unfit = Vec::new();
        for linear in self.linears.iter().filter(|l| chosen.contains(l.path.as_str())) {
            if blocks.contains_key(&linear.path) {
                continue;
            }
            match fits(config, linear) {
                Ok(dims) => {
                    blocks.insert(linear.path.clone(), Tensor::from(variant.init(&dims, rng)));
                }
                Err(why) => unfit.push(format!("{}: {why}", linear.path)),
            }
        }
        if !unfit.is_empty() {
            return Err(Error::config(format!(
                "{} of the chosen layers take no {} adapter; choose another r or leave them out with \
                 exclude_modules:\n  {}",
                unfit.len(),
                variant.name(),
                unfit.join("\n  ")
            )));
        }
        let parameters = select::parameters(self.base.graph(), self.linears);
        let mut saved = BTreeMap::new();
        for parameter in wanted(&parameters, config, chosen, warnings) {
            saved.insert(parameter.path.clone(), self.stored(parameter)?);
        }
        Ok(Adapter { name: name.into(), config: config.clone(), blocks, saved })
    }

    /// The base's value of a parameter in float32, matrices of linear layers as torch has them.
    pub(crate) fn stored(&self, parameter: &Parameter) -> Result<Tensor> {
        let tensor = source(self.base, &parameter.source)?;
        let value = to_f32(self.model.tensor(tensor)?)?;
        Ok(if parameter.stored_transposed { turned(value) } else { value })
    }

    /// The initializers that hold `adapter` in this model, and their record.
    ///
    /// # Errors
    /// A value for a layer or parameter that the model does not have, or of another size: all of them listed.
    pub(crate) fn place(
        &self,
        mut adapter: Adapter,
        names: &mut Names,
    ) -> Result<(AdapterRecord, Vec<(String, Tensor)>)> {
        let mut values = Vec::new();
        let mut targets: Vec<TargetRecord> = Vec::new();
        for linear in self.linears {
            let Some(block) = adapter.blocks.remove(&linear.path) else { continue };
            let wanted = format!("{}.{}.{}", linear.path, adapter.config.peft_type.block(), adapter.name);
            let parameter = names.fresh(&wanted);
            values.push((parameter.clone(), block));
            targets.push(TargetRecord {
                module: linear.path.clone(),
                parameter,
                in_features: linear.in_features,
                out_features: linear.out_features,
            });
        }
        let parameters =
            if adapter.saved.is_empty() { Vec::new() } else { select::parameters(self.base.graph(), self.linears) };
        let by_path: HashMap<&str, &Parameter> = parameters.iter().map(|p| (p.path.as_str(), p)).collect();
        let mut saved = Vec::new();
        let full = adapter.config.saved_modules();
        let in_full: HashSet<usize> = select::saved(&parameters, &full).into_iter().collect();
        for (path, value) in adapter.saved {
            let Some(found) = by_path.get(path.as_str()) else {
                return Err(Error::model(format!("the model has no parameter {path}")));
            };
            let name = names.fresh(&format!("{path}.{}", adapter.name));
            let value = if found.transposed { turned(value) } else { value };
            let position = parameters.iter().position(|p| p.path == path);
            saved.push(SavedRecord {
                path,
                parameter: name.clone(),
                transposed: found.transposed,
                bias: found.is_bias && !position.is_some_and(|i| in_full.contains(&i)),
            });
            values.push((name, value));
        }
        Ok((AdapterRecord { name: adapter.name, config: adapter.config, targets, saved }, values))
    }

    /// What of `adapter` does not fit this model, a sentence each: modules that are not there, or of another size.
    pub(super) fn misfits(&self, adapter: &Adapter) -> Vec<Misfit> {
        let mut misfits = Vec::new();
        let parameters = select::parameters(self.base.graph(), self.linears);
        let variant = adapter.config.init_weights.variant();
        for (module, block) in &adapter.blocks {
            let Some(linear) = self.linears.iter().find(|l| l.path == *module) else {
                let near = did_you_mean(module, self.linears.iter().map(|l| l.path.as_str()));
                misfits.push(Misfit::block(module, format!("the model has no linear layer {module}.{near}")));
                continue;
            };
            let sizes = format!("{} → {}", linear.in_features, linear.out_features);
            let why = match (&linear.adaptable, fits(&adapter.config, linear)) {
                (Err(why), _) => Some(why.clone()),
                (_, Err(why)) => Some(why),
                (_, Ok(dims)) => (block.dims() != variant.shape(&dims)).then(|| {
                    let wanted = variant.shape(&dims);
                    format!("its tensor is {:?}, but this layer ({sizes}) takes {wanted:?}", block.dims())
                }),
            };
            misfits.extend(why.map(|why| Misfit::block(module, format!("{module}: {why}"))));
        }
        for (path, value) in &adapter.saved {
            let Some(found) = parameters.iter().find(|p| p.path == *path) else {
                let near = did_you_mean(path, parameters.iter().map(|p| p.path.as_str()));
                misfits.push(Misfit::saved(path, format!("the model has no parameter {path}.{near}")));
                continue;
            };
            let mut wanted = found.dims.clone();
            if found.transposed {
                wanted.reverse();
            }
            if value.dims() != wanted {
                let text = format!("{path}: its tensor is {:?}, but the model's is {wanted:?}", value.dims());
                misfits.push(Misfit::saved(path, text));
            }
        }
        misfits
    }
}

/// The sizes of `linear` under `config`, or why it takes no such adapter.
fn fits(config: &BoneConfig, linear: &Linear) -> Result<Dims, String> {
    let variant = config.init_weights.variant();
    if !variant.is_additive() && !linear.reads_floats() {
        return Err(format!(
            "{} changes the weight itself, but {} reads it as integers; use Bone or MiSS",
            variant.name(),
            linear.op
        ));
    }
    config.dims(linear.in_features, linear.out_features)
}

/// A tensor of an adapter that has no place in a model.
pub(super) struct Misfit {
    pub path: String,
    pub is_block: bool,
    pub why: String,
}

impl Misfit {
    fn block(path: &str, why: String) -> Self {
        Self { path: path.into(), is_block: true, why }
    }

    fn saved(path: &str, why: String) -> Self {
        Self { path: path.into(), is_block: false, why }
    }
}

/// The parameters that `config` trains in full.
fn wanted<'a>(
    parameters: &'a [Parameter],
    config: &BoneConfig,
    chosen: &HashSet<&str>,
    warnings: &mut Vec<String>,
) -> Vec<&'a Parameter> {
    let named = config.saved_modules();
    let in_full: HashSet<usize> = select::saved(parameters, &named).into_iter().collect();
    for name in config.modules_to_save.iter().flatten() {
        if select::saved(parameters, std::slice::from_ref(name)).is_empty() {
            let modules = parameters.iter().filter_map(|p| p.path.rsplit_once('.').map(|(module, _)| module));
            let near = did_you_mean(name, modules);
            warnings.push(format!("modules_to_save names {name}, which this model does not have.{near}"));
        }
    }
    let bias = |p: &Parameter| match config.bias {
        Bias::None => false,
        Bias::All => p.is_bias,
        Bias::Only => p.path.strip_suffix(".bias").is_some_and(|module| chosen.contains(module)),
    };
    let chosen = parameters.iter().enumerate().filter(|(i, p)| in_full.contains(i) || bias(p));
    chosen.map(|(_, p)| p).collect()
}

/// The stored tensor of `source`.
pub(crate) fn source<'a>(base: &'a Base, source: &Source) -> Result<&'a TensorProto> {
    let gone = || Error::model("a Constant node lost its tensor");
    match source {
        Source::Initializer { scope, index } => base.graph_at(scope)?.initializer.get(*index).ok_or_else(gone),
        Source::ConstantNode { scope, node } => {
            let constant = base.graph_at(scope)?.node.get(*node).ok_or_else(gone)?;
            constant.attribute.iter().find_map(|a| a.t.as_ref()).ok_or_else(gone)
        }
    }
}

/// A float tensor as float32.
pub(crate) fn to_f32(value: Tensor) -> Result<Tensor> {
    Ok(match value {
        Tensor::F32(_) => value,
        Tensor::F16(a) => Tensor::F32(a.mapv(f32::from)),
        Tensor::Bf16(a) => Tensor::F32(a.mapv(f32::from)),
        Tensor::F64(a) => Tensor::F32(a.mapv(|v| v as f32)),
        other => {
            let name = crate::onnx::data_type_name(other.data_type());
            return Err(Error::model(format!("a {name} tensor cannot be trained")));
        }
    })
}

/// The transpose of a float32 matrix.
pub(crate) fn turned(value: Tensor) -> Tensor {
    match value {
        Tensor::F32(a) => Tensor::F32(a.t().as_standard_layout().into_owned()),
        other => other,
    }
}
