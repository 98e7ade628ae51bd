//! `train --plan` against what a run's process really takes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bone_onnx::engine::{Device, EngineKind, LoadOptions, open};
use bone_onnx::onnx::{DataType, Model, Tensor};
use bone_onnx::verify::random_inputs;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use super::done;

fn shared_model(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

fn write_arrays(path: &Path, arrays: &BTreeMap<String, Tensor>) {
    let bytes: Vec<Vec<u8>> = arrays.values().map(Tensor::to_bytes).collect();
    let views = arrays.iter().zip(&bytes).map(|((name, value), bytes)| {
        let dtype = if value.data_type() == DataType::Float { Dtype::F32 } else { Dtype::I64 };
        (name.as_str(), TensorView::new(dtype, value.dims().to_vec(), bytes).expect("a view"))
    });
    safetensors::serialize_to_file(views, None, path).expect("a file");
}

/// Peak resident memory of the binary, in bytes.
#[cfg(target_os = "linux")]
fn peak(args: &[&str], dir: &Path) -> u64 {
    let binary = assert_cmd::cargo::cargo_bin("bone-onnx");
    let mut child = Command::new(binary)
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it");
    let mut peak = 0;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) << 10);
        if let Some(status) = child.try_wait().expect("a child") {
            assert!(status.success(), "{args:?}");
            return peak;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_plan_is_within_half_of_what_a_run_takes() {
    // Rows and length that make activations of more than a hundred megabytes.
    for (name, rows, length) in
        [("mlp3d.dyn18.onnx", 65536, 16), ("bert.dyn18.onnx", 2048, 12), ("llama.dyn18.onnx", 2048, 12)]
    {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path();
        let base = shared_model(name);
        let model = Model::open(&base).expect("a model");
        let mut inputs = random_inputs(&model, rows, length, 1).expect("inputs");
        let output = model.graph().output[0].name().to_string();
        let load = LoadOptions { threads: Some(1), optimize: true };
        let engine = open(EngineKind::OnnxRuntime, Device::Cpu).expect("it");
        let mut session = engine.load(&model.to_inline().expect("tensors"), &load).expect("a session");
        let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let said = session.run(&given, &[&output]).expect("a run").remove(0);
        drop(session);
        // Something else than the model says, so that there is a loss to compare.
        let moved = said.values::<f32>().expect("floats").iter().enumerate().map(|(i, v)| v + (i % 3) as f32 * 0.1);
        let goal = Tensor::new(said.dims(), moved.collect());
        inputs.insert("goal".into(), goal);
        write_arrays(&path.join("data.safetensors"), &inputs);
        done(
            &[
                "inject",
                base.to_str().expect("a path"),
                "-o",
                "injected.onnx",
                "--target-modules",
                "all-linear",
                "--r",
                "4",
            ],
            path,
        );
        let rows = rows.to_string();
        let mut args = vec!["train", "injected.onnx", "-o", "run", "--data", "data.safetensors", "--loss", "mse"];
        args.extend(["--labels", "goal", "--output", &output, "--steps", "2", "--batch-size", &rows]);
        args.extend(["--engine", "onnxruntime"]);
        let said: Value =
            serde_json::from_str(&done(&[&args[..], &["--plan", "--json"]].concat(), path)).expect("JSON");
        assert!(!path.join("run").exists(), "a plan leaves nothing");
        assert_eq!(said["unknown"], 0, "{name}: {said}");
        let (planned, real) = (said["peak"].as_u64().expect("bytes") as f64, peak(&args, path) as f64);
        let mebibytes = |bytes: f64| bytes / f64::from(1 << 20);
        println!("{name}: planned {:.0} MiB, took {:.0} MiB", mebibytes(planned), mebibytes(real));
        assert!(real > f64::from(150 << 20), "{name}: {real} tells nothing");
        // Computed again, it is as much less as was said, and the losses are the same.
        let saves = said["recompute_saves"].as_u64().expect("bytes") as f64;
        let losses = |args: &[&str]| -> Vec<f64> {
            let lines = std::fs::read_to_string(path.join(args[3]).join("metrics.jsonl")).expect("metrics");
            let lines = lines.lines().map(|l| serde_json::from_str::<Value>(l).expect("JSON"));
            lines.map(|l| l["loss"].as_f64().expect("a loss")).collect()
        };
        let kept = losses(&args);
        args[3] = "again";
        args.push("--recompute");
        let less = real - peak(&args, path) as f64;
        println!("{name}: --recompute saves {:.0} MiB of the {:.0} said", mebibytes(less), mebibytes(saves));
        for (kept, again) in kept.iter().zip(losses(&args)) {
            assert!((kept - again).abs() <= 1e-6 * kept.abs(), "{name}: {kept} {again}");
        }
        assert!(saves < 0.1 * planned || less > 0.4 * saves, "{name}: saved {less} of {saves}");
        assert!((0.67..=1.5).contains(&(planned / real)), "{name}: planned {planned}, took {real}: {said}");
    }
}

#[test]
fn the_plan_tells_what_is_computed_once_or_why_nothing_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/digits");
    std::fs::copy(digits.join("train.safetensors"), path.join("data.safetensors")).expect("a copy");
    let base = digits.join("digits.onnx");
    let base = base.to_str().expect("a path");
    done(&["inject", base, "-o", "injected.onnx", "--target-modules", "fc2", "--r", "4"], path);
    let args = "train injected.onnx -o run --data data.safetensors --loss cross-entropy --engine tract --plan";
    let args: Vec<&str> = args.split(' ').collect();
    let planned = |more: &[&str]| -> Value {
        let said = done(&[&args[..], more, &["--json"]].concat(), path);
        serde_json::from_str::<Value>(&said).expect("JSON")["cache"].clone()
    };
    let kept = planned(&["--cache-frozen", "on"]);
    assert_eq!((kept["why_not"].is_null(), kept["bytes"].as_u64()), (true, Some(400 * 64 * 4)), "{kept}");
    assert_eq!(kept["values"].as_array().map(Vec::len), Some(1), "{kept}");
    let why = planned(&[])["why_not"].to_string();
    assert!(why.contains("too little"), "{why}");
    let said = done(&[&args[..], &["--cache-frozen", "on"]].concat(), path);
    assert!(said.contains("frozen part: computed once for each row, 102.4 kB on disk; spares about"), "{said}");
    let said = done(&[&args[..], &["--epochs", "1"]].concat(), path);
    assert!(said.contains("frozen part: not kept; each row is seen once"), "{said}");
}
