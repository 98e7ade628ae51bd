//! CUDA's shared libraries: found in Python's `nvidia` packages without LD_LIBRARY_PATH, and named where one is missing.

use std::path::Path;
#[cfg(unix)]
use std::{collections::HashSet, path::PathBuf};

#[cfg(unix)]
use super::discover::{Places, newest_first};

/// Libraries of the CUDA provider, dependencies first, and the PyPI packages that carry them for CUDA 13 and 12.
const LIBRARIES: &[(&str, &str, &str)] = &[
    ("libcudart.so", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
    ("libcublasLt.so", "nvidia-cublas", "nvidia-cublas-cu12"),
    ("libcublas.so", "nvidia-cublas", "nvidia-cublas-cu12"),
    ("libnvrtc.so", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    ("libcurand.so", "nvidia-curand", "nvidia-curand-cu12"),
    ("libcufft.so", "nvidia-cufft", "nvidia-cufft-cu12"),
    ("libcudnn.so", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
];

/// Loads what of [`LIBRARIES`] is found in `nvidia/*/lib` of the site-packages around `onnxruntime` and of the known
/// Python installations, or in the toolkit's usual place, so that the provider finds them by name. Every version found
/// is loaded: which one the provider needs is its own affair. What is missing shows when the provider loads.
#[cfg(unix)]
pub(super) fn preload(onnxruntime: &Path) {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

    let mut loaded = HashSet::new();
    let dirs = directories(onnxruntime, Places::from_env().site_packages());
    for (library, ..) in LIBRARIES {
        for path in dirs.iter().flat_map(|dir| newest_first(dir, |name| name.starts_with(library))) {
            if !loaded.insert(path.file_name().map(ToOwned::to_owned)) {
                continue;
            }
            // SAFETY: NVIDIA's own libraries, from where the user's Python would load them.
            match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                Ok(library) => std::mem::forget(library),
                Err(e) => tracing::debug!("{} is passed over: {e}", path.display()),
            }
        }
    }
}

/// Directories that may hold CUDA's libraries, those nearest to the library in use first.
#[cfg(unix)]
fn directories(onnxruntime: &Path, sites: Vec<PathBuf>) -> Vec<PathBuf> {
    let around = onnxruntime.ancestors().map(Path::to_path_buf).find(|dir| dir.join("nvidia").is_dir());
    let packages = around.into_iter().chain(sites).flat_map(|site| newest_first(&site.join("nvidia"), |_| true));
    packages.map(|package| package.join("lib")).chain([PathBuf::from("/usr/local/cuda/lib64")]).collect()
}

#[cfg(not(unix))]
pub(super) fn preload(_onnxruntime: &Path) {}

/// ONNX Runtime's words on why CUDA cannot be had, and what to do about it.
pub(super) fn explain(message: &str, onnxruntime: &Path) -> String {
    let message = message.trim();
    let mut advice = String::new();
    if message.contains("not enabled in this build") {
        advice = format!(
            "{} is built without CUDA. Install the wheel onnxruntime-gpu and point ORT_DYLIB_PATH at its \
             onnxruntime/capi/libonnxruntime.so.*",
            onnxruntime.display()
        );
    } else if let Some(missing) = missing_library(message) {
        advice = match LIBRARIES.iter().find(|(name, ..)| missing.starts_with(name)) {
            Some((_, cuda13, cuda12)) => format!(
                "{missing} is missing. Install it with `pip install {cuda13}` ({cuda12} for a build for CUDA 12), or \
                 put its directory into LD_LIBRARY_PATH"
            ),
            None if missing.starts_with("libcuda.so") => {
                format!("{missing} is missing: it comes with the NVIDIA driver, which this machine seems to lack")
            }
            None => format!("{missing} is missing"),
        };
    } else if message.contains("no CUDA-capable device") || message.contains("invalid device ordinal") {
        advice = "there is no such GPU; `nvidia-smi` lists those that the driver sees".into();
    }
    if advice.is_empty() {
        format!("CUDA cannot be used: {message}")
    } else {
        format!("CUDA cannot be used: {advice} ({message})")
    }
}

/// The `libX.so.N` of the loader's "libX.so.N: cannot open shared object file".
fn missing_library(message: &str) -> Option<&str> {
    let before = message.split(": cannot open").next().filter(|before| before.len() < message.len())?;
    before.rsplit([' ', ':', '/', '\'']).next().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn the_packages_around_the_library_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let (near, far) = (dir.path().join("a/site-packages"), dir.path().join("b/site-packages"));
        for lib in [near.join("nvidia/cu13/lib"), far.join("nvidia/cublas/lib"), near.join("onnxruntime/capi")] {
            std::fs::create_dir_all(lib).unwrap();
        }
        let found = directories(&near.join("onnxruntime/capi/libonnxruntime.so.1.31.1"), vec![far.clone()]);
        let wanted = [near.join("nvidia/cu13/lib"), far.join("nvidia/cublas/lib"), "/usr/local/cuda/lib64".into()];
        assert_eq!(found, wanted);
    }

    /// The three messages that ONNX Runtime 1.31.1 was seen to give.
    #[test]
    fn a_missing_library_is_named_with_its_package() {
        let told = explain(
            "Failed to load library /x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open \
             shared object file: No such file or directory",
            Path::new("/x/libonnxruntime.so"),
        );
        assert!(told.contains("libcublasLt.so.13 is missing") && told.contains("pip install nvidia-cublas`"), "{told}");
        let told = explain("libcuda.so.1: cannot open shared object file", Path::new("/x"));
        assert!(told.contains("driver"), "{told}");
        let told = explain("CUDA execution provider is not enabled in this build.", Path::new("/x/lib.so"));
        assert!(told.contains("onnxruntime-gpu") && told.contains("/x/lib.so"), "{told}");
        // What is not known is passed on as it is.
        assert_eq!(explain("odd", Path::new("/x")), "CUDA cannot be used: odd");
    }
}
