//! The adapter's config, field by field that of PEFT's `BoneConfig` (0.18.1) and `MissConfig` (0.21.2), which differ
//! only in what MiSS adds: `mini_r`, `miss_dropout` and the `"mini"` initialisation. One field PEFT does not have (and
//! ignores): `packed_sizes`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::words::words;
use crate::{Error, Result, did_you_mean};

/// `target_modules` and `exclude_modules`: a list of names, or one string (a full-match regex, or `all-linear`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    List(Vec<String>),
    Pattern(String),
}

impl TargetModules {
    /// As a flag spells it: a comma-separated list; one entry with a regex's characters is a pattern, and so is
    /// `all-linear`.
    pub fn parse(text: &str) -> Self {
        let is_pattern =
            text.eq_ignore_ascii_case("all-linear") || text.contains(['*', '(', '[', '|', '\\', '^', '$', '+', '?']);
        if is_pattern {
            Self::Pattern(text.into())
        } else {
            Self::List(text.split(',').map(|s| s.trim().to_string()).filter(|s| !s.is_empty()).collect())
        }
    }

    /// True for PEFT's `"all-linear"` (a string in any case; in a list it is only a name).
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Self::Pattern(p) if p.eq_ignore_ascii_case("all-linear"))
    }
}

/// A field of PEFT's files with a fixed set of words.
macro_rules! field {
    ($(#[$doc:meta])* $name:ident, $field:literal, $default:ident {
        $($(#[$about:meta])* $variant:ident = $first:literal $(| $more:literal)*),+ $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub enum $name { $($(#[$about])* $variant),+ }

        words!($name, $field { $($variant = $first $(| $more)*),+ });

        impl Default for $name {
            fn default() -> Self {
                Self::$default
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> std::result::Result<Self, String> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    };
}

field! {
    /// Whose names an adapter goes by: PEFT renamed Bone to MiSS in 0.17 and dropped the old name in 0.19.
    PeftType, "peft_type", Miss {
        /// Parameters are called `miss_block`; PEFT from 0.17 reads it.
        Miss = "MISS",
        /// Parameters are called `bone_block`; PEFT 0.14 to 0.18 reads it.
        Bone = "BONE",
    }
}

field! {
    /// How a block starts and which variant it is (PEFT's `init_weights`).
    InitWeights, "init_weights", Zeros {
        /// Bone (MiSS), zeros: a fresh adapter changes nothing.
        Zeros = "true",
        /// Bone (MiSS), uniform in ±1/√out_features (Kaiming with a = √5 over fan-in = out).
        Random = "false",
        /// BAT: the weight itself passes through the block.
        Bat = "bat",
        /// MiSS mini: a block of `mini_r` columns, repeated over the outputs.
        Mini = "mini",
    }
}

field! {
    /// Which biases train beside the blocks.
    Bias, "bias", None {
        None = "none",
        /// Every parameter with `bias` in its name.
        All = "all",
        /// The targeted layers' own.
        Only = "miss_only" | "bone_only",
    }
}

field! {
    /// What the model is for; it decides which output layers train in full.
    TaskType, "task_type", CausalLm {
        SeqCls = "SEQ_CLS",
        Seq2SeqLm = "SEQ_2_SEQ_LM",
        CausalLm = "CAUSAL_LM",
        TokenCls = "TOKEN_CLS",
        QuestionAns = "QUESTION_ANS",
        FeatureExtraction = "FEATURE_EXTRACTION",
    }
}

impl PeftType {
    /// The last part of a parameter's name: `miss_block` or `bone_block`.
    pub fn block(self) -> &'static str {
        match self {
            Self::Miss => "miss_block",
            Self::Bone => "bone_block",
        }
    }
}

impl TaskType {
    /// Layers that PEFT trains in full for this task, where the model has them.
    pub fn saved_modules(self) -> &'static [&'static str] {
        match self {
            Self::SeqCls | Self::TokenCls => &["classifier", "score"],
            Self::QuestionAns => &["qa_outputs"],
            _ => &[],
        }
    }
}

/// PEFT's `BoneConfig` and `MissConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BoneConfig {
    pub peft_type: PeftType,
    /// Rows of the block `[r, out_features]` that is tiled over the input dimension; the side of BAT's blocks.
    pub r: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<TargetModules>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    pub init_weights: InitWeights,
    /// Columns of a mini block; other variants do not look at it.
    pub mini_r: usize,
    /// Share of a layer's inputs that the block does not see, while training.
    pub miss_dropout: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<Vec<String>>,
    pub bias: Bias,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_type: Option<TaskType>,
    /// How many outputs the modules in a packed layer have, by the last segments of their names, where the graph does not
    /// say: `q_proj`, `k_proj` and `v_proj` of a `qkv_proj` whose outputs are theirs, one after another.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub packed_sizes: BTreeMap<String, usize>,
}

impl Default for BoneConfig {
    fn default() -> Self {
        Self {
            peft_type: PeftType::default(),
            r: 64,
            target_modules: None,
            exclude_modules: None,
            init_weights: InitWeights::default(),
            mini_r: 1,
            miss_dropout: 0.0,
            layers_to_transform: None,
            layers_pattern: None,
            bias: Bias::default(),
            modules_to_save: None,
            task_type: None,
            packed_sizes: BTreeMap::new(),
        }
    }
}

/// Keys of an `adapter_config.json` that say nothing to this program.
const OTHER_KEYS: [&str; 5] = ["auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"];

const KEYS: [&str; 13] = [
    "bias",
    "exclude_modules",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "mini_r",
    "miss_dropout",
    "modules_to_save",
    "packed_sizes",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
];

impl BoneConfig {
    /// Reads an `adapter_config.json`, as far as it is there: a missing key keeps its default. Unknown keys are
    /// ignored, as PEFT does, each with a sentence in `warnings`.
    ///
    /// # Errors
    /// A value that the field cannot have, by the field's name, and what is allowed.
    pub fn from_json(json: &Value, warnings: &mut Vec<String>) -> Result<Self> {
        let Value::Object(fields) = json else {
            return Err(Error::config("an adapter config is one JSON object"));
        };
        let mut config = Self::default();
        for (key, value) in fields {
            if OTHER_KEYS.contains(&key.as_str()) {
                continue;
            }
            if !KEYS.contains(&key.as_str()) {
                let near = did_you_mean(key, KEYS);
                warnings.push(format!("the adapter config has the unknown key {key}, which is ignored.{near}"));
                continue;
            }
            // A null is what PEFT writes for "not set".
            if value.is_null() {
                if key == "init_weights" {
                    config.init_weights = InitWeights::Random;
                }
                continue;
            }
            config.set(key, value).map_err(Error::config)?;
        }
        Ok(config)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<(), String> {
        match key {
            "r" => self.r = whole(key, value)?,
            "mini_r" => self.mini_r = whole(key, value)?,
            "miss_dropout" => {
                self.miss_dropout = value.as_f64().ok_or_else(|| unusable(key, value, "a number from 0 to below 1"))?;
            }
            "init_weights" => {
                self.init_weights = match value {
                    Value::Bool(true) => InitWeights::Zeros,
                    Value::Bool(false) => InitWeights::Random,
                    Value::String(text) => text.parse()?,
                    _ => return Err(unusable(key, value, r#"true, false, "bat" or "mini""#)),
                }
            }
            "bias" => self.bias = text(key, value, Bias::WORDS)?.parse()?,
            "peft_type" => {
                self.peft_type = text(key, value, PeftType::WORDS)?
                    .parse()
                    .map_err(|e| format!("{e} (Bone and its successor MiSS; adapters of other kinds are not read)"))?;
            }
            "task_type" => self.task_type = Some(text(key, value, TaskType::WORDS)?.parse()?),
            "target_modules" => self.target_modules = Some(modules(key, value)?),
            "exclude_modules" => self.exclude_modules = Some(modules(key, value)?),
            "packed_sizes" => {
                let sizes = value.as_object().ok_or_else(|| unusable(key, value, "an object of names and sizes"))?;
                let sizes = sizes.iter().map(|(name, size)| Ok((name.clone(), whole(key, size)?)));
                self.packed_sizes = sizes.collect::<Result<_, String>>()?;
            }
            "modules_to_save" => self.modules_to_save = Some(names(key, value)?),
            "layers_pattern" => {
                let patterns = names(key, value)?;
                self.layers_pattern = Some(patterns.into_iter().filter(|p| !p.is_empty()).collect());
            }
            _ => {
                let indices: Option<Vec<usize>> = match value {
                    Value::Array(list) => list.iter().map(|v| whole(key, v).ok()).collect(),
                    one => whole(key, one).ok().map(|i| vec![i]),
                };
                self.layers_to_transform =
                    Some(indices.ok_or_else(|| unusable(key, value, "a layer number or a list of them"))?);
            }
        }
        Ok(())
    }

    /// Checks the fields against each other; the message names the field, as PEFT's do.
    pub fn validate(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::config("r should be a positive integer value but the value passed is 0"));
        }
        if let Some(TargetModules::Pattern(_)) = &self.target_modules {
            let used = |field: &str| {
                Error::config(format!("{field} cannot be used when target_modules is a string; give a list of names"))
            };
            if self.layers_to_transform.is_some() {
                return Err(used("layers_to_transform"));
            }
            if self.layers_pattern.is_some() {
                return Err(used("layers_pattern"));
            }
        }
        if self.init_weights == InitWeights::Mini && self.mini_r == 0 {
            return Err(Error::config("mini_r should be a positive integer value but the value passed is 0"));
        }
        if !(0.0..1.0).contains(&self.miss_dropout) {
            return Err(Error::config(format!(
                "miss_dropout is {}; it has to be a number from 0 to below 1",
                self.miss_dropout
            )));
        }
        let only_miss = [
            (self.init_weights == InitWeights::Mini, "init_weights = mini"),
            (self.miss_dropout > 0.0, "miss_dropout"),
        ];
        match only_miss.iter().find(|(used, _)| *used && self.peft_type == PeftType::Bone) {
            Some((_, field)) => {
                Err(Error::config(format!("{field} came with MiSS: peft_type has to be MISS, not BONE")))
            }
            None => Ok(()),
        }
    }

    /// Layers trained in full: those named, and those that PEFT adds for the task.
    pub fn saved_modules(&self) -> Vec<String> {
        let mut saved = self.modules_to_save.clone().unwrap_or_default();
        let added = self.task_type.map_or(&[][..], TaskType::saved_modules);
        for name in added {
            if !saved.iter().any(|s| s == name) {
                saved.push((*name).into());
            }
        }
        saved
    }
}

fn unusable(key: &str, value: &Value, allowed: &str) -> String {
    format!("{key} is {value}; allowed is {allowed}")
}

fn whole(key: &str, value: &Value) -> Result<usize, String> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| match value.as_i64() {
        Some(n) if key == "r" => format!("r should be a positive integer value but the value passed is {n}"),
        _ => unusable(key, value, "a whole number from 0"),
    })
}

fn text<'a>(key: &str, value: &'a Value, allowed: &[&str]) -> Result<&'a str, String> {
    value.as_str().ok_or_else(|| unusable(key, value, &allowed.join(", ")))
}

/// A name or a list of names.
fn names(key: &str, value: &Value) -> Result<Vec<String>, String> {
    let list = match value {
        Value::String(one) => Some(vec![one.clone()]),
        Value::Array(list) => list.iter().map(|v| v.as_str().map(str::to_string)).collect(),
        _ => None,
    };
    list.ok_or_else(|| unusable(key, value, "a list of names"))
}

fn modules(key: &str, value: &Value) -> Result<TargetModules, String> {
    match value {
        Value::String(pattern) => Ok(TargetModules::Pattern(pattern.clone())),
        Value::Array(_) => names(key, value).map(TargetModules::List),
        _ => Err(unusable(key, value, "a list of names, one regular expression, or all-linear")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: Value) -> Result<BoneConfig, String> {
        BoneConfig::from_json(&json, &mut Vec::new()).map_err(|e| e.to_string())
    }

    #[test]
    fn every_field_is_read_and_a_missing_one_keeps_its_default() {
        assert_eq!(read(json!({})).unwrap(), BoneConfig::default());
        let config = read(json!({
            "peft_type": "BONE", "r": 8, "target_modules": ["query"], "exclude_modules": ".*pooler.*",
            "init_weights": "bat", "mini_r": 2, "miss_dropout": 0.25, "layers_to_transform": 3, "layers_pattern": "layer",
            "bias": "bone_only", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "inference_mode": true,
            "packed_sizes": {"q_proj": 8},
        }))
        .unwrap();
        let wanted = BoneConfig {
            peft_type: PeftType::Bone,
            r: 8,
            target_modules: Some(TargetModules::List(vec!["query".into()])),
            exclude_modules: Some(TargetModules::Pattern(".*pooler.*".into())),
            init_weights: InitWeights::Bat,
            mini_r: 2,
            miss_dropout: 0.25,
            layers_to_transform: Some(vec![3]),
            layers_pattern: Some(vec!["layer".into()]),
            bias: Bias::Only,
            modules_to_save: Some(vec!["classifier".into()]),
            task_type: Some(TaskType::SeqCls),
            packed_sizes: BTreeMap::from([("q_proj".into(), 8)]),
        };
        assert_eq!(config, wanted);
        assert_eq!(config.saved_modules(), ["classifier", "score"]);
        assert_eq!(read(json!({"init_weights": null})).unwrap().init_weights, InitWeights::Random);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<BoneConfig>(&text).unwrap(), config);
    }

    #[test]
    fn a_value_that_a_field_cannot_have_is_named_with_what_is_allowed() {
        let cases = [
            (json!({"init_weights": "foo"}), "init_weights is \"foo\"; allowed are true, false, bat, mini"),
            (json!({"init_weights": 3}), "init_weights is 3"),
            (json!({"bias": "some"}), "bias is \"some\"; allowed are none, all, miss_only, bone_only"),
            (json!({"r": -1}), "r should be a positive integer value but the value passed is -1"),
            (json!({"r": 1.5}), "r is 1.5"),
            (json!({"task_type": "SEQ"}), "task_type is \"SEQ\"; allowed are SEQ_CLS"),
            (json!({"peft_type": "LORA"}), "peft_type is \"LORA\"; allowed are MISS, BONE"),
            (json!({"packed_sizes": {"q_proj": "8"}}), "packed_sizes is \"8\""),
            (json!({"target_modules": 7}), "target_modules is 7"),
            (json!({"layers_to_transform": ["a"]}), "layers_to_transform is"),
            (json!([1]), "one JSON object"),
        ];
        for (json, words) in cases {
            let text = read(json.clone()).expect_err("an error");
            assert!(text.contains(words), "{json}: {text}");
        }
    }

    #[test]
    fn fields_that_exclude_each_other_are_refused() {
        type Change = fn(&mut BoneConfig);
        let cases: [(Change, &str); 6] = [
            (|c| c.r = 0, "r should be a positive integer"),
            (|c| c.layers_pattern = Some(vec!["h".into()]), "layers_pattern cannot be used"),
            (|c| c.layers_to_transform = Some(vec![1]), "layers_to_transform cannot be used"),
            (|c| (c.init_weights, c.mini_r) = (InitWeights::Mini, 0), "mini_r should be a positive integer"),
            (|c| c.miss_dropout = 1.0, "miss_dropout is 1"),
            (|c| (c.peft_type, c.init_weights) = (PeftType::Bone, InitWeights::Mini), "came with MiSS"),
        ];
        for (change, words) in cases {
            let mut config =
                BoneConfig { target_modules: Some(TargetModules::Pattern(".*".into())), ..Default::default() };
            assert!(config.validate().is_ok());
            change(&mut config);
            let text = config.validate().expect_err("an error").to_string();
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn unknown_keys_are_ignored_with_a_warning() {
        let mut warnings = Vec::new();
        BoneConfig::from_json(&json!({"target_module": [], "corda_config": null}), &mut warnings).unwrap();
        assert_eq!(warnings.len(), 2);
        assert!(warnings.iter().any(|w| w.contains("target_module,") && w.contains("Did you mean target_modules")));
    }
}
