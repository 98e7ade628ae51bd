//! Adapters of a model on their way out: as they are, or as the LoRA that does the same.

use std::collections::BTreeMap;

use ndarray::{Array2, ArrayView2, s};

use crate::adapter::{Adapter, Injection, Layout};
use crate::base::Base;
use crate::fold::chain::Chained;
use crate::inject::place::{self, Site, to_f32};
use crate::onnx::{Model, Tensor};
use crate::peft::lora::{self, LoraPair};
use crate::select::Linear;
use crate::{Error, Result};

/// An adapter as LoRA pairs by module.
pub struct AsLora {
    pub pairs: BTreeMap<String, LoraPair>,
    /// The pairs' rank.
    pub rank: usize,
    /// For a variant that is no LoRA (BAT): the relative error of each layer's change, `‖ΔW − BA‖ / ‖ΔW‖`, in the
    /// Frobenius norm.
    pub errors: BTreeMap<String, f64>,
}

/// `adapter`, which fits `model` (plain or injected), as LoRA: exactly, at rank r, for additive variants; for BAT the
/// best approximation of rank `rank` (`None`: r) to what it does to the base's weights.
pub fn as_lora(model: &Model, adapter: &Adapter, rank: Option<usize>) -> Result<AsLora> {
    let record = Injection::read(model)?;
    let mut base = Base::of(model, record.as_ref())?;
    base.know(&adapter.config)?;
    let linears = base.linears();
    let site = Site { model, base: &base, linears: &linears };
    crate::inject::fit(&site, &mut adapter.clone(), false, &mut Vec::new())?;
    let variant = adapter.config.init_weights.variant();
    let mut out = AsLora { pairs: BTreeMap::new(), rank: adapter.config.r, errors: BTreeMap::new() };
    if variant.is_additive() && rank.is_some_and(|r| r != adapter.config.r) {
        return Err(Error::config(format!(
            "lora-rank: {} is exactly a LoRA of rank r = {}; another rank would only lose some of it",
            variant.name(),
            adapter.config.r
        )));
    }
    if !variant.is_additive() {
        out.rank = rank.unwrap_or(adapter.config.r);
    }
    for (module, block) in &adapter.blocks {
        let failed = |what: String| Error::model(format!("module {module}: {what}"));
        let linear = linears.iter().find(|l| l.path == *module).ok_or_else(|| failed("it is gone".into()))?;
        let dims = adapter.config.dims(linear.in_features, linear.out_features).map_err(failed)?;
        let Tensor::F32(values) = block else { continue };
        let pair = match variant.block(&dims, values.view()) {
            Some(block) => lora::exact(&dims, block.view()),
            None => {
                let stored = base_weight(model, &base, linear)?;
                let layout = Layout { out_in: true, alpha: linear.alpha };
                let merger = variant.merger(&dims, layout, values.view(), false).map_err(failed)?;
                let before = stored.values::<f32>().unwrap_or_default();
                let mut after = before.to_vec();
                merger.apply(&mut after, dims.inputs, 0);
                let change = after.iter().zip(before).map(|(a, b)| (a - b) * linear.alpha).collect();
                let delta =
                    Array2::from_shape_vec((dims.outputs, dims.inputs), change).map_err(|e| failed(e.to_string()))?;
                let (pair, error) = lora::truncated(delta.view(), out.rank)?;
                out.errors.insert(module.clone(), error);
                pair
            }
        };
        out.pairs.insert(module.clone(), pair);
    }
    Ok(out)
}

/// The weight of `linear` `[out, in]`, as float32; of a part of a layer, its own rows.
fn base_weight(model: &Model, base: &Base, linear: &Linear) -> Result<Tensor> {
    let (value, out_in) = match linear.weight.is_matrix() {
        true => (model.tensor(place::source(base, &linear.weight.source)?)?, linear.is_stored_out_in()),
        false => (Chained::of(model, base, linear)?.as_read()?.into(), linear.trans_b),
    };
    let value = to_f32(value)?;
    let values = value.values::<f32>().unwrap_or_default();
    let inputs = linear.in_features;
    let outputs = values.len() / inputs.max(1);
    let shape = if out_in { (outputs, inputs) } else { (inputs, outputs) };
    let matrix = ArrayView2::from_shape(shape, values).map_err(|e| Error::model(e.to_string()))?;
    let matrix = if out_in { matrix } else { matrix.reversed_axes() };
    let first = linear.part.as_ref().map_or(0, |part| part.start);
    let own = matrix.slice(s![first..first + linear.out_features, ..]);
    Ok(Tensor::from(own.as_standard_layout().into_owned().into_dyn()))
}

impl AsLora {
    /// The pairs for a model with LoRA slots, as MatMul reads them: `<module>.lora_A.weight` `[in, rank]` and
    /// `<module>.lora_B.weight` `[rank, out]`.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let as_read = |m: &Array2<f32>| Tensor::from(m.t().as_standard_layout().into_owned().into_dyn());
        let pairs = self.pairs.iter();
        pairs
            .flat_map(|(module, pair)| {
                [
                    (format!("{module}.lora_A.weight"), as_read(&pair.a)),
                    (format!("{module}.lora_B.weight"), as_read(&pair.b)),
                ]
            })
            .collect()
    }
}

/// The parameters of an adapter under the names they have (or would have) as inputs of a model that was injected with
/// `--overridable` and an adapter called `slot`, in the layout the model reads.
pub fn parameters(model: Option<&Model>, adapter: &Adapter, slot: &str) -> Result<Vec<(String, Tensor)>> {
    let adapter = Adapter { name: slot.into(), ..adapter.clone() };
    if let Some(model) = model {
        let record = Injection::read(model)?;
        let mut base = Base::of(model, record.as_ref())?;
        base.know(&adapter.config)?;
        let linears = base.linears();
        let mut names = crate::onnx::Names::of(&base.proto);
        let site = Site { model, base: &base, linears: &linears };
        return Ok(site.place(adapter, &mut names)?.1);
    }
    if !adapter.saved.is_empty() {
        return Err(Error::config(
            "this adapter trains layers in full, and how the model reads them is not known without it: give --base MODEL",
        ));
    }
    let block = adapter.config.peft_type.block();
    let named = adapter.blocks.iter().map(|(module, value)| (format!("{module}.{block}.{slot}"), value.clone()));
    Ok(named.collect())
}
