//! Files beside a model that is written: where they may stand, what they are called, and who else uses them.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::external::{self, ExternalData, checked_relative};
use super::{Durability, Model, Origin, Patch, Rope};
use crate::{Error, Result};

/// The directory of the model at `path`.
pub(super) fn directory(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where the data file that a model in `dir` calls `location` is to be written. Directories on the way are made.
///
/// # Errors
/// A location that leads out of `dir`, by its parts or by a symbolic link.
pub(super) fn landing(dir: &Path, location: &str) -> Result<PathBuf> {
    let bad = |what: &str| Error::config(format!("{}: the data file {location:?} {what}", dir.display()));
    let relative = checked_relative(location)
        .map_err(|_| bad("is not a plain relative path, so it is not written: it could lead anywhere"))?;
    let mut path = dir.to_path_buf();
    for part in relative.components() {
        path.push(part);
        if path.is_symlink() {
            return Err(bad("leads over a symbolic link, so it is not written: it could lead anywhere"));
        }
    }
    if path.is_dir() {
        return Err(bad("is a directory"));
    }
    if let Some(parent) = path.parent().filter(|p| !p.exists()) {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    Ok(path)
}

/// Writes the model that results from `patch` to `out` (which may be the model's own path), with its data files beside
/// it: nothing is done where they are there already.
///
/// # Errors
/// A data file of another model that has the name; those of the file system.
pub fn write_beside(model: &Model, patch: Patch, out: &Path, durability: Durability) -> Result<()> {
    let locations = external::locations(model)?;
    let named = locations.iter().map(|old| (old.as_str(), patch.moved.get(old).map_or(old, |m| &m.location).as_str()));
    copy(model, named, out, durability)?;
    model.write_as(model.patched(patch)?, out, durability)
}

/// Copies the external files in `locations` beside `out`, under the names the model calls them by. Nothing is done
/// where they already are those files, or have their content.
///
/// # Errors
/// A file of that name that holds something else.
pub fn copy_external(model: &Model, locations: &[String], out: &Path, durability: Durability) -> Result<()> {
    copy(model, locations.iter().map(|l| (l.as_str(), l.as_str())), out, durability)
}

/// Copies data files, each called by the model as the first of a pair, to be called the second.
fn copy<'a>(
    model: &Model,
    named: impl Iterator<Item = (&'a str, &'a str)>,
    out: &Path,
    durability: Durability,
) -> Result<()> {
    let dir = directory(out);
    for (old, new) in named {
        let source = model
            .external
            .file(old)
            .map_err(|what| Error::file(&model.path, format!("its external data is at {old:?}, {what}")))?;
        if is_at(dir, new, &source, model.external.resolve(old).ok().as_deref()) {
            continue;
        }
        let to = landing(dir, new)?;
        if to.exists() {
            return Err(Error::config(format!(
                "{} is another model's data file and would be overwritten; write to another directory",
                to.display()
            )));
        }
        super::atomic::create(&to, Rope::from(source.bytes.clone()), &[source], None, durability)?;
    }
    Ok(())
}

/// True where a model in `dir` finds `source` (which really is at `real`) under the name `location`: the file itself, or
/// one with its content.
pub(super) fn is_at(dir: &Path, location: &str, source: &Origin, real: Option<&Path>) -> bool {
    let there = ExternalData::beside(dir);
    match there.resolve(location) {
        Ok(path) if Some(path.as_path()) == real => true,
        Ok(_) => there.file(location).is_ok_and(|there| there.bytes == source.bytes),
        Err(_) => false,
    }
}

/// The first of `candidates` that no file in `dir` has, and where it stands.
pub(super) fn free(
    dir: &Path,
    candidates: impl Iterator<Item = String>,
    taken: &mut HashSet<PathBuf>,
) -> Result<(String, PathBuf)> {
    let mut last = None;
    for location in candidates {
        match landing(dir, &location) {
            Ok(path) if !path.exists() && taken.insert(path.clone()) => return Ok((location, path)),
            Ok(_) => {}
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| Error::config(format!("{}: no name is free for a data file", dir.display()))))
}

/// Names for the data file of `out` that takes the place of `location`, the most wanted first: its own, then names after
/// `out`. `only`: `out` has no other data file.
pub(super) fn names(location: &str, out: &Path, only: bool) -> impl Iterator<Item = String> {
    const TRIES: usize = 1000;
    let text = |part: Option<&std::ffi::OsStr>| part.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let (whole, stem) = (text(out.file_name()), text(out.file_stem()));
    let first = location.rsplit('/').next().unwrap_or(location).to_string();
    // What an earlier writing put before it goes again.
    let own = first.strip_prefix(&format!("{stem}."));
    let counted = own.and_then(|own| own.split_once('.')).filter(|(n, _)| n.parse::<usize>().is_ok());
    let file = counted.map(|(_, rest)| rest).or(own).unwrap_or(&first).to_string();
    let numbered = move |n: usize| {
        let n = if n == 0 { String::new() } else { format!(".{n}") };
        match () {
            _ if !only => format!("{stem}{n}.{file}"),
            _ if file.ends_with("safetensors") => format!("{stem}{n}.safetensors"),
            _ => format!("{whole}{n}.data"),
        }
    };
    std::iter::once(first).chain((0..TRIES).map(numbered))
}

/// The data files of the model at `path`, each as it is named and where it really is.
pub(super) fn files_of(path: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let model = Model::open(path)?;
    let named = |location: String| {
        let real = model.external.resolve(&location).ok()?;
        Some((model.external.dir().join(checked_relative(&location).ok()?), real))
    };
    Ok(external::locations(&model)?.into_iter().filter_map(named).collect())
}

/// True where a model other than `model` keeps tensors in `file` (a real path). Such a model is in the file's directory
/// or above it: any file of the first, what is called `.onnx` of the others.
pub(super) fn is_used_by_others(file: &Path, model: &Path) -> bool {
    let model = fs::canonicalize(model).unwrap_or_else(|_| model.to_path_buf());
    file.ancestors().skip(1).enumerate().any(|(above, dir)| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.path()).any(|path| {
            let may_be = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx")) || above == 0;
            may_be
                && path != file
                && fs::canonicalize(&path).is_ok_and(|real| real != model)
                && path.metadata().is_ok_and(|m| m.len() <= super::model::LARGEST as u64)
                && files_of(&path).is_ok_and(|files| files.iter().any(|(_, real)| real == file))
        })
    })
}
