//! Several adapters and PEFT directories, by the command line.

use std::path::Path;

use serde_json::Value;

use super::{bone, done, refused, text, with_network};

fn json(args: &[&str], dir: &Path) -> Value {
    let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&done(&args, dir)).expect("one JSON object")
}

#[test]
fn adapters_come_and_go_by_name() {
    let (_dir, path) = with_network();
    let second = ["inject", "injected.onnx", "-o", "both.onnx", "--adapter-name", "second", "--target-modules", "fc1"];
    done(&[&second[..], &["--r", "3", "--init-weights", "mini"]].concat(), &path);
    let list = json(&["adapter", "list", "both.onnx"], &path);
    // Two kinds on fc1 cannot work together: the newcomer works alone.
    assert_eq!(list["active"], serde_json::json!(["second"]));
    let about: Vec<String> =
        ["name", "variant", "r", "layers", "parameters"].map(|key| list["adapters"][1][key].to_string()).to_vec();
    assert_eq!(about, ["\"second\"", "\"MiSS mini\"", "3", "1", "3"]);

    refused(
        &["adapter", "activate", "both.onnx", "--adapters", "default,second", "-o", "out.onnx"],
        &path,
        "out.onnx",
        &["fc1", "default is Bone", "second is MiSS mini", "only adapters of one kind"],
    );
    refused(
        &["adapter", "delete", "both.onnx", "secnd", "-o", "out.onnx"],
        &path,
        "out.onnx",
        &["Adapter secnd does not exist", "Did you mean second?"],
    );
    let again = ["inject", "both.onnx", "-o", "out.onnx", "--adapter-name", "second", "--target-modules", "fc1"];
    refused(&again, &path, "out.onnx", &["adapter \"second\" is already in it", "--adapter-name"]);
    done(&["adapter", "rename", "both.onnx", "second", "third", "-o", "both.onnx"], &path);
    done(&["adapter", "activate", "both.onnx", "--adapters", "default", "-o", "both.onnx"], &path);
    let changed = json(&["adapter", "delete", "both.onnx", "third", "-o", "one.onnx"], &path);
    assert_eq!(changed["adapters"], serde_json::json!(["default"]));
    // Not a byte tells that there was another one.
    assert!(std::fs::read(path.join("one.onnx")).unwrap() == std::fs::read(path.join("injected.onnx")).unwrap());
    let none = json(&["adapter", "activate", "both.onnx", "--adapters", "", "-o", "off.onnx"], &path);
    assert_eq!(none["active"], serde_json::json!([]));
    done(&["verify", "off.onnx", "base.onnx", "--atol", "0", "--rtol", "0"], &path);
    done(&["unload", "off.onnx", "-o", "back.onnx"], &path);
    assert!(std::fs::read(path.join("back.onnx")).unwrap() == std::fs::read(path.join("base.onnx")).unwrap());
}

#[test]
fn a_directory_goes_out_comes_in_and_folds_onto_the_base() {
    let (_dir, path) = with_network();
    done(
        &[
            "inject",
            "base.onnx",
            "-o",
            "random.onnx",
            "--target-modules",
            "all-linear",
            "--r",
            "4",
            "--init-weights",
            "false",
        ],
        &path,
    );
    done(&["adapter", "export", "random.onnx", "-o", "dir", "--peft-type", "BONE"], &path);
    done(&["adapter", "convert", "dir", "-o", "miss"], &path);
    done(&["adapter", "import", "base.onnx", "miss", "-o", "imported.onnx"], &path);
    done(&["fold", "random.onnx", "-o", "a.onnx"], &path);
    done(&["fold", "imported.onnx", "-o", "b.onnx", "--safe-merge"], &path);
    done(&["fold", "base.onnx", "--adapter", "dir", "-o", "c.onnx"], &path);
    let read = |name: &str| std::fs::read(path.join(name)).expect("a file");
    assert!(read("a.onnx") == read("b.onnx") && read("a.onnx") == read("c.onnx"));
    assert_ne!(read("a.onnx"), read("base.onnx"));
    done(&["fold", "c.onnx", "--unmerge", "--adapter", "dir", "-o", "back.onnx"], &path);
    done(&["verify", "back.onnx", "base.onnx", "--atol", "1e-6"], &path);

    // Another base: everything that does not fit is listed, and nothing is written.
    let config = std::fs::read_to_string(path.join("miss/adapter_config.json")).expect("the config");
    assert!(config.contains("\"MISS\""), "{config}");
    std::fs::write(path.join("miss/adapter_config.json"), config.replace("\"r\": 4", "\"r\": 5")).expect("a file");
    let import = ["adapter", "import", "base.onnx", "miss", "-o", "out.onnx"];
    refused(&import, &path, "out.onnx", &["fc1.miss_block", "fc2.miss_block", "adapter_model.safetensors"]);
    std::fs::remove_file(path.join("miss/adapter_config.json")).expect("the config");
    refused(&import, &path, "out.onnx", &["adapter_config.json", "no such file"]);
    refused(&["adapter", "convert", "dir", "-o", "out", "--peft-type", "LORA"], &path, "out", &["--base MODEL"]);
    done(&["adapter", "convert", "dir", "-o", "lora", "--peft-type", "LORA", "--base", "base.onnx"], &path);
    done(&["adapter", "export", "random.onnx", "-o", "a.onnx_adapter", "--format", "onnx_adapter"], &path);
    assert!(read("a.onnx_adapter")[4..8] == *b"TORT");
}

#[test]
fn a_config_file_is_read_and_flags_win() {
    let (_dir, path) = with_network();
    let config = r#"{"peft_type": "BONE", "r": 3, "target_modules": ["fc1"], "bias": "all", "lr": 1}"#;
    std::fs::write(path.join("config.json"), config).expect("a file");
    let inject = ["inject", "base.onnx", "-o", "out.onnx", "--config", "config.json"];
    let output = bone(&[&inject[..], &["--r", "2", "--bias", "bone_only"]].concat(), &path);
    let stderr = text(&output.stderr);
    assert!(output.status.success() && stderr.contains("unknown key lr"), "{stderr}");
    let list = json(&["adapter", "list", "out.onnx"], &path);
    let adapter = &list["adapters"][0];
    assert_eq!((adapter["r"].as_u64(), adapter["peft_type"].as_str()), (Some(2), Some("BONE")));
    assert_eq!(adapter["trained_in_full"], serde_json::json!(["fc1.bias"]));
    std::fs::remove_file(path.join("out.onnx")).expect("the file");

    for (field, words) in [
        (r#""init_weights": "foo""#, "init_weights is \"foo\"; allowed are true, false, bat, mini"),
        (r#""bias": "some""#, "bias is \"some\"; allowed are none, all"),
        (r#""r": -4"#, "r should be a positive integer value but the value passed is -4"),
        (r#""mini_r": 2, "init_weights": "mini", "peft_type": "BONE""#, "peft_type has to be MISS"),
        (r#""layers_pattern": "h", "target_modules": "fc1""#, "layers_pattern cannot be used"),
    ] {
        let config = format!("{{\"target_modules\": [\"fc1\"], {field}}}");
        std::fs::write(path.join("config.json"), config).expect("a file");
        refused(&inject, &path, "out.onnx", &[words]);
    }
}

#[test]
fn nothing_finite_comes_out_of_a_broken_adapter() {
    let (_dir, path) = with_network();
    done(&["adapter", "export", "injected.onnx", "-o", "dir"], &path);
    let file = path.join("dir/adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).expect("the tensors");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&file, bytes).expect("a file");
    refused(
        &["fold", "base.onnx", "--adapter", "dir", "--safe-merge", "-o", "out.onnx"],
        &path,
        "out.onnx",
        &["module fc2", "adapter dir", "element", "nothing was written"],
    );
    done(&["fold", "base.onnx", "--adapter", "dir", "-o", "out.onnx"], &path);
}
