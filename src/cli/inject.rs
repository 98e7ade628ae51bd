//! `inject`: adapters beside the layers you name, and a head where the model has none.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::printer::Printer;
use crate::adapter::{Bias, BoneConfig, InitWeights, PeftType, Pool, TargetModules, TaskType};
use crate::inject::{HeadOptions, InjectOptions, InjectSummary, inject};
use crate::onnx::Model;
use crate::select::Version;
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

    /// Layers by the names of their nodes, for files without module paths: comma-separated names in full, or one regex
    /// that matches whole names
    #[arg(long)]
    target_nodes: Option<String>,

    /// Layers to leave out, spelled as --target-modules
    #[arg(long)]
    exclude_modules: Option<String>,

    /// Rows of each block [default: 64]
    #[arg(long)]
    r: Option<usize>,

    /// true: zeros, so that nothing changes at first; false: random; bat: the weight passes through the block; mini: a
    /// block of --mini-r columns, repeated [default: true]
    #[arg(long)]
    init_weights: Option<InitWeights>,

    /// Columns of a mini block [default: 1]
    #[arg(long)]
    mini_r: Option<usize>,

    /// Share of a layer's inputs that its block does not see in training [default: 0]
    #[arg(long)]
    miss_dropout: Option<f64>,

    /// Biases to train: none, all, or miss_only (those of the adapted layers) [default: none]
    #[arg(long)]
    bias: Option<Bias>,

    /// Layers to train in full: comma-separated module names
    #[arg(long, value_delimiter = ',')]
    modules_to_save: Option<Vec<String>>,

    /// What the model is for (SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM, …): decides about output layers as PEFT does
    #[arg(long)]
    task_type: Option<TaskType>,

    /// MISS, or BONE for PEFT 0.14 to 0.18: what parameters and saved adapters are called [default: MISS]
    #[arg(long)]
    peft_type: Option<PeftType>,

    /// Adapt only these layer numbers (comma-separated); needs a list in --target-modules
    #[arg(long, value_delimiter = ',')]
    layers_to_transform: Option<Vec<usize>>,

    /// Path segment before the layer number, such as layers or h
    #[arg(long, value_delimiter = ',')]
    layers_pattern: Option<Vec<String>>,

    /// Outputs of each module in a packed layer, where the graph does not say and they follow one another:
    /// q_proj=2048,k_proj=512,v_proj=512
    #[arg(long, value_delimiter = ',', value_name = "NAME=N", value_parser = packed_size)]
    packed_sizes: Option<Vec<(String, usize)>>,

    /// Read the options above from a PEFT adapter_config.json (flags win)
    #[arg(long)]
    config: Option<PathBuf>,

    /// Whose reading of --layers-to-transform: 0.16 (the last number of a path) or 0.21 (the first)
    #[arg(long, default_value = "0.21")]
    peft_matching: Version,

    /// Name of the adapter
    #[arg(long, default_value = "default")]
    adapter_name: String,

    /// Make the parameters inputs of the graph, too, so that ONNX Runtime can swap .onnx_adapter files at run time
    #[arg(long)]
    overridable: bool,

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

    /// Refer to the base's data files where they are instead of copying them; they have to be in the directory of the
    /// output or below it. What they are is recorded (size and samples) and checked before each use
    #[arg(long)]
    share_data: bool,

    /// With --share-data: record the SHA-1 of the whole files, too, for `inspect --check-data`
    #[arg(long, requires = "share_data")]
    hash_data: bool,

    /// Show what would be adapted and write nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let options = args.options(printer)?;
    let model = Model::open(&args.model)?;
    let mut injected = inject(&model, &options)?;
    if let Some(chosen) = &injected.summary.default_targets {
        printer.say(format!("target modules: {chosen}"));
    }
    injected.summary.warnings.iter().for_each(|w| printer.warn(w));
    let summary = match &args.output {
        Some(out) if !args.dry_run => {
            if args.share_data {
                injected.share(&model, out, args.hash_data)?;
            }
            injected.write(&model, out)?
        }
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

pub fn print(summary: &InjectSummary, p: &Printer) {
    let rows = summary
        .targets
        .iter()
        .map(|t| vec![t.module.clone(), format!("{} → {}", t.in_features, t.out_features), format!("{:?}", t.shape)]);
    if !summary.targets.is_empty() {
        p.table(&["module", "in → out", "block"], rows.collect());
        p.line("");
    }
    for left in &summary.left_out {
        p.line(&format!("left out {}: {}", left.module, left.reason));
    }
    if !summary.saved.is_empty() {
        p.line(&format!("trained in full: {}", summary.saved.join(", ")));
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
    fn options(&self, printer: &Printer) -> Result<InjectOptions> {
        let mut config = match &self.config {
            Some(path) => read_config(path, printer)?,
            None => BoneConfig::default(),
        };
        config.peft_type = self.peft_type.unwrap_or(config.peft_type);
        config.r = self.r.unwrap_or(config.r);
        config.init_weights = self.init_weights.unwrap_or(config.init_weights);
        config.mini_r = self.mini_r.unwrap_or(config.mini_r);
        config.miss_dropout = self.miss_dropout.unwrap_or(config.miss_dropout);
        config.bias = self.bias.unwrap_or(config.bias);
        config.task_type = self.task_type.or(config.task_type);
        config.modules_to_save = self.modules_to_save.clone().or(config.modules_to_save);
        if let Some(text) = &self.target_modules {
            config.target_modules = Some(TargetModules::parse(text));
        }
        if let Some(text) = &self.exclude_modules {
            config.exclude_modules = Some(TargetModules::parse(text));
        }
        config.layers_to_transform = self.layers_to_transform.clone().or(config.layers_to_transform);
        config.layers_pattern = self.layers_pattern.clone().or(config.layers_pattern);
        if let Some(sizes) = &self.packed_sizes {
            config.packed_sizes = sizes.iter().cloned().collect();
        }
        Ok(InjectOptions {
            adapter_name: self.adapter_name.clone(),
            config,
            target_nodes: self.target_nodes.as_deref().map(TargetModules::parse),
            head: self.head_options()?,
            seed: self.seed,
            overridable: self.overridable,
            matching: self.peft_matching,
        })
    }

    fn head_options(&self) -> Result<Option<HeadOptions>> {
        let (Some(head), Some(input)) = (&self.head, &self.head_input) else { return Ok(None) };
        let parsed = head.rsplit_once(':').and_then(|(name, labels)| Some((name, labels.parse::<usize>().ok()?)));
        let Some((name, labels)) = parsed.filter(|(name, labels)| !name.is_empty() && *labels > 0) else {
            return Err(Error::config(format!("--head is {head:?}; write NAME:NUM_LABELS, for example topic:5")));
        };
        let (pool, mask) = (pool(&self.pool), self.pool_mask.clone());
        Ok(Some(HeadOptions { name: name.into(), labels, input: input.clone(), pool, mask }))
    }
}

/// What `--pool` says.
pub(super) fn pool(flag: &str) -> Pool {
    match flag {
        "cls" => Pool::Cls,
        "none" => Pool::None,
        _ => Pool::Mean,
    }
}

/// `q_proj=2048`.
fn packed_size(text: &str) -> Result<(String, usize), String> {
    let parsed = text.split_once('=').and_then(|(name, size)| Some((name.trim(), size.trim().parse::<usize>().ok()?)));
    let (name, size) =
        parsed.filter(|(name, size)| !name.is_empty() && *size > 0).ok_or("write NAME=N, for example q_proj=2048")?;
    Ok((name.into(), size))
}

fn read_config(path: &Path, printer: &Printer) -> Result<BoneConfig> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let json = serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not an adapter config: {e}")))?;
    let mut warnings = Vec::new();
    let config = BoneConfig::from_json(&json, &mut warnings).map_err(|e| Error::file(path, e.to_string()));
    warnings.iter().for_each(|w| printer.warn(format!("{}: {w}", path.display())));
    config
}
