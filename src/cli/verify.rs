//! `verify`: do two models compute the same?

use std::path::PathBuf;

use serde_json::json;

use super::engine::EngineArgs;
use super::printer::Printer;
use crate::onnx::Model;
use crate::train::data::read_arrays;
use crate::verify::{Tolerance, compare, random_inputs};
use crate::weights::compare_weights;
use crate::{Error, Result};

/// Run two models on the same inputs and compare their outputs
#[derive(clap::Args)]
pub struct Args {
    /// One ONNX file
    a: PathBuf,

    /// The other
    b: PathBuf,

    /// Inputs by name (.safetensors or .npz) [default: made up]
    #[arg(long)]
    data: Option<PathBuf>,

    /// Largest absolute difference that passes
    #[arg(long, default_value_t = 1e-5)]
    atol: f64,

    /// Largest relative difference that passes, added to --atol
    #[arg(long, default_value_t = 1e-5)]
    rtol: f64,

    /// Compare the stored weights by name instead of running the models: no engine, and little memory whatever their
    /// size. A weight with active adapters counts as what it becomes when they are merged
    #[arg(long, conflicts_with = "data")]
    weights: bool,

    /// Seed of made-up inputs
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Rows of made-up inputs
    #[arg(long, default_value_t = 2)]
    batch_size: usize,

    /// Size of other free dimensions of made-up inputs
    #[arg(long, default_value_t = 8)]
    length: usize,

    #[command(flatten)]
    engine: EngineArgs,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let (a, b) = (Model::open(&args.a)?, Model::open(&args.b)?);
    let tolerance = Tolerance { atol: args.atol, rtol: args.rtol };
    if args.weights {
        return weights(&args, &a, &b, tolerance, printer);
    }
    let engine = args.engine.open(printer)?;
    let inputs = match &args.data {
        Some(path) => read_arrays(path)?,
        None => random_inputs(&a, args.batch_size, args.length, args.seed)?,
    };
    let comparison = compare(&a, &b, &inputs, engine.as_ref(), &args.engine.load_options(), tolerance)?;
    let within = comparison.within();
    printer.result(&json!({"within": within, "atol": args.atol, "rtol": args.rtol, "comparison": comparison}), |p| {
        let rows = comparison.outputs.iter().map(|o| {
            let verdict = if o.within { "same" } else { "DIFFERENT" };
            vec![
                o.output.clone(),
                format!("{:?}", o.shape),
                format!("{:.3e}", o.max_abs),
                format!("{:.3e}", o.max_rel),
                verdict.into(),
            ]
        });
        p.table(&["output", "shape", "max abs", "max rel", ""], rows.collect());
        for name in &comparison.unmatched {
            p.line(&format!("{name}: only one of the two models has this output"));
        }
    });
    if within {
        Ok(())
    } else {
        let worst = comparison.outputs.iter().filter(|o| !o.within).max_by(|a, b| a.max_abs.total_cmp(&b.max_abs));
        let (name, off) = worst.map_or(("", 0.0), |o| (o.output.as_str(), o.max_abs));
        Err(Error::Check(format!(
            "{} and {} differ: output {name} by up to {off:.3e} (allowed: {:e} + {:e}·|b|)",
            args.a.display(),
            args.b.display(),
            args.atol,
            args.rtol
        )))
    }
}

fn weights(args: &Args, a: &Model, b: &Model, tolerance: Tolerance, printer: &Printer) -> Result<()> {
    let bar = printer.bar(0);
    let comparison = compare_weights(a, b, tolerance, |name| {
        bar.set_message(name.to_string());
        bar.inc(1);
    });
    bar.finish_and_clear();
    let comparison = comparison?;
    let within = comparison.within();
    printer.result(&json!({"within": within, "atol": args.atol, "rtol": args.rtol, "weights": comparison}), |p| {
        let rows = comparison.differences.iter().map(|d| {
            let verdict = if d.within { "same" } else { "DIFFERENT" };
            vec![
                d.name.clone(),
                d.incomparable.clone().unwrap_or_else(|| format!("{:?}", d.shape)),
                format!("{:.3e}", d.max_abs),
                format!("{:.3e}", d.relative),
                verdict.into(),
            ]
        });
        if !comparison.differences.is_empty() {
            p.table(&["weight", "shape", "max abs", "‖a − b‖ / ‖b‖", ""], rows.collect());
        }
        for name in &comparison.unmatched {
            p.line(&format!("{name}: only one of the two models has this weight"));
        }
        p.line(&format!("{} weights, {} of them byte for byte the same", comparison.compared, comparison.identical));
    });
    if within {
        return Ok(());
    }
    let (a, b) = (args.a.display(), args.b.display());
    let beyond = comparison.differences.iter().filter(|d| !d.within);
    let what = match beyond.max_by(|a, b| a.relative.total_cmp(&b.relative)) {
        Some(worst) => format!("weight {} by {:.3e} of its size", worst.name, worst.relative),
        None if comparison.compared == 0 => "they have no weight in common".into(),
        None => format!("{} weights are in only one of them", comparison.unmatched.len()),
    };
    Err(Error::Check(format!("{a} and {b} differ: {what} (allowed: {:e} + {:e}·|b|)", args.atol, args.rtol)))
}
