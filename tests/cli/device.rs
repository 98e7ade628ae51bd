//! Devices: where a gradient graph's nodes run, and what is said where CUDA cannot be had.

use serde_json::Value;

use super::{arrays, done, refused, train, with_network};

#[test]
fn doctor_shows_where_the_nodes_of_the_gradient_graph_run() {
    let (_dir, path) = with_network();
    let said = done(&["doctor", "--graph", "injected.onnx", "--engine", "onnxruntime", "--json"], &path);
    let said: Value = serde_json::from_str(&said).expect("JSON");
    let providers = said["providers"].as_array().expect("a list");
    assert!(providers.iter().all(|p| p["provider"] == "CPUExecutionProvider"), "{said}");
    let ops: Vec<&str> = said["ops"].as_array().expect("a list").iter().filter_map(|o| o["op"].as_str()).collect();
    // The network's own, and the product that gives a block's gradient.
    assert!(ops.contains(&"Gemm") || ops.contains(&"FusedGemm"), "{said}");
    assert!(ops.contains(&"MatMul") && said["nodes"].as_u64() > Some(8), "{said}");
    assert_eq!(said["fell_to_cpu"], Value::Array(Vec::new()));
    let table = done(&["doctor", "--graph", "injected.onnx", "--engine", "onnxruntime"], &path);
    assert!(table.contains("CPUExecutionProvider") && table.contains("MatMul"), "{table}");
    refused(&["doctor", "--graph", "base.onnx"], &path, "out", &["base.onnx", "inject"]);
    refused(&["doctor", "--graph", "injected.onnx", "--engine", "tract"], &path, "out", &["--engine onnxruntime"]);
}

/// The library here is a build for the CPU, or this machine has no GPU: an error either way, and no run on the CPU.
#[test]
fn cuda_is_used_or_refused_with_the_way_to_get_it() {
    if std::path::Path::new("/dev/nvidia0").exists() {
        return;
    }
    let (_dir, path) = with_network();
    arrays(&path, "data.safetensors", (&[8, 6], vec![0.5; 48]), vec![0, 1, 2, 0, 1, 2, 0, 1]);
    let mut args = train("data.safetensors", &["--device", "cuda:7"]);
    refused(&args, &path, "run", &["tract runs on the CPU only", "--engine onnxruntime"]);
    let engine = args.iter().position(|a| *a == "tract").expect("the engine");
    args[engine] = "onnxruntime";
    refused(&args, &path, "run", &["CUDA cannot be used", "pip install"]);
}

#[test]
fn the_optimizer_on_the_device_is_a_flag() {
    let (_dir, path) = with_network();
    arrays(&path, "data.safetensors", (&[8, 6], vec![0.5; 48]), vec![0, 1, 2, 0, 1, 2, 0, 1]);
    let with = ["--optimizer-on-device", "true"];
    refused(&train("data.safetensors", &with), &path, "run", &["tract", "ONNX Runtime"]);
}
