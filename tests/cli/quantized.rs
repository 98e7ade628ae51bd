//! Quantised models on the command line: what `inspect` and `fold` say.

use std::path::Path;

use serde_json::Value;

use super::{done, refused};

fn injected(dir: &Path) {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quantized/nbits4.onnx");
    std::fs::copy(base, dir.join("base.onnx")).expect("a file");
    done(&["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--r", "4"], dir);
}

#[test]
fn inspect_tells_how_a_layer_is_quantised() {
    let dir = tempfile::tempdir().expect("a directory");
    injected(dir.path());
    let report: Value = serde_json::from_str(&done(&["inspect", "base.onnx", "--json"], dir.path())).expect("json");
    assert_eq!(report["linears"][0]["quantized"], "uint4, in blocks of 32 (MatMulNBits)");
    assert!(done(&["inspect", "base.onnx"], dir.path()).contains("uint4, in blocks of 32 (MatMulNBits)"));
}

#[test]
fn fold_says_what_became_of_quantised_layers() {
    let dir = tempfile::tempdir().expect("a directory");
    injected(dir.path());
    let fold = |more: &[&str]| {
        let mut args = vec!["fold", "injected.onnx", "-o", "merged.onnx"];
        args.extend(more);
        done(&args, dir.path())
    };
    assert!(fold(&[]).contains("2 quantized layers keep their adapter beside them"));
    assert!(fold(&["--dequantize"]).contains("2 quantized layers have a weight of floats now"));
    let text = fold(&["--requantize"]);
    assert!(text.contains("2 layers quantized again") && text.contains("output y: off by up to"), "{text}");
    let json: Value = serde_json::from_str(&fold(&["--requantize", "--json"])).expect("json");
    let layers = json["summary"]["requantized"].as_array().expect("layers");
    assert_eq!(layers.len(), 2);
    assert!(layers.iter().all(|l| l["error"].as_f64().is_some_and(|e| e < 0.1)), "{layers:?}");
    assert!(json["output_errors"][0]["max_abs"].as_f64().is_some_and(|e| e < 0.1), "{json}");
}

#[test]
fn what_went_into_integers_does_not_come_out() {
    let dir = tempfile::tempdir().expect("a directory");
    injected(dir.path());
    let parts = ["module lin0", "cannot be taken out again"];
    refused(&["fold", "injected.onnx", "-o", "out.onnx", "--unmerge"], dir.path(), "out.onnx", &parts);
}
