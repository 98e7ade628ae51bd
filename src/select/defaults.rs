//! `target_modules` left unset: PEFT's choice for the architecture, and how a file tells which one it is.

use std::path::Path;

use super::Linear;
use super::kinds::{kinds, listed};
use super::matching::{Matcher, Verdict, Version, is_suffix};
use crate::adapter::{BoneConfig, TargetModules};
use crate::onnx::Model;
use crate::{Error, Result};

/// What PEFT adapts in a model of this architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct Defaults {
    /// As Hugging Face's configs spell it; where the layers told, a well-known architecture of their kind.
    pub model_type: String,
    /// Names for `target_modules`. For the one architecture that PEFT has a pattern for: the layers it matches.
    pub modules: Vec<String>,
    /// What told the architecture: `config.json`, or the kind of layer.
    pub told_by: String,
}

/// Target modules as flags spell them, and the model types they are for:
/// `TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING` of peft 0.21.2. For gpt2, gpt_bigcode and btlm PEFT then fails
/// on the layers' class (Conv1D); here they are matrices like any other.
const TARGETS: [(&str, &str); 17] = [
    ("q_proj,v_proj", "llama llama4 mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text stablelm"),
    ("q_proj,v_proj", "opt bart gptj gpt_neo"),
    ("query,value", "bert roberta xlm-roberta electra layoutlm"),
    ("query_key_value", "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel"),
    ("q,v", "t5 mt5"),
    ("c_attn", "gpt2 gpt_bigcode"),
    ("c_proj,c_attn", "btlm"),
    ("q_proj,v_proj,fc1,fc2", "phi"),
    ("query_proj,value_proj", "deberta-v2"),
    ("in_proj", "deberta"),
    ("Wqkv", "mpt"),
    ("qkv_proj", "codegen"),
    ("q,v,q_proj,v_proj", "blip-2"),
    (r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
    ("q_proj,k_proj,v_proj,o_proj", "nemotron_h"),
    ("key,value,receptance,output", "rwkv"),
    ("r_proj,k_proj,v_proj,o_proj,key,value", "rwkv7"),
];

/// Ends of module paths that only one kind of architecture has, all of which must be there, and a model type of that
/// kind. The first row that fits counts: phi's attention looks like llama's.
const SIGNATURES: [(&[&str], &str); 16] = [
    (&["self_attn.q_proj", "self_attn.dense", "mlp.fc1"], "phi"),
    (&["self_attn.q_proj"], "llama"),
    (&["attention.self.query"], "bert"),
    (&["attention.self.query_proj"], "deberta-v2"),
    (&["attention.self.in_proj"], "deberta"),
    (&["SelfAttention.q"], "t5"),
    (&["attn.c_attn"], "gpt2"),
    (&["attn.q_proj", "mlp.fc_in"], "gptj"),
    (&["attn.attention.q_proj"], "gpt_neo"),
    (&["attention.query_key_value"], "gpt_neox"),
    (&["self_attention.query_key_value"], "bloom"),
    (&["attn.Wqkv"], "mpt"),
    (&["attn.qkv_proj"], "codegen"),
    (&["mixer.q_proj", "mixer.o_proj"], "nemotron_h"),
    (&["attention.receptance", "feed_forward.receptance"], "rwkv"),
    (&["attn.r_proj", "ffn.key"], "rwkv7"),
];

/// The targets that PEFT takes where `target_modules` is unset. The `model_type` in the `config.json` beside the file
/// tells the architecture (or above it, as in repositories that keep their models in `onnx/`); where there is none
/// that PEFT knows, or this file has none of its targets, the paths of `linears` do.
///
/// # Errors
/// The architecture is not known; the message lists the layers there are.
pub fn default_targets(model: &Model, linears: &[Linear]) -> Result<Defaults> {
    // Parts of a packed layer have names that tell another architecture.
    let linears: Vec<Linear> = linears.iter().filter(|l| l.part.is_none()).cloned().collect();
    let linears = linears.as_slice();
    let model_type = configured(&model.path);
    if let Some(model_type) = &model_type
        && let Some(modules) = targets_of(model_type, linears)
    {
        return Ok(Defaults { model_type: model_type.clone(), modules, told_by: "config.json".into() });
    }
    let ends_so = |end: &&str| linears.iter().filter_map(|l| l.module.as_deref()).any(|path| is_suffix(end, path));
    let known = SIGNATURES.iter().find(|(ends, _)| ends.iter().all(ends_so));
    if let Some((ends, model_type)) = known
        && let Some(modules) = targets_of(model_type, linears)
    {
        return Ok(Defaults {
            model_type: model_type.to_string(),
            modules,
            told_by: format!("layers {}", ends.join(", ")),
        });
    }
    let why = match model_type {
        Some(model_type) => format!("its config.json says model_type {model_type}, and PEFT has no default that fits"),
        None => "there is no config.json beside it, and its layers' names are none that PEFT has a default for".into(),
    };
    Err(Error::config(format!(
        "Please specify target_modules: the architecture of {} is not known ({why}). Linear layers there are: {}",
        model.path.display(),
        listed(&kinds(linears), ", ")
    )))
}

/// The target modules for `model_type`; `None` where PEFT has none or they name none of `linears`.
fn targets_of(model_type: &str, linears: &[Linear]) -> Option<Vec<String>> {
    let (modules, _) = TARGETS.iter().find(|(_, types)| types.split(' ').any(|known| known == model_type))?;
    let modules = TargetModules::parse(modules);
    let config = BoneConfig { target_modules: Some(modules.clone()), ..Default::default() };
    let matcher = Matcher::new(&config, Version::default()).ok()?;
    let mut meant = linears.iter().map(Linear::key).filter(|key| matches!(matcher.check(key), Ok(Verdict::Match)));
    match modules {
        TargetModules::List(names) => meant.next().map(|_| names),
        TargetModules::Pattern(_) => {
            Some(meant.map(str::to_string).collect()).filter(|paths: &Vec<_>| !paths.is_empty())
        }
    }
}

/// The `model_type` of the model's `config.json`.
fn configured(model: &Path) -> Option<String> {
    let dir = model.parent()?;
    let above = dir.parent().filter(|_| dir.file_name().is_some_and(|name| name == "onnx"));
    [Some(dir), above].into_iter().flatten().find_map(|dir| {
        let text = std::fs::read(dir.join("config.json")).ok()?;
        let config: serde_json::Value = serde_json::from_slice(&text).ok()?;
        config.get("model_type")?.as_str().map(str::to_string)
    })
}

#[cfg(test)]
mod tests {
    use super::super::linears;
    use super::super::tests::{linears_in, shared};
    use super::*;

    fn defaults(path: impl AsRef<Path>) -> Result<Defaults, String> {
        let model = Model::open(path).unwrap();
        default_targets(&model, &linears(&model)).map_err(|e| e.to_string())
    }

    #[test]
    fn layers_tell_the_architecture() {
        let cases = [
            ("bert.ts17", "bert", "query,value"),
            ("bert_fp16.dyn18", "bert", "query,value"),
            ("llama.ts17", "llama", "q_proj,v_proj"),
            ("llama.dyn18", "llama", "q_proj,v_proj"),
            ("qwen2_tied_nofold.ts17", "llama", "q_proj,v_proj"),
            ("gpt2.ts17", "gpt2", "c_attn"),
            ("t5_decoder_merged.optimum18", "t5", "q,v"),
            ("llama.genai_int4", "codegen", "qkv_proj"),
        ];
        for (file, model_type, modules) in cases {
            let told = defaults(shared(&format!("models/{file}.onnx"))).unwrap();
            assert_eq!((told.model_type.as_str(), told.modules.join(",")), (model_type, modules.into()), "{file}");
            assert!(told.told_by.starts_with("layers "), "{}", told.told_by);
        }
    }

    #[test]
    fn what_is_not_known_says_what_there_is() {
        let text = defaults(shared("models/mlp2d.ts17.onnx")).unwrap_err();
        assert!(text.starts_with("Please specify target_modules: ") && text.contains("no config.json"), "{text}");
        assert!(text.ends_with("Linear layers there are: fc1, block.0, block.2, shared, square, head"), "{text}");
        assert!(defaults(shared("models/llama.dyn18.ort_ext.onnx")).unwrap_err().contains("node_linear"));
    }

    #[test]
    fn the_config_beside_the_model_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("onnx");
        std::fs::create_dir(&inner).unwrap();
        let model = |name: &str| {
            std::fs::copy(shared(&format!("models/{name}.onnx")), inner.join("model.onnx")).unwrap();
            defaults(inner.join("model.onnx"))
        };
        let say = |dir: &Path, text: &str| std::fs::write(dir.join("config.json"), text).unwrap();
        say(dir.path(), r#"{"model_type": "qwen2"}"#);
        let told = model("llama.ts17").unwrap();
        assert_eq!((told.model_type.as_str(), told.told_by.as_str()), ("qwen2", "config.json"));
        // A config nearer by; one that says nothing of these layers.
        say(&inner, r#"{"model_type": "roberta"}"#);
        assert_eq!(model("bert.ts17").unwrap().model_type, "roberta");
        assert_eq!(model("llama.ts17").unwrap().model_type, "llama");
        say(&inner, r#"{"model_type": "mine"}"#);
        assert!(model("mlp2d.ts17").unwrap_err().contains("says model_type mine, and PEFT has no default"));
        say(&inner, "not json");
        assert_eq!(model("llama.ts17").unwrap().model_type, "qwen2");
    }

    #[test]
    fn the_tables_agree() {
        let types: Vec<&str> = TARGETS.iter().flat_map(|(_, types)| types.split(' ')).collect();
        let distinct: std::collections::BTreeSet<_> = types.iter().collect();
        assert_eq!((types.len(), distinct.len()), (40, 40));
        let [layer] =
            linears_in("goldens/mlp/base_gemm.onnx").into_iter().take(1).collect::<Vec<_>>().try_into().unwrap();
        let named = |path: String| Linear { module: Some(path), ..layer.clone() };
        for (ends, model_type) in SIGNATURES {
            let layers: Vec<_> = ends.iter().map(|end| named(format!("m.{end}"))).collect();
            assert!(targets_of(model_type, &layers).is_some(), "{ends:?}");
        }
        let tower = |tower| named(format!("model.{tower}.layers.0.self_attn.q_proj"));
        let gemma4 = targets_of("gemma4", &[tower("vision_tower"), tower("language_model")]).unwrap();
        assert_eq!(gemma4, ["model.language_model.layers.0.self_attn.q_proj"]);
    }
}
