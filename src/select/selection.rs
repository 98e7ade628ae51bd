//! Which layers of a model a config means: PEFT's rules, and what they leave open for a file without module objects.

use std::collections::HashMap;

use super::form::Form;
use super::kinds::{kinds, listed, nearest};
use super::linears::FLOATS;
use super::matching::{Matcher, Verdict, Version, is_suffix};
use super::{Linear, NameRule};
use crate::adapter::{BoneConfig, TargetModules};
use crate::onnx::data_type_name;
use crate::{Error, Result};

/// What a config means in one model. Numbers are indices into the layers it was asked about.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Selection {
    pub chosen: Vec<usize>,
    /// Layers that the targets name but that are not adapted, and why.
    pub left_out: Vec<(usize, String)>,
    pub warnings: Vec<String>,
}

/// Output layers by the attribute that `get_output_embeddings` of Hugging Face's models returns (all models of
/// transformers 4.53.3): with `all-linear`, PEFT leaves that one module out. These names count anywhere in a path.
const OUTPUT_LAYERS: [&str; 12] = [
    "lm_head",                      // 119 models: Llama, GPT-2, T5, BART, …
    "predictions.decoder",          // BERT (cls.), ALBERT
    "lm_head.decoder",              // RoBERTa and kin
    "embed_out",                    // GPT-NeoX
    "generator_lm_head",            // ELECTRA, ConvBERT
    "pred_layer.proj",              // XLM, FlauBERT
    "vocab_projector",              // DistilBERT
    "lm_predictions.lm_head.dense", // DeBERTa
    "mlm_score.decoder",            // ViLT, BridgeTower
    "output_projection",            // TrOCR, BioGPT
    "lm_loss",                      // XLNet
    "lm_head.out_proj",             // T5Gemma
];

/// Names too common elsewhere to count below the top level: Whisper, ModernBERT. RWKV's `head` and GIT's `output` are
/// too common even there: a custom model's head is adapted, as PEFT does.
const TOP_OUTPUT_LAYERS: [&str; 2] = ["proj_out", "decoder"];

const EXCLUDED: &str = "named by exclude_modules";

/// [`select_as`] by today's rules.
pub fn select(linears: &[Linear], config: &BoneConfig) -> Result<Selection> {
    select_as(linears, config, Version::default())
}

/// The layers that `config` means. Those that it trains in full ([`BoneConfig::saved_modules`]) are left out, and
/// with them the head that PEFT's `all-linear` spares for `SEQ_CLS`: it is one of them.
///
/// # Errors
/// No layer is meant (the message lists those there are), or one that was named takes no adapter.
pub fn select_as(linears: &[Linear], config: &BoneConfig, version: Version) -> Result<Selection> {
    config.validate()?;
    let matcher = Matcher::new(config, version)?;
    let targets = config.target_modules.as_ref();
    let is_all = targets.is_some_and(TargetModules::is_all_linear);
    let mut selection = Selection::default();
    let mut unfit: Vec<(usize, &str)> = Vec::new();
    let (mut excluded, mut unmatched) = (0, 0);
    for (i, linear) in linears.iter().enumerate() {
        match verdict(&matcher, linear, is_all, targets)? {
            Verdict::Excluded => {
                excluded += 1;
                selection.left_out.push((i, EXCLUDED.into()));
            }
            Verdict::Saved => {
                excluded += 1;
                selection.left_out.push((i, "trained in full (modules_to_save, task_type)".into()));
                if !FLOATS.contains(&linear.data_type) {
                    let (key, stored) = (linear.key(), data_type_name(linear.data_type));
                    selection
                        .warnings
                        .push(format!("{key} is to train in full, but its weight is {stored} and stays as it is"));
                }
            }
            Verdict::No => unmatched += 1,
            // A packed layer is adapted as a whole where it is meant as well.
            Verdict::Match if linear.part.is_some() && (is_all || is_whole_meant(&matcher, linear, targets)?) => {}
            Verdict::Match if is_all && is_output_layer(linear) => selection.left_out.push((
                i,
                "it is the output layer, which all-linear leaves out as PEFT does; name it to adapt it".into(),
            )),
            Verdict::Match if is_all && matches!(linear.form, Form::Channels(_)) => selection.left_out.push((
                i,
                "it is a 1×1 convolution, and all-linear means no convolutions, as in PEFT; name it to adapt it".into(),
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
    warn(linears, config, &mut selection);
    if is_all {
        selection.warnings.extend(fixed_tables(linears, &selection.chosen));
    }
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

/// Whether a pattern that matches a part means the packed layer, too.
fn is_whole_meant(matcher: &Matcher, part: &Linear, targets: Option<&TargetModules>) -> Result<bool> {
    Ok(matches!(targets, Some(TargetModules::Pattern(_))) && matcher.check(part.whole())? == Verdict::Match)
}

fn is_output_layer(linear: &Linear) -> bool {
    linear.module.as_deref().is_some_and(|path| {
        OUTPUT_LAYERS.iter().any(|name| path == *name || is_suffix(name, path)) || TOP_OUTPUT_LAYERS.contains(&path)
    })
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
            "All modules were excluded. Check exclude_modules, modules_to_save and task_type: together they name every \
             linear layer",
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
            let near: String = names.iter().map(|name| nearest(name, linears)).collect();
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

fn warn(linears: &[Linear], config: &BoneConfig, selection: &mut Selection) {
    let excludes = match &config.exclude_modules {
        Some(TargetModules::List(names)) => !names.is_empty(),
        Some(TargetModules::Pattern(pattern)) => !pattern.is_empty(),
        None => false,
    };
    if excludes && !selection.left_out.iter().any(|(_, why)| why == EXCLUDED) {
        selection.warnings.push("exclude_modules names no linear layer of this model".into());
    }
    let keys = || linears.iter().map(Linear::key);
    if let Some(TargetModules::List(names)) = &config.target_modules {
        for name in names.iter().filter(|name| !keys().any(|key| key == name.as_str() || is_suffix(name, key))) {
            let near = nearest(name, linears);
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

/// A sentence about chosen matrices whose names are no weight's: they may be tables that nobody learned.
fn fixed_tables(linears: &[Linear], chosen: &[usize]) -> Option<String> {
    let is_table = |l: &&Linear| {
        let name = &l.weight.name;
        // Names that exporters make up say nothing.
        let is_own =
            !name.contains([':', '/']) && !name.starts_with("val_") && !name.bytes().all(|b| b.is_ascii_digit());
        l.module.is_none() && matches!(l.op.as_str(), "MatMul" | "Gemm") && is_own && !name.contains("weight")
    };
    let tables: Vec<&str> =
        chosen.iter().filter_map(|i| linears.get(*i)).filter(is_table).map(|l| l.weight.name.as_str()).collect();
    (!tables.is_empty()).then(|| {
        format!(
            "{} may be tables that were never learned (a mel filter bank, say): no module has them as its weight. If so, \
             leave their nodes out with exclude_modules",
            listed(&tables, ", ")
        )
    })
}

/// A sentence for each stored matrix that others than the calls of one chosen layer use.
fn shared_weights(linears: &[Linear], chosen: &[usize]) -> Vec<String> {
    let mut users_of: HashMap<_, Vec<&Linear>> = HashMap::new();
    for linear in linears.iter().filter(|l| l.part.is_none()) {
        users_of.entry(&linear.weight.source).or_default().push(linear);
    }
    let mut warnings = Vec::new();
    for linear in chosen.iter().filter_map(|i| linears.get(*i)) {
        // Taken out: a sentence once.
        let Some(users) = users_of.remove(&linear.weight.source) else { continue };
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

#[cfg(test)]
mod tests {
    use super::super::tests::{linears_in, shared};
    use super::*;

    fn config(targets: &[&str]) -> BoneConfig {
        let list = targets.iter().map(|t| t.to_string()).collect();
        BoneConfig { target_modules: Some(TargetModules::List(list)), ..Default::default() }
    }

    fn pattern(text: &str) -> BoneConfig {
        BoneConfig { target_modules: Some(TargetModules::Pattern(text.into())), ..Default::default() }
    }

    fn keys(linears: &[Linear], selection: &Selection) -> Vec<String> {
        selection.chosen.iter().map(|i| linears[*i].key().to_string()).collect()
    }

    fn error(linears: &[Linear], config: &BoneConfig) -> String {
        select(linears, config).unwrap_err().to_string()
    }

    #[test]
    fn the_goldens_adapt_the_layers_that_peft_adapts() {
        let linears = linears_in("goldens/bert/base.onnx");
        let text = std::fs::read(shared("goldens/bert/train.json")).unwrap();
        let runs: serde_json::Value = serde_json::from_slice(&text).unwrap();
        for (run, count) in [("bone_all_linear_r5_pad", 13), ("bat_qv_r4_layer1", 2), ("bone_qv_r8_seqcls", 4)] {
            let run = &runs["runs"][run];
            let config = BoneConfig::from_json(&run["config"], &mut Vec::new()).unwrap();
            for version in [Version::Peft016, Version::Peft021] {
                let mut chosen = keys(&linears, &select_as(&linears, &config, version).unwrap());
                chosen.sort();
                assert_eq!(chosen.len(), count);
                assert_eq!(serde_json::json!(chosen), run["targeted_modules"]);
            }
        }
    }

    #[test]
    fn all_linear_leaves_out_the_output_layer_and_takes_a_head_along() {
        let head = |file, name: &str, count| {
            let linears = linears_in(&format!("models/{file}"));
            let selection = select(&linears, &pattern("All-Linear")).unwrap();
            assert_eq!(selection.chosen.len(), count, "{file}");
            let out: Vec<_> = selection.left_out.iter().map(|(i, _)| linears[*i].key()).collect();
            assert_eq!(out, if name.is_empty() { vec![] } else { vec![name] }, "{file}");
            assert!(selection.left_out.iter().all(|(_, why)| why.contains("output layer")), "{file}");
        };
        head("llama.ts17.onnx", "lm_head", 14);
        head("llama.dyn18.onnx", "lm_head", 14);
        head("gpt2.ts17.onnx", "lm_head", 8);
        head("bert.ts17.onnx", "", 14);
        head("mlp2d.ts17.onnx", "", 7);
        head("vit.ts17.onnx", "", 13);
    }

    #[test]
    fn an_output_layer_can_be_named() {
        let linears = linears_in("models/llama.ts17.onnx");
        let selection = select(&linears, &config(&["lm_head", "layers.1.mlp.up_proj"])).unwrap();
        assert_eq!(keys(&linears, &selection), ["model.layers.1.mlp.up_proj", "lm_head"]);
    }

    #[test]
    fn layers_and_exclusions() {
        let linears = linears_in("models/bert.ts17.onnx");
        let mut chosen = config(&["query", "value"]);
        chosen.layers_to_transform = Some(vec![1]);
        chosen.layers_pattern = Some(vec!["layer".into()]);
        chosen.exclude_modules = Some(TargetModules::Pattern(".*value".into()));
        let selection = select(&linears, &chosen).unwrap();
        assert_eq!(keys(&linears, &selection), ["bert.encoder.layer.1.attention.self.query"]);
        assert_eq!(selection.left_out.len(), 2);
        chosen.exclude_modules = Some(TargetModules::List(vec!["nothing".into()]));
        let selection = select(&linears, &chosen).unwrap();
        assert!(selection.warnings.iter().any(|w| w.contains("exclude_modules names no")), "{:?}", selection.warnings);
        let saves = BoneConfig { modules_to_save: Some(vec!["pooler".into()]), ..pattern("all-linear") };
        let saved = select(&linears, &saves).unwrap();
        assert_eq!((saved.chosen.len(), saved.left_out.len()), (13, 1));
    }

    #[test]
    fn every_call_of_a_module_is_chosen() {
        let linears = linears_in("models/seqnest.ts17.onnx");
        let selection = select(&linears, &config(&["lin"])).unwrap();
        let calls: Vec<_> = selection.chosen.iter().map(|i| &linears[*i]).filter(|l| l.path == "lin").collect();
        assert_eq!(calls.iter().map(|l| l.node_name.as_str()).collect::<Vec<_>>(), ["/lin/MatMul", "/lin_1/MatMul_1"]);
        assert!(calls.iter().all(|l| l.weight.uses == 2));
        assert_eq!(selection.warnings, Vec::<String>::new());
    }

    #[test]
    fn layers_without_a_path_go_by_their_node() {
        let linears = linears_in("models/llama.dyn18.ort_ext.onnx");
        let selection = select(&linears, &pattern("all-linear")).unwrap();
        assert_eq!(selection.chosen.len(), 15);
        assert!(selection.warnings[0].contains("15 of the chosen layers have no module path"));
        let selection = select(&linears, &config(&["node_linear_3"])).unwrap();
        assert_eq!(keys(&linears, &selection), ["node_linear_3"]);
        assert_eq!(select(&linears, &pattern("node_linear_1.*")).unwrap().chosen.len(), 6);
        assert!(error(&linears, &config(&["linear_3"])).contains("not found"));
    }

    #[test]
    fn nothing_found_says_what_there_is() {
        let linears = linears_in("models/bert.ts17.onnx");
        let text = error(&linears, &config(&["quary"]));
        assert_eq!(
            text,
            "Target modules quary not found in the base model. Did you mean query? Linear layers there are: query ×2, \
             key ×2, value ×2, dense ×7, classifier"
        );
        let mut chosen = config(&["query"]);
        chosen.layers_to_transform = Some(vec![7]);
        assert!(error(&linears, &chosen).contains("Only layers [7] were looked at"));
        chosen = config(&["query"]);
        chosen.exclude_modules = Some(TargetModules::Pattern(".*".into()));
        assert!(error(&linears, &chosen).starts_with("All modules were excluded"));
        chosen.exclude_modules = Some(TargetModules::List(vec!["query".into()]));
        assert!(error(&linears, &chosen).starts_with("No modules were targeted for adaptation"));
        let few = linears_in("goldens/mlp/base_gemm.onnx");
        assert!(error(&few, &pattern("lin")).ends_with("Linear layers there are: lin0, lin1"));
        assert!(error(&few, &BoneConfig::default()).contains("target_modules is not set"));
        assert!(error(&[], &pattern("all-linear")).contains("no linear layer"));
    }

    #[test]
    fn a_name_that_is_no_layer_is_a_warning_beside_ones_that_are() {
        let linears = linears_in("models/bert.ts17.onnx");
        let selection = select(&linears, &config(&["query", "valeu"])).unwrap();
        assert_eq!(
            selection.warnings,
            ["target_modules names valeu, which is no linear layer of this model. Did you mean value?"]
        );
    }

    #[test]
    fn layers_that_take_no_adapter_are_refused_by_name() {
        let mut linears = linears_in("models/llama.genai_int4.onnx");
        assert_eq!(select(&linears, &pattern("all-linear")).unwrap().chosen.len(), 10);
        linears.iter_mut().for_each(|l| l.adaptable = Err("it is sealed".into()));
        let text = error(&linears, &config(&["qkv_proj", "o_proj"]));
        assert!(text.starts_with("4 of the layers named") && text.contains("/model/layers.1/attn/o_proj/MatMul_Q4"));
        assert!(text.contains("it is sealed"), "{text}");
        assert!(error(&linears, &pattern("all-linear")).contains("no linear layer of this model can be adapted"));
        let half = linears_in("models/bert_fp16.dyn18.onnx");
        assert_eq!(select(&half, &config(&["query"])).unwrap().chosen.len(), 2);
        let qdq = linears_in("models/bert.ts17.qdq.onnx");
        assert_eq!(select(&qdq, &config(&["query"])).unwrap().chosen.len(), 2);
    }

    #[test]
    fn a_quantized_layer_that_should_train_in_full_is_told() {
        let mut linears = linears_in("goldens/mlp/base_gemm.onnx");
        linears[1].data_type = crate::onnx::DataType::Int8;
        let saves = BoneConfig { modules_to_save: Some(vec!["lin1".into()]), ..config(&["lin0"]) };
        let selection = select(&linears, &saves).unwrap();
        assert_eq!(selection.warnings, ["lin1 is to train in full, but its weight is int8 and stays as it is"]);
    }

    #[test]
    fn shared_weights_are_told() {
        let linears = linears_in("models/qwen2_tied_nofold.ts17.onnx");
        let selection = select(&linears, &config(&["lm_head"])).unwrap();
        assert_eq!(
            selection.warnings,
            ["one stored matrix, model.embed_tokens.weight, serves lm_head and 1 other uses: each adapted layer gets \
              its own copy when it is folded"]
        );
    }
}
