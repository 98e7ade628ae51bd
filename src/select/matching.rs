//! PEFT's rules for which module paths a config means (`check_target_module_exists` in `peft/tuners/tuners_utils.py`,
//! 0.16.0 and 0.21.2).

use fancy_regex::Regex;

use crate::adapter::{BoneConfig, PeftType, TargetModules};
use crate::words::words;
use crate::{Error, Result};

/// Whose reading of `layers_to_transform`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// Up to PEFT 0.20: the last numbered segment of a path is the layer's index, and it never starts the path.
    Peft016,
    /// From PEFT 0.21: the first numbered segment counts, so that an expert's index is not taken for the layer's.
    #[default]
    Peft021,
}

impl Version {
    /// The reading of the PEFT that knew the config's type best: Bone was gone before the newer one came.
    pub fn of(config: &BoneConfig) -> Self {
        match config.peft_type {
            PeftType::Bone => Self::Peft016,
            PeftType::Miss => Self::Peft021,
        }
    }
}

words!(Version, "version of the matching rules (0.16: PEFT up to 0.20, 0.21: from 0.21)" {
    Peft016 = "0.16",
    Peft021 = "0.21",
});

/// The answer for one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Match,
    No,
    /// Named by `exclude_modules`.
    Excluded,
    /// In a module that is trained in full ([`BoneConfig::saved_modules`]).
    Saved,
}

/// A config's patterns, compiled.
pub struct Matcher {
    targets: Names,
    exclude: Option<Names>,
    save: Vec<Regex>,
    layers: Option<(Vec<usize>, Vec<Regex>)>,
}

enum Names {
    List(Vec<String>),
    /// `all-linear`, which PEFT turns into the list of all paths.
    All,
    Pattern(Regex),
}

impl Names {
    fn compile(names: &TargetModules, field: &str) -> Result<Self> {
        Ok(match names {
            TargetModules::List(list) => Self::List(list.clone()),
            TargetModules::Pattern(text) => Self::Pattern(pattern(field, text)?),
        })
    }

    fn matches(&self, path: &str) -> Result<bool> {
        Ok(match self {
            Self::List(list) => list.iter().any(|name| path == name || is_suffix(name, path)),
            Self::All => true,
            Self::Pattern(regex) => is_match(regex, path)?,
        })
    }
}

impl Matcher {
    /// # Errors
    /// Names the field: `target_modules` missing, or a pattern that is no regular expression.
    pub fn new(config: &BoneConfig, version: Version) -> Result<Self> {
        let targets = config.target_modules.as_ref().ok_or_else(|| {
            Error::config("target_modules is not set; name the layers to adapt (query,value) or give all-linear")
        })?;
        let targets = if targets.is_all_linear() { Names::All } else { Names::compile(targets, "target_modules")? };
        let is_set = |names: &&TargetModules| match names {
            TargetModules::List(list) => !list.is_empty(),
            TargetModules::Pattern(pattern) => !pattern.is_empty(),
        };
        let exclude = config.exclude_modules.as_ref().filter(is_set);
        let exclude = exclude.map(|names| Names::compile(names, "exclude_modules")).transpose()?;
        let save = config
            .saved_modules()
            .iter()
            .map(|name| compile("modules_to_save", name, |p| format!(r"^(?:(^|.*\.){p}($|\..*))")))
            .collect::<Result<_>>()?;
        let indices = config.layers_to_transform.as_ref().filter(|indices| !indices.is_empty());
        let layers = indices.map(|indices| Ok((indices.clone(), layer_patterns(config, version)?)));
        Ok(Self { targets, exclude, save, layers: layers.transpose()? })
    }

    pub fn check(&self, path: &str) -> Result<Verdict> {
        if let Some(exclude) = &self.exclude
            && exclude.matches(path)?
        {
            return Ok(Verdict::Excluded);
        }
        for saved in &self.save {
            if is_match(saved, path)? {
                return Ok(Verdict::Saved);
            }
        }
        if !self.targets.matches(path)? {
            return Ok(Verdict::No);
        }
        // A path that is listed in full is meant whatever its layer.
        let by_suffix = matches!(&self.targets, Names::List(list) if !list.iter().any(|name| name == path));
        match &self.layers {
            Some((indices, patterns))
                if by_suffix && !layer_of(patterns, path)?.is_some_and(|i| indices.contains(&i)) =>
            {
                Ok(Verdict::No)
            }
            _ => Ok(Verdict::Match),
        }
    }
}

/// True where `path` ends with the whole segments of `name`.
pub fn is_suffix(name: &str, path: &str) -> bool {
    path.strip_suffix(name).is_some_and(|front| front.ends_with('.'))
}

fn layer_patterns(config: &BoneConfig, version: Version) -> Result<Vec<Regex>> {
    let before = |pattern: &str| match version {
        Version::Peft016 => format!(r"^(?:.*\.{pattern}\.(?P<bone_layer>\d+)\.)"),
        Version::Peft021 => format!(r"^(?:(?:^|.*?\.){pattern}\.(?P<bone_layer>\d+)\.)"),
    };
    match config.layers_pattern.as_deref() {
        None | Some([]) => {
            // Any segment before the number; it does not start the path in either version.
            let any = match version {
                Version::Peft016 => r"^.*\.[^.]*\.(?P<bone_layer>\d+)\.",
                Version::Peft021 => r"^.*?\.[^.]*\.(?P<bone_layer>\d+)\.",
            };
            Ok(vec![compile("layers_pattern", any, str::to_string)?])
        }
        Some(patterns) => patterns.iter().map(|p| compile("layers_pattern", p, before)).collect(),
    }
}

/// The layer's index, by the first pattern that fits.
fn layer_of(patterns: &[Regex], path: &str) -> Result<Option<usize>> {
    for pattern in patterns {
        if let Some(found) = pattern.captures(path).map_err(too_hard)? {
            return Ok(found.name("bone_layer").and_then(|digits| digits.as_str().parse().ok()));
        }
    }
    Ok(None)
}

/// A user's `pattern`, which has to match the whole of a name.
pub fn pattern(field: &str, text: &str) -> Result<Regex> {
    compile(field, text, |p| format!("^(?:{p})$"))
}

/// Compiles a user's `pattern` of Python's syntax as a part of what `frame` makes of it.
fn compile(field: &str, pattern: &str, frame: impl Fn(&str) -> String) -> Result<Regex> {
    let bad = |e: fancy_regex::Error| {
        Error::config(format!("{field}: {pattern:?} is not a valid regular expression: {}", first_line(&e.to_string())))
    };
    let pattern = from_python(pattern);
    // On its own first: an unbalanced parenthesis must not close the frame's.
    Regex::new(&pattern).map_err(bad)?;
    Regex::new(&frame(&pattern)).map_err(bad)
}

pub fn is_match(regex: &Regex, path: &str) -> Result<bool> {
    regex.is_match(path).map_err(too_hard)
}

fn too_hard(e: fancy_regex::Error) -> Error {
    Error::config(format!("a pattern takes too long to match ({e}); write it without nested repetitions"))
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Where Python's regular expressions and this crate's spell things differently: `\Z` is the very end, and a bracket
/// or `&&`, `--`, `~~` inside a character class are plain characters.
fn from_python(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut chars = pattern.chars().peekable();
    let mut in_class = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('Z') if !in_class => out.push_str(r"\z"),
                Some(escaped) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            '[' if !in_class => {
                in_class = true;
                out.push('[');
                out.extend(chars.next_if_eq(&'^'));
                // A bracket that comes first closes nothing; a hyphen that comes first is no range.
                if let Some(first) = chars.next_if(|c| matches!(c, ']' | '-')) {
                    out.extend(['\\', first]);
                }
            }
            ']' if in_class => {
                in_class = false;
                out.push(']');
            }
            '[' => out.push_str(r"\["),
            '&' | '~' if in_class => out.extend(['\\', c]),
            // A range that ends in the hyphen.
            '-' if in_class && chars.next_if_eq(&'-').is_some() => out.push_str(r"-\-"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::Value;

    use super::*;

    fn cases(file: &str) -> Vec<Value> {
        let base = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared"));
        let text = std::fs::read(base.join("goldens").join(file)).unwrap();
        let mut document: Value = serde_json::from_slice(&text).unwrap();
        serde_json::from_value(document["cases"].take()).unwrap()
    }

    /// A field that is one value or a list of them.
    fn list<T: serde::de::DeserializeOwned>(value: &Value) -> Option<Vec<T>> {
        match value {
            Value::Null => None,
            Value::Array(_) => serde_json::from_value(value.clone()).unwrap(),
            Value::String(s) if s.is_empty() => Some(Vec::new()),
            one => serde_json::from_value(Value::Array(vec![one.clone()])).unwrap(),
        }
    }

    fn answer(case: &Value, version: Version) -> &'static str {
        let names = |field: &str| serde_json::from_value::<Option<TargetModules>>(case[field].clone()).unwrap();
        let config = BoneConfig {
            target_modules: names("target_modules"),
            exclude_modules: names("exclude_modules"),
            layers_to_transform: list(&case["layers_to_transform"]),
            layers_pattern: list(&case["layers_pattern"]),
            modules_to_save: list(&case["modules_to_save"]),
            ..Default::default()
        };
        match Matcher::new(&config, version).unwrap().check(case["key"].as_str().unwrap()).unwrap() {
            Verdict::Match => "match",
            Verdict::No => "no",
            Verdict::Excluded | Verdict::Saved => "excluded",
        }
    }

    #[test]
    fn peft_016_answers_all_its_cases() {
        let cases = cases("match_bone.json");
        assert_eq!(cases.len(), 126);
        for case in &cases {
            assert_eq!(answer(case, Version::Peft016), case["result"], "{case}");
        }
    }

    #[test]
    fn peft_021_differs_in_seven() {
        let newer = cases("match_miss.json");
        assert_eq!(newer.len(), 7);
        let question = |case: &Value| {
            let mut case = case.clone();
            case["result"].take();
            case
        };
        let mut differ = 0;
        for older in cases("match_bone.json") {
            let case = newer.iter().find(|case| question(case) == question(&older));
            differ += usize::from(case.is_some());
            assert_eq!(answer(&older, Version::Peft021), case.unwrap_or(&older)["result"], "{older}");
        }
        assert_eq!(differ, 7);
    }

    #[test]
    fn versions_have_names() {
        for word in ["0.16", "0.21"] {
            assert_eq!(word.parse::<Version>().unwrap().to_string(), word);
        }
        let complaint = "0.20".parse::<Version>().unwrap_err();
        assert!(
            complaint.contains("0.16: PEFT up to 0.20") && complaint.contains("allowed are 0.16, 0.21"),
            "{complaint}"
        );
    }

    fn pattern_matches(pattern: &str, path: &str) -> Result<bool> {
        let target_modules = Some(TargetModules::Pattern(pattern.into()));
        let config = BoneConfig { target_modules, ..Default::default() };
        Ok(Matcher::new(&config, Version::default())?.check(path)? == Verdict::Match)
    }

    #[test]
    fn python_syntax() {
        // Each answered by `bool(re.fullmatch(pattern, path))` of Python 3.
        let cases = [
            (r".*\.q\Z", "a.q", true),
            (r"a|ab", "ab", true),
            (r"(?P<x>q|k)_(?P=x)", "q_q", true),
            (r"(?P<x>q|k)_(?P=x)", "q_k", false),
            (r"(?!.*head).*", "a.head.q", false),
            (r"(?<=x)a", "xa", false),
            (r"layer\.[[0-3]\.q", "layer.[.q", true),
            (r"layer\.[^]]\.q", "layer.1.q", true),
            (r"[a&&b]+", "a&b", true),
            (r"[+--]+", "+,-", true),
            (r"[-a]+", "a-a", true),
            (r"[^-a]", "-", false),
            (r"[\w.]+", "a.b_1", true),
            (r"(?i)A\.B", "a.b", true),
            (r"layers\.\d{1,2}\.q", "layers.12.q", true),
            (r"layers\.\d{1,2}\.q", "layers.123.q", false),
        ];
        for (pattern, path, wanted) in cases {
            assert_eq!(pattern_matches(pattern, path).unwrap(), wanted, "{pattern} on {path}");
        }
    }

    #[test]
    fn a_bad_pattern_is_named() {
        for pattern in ["(q", "q)|(v", "[q", "*q", "(?P<x"] {
            let error = pattern_matches(pattern, "q").unwrap_err().to_string();
            assert!(error.contains("target_modules") && error.contains(&format!("{pattern:?}")), "{error}");
        }
        let endless = pattern_matches(r"(?:(a|a)*)*(?=b)\1c", &"a".repeat(60));
        assert!(endless.is_err() || !endless.unwrap());
    }
}
