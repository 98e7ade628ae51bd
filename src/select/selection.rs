//! Which layers of a model a config means: PEFT's rules, and what they leave open for a file without module objects.

use std::collections::{BTreeMap, HashSet};

use super::matching::{Matcher, Verdict, Version, is_suffix};
use super::{Linear, NameRule};
use crate::adapter::{BoneConfig, TargetModules};
use crate::{Error, Result, did_you_mean};

/// What a config means in one model. Numbers are indices into the layers it was asked about.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Selection {
    pub chosen: Vec<usize>,
    /// Layers that the targets name but that are not adapted, and why.
    pub left_out: Vec<(usize, String)>,
    pub warnings: Vec<String>,
}

/// Output layers by the names that `get_output_embeddings` of Hugging Face's models returns: with `all-linear`, PEFT
/// leaves that one module out. These names count anywhere in a path.
const OUTPUT_LAYERS: [&str; 13] = [
    "lm_head",                // most decoders, T5, BART
    "embed_out",              // GPT-NeoX
    "predictions.decoder",    // BERT (cls.), ALBERT
    "lm_head.decoder",        // RoBERTa, XLM-R, MPNet
    "lm_predictions.lm_head", // DeBERTa-v2
    "vocab_projector",        // DistilBERT
    "generator_lm_head",      // ELECTRA, ConvBERT
    "pred_layer.proj",        // XLM, FlauBERT
    "lm_loss",                // XLNet
    "output_projection",      // TrOCR, FSMT
    "cls.decoder",            // MobileBERT-like heads
    "text_projection_head",   // speech models with a text head
    "final_proj_out",         // speech decoders
];

/// Names too common elsewhere to count below the top level: Whisper, ModernBERT.
const TOP_OUTPUT_LAYERS: [&str; 2] = ["proj_out", "decoder"];

/// [`select_as`] by today's rules.
pub fn select(linears: &[Linear], config: &BoneConfig) -> Result<Selection> {
    select_as(linears, config, &[], Version::default())
}

/// The layers that `config` means; those in `modules_to_save` are trained in full elsewhere and left out.
///
/// # Errors
/// No layer is meant (the message lists those there are), or one that was named takes no adapter.
pub fn select_as(
    linears: &[Linear],
    config: &BoneConfig,
    modules_to_save: &[String],
    version: Version,
) -> Result<Selection> {
    config.validate()?;
    let matcher = Matcher::new(config, modules_to_save, version)?;
    let targets = config.target_modules.as_ref();
    let is_all = targets.is_some_and(TargetModules::is_all_linear);
    let mut selection = Selection::default();
    let mut unfit: Vec<(usize, &str)> = Vec::new();
    let (mut excluded, mut unmatched) = (0, 0);
    for (i, linear) in linears.iter().enumerate() {
        match verdict(&matcher, linear, is_all, targets)? {
            Verdict::Excluded => {
                excluded += 1;
                selection.left_out.push((i, "named by exclude_modules".into()));
            }
            Verdict::Saved => {
                excluded += 1;
                selection.left_out.push((i, "named by modules_to_save".into()));
            }
            Verdict::No => unmatched += 1,
            Verdict::Match if is_all && is_output_layer(linear) => selection.left_out.push((
                i,
                "it is the output layer, which all-linear leaves out as PEFT does; name it to adapt it".into(),
            )),
            Verdict::Match => match &linear.adaptable {
                Ok(()) => selection.chosen.push(i),
                Err(why) if is_all => selection.left_out.push((i, why.clone())),
                Err(why) => unfit.push((i, why)),
            },
        }
    }
    if !unfit.is_empty() {
        return Err(cannot_adapt(linears, &unfit));
    }
    if selection.chosen.is_empty() {
        return Err(nothing_chosen(linears, config, is_all, &selection, excluded, unmatched));
    }
    warn(linears, config, &matcher, excluded, &mut selection);
    Ok(selection)
}

/// A layer without a module path is matched by its node's name, which a list must give in full.
fn verdict(matcher: &Matcher, linear: &Linear, is_all: bool, targets: Option<&TargetModules>) -> Result<Verdict> {
    let verdict = matcher.check(linear.key())?;
    let is_suffix_hit = linear.module.is_none()
        && !is_all
        && matches!(targets, Some(TargetModules::List(list)) if !list.iter().any(|name| name == linear.key()));
    Ok(if verdict == Verdict::Match && is_suffix_hit { Verdict::No } else { verdict })
}

fn is_output_layer(linear: &Linear) -> bool {
    linear.module.as_deref().is_some_and(|path| {
        OUTPUT_LAYERS.iter().any(|name| path == *name || is_suffix(name, path)) || TOP_OUTPUT_LAYERS.contains(&path)
    })
}

/// How many entries a message lists before it counts the rest.
const LISTED: usize = 12;

fn listed<T: AsRef<str>>(entries: &[T], separator: &str) -> String {
    let mut text = entries.iter().take(LISTED).map(AsRef::as_ref).collect::<Vec<_>>().join(separator);
    if entries.len() > LISTED {
        text.push_str(&format!("{separator}and {} more", entries.len() - LISTED));
    }
    text
}

fn cannot_adapt(linears: &[Linear], unfit: &[(usize, &str)]) -> Error {
    let lines: Vec<String> = unfit
        .iter()
        .filter_map(|(i, why)| linears.get(*i).map(|l| format!("{} (node {}): {why}", l.key(), l.node_name)))
        .collect();
    Error::model(format!(
        "{} of the layers named by target_modules cannot be adapted; name others, or leave these out with \
         exclude_modules:\n  {}",
        unfit.len(),
        listed(&lines, "\n  ")
    ))
}

fn nothing_chosen(
    linears: &[Linear],
    config: &BoneConfig,
    is_all: bool,
    selection: &Selection,
    excluded: usize,
    unmatched: usize,
) -> Error {
    if linears.is_empty() {
        return Error::model(
            "this model has no linear layer: no node multiplies by a constant matrix (MatMul or Gemm)",
        );
    }
    if excluded == linears.len() {
        return Error::config(
            "All modules were excluded. Check exclude_modules and modules_to_save: together they name every linear layer",
        );
    }
    if is_all {
        let lines: Vec<String> = selection
            .left_out
            .iter()
            .filter_map(|(i, why)| linears.get(*i).map(|l| format!("{}: {why}", l.key())))
            .collect();
        return Error::model(format!("no linear layer of this model can be adapted:\n  {}", listed(&lines, "\n  ")));
    }
    let (wanted, near) = match &config.target_modules {
        Some(TargetModules::List(names)) => {
            let near: String = names.iter().map(|n| did_you_mean(n, linears.iter().map(Linear::key))).collect();
            (names.join(", "), near)
        }
        Some(TargetModules::Pattern(pattern)) => {
            (format!("{pattern:?} (matched against the whole path)"), String::new())
        }
        None => (String::new(), String::new()),
    };
    let head = if excluded > 0 && unmatched > 0 {
        format!(
            "No modules were targeted for adaptation: target_modules {wanted} matches no linear layer that is not \
             excluded ({excluded} are)."
        )
    } else {
        format!("Target modules {wanted} not found in the base model.")
    };
    let layers = match (&config.layers_to_transform, &config.layers_pattern) {
        (Some(indices), pattern) if !indices.is_empty() => format!(
            " Only layers {indices:?}{} were looked at (layers_to_transform, layers_pattern).",
            pattern.as_ref().filter(|p| !p.is_empty()).map_or(String::new(), |p| format!(" of {}", p.join(", ")))
        ),
        _ => String::new(),
    };
    Error::config(format!("{head}{near}{layers} Linear layers there are: {}", listed(&kinds(linears), ", ")))
}

/// The layers' names, shortened: distinct last segments with their number, unless they are few.
fn kinds(linears: &[Linear]) -> Vec<String> {
    if linears.len() <= LISTED {
        let mut seen = HashSet::new();
        return linears.iter().map(Linear::key).filter(|key| seen.insert(*key)).map(str::to_string).collect();
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut order = Vec::new();
    for linear in linears {
        let kind = match &linear.module {
            // The last segment that is a name: `block.0` and `block.2` go by their numbers' parent.
            Some(module) => named_tail(module),
            None => linear.key(),
        };
        let count = counts.entry(kind).or_default();
        if *count == 0 {
            order.push(kind);
        }
        *count += 1;
    }
    order
        .into_iter()
        .map(|kind| match counts.get(kind) {
            Some(n) if *n > 1 => format!("{kind} ×{n}"),
            _ => kind.to_string(),
        })
        .collect()
}

/// `q_proj` of `a.q_proj`; `block.0` of `a.block.0`.
fn named_tail(path: &str) -> &str {
    let mut start = path.len();
    while let Some(dot) = path[..start].rfind('.') {
        let segment = &path[dot + 1..start];
        if !segment.bytes().all(|b| b.is_ascii_digit()) {
            return &path[dot + 1..];
        }
        start = dot;
    }
    path
}

fn warn(linears: &[Linear], config: &BoneConfig, matcher: &Matcher, excluded: usize, selection: &mut Selection) {
    let _ = matcher;
    if excluded == 0 && config.exclude_modules.as_ref().is_some_and(|names| *names != TargetModules::List(Vec::new())) {
        selection.warnings.push("exclude_modules names no linear layer of this model".into());
    }
    let keys = || linears.iter().map(Linear::key);
    if let Some(TargetModules::List(names)) = &config.target_modules {
        for name in names.iter().filter(|name| !keys().any(|key| key == name.as_str() || is_suffix(name, key))) {
            let near = did_you_mean(name, keys());
            selection
                .warnings
                .push(format!("target_modules names {name}, which is no linear layer of this model.{near}"));
        }
    }
    let nameless =
        selection.chosen.iter().filter(|i| linears.get(**i).is_some_and(|l| l.rule == NameRule::None)).count();
    if nameless > 0 {
        selection.warnings.push(format!(
            "{nameless} of the chosen layers have no module path in this file; they go by their nodes' names, and an \
             output layer among them cannot be told"
        ));
    }
    selection.warnings.extend(shared_weights(linears, &selection.chosen));
}

/// A sentence for each stored matrix that others than the calls of one chosen layer use.
fn shared_weights(linears: &[Linear], chosen: &[usize]) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut warnings = Vec::new();
    for linear in chosen.iter().filter_map(|i| linears.get(*i)) {
        if linear.weight.uses < 2 || !seen.insert(&linear.weight.source) {
            continue;
        }
        let users: Vec<&Linear> = linears.iter().filter(|l| l.weight.source == linear.weight.source).collect();
        let mut paths: Vec<&str> = users.iter().map(|l| l.path.as_str()).collect();
        paths.sort_unstable();
        paths.dedup();
        let others = linear.weight.uses.saturating_sub(users.len());
        if paths.len() > 1 || others > 0 {
            let elsewhere = if others > 0 { format!(" and {others} other uses") } else { String::new() };
            warnings.push(format!(
                "one stored matrix, {}, serves {}{elsewhere}: each adapted layer gets its own copy when it is folded",
                linear.weight.name,
                listed(&paths, ", ")
            ));
        }
    }
    warnings
}
