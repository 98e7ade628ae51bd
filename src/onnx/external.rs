//! External data: tensors whose bytes stand in files beside the model. Models come from strangers, so a location is
//! followed only to a regular file inside the model's directory, and ranges are checked before anything is mapped.
//! Source: ONNX `docs/ExternalData.md`; the attacks in question are those of CVE-2022-25882, CVE-2024-27318 and the
//! hard-link and symlink ones of 2026.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::proto::StringStringEntryProto;
use super::proto::tensor_proto::DataLocation;
use super::{Model, Origin, TensorProto, walk_graphs};
use crate::{Error, Result};

/// The external files of one model, mapped when first asked for.
#[derive(Debug)]
pub struct ExternalData {
    dir: PathBuf,
    maps: Mutex<HashMap<PathBuf, Origin>>,
}

/// Where a tensor's bytes stand: `location` as written in the model, the range inside that file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub location: String,
    pub offset: u64,
    /// `None`: to the end of the file.
    pub length: Option<u64>,
    /// SHA-1 of the whole file, in hexadecimal, where the model says one.
    pub checksum: Option<String>,
}

impl Place {
    /// A tensor with nothing but this place.
    pub fn entries(&self) -> TensorProto {
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
        let mut external_data =
            vec![entry("location", self.location.clone()), entry("offset", self.offset.to_string())];
        external_data.extend(self.length.map(|len| entry("length", len.to_string())));
        external_data.extend(self.checksum.clone().map(|sum| entry("checksum", sum)));
        TensorProto { external_data, data_location: Some(DataLocation::External as i32), ..Default::default() }
    }

    /// The bytes that this place means in a file of `size` bytes; `None` where they are not all there.
    pub fn range(&self, size: usize) -> Option<std::ops::Range<usize>> {
        let offset = usize::try_from(self.offset).ok()?;
        let end = match self.length {
            Some(len) => offset.checked_add(usize::try_from(len).ok()?)?,
            None => size,
        };
        (offset <= end && end <= size).then_some(offset..end)
    }
}

impl ExternalData {
    /// Files are looked for in `dir`, the model's own directory.
    pub fn beside(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), maps: Mutex::default() }
    }

    /// The model's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The bytes of an external tensor; no copy is made.
    pub fn bytes(&self, tensor: &TensorProto) -> Result<Bytes> {
        let place = place(tensor)?;
        let name = tensor.name();
        let whole = self.file(&place.location).map_err(|what| {
            Error::model(format!("tensor {name}: its external data is at {:?}, {what}", place.location))
        })?;
        let size = whole.bytes.len();
        match place.range(size) {
            Some(range) => Ok(whole.bytes.slice(range)),
            None => Err(Error::file(
                self.dir.join(&place.location),
                format!(
                    "tensor {name} should be at bytes {}..{}, but the file has {size} bytes: it is too short; \
                     copy the whole file again from where the model came from",
                    place.offset,
                    place.length.map_or("the end".into(), |len| place
                        .offset
                        .checked_add(len)
                        .map_or("beyond 2^64".into(), |end| end.to_string())),
                ),
            )),
        }
    }

    /// The file that `location` means, opened and mapped, or why it is not followed.
    pub fn file(&self, location: &str) -> Result<Origin, String> {
        let path = self.resolve(location)?;
        let mut maps = self.maps.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(origin) = maps.get(&path) {
            return Ok(origin.clone());
        }
        let missing = |e: std::io::Error| format!("which cannot be opened in {}: {e}", self.dir.display());
        let file = open_real(&path).map_err(missing)?;
        // What was opened need no longer be what was looked at.
        self.check(&path, &file.metadata().map_err(missing)?)?;
        let origin = Origin::map(file).map_err(missing)?;
        maps.insert(path, origin.clone());
        Ok(origin)
    }

    /// Where the file that `location` means really is, or why it is not followed.
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
        self.check(&real, &fs::metadata(&real).map_err(missing)?)?;
        Ok(real)
    }

    /// Only regular files that nobody else has under another name.
    fn check(&self, real: &Path, meta: &fs::Metadata) -> Result<(), String> {
        if !meta.is_file() {
            return Err("which is not a regular file".into());
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let dir = fs::canonicalize(&self.dir).unwrap_or_default();
            if meta.nlink() > 1 && !is_cache_blob(&dir, real) {
                return Err(
                    "which has more than one hard link, so its content may be another file's; copy it first".into()
                );
            }
        }
        Ok(())
    }
}

impl Origin {
    /// Opens and maps the file at `path`.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Self::map(File::open(path)?)
    }

    /// A copy of the bytes in `range`, read past the map, whose pages would count as this process's memory.
    pub fn read(&self, range: std::ops::Range<usize>) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; range.len()];
        #[cfg(unix)]
        std::os::unix::fs::FileExt::read_exact_at(&*self.file, &mut bytes, range.start as u64)?;
        #[cfg(not(unix))]
        bytes.copy_from_slice(&self.bytes[range]);
        Ok(bytes)
    }

    /// Maps the content of `file` (an empty file as no bytes).
    pub fn map(file: File) -> std::io::Result<Self> {
        let bytes = if file.metadata()?.len() == 0 {
            Bytes::new()
        } else {
            // SAFETY: the map is read-only and private. Another process that truncates the file while we read it can
            // make the reads fault; our own writes go to new files that are renamed into place, never to a mapped one.
            Bytes::from_owner(unsafe { memmap2::Mmap::map(&file)? })
        };
        Ok(Self { file: Arc::new(file), bytes })
    }
}

/// Opens a path without symbolic links: one that came into it meanwhile is not followed, and a pipe is not waited for.
fn open_real(real: &Path) -> std::io::Result<File> {
    #[cfg(unix)]
    {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        #[cfg(target_os = "linux")]
        match rustix::fs::openat2(rustix::fs::CWD, real, flags, Mode::empty(), rustix::fs::ResolveFlags::NO_SYMLINKS) {
            // Kernels before 5.6, and sandboxes, lack it.
            Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {}
            opened => return Ok(opened?.into()),
        }
        Ok(rustix::fs::open(real, flags, Mode::empty())?.into())
    }
    #[cfg(not(unix))]
    File::open(real)
}

/// The content of the file at `path` as a memory map.
pub(crate) fn map_file(path: &Path) -> std::io::Result<Bytes> {
    Ok(Origin::open(path)?.bytes)
}

/// Calls `visit` with every tensor of the model whose bytes stand in another file, in file order.
pub fn each_external<'a>(model: &'a Model, visit: &mut impl FnMut(&'a TensorProto)) {
    walk_graphs(model.graph(), &mut |_, graph| {
        let attributes = graph.node.iter().flat_map(|n| &n.attribute).filter_map(|a| a.t.as_ref());
        graph.initializer.iter().chain(attributes).filter(|t| is_external(t)).for_each(&mut *visit);
    });
}

/// Locations of all external files that the model's tensors name, in order, each once.
pub fn locations(model: &Model) -> Result<Vec<String>> {
    let mut places = Vec::new();
    each_external(model, &mut |tensor| places.push(place(tensor)));
    let mut locations = Vec::new();
    for place in places {
        let location = place?.location;
        if !locations.contains(&location) {
            locations.push(location);
        }
    }
    Ok(locations)
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
    let checksum = entry("checksum").map(Into::into);
    Ok(Place { location: location.into(), offset: number("offset")?.unwrap_or(0), length: number("length")?, checksum })
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
pub(super) fn is_cache_blob(dir: &Path, real: &Path) -> bool {
    let Some(blobs) = real.parent().filter(|p| p.file_name().is_some_and(|n| n == "blobs")) else { return false };
    let Some(cache) = blobs.parent() else { return false };
    dir.starts_with(cache.join("snapshots"))
}
