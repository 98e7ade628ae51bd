//! The one error type. A message says what is wrong, where (file, node, tensor) and how to fix it.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by whose hands could mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write `path`.
    #[error("{path}: cannot {action}: {source}")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// The bytes of `path` are not what they claim to be (not a model, truncated, hostile).
    #[error("{path}: {what}")]
    File { path: PathBuf, what: String },
    /// The model is well formed, but this cannot be done with it. The text names the node or tensor.
    #[error("{0}")]
    Model(String),
    /// A flag, a config field or an argument of the library call is unusable. The text names it.
    #[error("{0}")]
    Config(String),
    /// Training or evaluation data does not fit the model. The text names the file and the line or array.
    #[error("{0}")]
    Data(String),
    /// An inference engine failed or is missing.
    #[error("{engine}: {what}")]
    Engine { engine: &'static str, what: String },
    /// A check ran to its end and the answer is no (`verify`, `--safe-merge`).
    #[error("{0}")]
    Check(String),
}

impl Error {
    /// For `map_err`: `File::open(p).map_err(Error::io("open", p))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    pub fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), what: what.into() }
    }

    pub fn model(what: impl Into<String>) -> Error {
        Error::Model(what.into())
    }

    pub fn config(what: impl Into<String>) -> Error {
        Error::Config(what.into())
    }

    pub fn data(what: impl Into<String>) -> Error {
        Error::Data(what.into())
    }
}

/// `" Did you mean a, b or c?"` for the names nearest to `wanted`, or nothing where none is near.
pub fn did_you_mean<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> String {
    let mut near: Vec<(f64, &str)> = names
        .into_iter()
        .map(|name| {
            let tail = name.rsplit(['.', '/']).next().unwrap_or(name);
            (strsim::jaro_winkler(wanted, name).max(strsim::jaro_winkler(wanted, tail)), name)
        })
        .filter(|(score, _)| *score > 0.75)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    near.dedup_by(|a, b| a.1 == b.1);
    let near: Vec<&str> = near.into_iter().take(3).map(|(_, name)| name).collect();
    match near.as_slice() {
        [] => String::new(),
        [one] => format!(" Did you mean {one}?"),
        [head @ .., last] => format!(" Did you mean {} or {last}?", head.join(", ")),
    }
}
