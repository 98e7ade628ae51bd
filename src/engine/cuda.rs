//! CUDA's shared libraries: found in Python's `nvidia` packages without LD_LIBRARY_PATH, and named where one is missing.

use std::path::Path;
#[cfg(unix)]
use std::{collections::HashSet, path::PathBuf};

use super::discover::CUDA_PROVIDER;
#[cfg(unix)]
use super::discover::{Places, newest_first};
use super::elf::Elf;
use super::onnxruntime::error;
use crate::Result;
use crate::onnx::external::map_file;

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

/// Makes sure that the CUDA provider of the library `onnxruntime` of `version` can be loaded, with CUDA's libraries from
/// wherever they are.
///
/// # Errors
/// Everything that is missing at once, and what installs it.
pub(super) fn prepare(onnxruntime: &Path, version: &str) -> Result<()> {
    let provider = onnxruntime.with_file_name(CUDA_PROVIDER);
    if !provider.is_file() {
        return Err(error(format!("CUDA cannot be used: {}", no_provider(onnxruntime))));
    }
    preload(onnxruntime);
    let Ok(bytes) = map_file(&provider) else { return Ok(()) };
    let Some(elf) = Elf::parse(&bytes) else {
        return Err(error(format!("CUDA cannot be used: {} is no shared library of this machine", provider.display())));
    };
    let others = elf.versions();
    if !others.is_empty() && !others.contains(&version) {
        return Err(error(format!(
            "CUDA cannot be used: {} is of ONNX Runtime {}, but {} is {version}. Both have to come from one wheel: \
             `pip install --force-reinstall onnxruntime-gpu=={version}`",
            provider.display(),
            others.join(", "),
            onnxruntime.display()
        )));
    }
    let missing: Vec<&str> = wanted(&elf.needed()).into_iter().filter(|name| !can_be_loaded(name)).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(error(format!("CUDA cannot be used: {}", told(&missing)))),
    }
}

/// NVIDIA's among the `needed` libraries, and those that the provider loads by itself once it runs.
fn wanted<'a>(needed: &[&'a str]) -> Vec<&'a str> {
    let mut wanted: Vec<&str> = needed.iter().copied().filter(|name| package(name).is_some() || driver(name)).collect();
    if !wanted.is_empty() && !wanted.iter().any(|name| name.starts_with("libcudnn.so")) {
        wanted.push("libcudnn.so.9");
    }
    wanted
}

/// The PyPI packages that carry a library, for CUDA 13 and 12.
fn package(library: &str) -> Option<(&'static str, &'static str)> {
    LIBRARIES.iter().find(|(name, ..)| library.starts_with(name)).map(|(_, cuda13, cuda12)| (*cuda13, *cuda12))
}

fn driver(library: &str) -> bool {
    library.starts_with("libcuda.so")
}

#[cfg(unix)]
fn can_be_loaded(name: &str) -> bool {
    use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};
    // SAFETY: NVIDIA's own library, which the provider is about to load in the same way. It stays loaded.
    let loaded = unsafe { Library::open(Some(name), RTLD_LAZY | RTLD_LOCAL) };
    loaded.map(std::mem::forget).is_ok()
}

#[cfg(not(unix))]
fn can_be_loaded(_name: &str) -> bool {
    true
}

/// Which libraries are missing, and one line that installs them.
fn told(missing: &[&str]) -> String {
    // libcudart and libcublas carry CUDA's own version.
    let is_12 = missing.iter().any(|name| ["libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12"].contains(name));
    let mut packages: Vec<&str> = Vec::new();
    for (cuda13, cuda12) in missing.iter().filter_map(|name| package(name)) {
        let package = if is_12 { cuda12 } else { cuda13 };
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    let verb = if missing.len() == 1 { "is" } else { "are" };
    let mut text = format!("{} {verb} missing.", missing.join(", "));
    if !packages.is_empty() {
        text += &format!(
            " Install with `pip install {}`, or put the directories into LD_LIBRARY_PATH.",
            packages.join(" ")
        );
    }
    if missing.iter().any(|name| driver(name)) {
        text += " libcuda comes with the NVIDIA driver, which this machine seems to lack.";
    }
    text
}

fn no_provider(onnxruntime: &Path) -> String {
    format!(
        "{} is built without CUDA: there is no {CUDA_PROVIDER} beside it. Install the wheel with `pip install \
         onnxruntime-gpu`, and point ORT_DYLIB_PATH at its onnxruntime/capi/libonnxruntime.so.*",
        onnxruntime.display()
    )
}

/// ONNX Runtime's words on why CUDA cannot be had, and what to do about it.
pub(super) fn explain(message: &str, onnxruntime: &Path) -> String {
    let message = message.trim();
    let mut advice = String::new();
    if message.contains("not enabled in this build") {
        advice = no_provider(onnxruntime);
    } else if let Some(missing) = missing_library(message) {
        advice = match package(missing).is_some() || driver(missing) {
            true => told(&[missing]),
            false => format!("{missing} is missing."),
        };
    } else if message.contains("no CUDA-capable device") || message.contains("invalid device ordinal") {
        advice = "there is no such GPU; `nvidia-smi` lists those that the driver sees.".into();
    } else if message.contains("driver version is insufficient") {
        advice = "the NVIDIA driver is older than the CUDA libraries; update it, or install a build of \
                  onnxruntime-gpu for an older CUDA."
            .into();
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
        assert!(!told.contains("driver"), "{told}");
        let told = explain("libcuda.so.1: cannot open shared object file", Path::new("/x"));
        assert!(told.contains("driver"), "{told}");
        let told = explain("CUDA execution provider is not enabled in this build.", Path::new("/x/lib.so"));
        assert!(told.contains("onnxruntime-gpu") && told.contains("/x/lib.so"), "{told}");
        // What is not known is passed on as it is.
        assert_eq!(explain("odd", Path::new("/x")), "CUDA cannot be used: odd");
    }

    /// No machine that runs these tests without a GPU has them: the loader itself says so.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_the_provider_needs_is_asked_of_the_loader_and_told_at_once() {
        let needed = ["libcublasLt.so.12", "libcublas.so.12", "libcurand.so.77", "libcudart.so.12", "libc.so.6"];
        let wanted = wanted(&needed);
        assert_eq!(wanted[..4], needed[..4]);
        assert_eq!(wanted[4..], ["libcudnn.so.9"]);
        assert!(can_be_loaded("libc.so.6") && !can_be_loaded("libcurand.so.77"));
        let line = "`pip install nvidia-cublas-cu12 nvidia-curand-cu12 nvidia-cuda-runtime-cu12 nvidia-cudnn-cu12`";
        let words = super::told(&wanted);
        assert!(words.starts_with("libcublasLt.so.12, libcublas.so.12, ") && words.contains(line), "{words}");
        let words = super::told(&["libcuda.so.1"]);
        assert!(words.contains("driver") && !words.contains("pip"), "{words}");
    }

    #[test]
    fn a_provider_that_is_not_there_or_of_another_version_is_told() {
        use std::fs;
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libonnxruntime.so.1.31.1");
        let fail = || prepare(&library, "1.31.1").unwrap_err().to_string();
        assert!(fail().contains(CUDA_PROVIDER) && fail().contains("pip install onnxruntime-gpu"), "{}", fail());
        let provider = dir.path().join(CUDA_PROVIDER);
        fs::write(&provider, b"no library").unwrap();
        assert!(fail().contains("no shared library"), "{}", fail());
        #[cfg(target_os = "linux")]
        {
            // ONNX Runtime itself is a library that has its version in it.
            let places = Places::from_env();
            let real = super::super::discover::pick(&places, crate::engine::Device::Cpu).unwrap().unwrap();
            let version = real.version.unwrap();
            fs::copy(&real.path, &provider).unwrap();
            prepare(&library, &version).unwrap();
            let told = prepare(&library, "1.99.9").unwrap_err().to_string();
            assert!(told.contains(&version) && told.contains("onnxruntime-gpu==1.99.9"), "{told}");
        }
    }
}
