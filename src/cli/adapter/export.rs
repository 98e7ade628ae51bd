//! `adapter export`: an adapter of a model in the forms that others read.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::json;

use super::super::printer::Printer;
use crate::adapter::{Adapter, Injection, METADATA_KEY, PeftType};
use crate::export;
use crate::inject::extract;
use crate::onnx::Model;
use crate::peft::onnx_adapter::{self, Versions};
use crate::peft::{self, WriteOptions, lora};
use crate::{Error, Result};

/// Write an adapter of a model as a PEFT directory (MISS, BONE or LORA) or as ONNX Runtime's .onnx_adapter
#[derive(clap::Args)]
pub struct Args {
    /// The injected model
    model: PathBuf,

    /// The adapter [default: the only active one]
    #[arg(long)]
    adapter_name: Option<String>,

    #[command(flatten)]
    form: FormArgs,
}

/// What to write, and where.
#[derive(clap::Args)]
pub struct FormArgs {
    /// Directory to write, or file with --format onnx_adapter
    #[arg(short, long)]
    output: PathBuf,

    /// peft: a directory as PEFT saves it; onnx_adapter: a file that ONNX Runtime swaps in at run time
    #[arg(long, value_enum, default_value = "peft")]
    format: Format,

    /// MISS (PEFT from 0.17), BONE (PEFT 0.14 to 0.18), or LORA: exact, but for BAT [default: MISS]
    #[arg(long, value_enum, ignore_case = true, default_value = "MISS")]
    peft_type: ExportType,

    /// Rank of the LoRA that stands for a BAT adapter [default: r]
    #[arg(long)]
    lora_rank: Option<usize>,

    /// Name of the adapter whose place the .onnx_adapter takes in the model it is loaded with [default: its own]
    #[arg(long)]
    slot: Option<String>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Format {
    Peft,
    #[value(name = "onnx_adapter")]
    OnnxAdapter,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum ExportType {
    #[value(name = "MISS")]
    Miss,
    #[value(name = "BONE")]
    Bone,
    #[value(name = "LORA")]
    Lora,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let record = Injection::expect(&model)?;
    let name = match (&args.adapter_name, record.active.as_slice()) {
        (Some(name), _) => name,
        (None, [only]) => only,
        (None, active) => {
            return Err(Error::config(format!(
                "the model has {} active adapters ({}); name the one to export with --adapter-name",
                active.len(),
                active.join(", ")
            )));
        }
    };
    let adapter = extract(&model, &record, name)?;
    write(&adapter, Some(&model), &args.form, printer)
}

/// Writes `adapter` in the form asked for; `model` is the one it is for, where that is known.
pub fn write(adapter: &Adapter, model: Option<&Model>, form: &FormArgs, printer: &Printer) -> Result<()> {
    let needs = |why: &str| Error::config(format!("{why}: give the model it is for with --base MODEL"));
    let out = form.output.as_path();
    let mut errors = Default::default();
    if form.lora_rank.is_some() && form.peft_type != ExportType::Lora {
        return Err(Error::config("--lora-rank is for --peft-type LORA"));
    }
    if form.peft_type == ExportType::Lora {
        let model = model.ok_or_else(|| needs("a LoRA is as wide as the layers it is for"))?;
        let lora = export::as_lora(model, adapter, form.lora_rank)?;
        match form.format {
            Format::Peft => {
                let base = base_name(Some(model));
                let (name, config) = (&adapter.name, &adapter.config);
                lora::write_lora(out, name, &lora.pairs, &adapter.saved, config, base.as_deref())?;
            }
            Format::OnnxAdapter if !adapter.saved.is_empty() => {
                return Err(Error::config(
                    "this adapter trains layers in full, which a model with LoRA slots has no place for; export it \
                     without --peft-type LORA for a model injected with --overridable",
                ));
            }
            Format::OnnxAdapter => onnx_adapter::write(out, &lora.parameters(), Versions::default())?,
        }
        errors = lora.errors;
    } else if form.format == Format::OnnxAdapter {
        let slot = form.slot.as_deref().unwrap_or(&adapter.name);
        onnx_adapter::write(out, &export::parameters(model, adapter, slot)?, Versions::default())?;
    } else {
        let peft_type = if form.peft_type == ExportType::Bone { PeftType::Bone } else { PeftType::Miss };
        peft::write(out, adapter, &WriteOptions { peft_type, base_model: base_name(model) })?;
    }
    let worst = errors.values().copied().fold(0.0, f64::max);
    let value = json!({
        "output": out, "adapter": adapter.name, "layers": adapter.blocks.len(), "relative_errors": errors,
    });
    printer.result(&value, |p| {
        p.line(&format!("adapter {}: {} layers", adapter.name, adapter.blocks.len()));
        if !errors.is_empty() {
            p.line(&format!("BAT is no LoRA: relative error of the weights' change at most {worst:.3e}"));
        }
    });
    printer.say(format!("wrote {}", out.display()));
    Ok(())
}

/// The base's file name, for the card and the config: a path would say more than a reader has use for. An injected
/// model's name is not its base's.
fn base_name(model: Option<&Model>) -> Option<String> {
    let model = model.filter(|m| m.metadata(METADATA_KEY).is_none())?;
    let name = model.path.file_name().map(Path::new)?;
    Some(name.display().to_string())
}
