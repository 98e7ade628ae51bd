//! External data: tensors whose bytes stand in files beside the model. Models come from strangers, so a location is
//! followed only to a regular file inside the model's directory, and ranges are checked before anything is mapped.
//! Source: ONNX `docs/ExternalData.md`; the attacks in question are those of CVE-2022-25882, CVE-2024-27318 and the
//! hard-link and symlink ones of 2026.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use bytes::Bytes;

use super::proto::StringStringEntryProto;
use super::proto::tensor_proto::DataLocation;
use super::{Durability, Model, TensorProto, walk_graphs};
use crate::{Error, Result};

/// The external files of one model, mapped when first asked for.
#[derive(Debug)]
pub struct ExternalData {
    dir: PathBuf,
    maps: Mutex<HashMap<PathBuf, Bytes>>,
}

/// Where a tensor's bytes stand: `location` as written in the model, the range inside that file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub location: String,
    pub offset: u64,
    /// `None`: to the end of the file.
    pub length: Option<u64>,
}

impl Place {
    /// A tensor with nothing but this place.
    pub fn entries(&self) -> TensorProto {
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
        let mut external_data =
            vec![entry("location", self.location.clone()), entry("offset", self.offset.to_string())];
        external_data.extend(self.length.map(|len| entry("length", len.to_string())));
        TensorProto { external_data, data_location: Some(DataLocation::External as i32), ..Default::default() }
    }
}

impl ExternalData {
    /// Files are looked for in `dir`, the model's own directory.
    pub fn beside(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), maps: Mutex::default() }
    }

    /// The bytes of an external tensor; no copy is made.
    pub fn bytes(&self, tensor: &TensorProto) -> Result<Bytes> {
        let place = place(tensor)?;
        let name = tensor.name();
        let path = self.resolve(&place.location).map_err(|what| {
            Error::model(format!("tensor {name}: its external data is at {:?}, {what}", place.location))
        })?;
        let whole = self.map(&path, name)?;
        let size = whole.len() as u64;
        let end = match place.length {
            Some(len) => place.offset.checked_add(len),
            None => Some(size),
        };
        match end {
            Some(end) if end <= size && place.offset <= end => Ok(whole.slice(place.offset as usize..end as usize)),
            _ => Err(Error::file(
                path,
                format!(
                    "tensor {name} should be at bytes {}..{}, but the file has {size} bytes: it is too short; \
                     copy the whole file again from where the model came from",
                    place.offset,
                    end.map_or("beyond 2^64".into(), |e| e.to_string()),
                ),
            )),
        }
    }

    /// The file that `location` means, or why it is not followed.
    pub fn resolve(&self, location: &str) -> Result<PathBuf, String> {
        let relative = checked_relative(location)?;
        let path = self.dir.join(relative);
        let missing = |e: std::io::Error| format!("which cannot be opened in {}: {e}", self.dir.display());
        let dir = fs::canonicalize(&self.dir).map_err(missing)?;
        let real = fs::canonicalize(&path).map_err(missing)?;
        // A download cache keeps models as links to content files beside its snapshots: links/…/model.onnx and
        // links/…/model.onnx.data both point into ../../blobs. Such a link is the layout's own, so it is followed
        // when the model's directory is one of a cache's `snapshots`.
        if !real.starts_with(&dir) && !is_cache_blob(&dir, &real) {
            return Err("which is a link out of the model's directory; such files are not opened".into());
        }
        let meta = fs::metadata(&real).map_err(missing)?;
        if !meta.is_file() {
            return Err("which is not a regular file".into());
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            if meta.nlink() > 1 && !is_cache_blob(&dir, &real) {
                return Err(
                    "which has more than one hard link, so its content may be another file's; copy it first".into()
                );
            }
        }
        Ok(real)
    }

    fn map(&self, path: &Path, tensor: &str) -> Result<Bytes> {
        let mut maps = self.maps.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(bytes) = maps.get(path) {
            return Ok(bytes.clone());
        }
        let bytes = map_file(path)
            .map_err(|e| Error::model(format!("tensor {tensor}: cannot open {}: {e}", path.display())))?;
        maps.insert(path.to_path_buf(), bytes.clone());
        Ok(bytes)
    }
}

/// The file's content as a memory map (an empty file as no bytes).
pub(crate) fn map_file(path: &Path) -> std::io::Result<Bytes> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is read-only and private. Another process that truncates the file while we read it can make the
    // reads fault; our own writes go to new files that are renamed into place, never to a mapped one.
    Ok(Bytes::from_owner(unsafe { memmap2::Mmap::map(&file)? }))
}

/// Locations of all external files that the model's tensors name, in order, each once.
pub fn locations(model: &Model) -> Result<Vec<String>> {
    let mut places = Vec::new();
    walk_graphs(model.graph(), &mut |_, graph| {
        let attributes = graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.t.as_ref());
        places.extend(graph.initializer.iter().chain(attributes).filter(|t| is_external(t)).map(place));
    });
    let mut locations = Vec::new();
    for place in places {
        let location = place?.location;
        if !locations.contains(&location) {
            locations.push(location);
        }
    }
    Ok(locations)
}

/// Copies the external files in `locations` beside `out`, under the names the model calls them by. Nothing is done
/// where they already are those files. A file that is there and is not known to belong to `out` is not overwritten.
pub fn copy_external(model: &Model, locations: &[String], out: &Path, durability: Durability) -> Result<()> {
    let dir = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for location in locations {
        let from = model
            .external
            .resolve(location)
            .map_err(|what| Error::file(&model.path, format!("its external data is at {location:?}, {what}")))?;
        let to = dir.join(
            checked_relative(location).map_err(|what| Error::file(&model.path, format!("{location:?}, {what}")))?,
        );
        if fs::canonicalize(&to).is_ok_and(|real| real == from) {
            continue;
        }
        if to.exists() && !belongs_to(out, location) && !same_content(&from, &to) {
            return Err(Error::config(format!(
                "{} is another model's data file and would be overwritten; write to another directory",
                to.display()
            )));
        }
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        let mut source = File::open(&from).map_err(Error::io("read", &from))?;
        let len = source.metadata().map_err(Error::io("read", &from))?.len();
        super::atomic::replace(&to, len, durability, |file| Ok(std::io::copy(&mut source, file).map(|_| ())?))?;
    }
    Ok(())
}

/// True where the model that stands at `out` (about to be replaced) keeps its data at `location`.
pub fn belongs_to(out: &Path, location: &str) -> bool {
    Model::open(out).and_then(|m| locations(&m)).is_ok_and(|l| l.iter().any(|l| l == location))
}

fn same_content(a: &Path, b: &Path) -> bool {
    match (map_file(a), map_file(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// True where the tensor's bytes stand in another file.
pub fn is_external(tensor: &TensorProto) -> bool {
    tensor.data_location() == DataLocation::External
}

/// Reads `external_data` of a tensor whose `data_location` is EXTERNAL.
pub fn place(tensor: &TensorProto) -> Result<Place> {
    let entry = |key: &str| tensor.external_data.iter().find(|e| e.key() == key).map(|e| e.value());
    let number = |key: &str| {
        entry(key)
            .map(|v| {
                v.parse::<u64>().map_err(|_| {
                    Error::model(format!("tensor {}: external data has {key} {v:?}, not a number", tensor.name()))
                })
            })
            .transpose()
    };
    let location = entry("location")
        .ok_or_else(|| Error::model(format!("tensor {}: external data without a location", tensor.name())))?;
    Ok(Place { location: location.into(), offset: number("offset")?.unwrap_or(0), length: number("length")? })
}

/// `location` as a path that stays below where it starts, or why it does not.
pub fn checked_relative(location: &str) -> Result<PathBuf, String> {
    let bad = "which is not a plain relative path inside the model's directory; such files are not opened";
    if location.is_empty() || location.contains(['\0', '\\']) || location.get(1..2) == Some(":") {
        return Err(bad.into());
    }
    let mut path = PathBuf::new();
    for part in Path::new(location).components() {
        match part {
            Component::Normal(p) => path.push(p),
            Component::CurDir => {}
            _ => return Err(bad.into()),
        }
    }
    if path.as_os_str().is_empty() { Err(bad.into()) } else { Ok(path) }
}

/// True where `real` is `<cache>/blobs/<hash>` and `dir` is below `<cache>/snapshots/`.
fn is_cache_blob(dir: &Path, real: &Path) -> bool {
    let Some(blobs) = real.parent().filter(|p| p.file_name().is_some_and(|n| n == "blobs")) else { return false };
    let Some(cache) = blobs.parent() else { return false };
    dir.starts_with(cache.join("snapshots"))
}
