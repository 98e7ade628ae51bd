//! Where libonnxruntime is looked for: `ORT_DYLIB_PATH`, beside the executable, the project's cache, Python's
//! site-packages (the `onnxruntime` wheel carries the library whole).

use std::env;
use std::ffi::{CStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Device, onnxruntime};
use crate::Result;

/// Said where no library is found for `device`.
pub(super) fn none_found(device: Device) -> String {
    let package = if device == Device::Cpu { "onnxruntime" } else { "onnxruntime-gpu" };
    format!(
        "no usable libonnxruntime was found; install it with `pip install {package}`, or set ORT_DYLIB_PATH to the \
         library's path (`bone-onnx doctor` lists where it was looked for)"
    )
}

/// A library that was found, and whether it can be used.
#[derive(Debug, Clone, Serialize)]
pub struct Library {
    pub path: PathBuf,
    /// Which rule found it.
    pub origin: &'static str,
    /// What the library says of itself, as `1.31.1`.
    pub version: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// The places to look in, in order. Taken from the environment once, so that a search can be told apart from it.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// `ORT_DYLIB_PATH`: where it is set, nothing else is looked at.
    pub explicit: Option<PathBuf>,
    /// The directory of the executable.
    pub executable: Option<PathBuf>,
    /// The directory that holds `onnxruntime-*/libonnxruntime.so*`.
    pub cache: Option<PathBuf>,
    /// Prefixes of Python installations, most specific first.
    pub python: Vec<PathBuf>,
}

impl Places {
    pub fn from_env() -> Self {
        let dir = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = env::home_dir();
        let executable = env::current_exe().ok().and_then(|p| p.parent().map(Path::to_path_buf));
        let cache = dir("BONE_ONNX_CACHE")
            .or_else(|| dir("XDG_CACHE_HOME").map(|d| d.join("bone-onnx")))
            .or_else(|| home.as_ref().map(|d| d.join(".cache/bone-onnx")));
        let pyenv = dir("PYENV_ROOT").or_else(|| home.as_ref().map(|d| d.join(".pyenv")));
        let mut python: Vec<PathBuf> = [dir("VIRTUAL_ENV"), dir("CONDA_PREFIX"), home.map(|d| d.join(".local"))]
            .into_iter()
            .flatten()
            .chain(pyenv.iter().flat_map(|d| newest_first(&d.join("versions"), |_| true)))
            .collect();
        python.extend(["/usr/local", "/usr"].map(PathBuf::from));
        Self { explicit: dir("ORT_DYLIB_PATH"), executable, cache, python }
    }

    /// Libraries by path and origin, in the order in which they are tried for `device`.
    fn candidates(&self, device: Device) -> Vec<(PathBuf, &'static str)> {
        if let Some(path) = &self.explicit {
            // As ONNX Runtime's own bindings do: a relative path is first taken from the executable.
            let beside = self.executable.iter().map(|d| d.join(path)).find(|p| p.exists());
            return vec![(beside.unwrap_or_else(|| path.clone()), "ORT_DYLIB_PATH")];
        }
        let mut found: Vec<(PathBuf, &'static str)> = Vec::new();
        let mut look = |dir: &Path, origin| {
            found.extend(newest_first(dir, is_library).into_iter().map(|path| (path, origin)));
        };
        if let Some(dir) = &self.executable {
            look(dir, "beside the executable");
        }
        if let Some(cache) = &self.cache {
            for dir in newest_first(cache, |name| name.starts_with("onnxruntime-")) {
                look(&dir, "cache");
            }
        }
        for site in self.site_packages() {
            look(&site.join("onnxruntime/capi"), "Python");
        }
        let mut seen = Vec::new();
        found.retain(|(path, _)| {
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            let new = !seen.contains(&real);
            seen.push(real);
            new
        });
        if device != Device::Cpu {
            // A wheel built for CUDA carries the provider beside the library; builds without it can only fail.
            found.sort_by_key(|(path, _)| !path.with_file_name(CUDA_PROVIDER).exists());
        }
        found
    }

    /// Directories of installed Python packages.
    pub(super) fn site_packages(&self) -> Vec<PathBuf> {
        let mut sites = Vec::new();
        for prefix in &self.python {
            for lib in ["lib", "lib64"] {
                for python in newest_first(&prefix.join(lib), |name| name.starts_with("python3")) {
                    sites.extend(["site-packages", "dist-packages"].map(|s| python.join(s)));
                }
            }
            sites.push(prefix.join("Lib/site-packages"));
        }
        sites.retain(|dir| dir.is_dir());
        sites
    }

    /// Every library found, each asked for its version.
    pub fn libraries(&self) -> Vec<Library> {
        self.candidates(Device::Cpu).into_iter().map(|(path, origin)| inspect(path, origin)).collect()
    }
}

/// The library that `device` would run on: `None` where there is none, an error where `ORT_DYLIB_PATH` names one that
/// cannot be used.
pub(super) fn pick(places: &Places, device: Device) -> Result<Option<Library>> {
    for (path, origin) in places.candidates(device) {
        let library = inspect(path, origin);
        match &library.problem {
            None => return Ok(Some(library)),
            Some(problem) if places.explicit.is_some() => {
                return Err(onnxruntime::error(format!("ORT_DYLIB_PATH={}: {problem}", library.path.display())));
            }
            Some(problem) => tracing::debug!("{} is passed over: {problem}", library.path.display()),
        }
    }
    Ok(None)
}

#[cfg(windows)]
pub(super) const CUDA_PROVIDER: &str = "onnxruntime_providers_cuda.dll";
#[cfg(not(windows))]
pub(super) const CUDA_PROVIDER: &str = "libonnxruntime_providers_cuda.so";

/// File names of the library itself, versioned or not (`libonnxruntime.so.1.31.1`), not of its providers.
fn is_library(name: &str) -> bool {
    if cfg!(windows) {
        name == "onnxruntime.dll"
    } else if cfg!(target_vendor = "apple") {
        name.starts_with("libonnxruntime.") && name.ends_with(".dylib")
    } else {
        name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so.")
    }
}

/// Entries of `dir` whose names pass, the highest version first; nothing where there is no such directory.
pub(super) fn newest_first(dir: &Path, pass: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut named: Vec<(Vec<u64>, OsString)> = entries
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name.to_str().is_some_and(&pass))
        .map(|name| (numbers(&name.to_string_lossy()), name))
        .collect();
    named.sort_by(|a, b| b.cmp(a));
    named.into_iter().map(|(_, name)| dir.join(name)).collect()
}

/// The numbers in a name, for ordering by version: `python3.11` → `[3, 11]`.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn inspect(path: PathBuf, origin: &'static str) -> Library {
    match version(&path) {
        Err(problem) => Library { path, origin, version: None, problem: Some(problem) },
        Ok(version) => Library { path, origin, problem: unsupported(&version), version: Some(version) },
    }
}

/// Why a library of this version cannot be used, if so.
fn unsupported(version: &str) -> Option<String> {
    let fits = matches!(numbers(version)[..], [1, minor, ..] if minor >= u64::from(ort::MINOR_VERSION));
    (!fits).then(|| format!("its version is {version}, but 1.{} or a newer 1.x is needed", ort::MINOR_VERSION))
}

/// Loads the library at `path` and asks for its version.
pub(super) fn version(path: &Path) -> Result<String, String> {
    if path.is_dir() {
        return Err("this is a directory; the path of the library file itself is needed".into());
    }
    type GetApiBase = unsafe extern "C" fn() -> *const ort::sys::OrtApiBase;
    // SAFETY: loading runs the library's initialisers: it comes from where the user's own programs come from. The
    // symbol has had this signature since ONNX Runtime 1.0, and the string it gives is the library's constant.
    unsafe {
        let library = libloading::Library::new(path).map_err(|e| format!("it cannot be loaded: {}", reason(&e)))?;
        let base = library
            .get::<GetApiBase>(b"OrtGetApiBase")
            .map_err(|_| "it is not ONNX Runtime: it lacks OrtGetApiBase".to_string())?();
        if base.is_null() {
            return Err("its OrtGetApiBase gives nothing".into());
        }
        let text = ((*base).GetVersionString)();
        if text.is_null() {
            Err("it tells no version".into())
        } else {
            Ok(CStr::from_ptr(text).to_string_lossy().into())
        }
    }
}

/// The operating system's words for a failed load.
fn reason(error: &libloading::Error) -> String {
    use std::error::Error;
    error.source().map_or_else(|| error.to_string(), |source| source.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"not a library").unwrap();
    }

    #[test]
    fn places_are_tried_in_order_newest_version_first() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let names = [
            "exe/libonnxruntime.so.1.30.0",
            "cache/onnxruntime-1.31.1/libonnxruntime.so.1.31.1",
            "cache/onnxruntime-1.9.0/libonnxruntime.so",
            "env/lib/python3.12/site-packages/onnxruntime/capi/libonnxruntime.so.1.27.0",
            "env/lib/python3.9/site-packages/onnxruntime/capi/libonnxruntime.so.1.28.0",
        ];
        for name in names.iter().rev() {
            touch(&root.join(name));
        }
        // Providers and other packages' files are no libraries to try.
        touch(&root.join("exe/libonnxruntime_providers_shared.so"));
        touch(&root.join("cache/hf/libonnxruntime.so"));
        let places = Places {
            explicit: None,
            executable: Some(root.join("exe")),
            cache: Some(root.join("cache")),
            python: vec![root.join("env"), root.join("absent")],
        };
        let found: Vec<PathBuf> = places.candidates(Device::Cpu).into_iter().map(|(path, _)| path).collect();
        assert_eq!(found, names.map(|n| root.join(n)));
        // None of them is a library: each is reported, none is picked.
        assert!(places.libraries().iter().all(|l| l.problem.is_some() && l.version.is_none()));
        assert!(pick(&places, Device::Cpu).unwrap().is_none());
    }

    #[test]
    fn a_version_below_the_api_in_use_is_told() {
        assert_eq!(["1.24.0", "1.24.4", "1.31.1", "1.100.0"].map(unsupported), [const { None }; 4]);
        for old in ["1.23.2", "1.9.1", "0.30.0", "2.0.0", "1", "rubbish", ""] {
            let told = unsupported(old).unwrap();
            assert!(told.contains(&format!("version is {old},")) && told.contains("1.24"), "{told}");
        }
    }

    #[test]
    fn an_explicit_path_is_the_only_one_and_must_work() {
        let dir = tempfile::tempdir().unwrap();
        let bad = dir.path().join("broken.so");
        touch(&bad);
        let mut places = Places::from_env();
        places.explicit = Some(bad.clone());
        let error = pick(&places, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("ORT_DYLIB_PATH") && error.contains("broken.so"), "{error}");
        places.explicit = Some(dir.path().into());
        let error = pick(&places, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("directory"), "{error}");
    }

    #[test]
    fn a_cuda_build_goes_first_for_cuda() {
        let dir = tempfile::tempdir().unwrap();
        touch(&dir.path().join("exe/libonnxruntime.so"));
        touch(&dir.path().join("cache/onnxruntime-1.31.1/libonnxruntime.so"));
        touch(&dir.path().join("cache/onnxruntime-1.31.1").join(CUDA_PROVIDER));
        let places = Places {
            executable: Some(dir.path().join("exe")),
            cache: Some(dir.path().join("cache")),
            ..Places::default()
        };
        let first = |device| places.candidates(device)[0].1;
        assert_eq!((first(Device::Cpu), first(Device::Cuda(0))), ("beside the executable", "cache"));
    }
}
