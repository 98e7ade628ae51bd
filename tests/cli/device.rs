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

#[test]
fn without_an_arena_a_run_comes_to_the_same_bits() {
    let (_dir, path) = with_network();
    let pixels = (0..60 * 6).map(|i| (i as f32 * 0.7).sin()).collect();
    arrays(&path, "data.safetensors", (&[60, 6], pixels), (0..60).map(|i| i * 7 % 3).collect());
    let run = |out, more: &[&'static str]| {
        let mut args = train("data.safetensors", &["--threads", "1", "--json"]);
        let engine = args.iter().position(|a| *a == "tract").expect("the engine");
        (args[3], args[engine]) = (out, "onnxruntime");
        args.extend(more);
        let said: Value = serde_json::from_str(&done(&args, &path)).expect("JSON");
        // What is no row of tokens has none to count.
        assert!(said["samples_per_second"].as_f64() > Some(0.0) && said["tokens_per_second"].is_null(), "{said}");
        let names = ["injected.onnx", "adapter/adapter_model.safetensors"];
        names.map(|name| std::fs::read(path.join(out).join(name)).expect("a file"))
    };
    let with = run("with", &["--arena-extend-strategy", "next-power-of-two"]);
    assert!(with == run("without", &["--arena-extend-strategy", "none"]));
    assert!(with != run("longer", &["--lr", "0.1"]), "nothing was learned");
}

#[test]
fn what_a_device_has_not_of_the_arena_is_refused() {
    let (_dir, path) = with_network();
    arrays(&path, "data.safetensors", (&[8, 6], vec![0.5; 48]), vec![0, 1, 2, 0, 1, 2, 0, 1]);
    let cases: [(&[&str], &str); 4] = [
        (
            &["--arena-extend-strategy", "same-as-requested"],
            "arena-extend-strategy same-as-requested is for --device cuda",
        ),
        (&["--gpu-mem-limit", "100"], "gpu-mem-limit is for --device cuda"),
        (&["--device", "cuda", "--arena-extend-strategy", "none"], "arena-extend-strategy none is for the CPU"),
        (&["--device", "cuda", "--arena-extend-strategy", "none", "--gpu-mem-limit", "100"], "is for the CPU"),
    ];
    for (more, what) in cases {
        refused(&train("data.safetensors", more), &path, "run", &[what]);
    }
}
