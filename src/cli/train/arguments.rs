//! The options of `train`. An option is described here alone: the flags, the help and the settings file all come from it.

use std::path::PathBuf;

use crate::cli::data::DataArgs;
use crate::cli::engine::EngineArgs;
use crate::train::schedule::Shape;
use crate::train::{CacheFrozen, Distance, Loss, Metric, Precision, TrainOptions};

/// Train an injected model's adapters (and head) on your data
#[derive(clap::Args)]
pub struct Arguments {
    /// The injected model
    pub model: PathBuf,

    /// Directory for what the run leaves: injected.onnx, adapter/, report.html, metrics.jsonl, curves, tensorboard/,
    /// train.toml
    #[arg(short, long)]
    pub output_dir: PathBuf,

    /// Read options from a TOML file, by the names of their flags (flags win); a run saves all of its own as train.toml
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub data: DataArgs,

    /// When to evaluate: after every epoch, after every --eval-steps steps, or at the end only [default: epoch, or
    /// steps where --eval-steps is given]
    #[arg(long, value_parser = ["epoch", "steps", "end"])]
    pub eval_strategy: Option<String>,

    /// Steps from one evaluation to the next
    #[arg(long, value_name = "N")]
    pub eval_steps: Option<usize>,

    /// Save the values of the best evaluation in the end, not the last ones
    #[arg(long)]
    pub load_best_model_at_end: bool,

    /// What evaluations are compared by: eval_loss, or eval_accuracy for losses over classes
    #[arg(long, default_value = "eval_loss")]
    pub metric_for_best_model: Metric,

    /// End the run after N evaluations in a row without a gain
    #[arg(long, value_name = "N")]
    pub early_stopping_patience: Option<usize>,

    /// What is no more than this is no gain
    #[arg(long, default_value_t = 0.0)]
    pub early_stopping_threshold: f64,

    /// With class ids (-100 is left out): cross-entropy, causal-lm (each token against the next one's label); with
    /// numbers: bce-with-logits, mse, mae, huber; with rows: kl-div (soft targets), cosine-embedding; of pairs, without
    /// labels: multiple-negatives-ranking (InfoNCE: each anchor is to find its positive in the batch), triplet; of
    /// sequences: ctc (with arrays input_lengths and target_lengths)
    #[arg(long, value_name = "LOSS", required_unless_present_any = ["loss_model", "config"])]
    pub loss: Option<Loss>,

    /// The class that means no label, for ctc [default: 0]
    #[arg(long)]
    pub blank: Option<usize>,

    /// In ctc, count labels that do not fit into their frames as no loss instead of an infinite one
    #[arg(long)]
    pub zero_infinity: bool,

    /// A loss of your own, in place of --loss: an ONNX model whose inputs have the names of outputs of the model and of
    /// columns of the data, and whose output is a scalar
    #[arg(long, value_name = "FILE", conflicts_with = "loss")]
    pub loss_model: Option<PathBuf>,

    /// Part of a class label that is spread over all classes, for cross-entropy and causal-lm [default: 0]
    #[arg(long, visible_alias = "label-smoothing-factor")]
    pub label_smoothing: Option<f64>,

    /// Where huber goes from a square to a line [default: 1]
    #[arg(long)]
    pub huber_delta: Option<f64>,

    /// What kl-div and --teacher divide the scores by before their softmax [default: 1; with a teacher: 2]
    #[arg(long)]
    pub temperature: Option<f64>,

    /// Distil: an ONNX model with (some of) the same inputs, whose scores are soft targets beside the labels
    #[arg(long, value_name = "FILE")]
    pub teacher: Option<PathBuf>,

    /// The teacher's output with the scores [default: the one named as the model's, or its only one]
    #[arg(long, value_name = "NAME", requires = "teacher")]
    pub teacher_output: Option<String>,

    /// Part of the labels' loss with a teacher; the rest is the divergence from it [default: 0.5]
    #[arg(long, requires = "teacher")]
    pub alpha: Option<f64>,

    /// End the gradients at this node: all that lies before its outputs is constant
    #[arg(long, value_name = "NODE")]
    pub freeze_until: Option<String>,

    /// What multiple-negatives-ranking multiplies the cosines by: 1/temperature of InfoNCE [default: 20]
    #[arg(long)]
    pub scale: Option<f64>,

    /// multiple-negatives-ranking both ways: the positives are to find their anchors, too
    #[arg(long)]
    pub symmetric: bool,

    /// By how much triplet wants the negative to be farther away than the positive [default: 1]
    #[arg(long)]
    pub margin: Option<f64>,

    /// euclidean, manhattan or cosine, for triplet [default: euclidean]
    #[arg(long)]
    pub distance: Option<Distance>,

    /// Train only these adapters (comma-separated); other active ones stay as they are [default: all active]
    #[arg(long, value_delimiter = ',')]
    pub adapter_names: Option<Vec<String>>,

    /// The output to train on [default: the head, or the only output]
    #[arg(long, value_name = "NAME")]
    pub output: Option<String>,

    /// Make one vector of each row's tokens before the loss: mean, cls (the first token) or none
    #[arg(long, default_value = "none", value_parser = ["mean", "cls", "none"])]
    pub pool: String,

    /// The input that marks which tokens count, for --pool mean [default: attention_mask, where the model has it]
    #[arg(long, value_name = "INPUT")]
    pub pool_mask: Option<String>,

    /// adamw, adam (weight decay as an L2 term), sgd or lion
    #[arg(long, visible_alias = "optim", default_value = "adamw", value_parser = ["adamw", "adam", "sgd", "lion"])]
    pub optimizer: String,

    /// Momentum of sgd [default: 0]
    #[arg(long)]
    pub momentum: Option<f64>,

    /// Nesterov's momentum for sgd
    #[arg(long)]
    pub nesterov: bool,

    /// Learning rate. Each number of a block is a part of many weights at once (in_features / r of each output), so its
    /// steps are smaller than those of a matrix of its own; a small network of one or two layers takes 10 to 100 times more
    #[arg(long, visible_alias = "learning-rate", default_value_t = TrainOptions::LR)]
    pub lr: f64,

    /// Learning rate of layers trained in full (the head) [default: --lr]
    #[arg(long)]
    pub head_lr: Option<f64>,

    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,

    /// Weight decay on biases and norms, too
    #[arg(long)]
    pub decay_all: bool,

    /// Decay rates of the moments [default: 0.9,0.999; lion: 0.9,0.99]
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    pub betas: Option<Vec<f64>>,

    /// What is added to the root in adamw and adam [default: 1e-8]
    #[arg(long, visible_alias = "adam-epsilon")]
    pub eps: Option<f64>,

    /// constant, linear, cosine, cosine-with-restarts or polynomial
    #[arg(long, visible_alias = "lr-scheduler-type", default_value = "constant")]
    pub schedule: Shape,

    /// Cosines that cosine-with-restarts goes through [default: 1]
    #[arg(long)]
    pub num_cycles: Option<usize>,

    /// Power of the polynomial schedule [default: 1]
    #[arg(long)]
    pub power: Option<f64>,

    /// Learning rate at the end of the polynomial schedule [default: 1e-7]
    #[arg(long)]
    pub lr_end: Option<f64>,

    /// Steps over which the learning rate rises from zero
    #[arg(long, default_value_t = 0)]
    pub warmup_steps: usize,

    /// Share of the run over which the learning rate rises from zero
    #[arg(long, default_value_t = 0.0, conflicts_with = "warmup_steps")]
    pub warmup_ratio: f64,

    /// Clip the gradients to this norm
    #[arg(long)]
    pub max_grad_norm: Option<f64>,

    /// Keep parameters and moments on the engine's device, and update them there [default: true on CUDA]
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    pub optimizer_on_device: Option<bool>,

    /// What the products of a float32 model are computed in: f32, f16 or bf16. Norms, softmax, the loss, adapters and
    /// moments are float32 in any case; the file keeps its weights
    #[arg(long, default_value = "f32")]
    pub precision: Precision,

    /// Compute activations a second time on the way back instead of keeping them: less memory, up to a third more time
    #[arg(long, visible_alias = "gradient-checkpointing")]
    pub recompute: bool,

    /// Compute once for each row what comes before the first layer that learns, keep it on disk (in the output directory,
    /// until the run ends) and read it in every epoch: auto (where that pays), on or off
    #[arg(long, value_name = "auto|on|off", default_value = "auto")]
    pub cache_frozen: CacheFrozen,

    /// MiB on disk that --cache-frozen may take
    #[arg(long, value_name = "MIB", default_value_t = TrainOptions::CACHE_LIMIT >> 20)]
    pub cache_limit: u64,

    /// Say how much memory the run would take, by the sizes of its first batch, and do not train
    #[arg(long)]
    pub plan: bool,

    /// Samples per batch [default: 8, or what the model is made for]
    #[arg(long, visible_alias = "per-device-train-batch-size")]
    pub batch_size: Option<usize>,

    /// Batches per step: their gradients make one update, as those of one large batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub gradient_accumulation_steps: usize,

    /// Steps to train
    #[arg(long, visible_alias = "max-steps", conflicts_with = "epochs")]
    pub steps: Option<usize>,

    /// Passes over the data to train [default: 3]
    #[arg(long, visible_alias = "num-train-epochs")]
    pub epochs: Option<usize>,

    /// Keep the file's order
    #[arg(long)]
    pub no_shuffle: bool,

    /// Put rows of like lengths into a batch, so that little is padded
    #[arg(long)]
    pub group_by_length: bool,

    /// Seed of the shuffling
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Save a checkpoint after every N steps and after the last [default: only on Ctrl-C]
    #[arg(long, value_name = "N")]
    pub save_steps: Option<usize>,

    /// Keep only the N newest checkpoints [default: all]
    #[arg(long, value_name = "N")]
    pub save_total_limit: Option<usize>,

    /// Go on from the last whole checkpoint in the output directory, or from the start where there is none yet
    #[arg(long)]
    pub resume: bool,

    #[command(flatten)]
    pub engine: EngineArgs,
}
