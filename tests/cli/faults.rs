//! Faults from outside: a file system that takes no more, a process that is killed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bone_onnx::onnx::{DataType, GraphProto, Tensor, node, value_info};
use prost::Message;

use super::{done, model, with_network};

const BINARY: &str = env!("CARGO_BIN_EXE_bone-onnx");

#[test]
fn a_file_system_that_takes_no_more_leaves_the_old_file() {
    let (_dir, path) = with_network();
    std::fs::write(path.join("out.onnx"), b"precious").expect("a file");
    for command in [
        "fold injected.onnx -o out.onnx",
        "unload injected.onnx -o out.onnx",
        "inject base.onnx -o out.onnx --target-modules fc1 --r 4096",
    ] {
        // Files may grow to no more than 0 (fold, unload) or 8 blocks of 512 bytes.
        let blocks = if command.starts_with("inject") { 8 } else { 0 };
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec {BINARY} {command}");
        let output = Command::new("sh").args(["-c", &script]).current_dir(&path).output().expect("a run");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command}: {stderr}");
        assert!(stderr.contains("out.onnx: cannot write"), "{command}: {stderr}");
        assert_eq!(std::fs::read(path.join("out.onnx")).expect("a file"), b"precious", "{command}");
        let names: Vec<String> = std::fs::read_dir(&path)
            .expect("a directory")
            .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        assert!(!names.iter().any(|n| n.starts_with(".bone-onnx")), "{command} left {names:?}");
    }
}

/// A chain of four products with weights of 16 MiB.
fn large(path: &Path) {
    let mut graph = GraphProto { name: Some("large".into()), ..Default::default() };
    graph.input.push(value_info("x0", DataType::Float, &["n", "2048"]));
    for i in 0..4 {
        let (name, x, y) = (format!("layer.{i}.weight"), format!("x{i}"), format!("x{}", i + 1));
        let values = (0..2048 * 2048).map(|k| (k % 997) as f32).collect();
        graph.initializer.push(Tensor::new::<f32>(&[2048, 2048], values).to_proto(&name));
        graph.node.push(node("MatMul", &[&x, &name], &[&y]));
    }
    graph.output.push(value_info("x4", DataType::Float, &["n", "2048"]));
    std::fs::write(path, model(graph).encode_to_vec()).expect("a file");
}

#[test]
fn a_fold_that_is_killed_leaves_the_old_file_or_the_new_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    large(&path.join("base.onnx"));
    let inject =
        ["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--init-weights", "false"];
    done(&inject, path);
    done(&["fold", "injected.onnx", "-o", "whole.onnx"], path);
    let (old, new) = (std::fs::read(path.join("base.onnx")).unwrap(), std::fs::read(path.join("whole.onnx")).unwrap());
    let mut killed = 0;
    for millis in [1, 4, 8, 12, 16, 20, 30, 40, 60] {
        std::fs::write(path.join("out.onnx"), &old).expect("a file");
        let mut child = Command::new(BINARY)
            .args(["fold", "injected.onnx", "-o", "out.onnx", "-q"])
            .stdout(Stdio::null())
            .current_dir(path)
            .spawn()
            .expect("a process");
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().expect("a signal");
        killed += i32::from(!child.wait().expect("an end").success());
        let out = std::fs::read(path.join("out.onnx")).expect("a file");
        assert!(out == old || out == new, "killed after {millis} ms: neither the old file nor the new one");
    }
    assert!(killed > 0, "every fold was done before it could be killed");
}
