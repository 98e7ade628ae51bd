//! Files that appear whole under their final name or not at all: temp file in the same directory → fsync → rename →
//! fsync of the directory. An existing file keeps its mode; a new one gets what the umask leaves.

use std::fs::{self, File, Permissions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tempfile::NamedTempFile;

use super::external::is_cache_blob;
use super::rope::{Origin, Rope, RopeError};
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

/// Writes `rope` to `path`, over a file that may be there. `origins` are the files that the rope's slices come from.
pub fn write_atomic(path: &Path, rope: Rope, origins: &[Origin], durability: Durability) -> Result<()> {
    if path.is_dir() {
        return Err(Error::config(format!("{}: this is a directory; name a file", path.display())));
    }
    // Where the name is a symbolic link, the file it points to is what gets replaced.
    let target: PathBuf = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let dir = parent(&target);
    if is_cache_blob(&fs::canonicalize(parent(path)).unwrap_or_default(), &target) {
        return Err(Error::config(format!(
            "{}: this is a link into a download cache, whose files are not changed; write to another directory",
            path.display()
        )));
    }
    if !dir.is_dir() {
        return Err(Error::config(format!(
            "{}: there is no directory {}; make it first",
            path.display(),
            dir.display()
        )));
    }
    let temp = filled(&dir, path, rope, origins, durability)?;
    if let Ok(old) = fs::metadata(&target) {
        finish(&temp, path, Some(old.permissions()), durability)?;
    } else {
        finish(&temp, path, None, durability)?;
    }
    temp.persist(&target).map_err(|e| Error::io("write", path)(e.error))?;
    if durability == Durability::OnDisk { sync_dir(&dir) } else { Ok(()) }
}

/// Writes `rope` to `path`, where no file may be; with the mode `like`, or what the umask leaves.
pub(crate) fn create(
    path: &Path,
    rope: Rope,
    origins: &[Origin],
    like: Option<Permissions>,
    durability: Durability,
) -> Result<()> {
    let dir = parent(path);
    let temp = filled(&dir, path, rope, origins, durability)?;
    finish(&temp, path, like, durability)?;
    temp.persist_noclobber(path).map_err(|e| Error::io("write", path)(e.error))?;
    if durability == Durability::OnDisk { sync_dir(&dir) } else { Ok(()) }
}

/// A temp file in `dir` with all bytes of `rope`, which are to go to `path`.
fn filled(dir: &Path, path: &Path, rope: Rope, origins: &[Origin], durability: Durability) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".bone-onnx-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What a new file gets; the kernel takes the umask off it.
        builder.permissions(Permissions::from_mode(0o666));
    }
    let temp = builder.tempfile_in(dir).map_err(Error::io("write to", dir))?;
    let file = temp.as_file();
    if let Some(origin) = rope.whole(origins)
        && reflinked(origin, file)
    {
        return Ok(temp);
    }
    reserve(file, rope.len() as u64).map_err(Error::io("write", path))?;
    match durability {
        Durability::OnDisk => while_syncing(file, || rope.write_to(file, origins)),
        Durability::Buffered => rope.write_to(file, origins),
    }
    .map_err(|e| e.at(path))?;
    Ok(temp)
}

fn finish(temp: &NamedTempFile, path: &Path, mode: Option<Permissions>, durability: Durability) -> Result<()> {
    if let Some(mode) = mode {
        temp.as_file().set_permissions(mode).map_err(Error::io("set the mode of", path))?;
    }
    if durability == Durability::OnDisk {
        temp.as_file().sync_all().map_err(Error::io("write", path))?;
    }
    Ok(())
}

/// Makes `copy` share the blocks of the whole of `origin`, where the file system can.
fn reflinked(origin: &Origin, copy: &File) -> bool {
    #[cfg(target_os = "linux")]
    return rustix::fs::ioctl_ficlone(copy, &*origin.file).is_ok()
        && copy.metadata().is_ok_and(|m| m.len() == origin.bytes.len() as u64);
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (origin, copy);
        false
    }
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

/// Has the disk take the names in `dir`.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("sync", dir))
}
