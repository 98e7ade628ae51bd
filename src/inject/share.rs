//! An injected model that refers to the base's data files where they are (`--share-data`). What the record says of them
//! tells later whether they are still the same: the size, and samples of every tensor, which costs next to nothing; the
//! whole content only on demand.

use std::fs;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::{Injected, note};
use crate::adapter::Injection;
use crate::onnx::external::{self, ExternalData};
use crate::onnx::sha1;
use crate::onnx::{Model, Moved, Origin};
use crate::{Error, Result};

/// A data file of the base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedData {
    /// What the injected model calls it.
    pub location: String,
    /// What the base calls it.
    pub base: String,
    pub size: u64,
    /// SHA-1 of the file's ends and of a piece of each tensor in it.
    pub samples: String,
    /// SHA-1 of all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha1: Option<String>,
}

impl Injected {
    /// Has the injected model, once it is written to `out`, refer to the base's data files where they are. `whole`: their
    /// whole content is read for the record, not only samples.
    ///
    /// # Errors
    /// A base that has none; files that are not in the directory of `out` or below it, where alone ONNX allows them.
    pub fn share(&mut self, model: &Model, out: &Path, whole: bool) -> Result<()> {
        let opened = self.opened.take();
        let shared = self.share_of(opened.as_ref().unwrap_or(model), out, whole);
        self.opened = opened;
        shared
    }

    fn share_of(&mut self, model: &Model, out: &Path, whole: bool) -> Result<()> {
        let locations = external::locations(model)?;
        if locations.is_empty() {
            return Err(Error::file(
                &model.path,
                "it keeps its weights in itself, so there is no data file to share; leave --share-data out",
            ));
        }
        let dir = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = fs::canonicalize(dir).map_err(Error::io("write to", dir))?;
        let home = fs::canonicalize(model.external.dir()).map_err(Error::io("read", model.external.dir()))?;
        for old in locations {
            let failed = |what| Error::file(&model.path, format!("its external data is at {old:?}, {what}"));
            let origin = model.external.file(&old).map_err(failed)?;
            let path = home.join(external::checked_relative(&old).map_err(failed)?);
            let location = path.strip_prefix(&dir).ok().and_then(location_of).ok_or_else(|| {
                Error::config(format!(
                    "{}: the base's data file {} is not in {} or below it, and ONNX Runtime refuses data from elsewhere; \
                     write the injected model beside the base, or leave --share-data out to copy the data",
                    out.display(),
                    path.display(),
                    dir.display()
                ))
            })?;
            ExternalData::beside(&dir).resolve(&location).map_err(failed)?;
            let earlier = self.record.data.iter().find(|d| d.location == old);
            let shared = SharedData {
                base: earlier.map_or(&old, |d| &d.base).clone(),
                size: origin.bytes.len() as u64,
                samples: samples(model, &old, &origin)?,
                sha1: whole.then(|| sha1(&origin.bytes)),
                location: location.clone(),
            };
            self.record.data.retain(|d| d.location != old);
            self.record.data.push(shared);
            if location != old {
                self.patch.moved.insert(old, Moved { location, checksum: None });
            }
        }
        note(&mut self.patch, &self.record)
    }
}

/// A path as models spell it.
fn location_of(path: &Path) -> Option<String> {
    let part = |part: Component| part.as_os_str().to_str().map(str::to_string);
    Some(path.components().map(part).collect::<Option<Vec<_>>>()?.join("/"))
}

/// Are the shared data files of `model` what they were when it was injected? Sizes and samples are compared, and with
/// `whole` the content, where the record knows it.
///
/// # Errors
/// A file that is not.
pub fn check_shared(model: &Model, record: &Injection, whole: bool) -> Result<()> {
    for data in &record.data {
        let named = model.path.with_file_name(&data.location);
        let origin = model.external.file(&data.location).map_err(|what| {
            Error::file(&model.path, format!("it shares the base's data at {:?}, {what}", data.location))
        })?;
        let size = origin.bytes.len() as u64;
        let what = if size != data.size {
            format!("it has {size} bytes instead of {}", data.size)
        } else if samples(model, &data.location, &origin)? != data.samples {
            "values in it are others".into()
        } else if whole && data.sha1.as_ref().is_some_and(|sum| *sum != sha1(&origin.bytes)) {
            "its SHA-1 is another".into()
        } else {
            continue;
        };
        return Err(Error::file(
            named,
            format!(
                "this data file is no longer what {} was injected into: {what}; put the old one back, or inject the base \
                 again",
                model.path.display()
            ),
        ));
    }
    Ok(())
}

/// SHA-1 of the ends of the file at `location` and of some bytes in the middle of each tensor in it.
fn samples(model: &Model, location: &str, origin: &Origin) -> Result<String> {
    const END: usize = 4096;
    const PIECE: usize = 256;
    let size = origin.bytes.len();
    let mut ranges = vec![0..END.min(size), size.saturating_sub(END)..size];
    let mut failed = None;
    external::each_external(model, &mut |tensor| match external::place(tensor) {
        Ok(place) if place.location == location => {
            ranges.extend(place.range(size).map(|r| {
                let piece = PIECE.min(r.len());
                let start = r.start + (r.len() - piece) / 2;
                start..start + piece
            }));
        }
        Ok(_) => {}
        Err(error) => failed = Some(error),
    });
    match failed {
        Some(error) => Err(error),
        None => {
            let read = ranges.into_iter().map(|range| origin.read(range)).collect::<std::io::Result<Vec<_>>>();
            let path = model.external.dir().join(location);
            Ok(sha1(&read.map_err(Error::io("read", &path))?.concat()))
        }
    }
}
