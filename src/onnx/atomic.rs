//! Files that appear whole under their final name or not at all: temp file in the same directory → fsync → rename →
//! fsync of the directory. An existing file keeps its mode; a new one gets what the umask leaves.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::rope::{Rope, RopeError};
use crate::{Error, Result};

/// When a file counts as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// When it is on the disk: a power cut leaves the old file or the new one.
    #[default]
    OnDisk,
    /// When the operating system has it, as for `cp`: a power cut may lose it. A killed process still leaves the old
    /// file or the new one.
    Buffered,
}

/// Writes `rope` to `path`. `origin` is the file (and its map) that the rope's slices come from.
pub fn write_atomic(
    path: &Path,
    rope: Rope,
    origin: Option<(&File, &bytes::Bytes)>,
    durability: Durability,
) -> Result<()> {
    replace(path, rope.len() as u64, durability, |file| rope.write_to(file, origin))
}

/// Opens a temp file beside `path`, lets `fill` write its `len` bytes, and moves it to `path` once it is safe on disk.
pub(crate) fn replace(
    path: &Path,
    len: u64,
    durability: Durability,
    fill: impl FnOnce(&mut File) -> Result<(), RopeError>,
) -> Result<()> {
    let dir = parent(path);
    if path.is_dir() {
        return Err(Error::config(format!("{}: this is a directory; name a file", path.display())));
    }
    // Where the name is a symbolic link, the file it points to is what gets replaced.
    let target: PathBuf = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let dir = if target.is_absolute() { parent(&target) } else { dir };
    if !dir.is_dir() {
        return Err(Error::config(format!(
            "{}: there is no directory {}; make it first",
            path.display(),
            dir.display()
        )));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".bone-onnx-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What a new file gets; the kernel takes the umask off it.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let temp = builder.tempfile_in(&dir).map_err(Error::io("write to", &dir))?;
    reserve(temp.as_file(), len).map_err(Error::io("write", path))?;
    let mut file = temp.as_file().try_clone().map_err(Error::io("write", path))?;
    match durability {
        Durability::OnDisk => while_syncing(temp.as_file(), || fill(&mut file)),
        Durability::Buffered => fill(&mut file),
    }
    .map_err(|e| e.at(path))?;
    if let Ok(old) = fs::metadata(&target) {
        temp.as_file().set_permissions(old.permissions()).map_err(Error::io("set the mode of", path))?;
    }
    if durability == Durability::OnDisk {
        temp.as_file().sync_all().map_err(Error::io("write", path))?;
    }
    temp.persist(&target).map_err(|e| Error::io("write", path)(e.error))?;
    if durability == Durability::OnDisk { sync_dir(&dir) } else { Ok(()) }
}

/// Has the file system set the space aside: a full disk shows before the work is done, and the writing is quicker.
#[cfg(target_os = "linux")]
fn reserve(file: &File, len: u64) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    const WORTH_IT: u64 = 1 << 20;
    if len < WORTH_IT {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(rustix::io::Errno::NOSPC) => Err(rustix::io::Errno::NOSPC.into()),
        // A file system that cannot do it takes the bytes as they come.
        _ => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(_file: &File, _len: u64) -> std::io::Result<()> {
    Ok(())
}

/// Runs `fill` while another thread keeps sending what it has written to the disk, so that the wait for it at the end
/// is short.
fn while_syncing(file: &File, fill: impl FnOnce() -> Result<(), RopeError>) -> Result<(), RopeError> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let syncing = scope.spawn(|| {
            // A small file is written before the first look.
            std::thread::park_timeout(Duration::from_millis(2));
            while !done.load(Ordering::Acquire) {
                // A failure shows again in the last sync, which is checked.
                let _ = file.sync_data();
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        let result = fill();
        done.store(true, Ordering::Release);
        syncing.thread().unpark();
        result
    })
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("sync", dir))
}
