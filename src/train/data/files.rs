//! Which files `--data` names, and of what kind they are: paths, globs, folders.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::record::RecordFormat;
use super::room::Room;
use super::{Array, arrays, arrow, csv, folder, jsonl};
use crate::{Error, Result};

/// A kind of data file, told by the end of its name.
pub(super) struct Format {
    extensions: &'static [&'static str],
    pub read: Read,
}

type Arrays = Vec<(String, Array)>;

/// How a file is read.
pub(super) enum Read {
    /// All of it at once: arrays by name, one row per sample.
    Arrays(fn(&Path, &Room) -> Result<Arrays>),
    /// Row by row.
    Records(RecordFormat),
}

static FORMATS: [Format; 6] = [
    Format { extensions: &["safetensors"], read: Read::Arrays(arrays::safetensors) },
    Format { extensions: &["npz"], read: Read::Arrays(arrays::npz) },
    Format { extensions: &["jsonl", "ndjson"], read: Read::Records(jsonl::FORMAT) },
    Format { extensions: &["csv", "tsv"], read: Read::Records(csv::FORMAT) },
    Format { extensions: &["parquet"], read: Read::Records(arrow::PARQUET) },
    Format { extensions: &["arrow", "feather"], read: Read::Records(arrow::IPC) },
];

/// Of a directory with a folder per class.
static IMAGE_FOLDER: Format = Format { extensions: &[], read: Read::Records(folder::FORMAT) };

impl Format {
    fn of(path: &Path) -> Result<&'static Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        FORMATS.iter().find(|f| f.extensions.contains(&extension.as_str())).ok_or_else(|| {
            let known: Vec<String> = FORMATS.iter().flat_map(|f| f.extensions).map(|e| format!(".{e}")).collect();
            Error::data(format!(
                "{}: data files are told apart by their names, and this one ends in none of {}",
                path.display(),
                known.join(", ")
            ))
        })
    }
}

/// Files of one kind.
pub(super) struct Files {
    pub format: &'static Format,
    /// At least one; for a folder of images, the folder.
    pub paths: Vec<PathBuf>,
}

impl Files {
    /// What `patterns` name: each a file, a glob, a folder that `datasets` saved, or a folder of images. Files of a glob
    /// come in the order of their names.
    pub fn find(patterns: &[PathBuf]) -> Result<Self> {
        let mut found: Vec<(&'static Format, PathBuf)> = Vec::new();
        for pattern in patterns {
            for path in expand(pattern)? {
                if path.is_dir() {
                    of_directory(&path, &mut found)?;
                } else {
                    found.push((Format::of(&path)?, path));
                }
            }
        }
        let Some((format, first)) = found.first() else {
            return Err(Error::config("no data file was given"));
        };
        if let Some((_, other)) = found.iter().find(|(f, _)| !std::ptr::eq(*f, *format)) {
            return Err(Error::data(format!(
                "{} and {} are of different kinds; give files of one kind",
                first.display(),
                other.display()
            )));
        }
        Ok(Self { format, paths: found.into_iter().map(|(_, path)| path).collect() })
    }

    /// Every single file, those in folders of images too.
    pub fn all(&self) -> Result<Vec<PathBuf>> {
        if !std::ptr::eq(self.format, &IMAGE_FOLDER) {
            return Ok(self.paths.clone());
        }
        let mut all = Vec::new();
        for root in &self.paths {
            all.extend(folder::images(root)?.into_iter().map(|(path, _)| path));
        }
        Ok(all)
    }

    /// What messages call them.
    pub fn name(&self) -> PathBuf {
        match self.paths.as_slice() {
            [only] => only.clone(),
            [first, more @ ..] => format!("{} and {} more", first.display(), more.len()).into(),
            [] => PathBuf::new(),
        }
    }
}

fn expand(pattern: &Path) -> Result<Vec<PathBuf>> {
    let text = pattern.to_string_lossy();
    if pattern.exists() || !text.contains(['*', '?', '[']) {
        return Ok(vec![pattern.into()]);
    }
    let paths = glob::glob(&text).map_err(|e| Error::config(format!("{text}: this is no pattern ({e})")))?;
    let paths = paths.collect::<Result<Vec<_>, _>>();
    let paths = paths.map_err(|e| Error::io("read", e.path().to_path_buf())(e.into()))?;
    if paths.is_empty() {
        return Err(Error::data(format!("{text}: no file has such a name")));
    }
    Ok(paths)
}

fn of_directory(path: &Path, found: &mut Vec<(&'static Format, PathBuf)>) -> Result<()> {
    let json = |name: &str| -> Result<Option<Value>> {
        let file = path.join(name);
        if !file.is_file() {
            return Ok(None);
        }
        let bytes = fs::read(&file).map_err(Error::io("read", &file))?;
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::file(&file, format!("this is no JSON ({e})")))
    };
    if let Some(dict) = json("dataset_dict.json")? {
        let splits = dict["splits"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let splits: Vec<String> = splits.map(|s| path.join(s).display().to_string()).collect();
        return Err(Error::data(format!(
            "{}: it holds several splits; give one: {}",
            path.display(),
            splits.join(", ")
        )));
    }
    if let Some(state) = json("state.json")? {
        let shards = state["_data_files"].as_array().into_iter().flatten().map(|file| file["filename"].as_str());
        let shards: Option<Vec<&str>> = shards.collect();
        let plain = |name: &str| Path::new(name).file_name().is_some_and(|n| n == name);
        return match shards.filter(|shards| !shards.is_empty() && shards.iter().all(|name| plain(name))) {
            Some(shards) => {
                let format = Format::of(Path::new("data.arrow"))?;
                found.extend(shards.into_iter().map(|name| (format, path.join(name))));
                Ok(())
            }
            None => Err(Error::file(path.join("state.json"), "it lists no data files that lie beside it")),
        };
    }
    if folder::is_one(path) {
        found.push((&IMAGE_FOLDER, path.into()));
        return Ok(());
    }
    Err(Error::data(format!(
        "{}: this folder is neither one that `datasets` saved (state.json), nor one of folders of images; name files in it \
         by a pattern, as in '{}/*.parquet'",
        path.display(),
        path.display()
    )))
}
