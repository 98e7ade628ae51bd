//! `train --packing` on a decoder: the rows are those that one would make by hand, and so is the run.

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tempfile::TempDir;

use super::{bone, done, refused, text};

const LENGTH: usize = 6;

/// A directory with `injected.onnx` (a Llama of two layers and 96 tokens), `tokenizer.json` (</s> 0, [CLS] 1, a..e 2..6)
/// and `texts.jsonl`; and the tokens of all texts, joined.
fn with_decoder() -> (TempDir, PathBuf, Vec<i64>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_path_buf();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let base = root.join("../shared/models/llama.ts17.onnx");
    let base = base.to_str().expect("a path");
    done(&["inject", base, "-o", "injected.onnx", "--target-modules", "all-linear", "--r", "4"], &path);
    let tokenizer = std::fs::read_to_string(root.join("fixtures/data/tokenizer.json")).expect("a tokenizer");
    std::fs::write(path.join("tokenizer.json"), tokenizer.replace("[PAD]", "</s>")).expect("a file");
    let (mut lines, mut ids) = (String::new(), Vec::new());
    for row in 0..23usize {
        let words: Vec<usize> = (0..1 + row * 5 % 9).map(|at| (row * 3 + at * at) % 5).collect();
        let letters: Vec<&str> = words.iter().map(|word| ["a", "b", "c", "d", "e"][*word]).collect();
        lines += &format!("{{\"text\": {:?}}}\n", letters.join(" "));
        ids.extend((row > 0).then_some(0));
        ids.push(1);
        ids.extend(words.iter().map(|word| *word as i64 + 2));
    }
    std::fs::write(path.join("texts.jsonl"), lines).expect("a file");
    (dir, path, ids)
}

fn train<'a>(data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "injected.onnx", "-o", out, "--data", data, "--loss", "causal-lm", "--engine"];
    args.extend(["onnxruntime", "--steps", "6", "--batch-size", "4", "--lr", "1e-2", "--seed", "5", "--json"]);
    args.extend(more);
    args
}

fn losses(dir: &Path) -> Vec<f64> {
    let lines = std::fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.map(|line| line["loss"].as_f64().expect("a loss")).collect()
}

#[test]
fn a_run_over_packed_texts_is_one_over_the_rows_made_by_hand() {
    let (_dir, path, ids) = with_decoder();
    let packing = ["--tokenizer", "tokenizer.json", "--packing", "--max-length", "6"];
    let output = bone(&train("texts.jsonl", "packed", &packing), &path);
    let (said, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    let (rows, left_out) = (ids.len() / LENGTH, ids.len() % LENGTH);
    assert!(rows > 20 && left_out > 0, "{rows} {left_out}");
    let word = format!("23 texts packed into {rows} rows of {LENGTH} tokens, {left_out} tokens left out");
    assert!(stderr.contains(&word) && stderr.contains(&format!("{rows} samples, 6 steps of 4")), "{stderr}");
    let said: Value = serde_json::from_str(&said).expect("JSON");
    let rate = |name: &str| said[name].as_f64().expect("a rate");
    assert!((rate("tokens_per_second") / rate("samples_per_second") - LENGTH as f64).abs() < 1e-9, "{said}");

    let bytes: Vec<u8> = ids[..rows * LENGTH].iter().flat_map(|id| id.to_le_bytes()).collect();
    let ones: Vec<u8> = (0..rows * LENGTH).flat_map(|_| 1i64.to_le_bytes()).collect();
    let view = |bytes| TensorView::new(Dtype::I64, vec![rows, LENGTH], bytes).expect("a view");
    let arrays = [("input_ids", view(&bytes)), ("attention_mask", view(&ones)), ("labels", view(&bytes))];
    safetensors::serialize_to_file(arrays, None, &path.join("rows.safetensors")).expect("a file");
    done(&train("rows.safetensors", "by-hand", &[]), &path);
    let packed = losses(&path.join("packed"));
    assert_eq!(packed, losses(&path.join("by-hand")));
    assert!(packed[5] < packed[0], "{packed:?}");
    let [a, b] = ["packed", "by-hand"].map(|out| std::fs::read(path.join(out).join("injected.onnx")).expect("a file"));
    assert!(a == b, "not the same bits");
}

#[test]
fn packing_says_what_it_is_for() {
    let (_dir, path, _) = with_decoder();
    let packing = ["--tokenizer", "tokenizer.json", "--packing"];
    let long = [&packing[..], &["--max-length", "600"]].concat();
    refused(&train("texts.jsonl", "out", &long), &path, "out", &["texts.jsonl", "fewer than one row of 600"]);
    refused(&train("texts.jsonl", "out", &["--packing"]), &path, "out", &["--tokenizer"]);
    let unknown = [&packing[..], &["--eos-token", "<end>"]].concat();
    refused(&train("texts.jsonl", "out", &unknown), &path, "out", &["eos-token is \"<end>\""]);
    let mut other = train("texts.jsonl", "out", &packing);
    other[7] = "cross-entropy";
    refused(&other, &path, "out", &["packing makes rows for loss causal-lm"]);
}
