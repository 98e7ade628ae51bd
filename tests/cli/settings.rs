//! Settings files: what a run saves runs again, and what cannot be used is refused with its line.

use super::{arrays, done, refused, with_network};

/// A directory in which `train --config my.toml` trains into `run`, with `more` in the file.
fn with_file(more: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let (dir, path) = with_network();
    arrays(
        &path,
        "data.safetensors",
        (&[8, 6], (0..48).map(|i| i as f32 / 48.0).collect()),
        vec![0, 1, 2, 0, 1, 2, 0, 1],
    );
    let file = "model = 'injected.onnx'\noutput_dir = 'run'\ndata = 'data.safetensors'\nloss = 'cross-entropy'\n\
                engine = 'tract'\nper_device_train_batch_size = 3\nsteps = 4\n";
    std::fs::write(path.join("my.toml"), format!("{file}{more}\n")).expect("a file");
    (dir, path)
}

#[test]
fn what_a_run_saves_runs_again() {
    let (_dir, path) = with_file("learning-rate = 0.5\nweight_decay = 0.1");
    done(&["train", "--config", "my.toml", "--seed", "7", "--lr", "0.25"], &path);
    done(&["train", "--config", "run/train.toml", "-o", "again"], &path);
    let words = "train injected.onnx --data data.safetensors --loss cross-entropy --engine tract --batch-size 3 --steps 4 \
                 --lr 0.25 --seed 7 --weight-decay 0.1 -o flags";
    done(&words.split_whitespace().collect::<Vec<_>>(), &path);
    let read = |name: &str| std::fs::read_to_string(path.join(name).join("train.toml")).expect("a file");
    let model = |name: &str| std::fs::read(path.join(name).join("injected.onnx")).expect("a file");
    assert!(read("run").contains("\nlr = 0.25\n") && read("run").contains("\nengine = \"tract\"\n"), "{}", read("run"));
    for other in ["again", "flags"] {
        assert_eq!(read(other), read("run").replace("\"run\"", &format!("{other:?}")));
        assert!(model(other) == model("run"), "{other} trained something else");
    }
}

#[test]
fn a_file_that_cannot_be_used_is_refused_with_its_line() {
    for (more, parts) in [
        ("\nwarmup_step = 3", &["my.toml: line 9", "warmup_step", "warmup-steps"][..]),
        ("lr = 'high'", &["my.toml: line 8", "high"]),
        ("lr = -1.0", &["lr has to be a number above 0"]),
    ] {
        let (_dir, path) = with_file(more);
        refused(&["train", "--config", "my.toml"], &path, "run", parts);
    }
    let (_dir, path) = with_file("");
    refused(&["train", "--config", "your.toml"], &path, "run", &["your.toml"]);
}
