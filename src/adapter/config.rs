//! The adapter's config, field by field that of PEFT's `BoneConfig` (0.18.1).

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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

/// How a block starts (PEFT's `init_weights`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value", into = "serde_json::Value")]
pub enum InitWeights {
    /// `true`: zeros, so that a fresh adapter changes nothing.
    #[default]
    Zeros,
    /// `false`: uniform in ±1/√out_features (Kaiming with a = √5 over fan-in = out).
    Random,
}

impl TryFrom<serde_json::Value> for InitWeights {
    type Error = String;

    fn try_from(value: serde_json::Value) -> std::result::Result<Self, String> {
        match value {
            serde_json::Value::Bool(true) => Ok(Self::Zeros),
            serde_json::Value::Bool(false) => Ok(Self::Random),
            serde_json::Value::String(s) => s.parse(),
            other => Err(format!("init_weights is {other}; use true or false")),
        }
    }
}

impl From<InitWeights> for serde_json::Value {
    fn from(init: InitWeights) -> Self {
        serde_json::Value::Bool(init == InitWeights::Zeros)
    }
}

impl std::str::FromStr for InitWeights {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "true" => Ok(Self::Zeros),
            "false" => Ok(Self::Random),
            _ => Err(format!("init_weights is {text:?}; use true (zeros) or false (random)")),
        }
    }
}

/// PEFT's `BoneConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoneConfig {
    /// Rows of the block `[r, out_features]` that is tiled over the input dimension.
    #[serde(default = "default_r")]
    pub r: usize,
    #[serde(default)]
    pub target_modules: Option<TargetModules>,
    #[serde(default)]
    pub exclude_modules: Option<TargetModules>,
    #[serde(default)]
    pub init_weights: InitWeights,
    #[serde(default)]
    pub layers_to_transform: Option<Vec<usize>>,
    #[serde(default)]
    pub layers_pattern: Option<Vec<String>>,
}

fn default_r() -> usize {
    64
}

impl Default for BoneConfig {
    fn default() -> Self {
        Self {
            r: default_r(),
            target_modules: None,
            exclude_modules: None,
            init_weights: InitWeights::default(),
            layers_to_transform: None,
            layers_pattern: None,
        }
    }
}

impl BoneConfig {
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
        Ok(())
    }
}
