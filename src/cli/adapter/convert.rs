//! `adapter convert`: a PEFT directory in another form.

use std::path::PathBuf;

use super::super::printer::Printer;
use super::export::{self, FormArgs};
use crate::Result;
use crate::onnx::Model;
use crate::peft::{self, ReadOptions};

/// Write a PEFT directory (BONE or MISS) as MISS, BONE, LORA or .onnx_adapter
#[derive(clap::Args)]
pub struct Args {
    /// Directory with adapter_config.json and adapter_model.safetensors
    adapter: PathBuf,

    /// The ONNX model it is for (a LoRA needs its layers' sizes, BAT its weights)
    #[arg(long)]
    base: Option<PathBuf>,

    /// Name of the adapter
    #[arg(long, default_value = "default")]
    adapter_name: String,

    #[command(flatten)]
    form: FormArgs,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let mut warnings = Vec::new();
    let adapter = peft::read(&args.adapter, &args.adapter_name, &ReadOptions::default(), &mut warnings)?;
    warnings.iter().for_each(|w| printer.warn(w));
    let model = args.base.map(Model::open).transpose()?;
    export::write(&adapter, model.as_ref(), &args.form, printer)
}
