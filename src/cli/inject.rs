//! `inject`: adapters beside the layers you name, and a head where the model has none.

use std::path::PathBuf;

use serde_json::json;

use super::printer::Printer;
use crate::adapter::{BoneConfig, InitWeights, Pool, TargetModules};
use crate::inject::{HeadOptions, InjectOptions, InjectSummary, inject};
use crate::onnx::Model;
use crate::{Error, Result};

/// Put Bone adapters (and a head) into a model
#[derive(clap::Args)]
pub struct Args {
    /// The ONNX file to adapt
    model: PathBuf,

    /// The injected model to write
    #[arg(short, long, required_unless_present = "dry_run")]
    output: Option<PathBuf>,

    /// Layers to adapt: comma-separated module names (each matches whole path endings), one regex that matches whole
    /// paths, or all-linear
    #[arg(long)]
    target_modules: Option<String>,

    /// Layers to leave out, spelled as --target-modules
    #[arg(long)]
    exclude_modules: Option<String>,

    /// Rows of each block [default: 64]
    #[arg(long)]
    r: Option<usize>,

    /// true: zeros, so that nothing changes at first; false: random [default: true]
    #[arg(long)]
    init_weights: Option<InitWeights>,

    /// Adapt only these layer numbers (comma-separated); needs a list in --target-modules
    #[arg(long, value_delimiter = ',')]
    layers_to_transform: Option<Vec<usize>>,

    /// Path segment before the layer number, such as layers or h
    #[arg(long, value_delimiter = ',')]
    layers_pattern: Option<Vec<String>>,

    /// Read the options above from a PEFT adapter_config.json (flags win)
    #[arg(long)]
    config: Option<PathBuf>,

    /// Name of the adapter
    #[arg(long, default_value = "default")]
    adapter_name: String,

    /// Append a trainable linear layer as a new output: NAME:NUM_LABELS
    #[arg(long, value_name = "NAME:NUM_LABELS", requires = "head_input")]
    head: Option<String>,

    /// The value the head reads (an output such as last_hidden_state)
    #[arg(long, value_name = "OUTPUT", requires = "head")]
    head_input: Option<String>,

    /// How token vectors become one: mean, cls (the first) or none
    #[arg(long, default_value = "mean", value_parser = ["mean", "cls", "none"])]
    pool: String,

    /// The input that marks which tokens count, for --pool mean
    #[arg(long, value_name = "INPUT")]
    pool_mask: Option<String>,

    /// Seed of random initial values
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Show what would be adapted and write nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let options = args.options()?;
    let model = Model::open(&args.model)?;
    let injected = inject(&model, &options)?;
    injected.summary.warnings.iter().for_each(|w| printer.warn(w));
    let summary = match &args.output {
        Some(out) if !args.dry_run => injected.write(&model, out)?,
        _ => injected.summary,
    };
    let written = args.output.filter(|_| !args.dry_run);
    let value = json!({"dry_run": args.dry_run, "output": written, "summary": summary});
    printer.result(&value, |p| print(&summary, p));
    match written {
        Some(out) => printer.say(format!("wrote {}", out.display())),
        None => printer.say("dry run: nothing was written"),
    }
    Ok(())
}

fn print(summary: &InjectSummary, p: &Printer) {
    let rows = summary.targets.iter().map(|t| {
        vec![
            t.module.clone(),
            format!("{} → {}", t.in_features, t.out_features),
            format!("[{}, {}]", t.r, t.out_features),
        ]
    });
    if !summary.targets.is_empty() {
        p.table(&["module", "in → out", "block"], rows.collect());
        p.line("");
    }
    for left in &summary.left_out {
        p.line(&format!("left out {}: {}", left.module, left.reason));
    }
    if let Some(head) = &summary.head {
        p.line(
            &format!("head {}: {} labels on {} ({:?} pooling)", head.name, head.labels, head.input, head.pool)
                .to_lowercase(),
        );
    }
    p.line(&format!("{} layers adapted, {} trainable parameters", summary.targets.len(), summary.trainable_parameters));
}

impl Args {
    fn options(&self) -> Result<InjectOptions> {
        let mut config: BoneConfig = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
                serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not an adapter config: {e}")))?
            }
            None => BoneConfig::default(),
        };
        config.r = self.r.unwrap_or(config.r);
        config.init_weights = self.init_weights.unwrap_or(config.init_weights);
        if let Some(text) = &self.target_modules {
            config.target_modules = Some(TargetModules::parse(text));
        }
        if let Some(text) = &self.exclude_modules {
            config.exclude_modules = Some(TargetModules::parse(text));
        }
        config.layers_to_transform = self.layers_to_transform.clone().or(config.layers_to_transform);
        config.layers_pattern = self.layers_pattern.clone().or(config.layers_pattern);
        Ok(InjectOptions {
            adapter_name: self.adapter_name.clone(),
            config,
            head: self.head_options()?,
            seed: self.seed,
        })
    }

    fn head_options(&self) -> Result<Option<HeadOptions>> {
        let (Some(head), Some(input)) = (&self.head, &self.head_input) else { return Ok(None) };
        let parsed = head.rsplit_once(':').and_then(|(name, labels)| Some((name, labels.parse::<usize>().ok()?)));
        let Some((name, labels)) = parsed.filter(|(name, labels)| !name.is_empty() && *labels > 0) else {
            return Err(Error::config(format!("--head is {head:?}; write NAME:NUM_LABELS, for example topic:5")));
        };
        let pool = match self.pool.as_str() {
            "cls" => Pool::Cls,
            "none" => Pool::None,
            _ => Pool::Mean,
        };
        Ok(Some(HeadOptions { name: name.into(), labels, input: input.clone(), pool, mask: self.pool_mask.clone() }))
    }
}
