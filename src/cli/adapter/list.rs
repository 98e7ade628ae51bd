//! `adapter list`: what adapters a model holds.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::super::printer::Printer;
use crate::Result;
use crate::adapter::{AdapterRecord, Injection};
use crate::onnx::Model;

/// Show the adapters in a model
#[derive(clap::Args)]
pub struct Args {
    /// The injected model
    model: PathBuf,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let record = Injection::read(&model)?.unwrap_or_default();
    let adapters: Vec<Value> = record.adapters.iter().map(|a| describe(&record, a, &model)).collect();
    let value = json!({"model": args.model, "active": record.active, "adapters": adapters});
    printer.result(&value, |p| {
        if adapters.is_empty() {
            p.line("no adapters");
            return;
        }
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
        let rows = adapters.iter().map(|a| {
            let active = match a["active"].as_u64() {
                Some(place) if record.active.len() > 1 => format!("{}.", place + 1),
                Some(_) => "yes".into(),
                None => "no".into(),
            };
            let mut row = vec![text(&a["name"]), active];
            row.extend(["variant", "r", "layers", "saved", "parameters"].iter().map(|key| text(&a[key])));
            row
        });
        p.table(&["adapter", "active", "variant", "r", "layers", "in full", "parameters"], rows.collect());
    });
    Ok(())
}

/// One adapter, for `list` and `inspect`.
pub fn describe(record: &Injection, adapter: &AdapterRecord, model: &Model) -> Value {
    let count = |name: &str| {
        let tensor = model.graph().initializer.iter().find(|t| t.name() == name);
        tensor.map_or(0, |t| t.dims.iter().product::<i64>())
    };
    json!({
        "name": adapter.name,
        "active": record.active.iter().position(|a| *a == adapter.name),
        "variant": adapter.config.init_weights.variant().name(),
        "peft_type": adapter.config.peft_type,
        "r": adapter.config.r,
        "layers": adapter.targets.len(),
        "saved": adapter.saved.len(),
        "parameters": adapter.parameters().map(count).sum::<i64>(),
        "modules": adapter.targets.iter().map(|t| &t.module).collect::<Vec<_>>(),
        "trained_in_full": adapter.saved.iter().map(|s| &s.path).collect::<Vec<_>>(),
    })
}
