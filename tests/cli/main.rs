//! The command line as a person meets it: every bad input gets one clear error, exit code 1 and no output file.

mod adapters;
mod data;
mod device;
mod faults;
mod formats;
mod grad;
mod packing;
mod plan;
mod quantized;
mod resume;
mod settings;

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use bone_onnx::onnx::proto::tensor_proto::DataLocation;
use bone_onnx::onnx::proto::{OperatorSetIdProto, StringStringEntryProto};
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, Tensor, TensorProto, node, value_info};
use prost::Message;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

fn bone(args: &[&str], dir: &Path) -> Output {
    Command::cargo_bin("bone-onnx").expect("the binary").args(args).current_dir(dir).output().expect("a run")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command that has to fail: exit code 1, one `error:` line that contains all of `parts`, and `out` not there.
fn refused(args: &[&str], dir: &Path, out: &str, parts: &[&str]) {
    let output = bone(args, dir);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert_eq!(stderr.matches("error: ").count(), 1, "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{args:?}: no {part:?} in: {stderr}");
    }
    assert!(!dir.join(out).exists(), "{args:?} left {out}");
    let strays: Vec<_> = std::fs::read_dir(dir)
        .expect("a directory")
        .filter_map(|e| e.expect("an entry").file_name().into_string().ok())
        .filter(|n| n.starts_with(".bone-onnx"))
        .collect();
    assert!(strays.is_empty(), "{args:?} left {strays:?}");
}

fn done(args: &[&str], dir: &Path) -> String {
    let output = bone(args, dir);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn floats(dims: &[usize]) -> Tensor {
    let len = dims.iter().product::<usize>();
    Tensor::new(dims, (0..len).map(|i| ((i * 37 % 23) as f32 - 11.0) / 40.0).collect())
}

fn model(graph: GraphProto) -> ModelProto {
    let opset = |domain: &str, version| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) };
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![opset("", 17), opset("org.example", 1)],
        graph: Some(graph),
        ..Default::default()
    }
}

/// pixels[n,6] → fc1 (Gemm) → ReLU → fc2 (MatMul, Add) → logits[n,3]; with `mystery`, two operators nobody knows.
fn network(mystery: bool) -> ModelProto {
    let mut graph = GraphProto { name: Some("net".into()), ..Default::default() };
    graph.input.push(value_info("pixels", DataType::Float, &["n", "6"]));
    graph.output.push(value_info("logits", DataType::Float, &["n", "3"]));
    graph.initializer = vec![
        floats(&[5, 6]).to_proto("fc1.weight"),
        floats(&[5]).to_proto("fc1.bias"),
        floats(&[5, 3]).to_proto("onnx::MatMul_9"),
        floats(&[3]).to_proto("fc2.bias"),
    ];
    let mut gemm = node("Gemm", &["pixels", "fc1.weight", "fc1.bias"], &["h"]);
    gemm.attribute = vec![AttributeProto::int("transB", 1)];
    gemm.name = Some("/fc1/Gemm".into());
    let mut multiply = node("MatMul", &["a", "onnx::MatMul_9"], &["m"]);
    multiply.name = Some("/fc2/MatMul".into());
    graph.node = vec![gemm, node("Relu", &["h"], &["a"]), multiply, node("Add", &["fc2.bias", "m"], &["logits"])];
    if mystery {
        for (at, (x, y)) in [("h", "h2"), ("h2", "h3")].into_iter().enumerate() {
            let mut unknown = node("Mystery", &[x], &[y]);
            unknown.domain = Some("org.example".into());
            unknown.name = Some(format!("/strange/{at}"));
            graph.node.insert(1 + at, unknown);
        }
        graph.node[3].input[0] = "h3".into();
    }
    model(graph)
}

/// A directory with `base.onnx` and `injected.onnx`.
fn with_network() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_path_buf();
    std::fs::write(path.join("base.onnx"), network(false).encode_to_vec()).expect("a file");
    done(&["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--r", "2"], &path);
    (dir, path)
}

fn arrays(path: &Path, name: &str, pixels: (&[usize], Vec<f32>), labels: Vec<i64>) {
    let (dims, pixels) = pixels;
    let pixel_bytes: Vec<u8> = pixels.iter().flat_map(|v| v.to_le_bytes()).collect();
    let label_bytes: Vec<u8> = labels.iter().flat_map(|v| v.to_le_bytes()).collect();
    let views = [
        ("pixels", TensorView::new(Dtype::F32, dims.to_vec(), &pixel_bytes).expect("a view")),
        ("labels", TensorView::new(Dtype::I64, vec![labels.len()], &label_bytes).expect("a view")),
    ];
    safetensors::serialize_to_file(views, None, &path.join(name)).expect("a file");
}

fn train<'a>(data: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![
        "train",
        "injected.onnx",
        "-o",
        "run",
        "--data",
        data,
        "--loss",
        "cross-entropy",
        "--engine",
        "tract",
        "--steps",
        "4",
        "--batch-size",
        "4",
    ];
    args.extend(more);
    args
}

#[test]
fn what_is_not_a_model() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("notes.txt"), "this is no model, only a note to myself").expect("a file");
    std::fs::write(dir.path().join("empty.onnx"), "").expect("a file");
    for name in ["notes.txt", "empty.onnx", "absent.onnx"] {
        refused(&["inspect", name], dir.path(), "out.onnx", &[name]);
        refused(&["inject", name, "-o", "out.onnx", "--target-modules", "all-linear"], dir.path(), "out.onnx", &[name]);
        refused(&["fold", name, "-o", "out.onnx"], dir.path(), "out.onnx", &[name]);
    }
}

#[test]
fn a_file_cut_short_anywhere() {
    let (_dir, path) = with_network();
    let whole = std::fs::read(path.join("injected.onnx")).expect("a file");
    for len in (1..whole.len()).step_by(7) {
        std::fs::write(path.join("cut.onnx"), &whole[..len]).expect("a file");
        // Some prefixes are whole messages that only lack their last fields; none may panic or leave a file.
        let output = bone(&["fold", "cut.onnx", "-o", "out.onnx"], &path);
        assert_ne!(output.status.code(), None);
        assert!(!text(&output.stderr).contains("panicked"), "cut at {len}: {}", text(&output.stderr));
        if !output.status.success() {
            assert!(!path.join("out.onnx").exists(), "cut at {len}");
            assert!(text(&output.stderr).contains("cut.onnx"), "cut at {len}: {}", text(&output.stderr));
        } else {
            std::fs::remove_file(path.join("out.onnx")).expect("a file");
        }
    }
}

fn external(location: &str, length: Option<&str>) -> ModelProto {
    let mut proto = network(false);
    let weight = &mut proto.graph.as_mut().expect("a graph").initializer[0];
    let entry = |key: &str, value: &str| StringStringEntryProto { key: Some(key.into()), value: Some(value.into()) };
    *weight = TensorProto {
        raw_data: None,
        data_location: Some(DataLocation::External as i32),
        external_data: vec![entry("location", location)],
        ..weight.clone()
    };
    weight.external_data.extend(length.map(|l| entry("length", l)));
    proto
}

#[test]
fn external_data_that_is_missing_short_or_elsewhere() {
    let outer = tempfile::tempdir().expect("a directory");
    let dir = outer.path().join("models");
    std::fs::create_dir(&dir).expect("a directory");
    std::fs::write(outer.path().join("secret.bin"), [0; 120]).expect("a file");
    std::fs::write(dir.join("short.bin"), [0; 10]).expect("a file");
    std::fs::write(dir.join("right.bin"), [0; 120]).expect("a file");
    std::os::unix::fs::symlink(outer.path().join("secret.bin"), dir.join("link.bin")).expect("a link");
    std::fs::hard_link(outer.path().join("secret.bin"), dir.join("hard.bin")).expect("a link");
    let absolute = outer.path().join("secret.bin").to_string_lossy().into_owned();
    let inject: &[&str] =
        &["inject", "base.onnx", "-o", "sub/injected.onnx", "--target-modules", "all-linear", "--r", "2"];
    std::fs::create_dir(dir.join("sub")).expect("a directory");
    let cases = [
        ("gone.bin", None, "gone.bin"),
        ("../secret.bin", None, "secret.bin"),
        ("a/../../secret.bin", None, "secret.bin"),
        (absolute.as_str(), None, "secret.bin"),
        ("link.bin", None, "link.bin"),
        ("hard.bin", None, "hard.bin"),
        ("", None, "fc1.weight"),
        ("sub", None, "sub"),
    ];
    for (location, length, part) in cases {
        std::fs::write(dir.join("base.onnx"), external(location, length).encode_to_vec()).expect("a file");
        let parts: &[&str] = if location.is_empty() { &["base.onnx"] } else { &["base.onnx", part] };
        refused(inject, &dir, "sub/injected.onnx", parts);
    }
    // Too short, and ranges beyond the end: found when the weight is wanted.
    for (location, length) in
        [("short.bin", Some("120")), ("short.bin", None), ("right.bin", Some("18446744073709551615"))]
    {
        std::fs::write(dir.join("base.onnx"), external(location, length).encode_to_vec()).expect("a file");
        done(&["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--r", "2"], &dir);
        refused(&["fold", "injected.onnx", "-o", "merged.onnx"], &dir, "merged.onnx", &["fc1.weight"]);
    }
    // And the one that is right works, in another directory too.
    std::fs::write(dir.join("base.onnx"), external("right.bin", Some("120")).encode_to_vec()).expect("a file");
    done(inject, &dir);
    done(&["fold", "sub/injected.onnx", "-o", "sub/merged.onnx"], &dir);
    done(&["unload", "sub/injected.onnx", "-o", "sub/back.onnx"], &dir);
    assert_eq!(std::fs::read(dir.join("sub/back.onnx")).unwrap(), std::fs::read(dir.join("base.onnx")).unwrap());
}

#[test]
fn a_weight_of_two_hundred_gigabytes_is_not_read_to_inspect_inject_or_unload() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let (inputs, outputs) = (500_000, 100_000);
    let file = std::fs::File::create(path.join("big.bin")).expect("a file");
    file.set_len(4 * inputs * outputs).expect("a sparse file");
    let mut proto = external("big.bin", None);
    let graph = proto.graph.as_mut().expect("a graph");
    graph.input = vec![value_info("pixels", DataType::Float, &["n", &inputs.to_string()])];
    graph.output = vec![value_info("h", DataType::Float, &["n", &outputs.to_string()])];
    graph.initializer.truncate(1);
    graph.initializer[0].dims = vec![outputs as i64, inputs as i64];
    graph.node.truncate(1);
    graph.node[0].input.truncate(2);
    std::fs::write(path.join("base.onnx"), proto.encode_to_vec()).expect("a file");
    let begun = std::time::Instant::now();
    done(&["inspect", "base.onnx"], path);
    done(&["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "fc1", "--r", "2"], path);
    done(&["unload", "injected.onnx", "-o", "back.onnx"], path);
    // Reading it would take minutes on any machine.
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    assert_eq!(std::fs::read(path.join("back.onnx")).unwrap(), std::fs::read(path.join("base.onnx")).unwrap());
}

#[test]
fn sizes_of_packed_modules_and_nodes_before_a_weight() {
    let dir = tempfile::tempdir().expect("a directory");
    let fixture = |name: &str| format!("{}/fixtures/exported/{name}", env!("CARGO_MANIFEST_DIR"));
    let base = fixture("packed_groups.ts17.onnx");
    let inject = ["inject", &base, "-o", "out.onnx", "--target-modules", "q_proj,v_proj", "--r", "2"];
    refused(&inject, dir.path(), "out.onnx", &["--packed-sizes q_proj=…,k_proj=…,v_proj=…"]);
    let sized = |sizes| [&inject[..], &["--packed-sizes", sizes]].concat();
    refused(&sized("q_proj=8,k_proj=4,v_proj=5"), dir.path(), "out.onnx", &["qkv_proj", "16 outputs"]);
    assert!(text(&bone(&sized("q_proj:8"), dir.path()).stderr).contains("NAME=N"));
    assert!(done(&sized("q_proj=8,k_proj=4,v_proj=4"), dir.path()).contains("2 layers adapted"));
    done(&["fold", "out.onnx", "-o", "merged.onnx"], dir.path());
    let layers = done(&["inspect", &fixture("weights_f16.ts17.onnx")], dir.path());
    assert!(layers.contains("float16 (Cast, Mul, Transpose)"), "{layers}");
}

#[test]
fn modules_that_are_not_there() {
    let (_dir, path) = with_network();
    let args = ["inject", "base.onnx", "-o", "out.onnx", "--target-modules", "fc_1"];
    refused(&args, &path, "out.onnx", &["fc_1", "fc1", "fc2"]);
    let args = ["inject", "base.onnx", "-o", "out.onnx", "--target-modules", "fc1,fc2", "--exclude-modules", "fc1,fc2"];
    refused(&args, &path, "out.onnx", &["excluded"]);
    let args = ["inject", "base.onnx", "-o", "out.onnx", "--target-modules", "fc(1"];
    refused(&args, &path, "out.onnx", &["fc(1"]);
    refused(
        &["inject", "base.onnx", "-o", "out.onnx", "--target-modules", "fc1", "--r", "0"],
        &path,
        "out.onnx",
        &["r "],
    );
}

#[test]
fn a_model_that_is_injected_already() {
    let (_dir, path) = with_network();
    let again = ["inject", "injected.onnx", "-o", "out.onnx", "--target-modules", "all-linear"];
    refused(&again, &path, "out.onnx", &["injected.onnx", "default", "already", "--adapter-name"]);
    done(
        &[
            "inject",
            "injected.onnx",
            "-o",
            "two.onnx",
            "--target-modules",
            "fc1",
            "--r",
            "3",
            "--adapter-name",
            "second",
        ],
        &path,
    );
    let twice = ["inject", "two.onnx", "-o", "out.onnx", "--target-modules", "fc1", "--adapter-name", "second"];
    refused(&twice, &path, "out.onnx", &["two.onnx", "second", "already"]);
    refused(&["unload", "base.onnx", "-o", "out.onnx"], &path, "out.onnx", &["base.onnx", "inject"]);
    refused(&["fold", "base.onnx", "-o", "out.onnx"], &path, "out.onnx", &["base.onnx", "inject"]);
}

#[test]
fn operators_without_a_gradient_are_all_named_before_training() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    std::fs::write(path.join("base.onnx"), network(true).encode_to_vec()).expect("a file");
    done(&["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--r", "2"], path);
    arrays(path, "data.safetensors", (&[8, 6], vec![0.5; 48]), vec![0; 8]);
    refused(&train("data.safetensors", &[]), path, "run/injected.onnx", &["Mystery", "/strange/0", "/strange/1"]);
}

#[test]
fn data_that_does_not_fit() {
    let (_dir, path) = with_network();
    arrays(&path, "labels.safetensors", (&[8, 6], vec![0.5; 48]), vec![0, 1, 2, 0, 1, 3, 0, 1]);
    refused(&train("labels.safetensors", &[]), &path, "run/injected.onnx", &["label", "3", "labels.safetensors"]);
    arrays(&path, "shape.safetensors", (&[8, 5], vec![0.5; 40]), vec![0; 8]);
    refused(&train("shape.safetensors", &[]), &path, "run/injected.onnx", &["pixels", "shape.safetensors", "5", "6"]);
    arrays(&path, "rows.safetensors", (&[8, 6], vec![0.5; 48]), vec![0; 7]);
    refused(&train("rows.safetensors", &[]), &path, "run/injected.onnx", &["rows.safetensors", "8", "7"]);
    arrays(&path, "empty.safetensors", (&[0, 6], vec![]), vec![]);
    refused(&train("empty.safetensors", &[]), &path, "run/injected.onnx", &["empty.safetensors"]);
    refused(&train("absent.safetensors", &[]), &path, "run/injected.onnx", &["absent.safetensors"]);
    std::fs::write(path.join("data.xml"), "<data/>").expect("a file");
    refused(&train("data.xml", &[]), &path, "run/injected.onnx", &["data.xml", ".safetensors", ".npz", ".jsonl"]);
    std::fs::write(path.join("broken.safetensors"), b"\xff\xff\xff\xff\xff\xff\xff\x7f{}").expect("a file");
    refused(&train("broken.safetensors", &[]), &path, "run/injected.onnx", &["broken.safetensors"]);

    // The right shape in the wrong type, and an array under a name that the model does not have.
    let bytes = [0u8; 48 * 8];
    let labels = [0u8; 64];
    let wrong = |name: &str, dtype: Dtype, len: usize| {
        let views = [
            (name.to_string(), TensorView::new(dtype, vec![8, 6], &bytes[..len]).expect("a view")),
            ("labels".to_string(), TensorView::new(Dtype::I64, vec![8], &labels).expect("a view")),
        ];
        safetensors::serialize_to_file(views, None, &path.join("wrong.safetensors")).expect("a file");
    };
    wrong("pixels", Dtype::I64, 48 * 8);
    refused(&train("wrong.safetensors", &[]), &path, "run/injected.onnx", &["pixels", "float32", "int64"]);
    wrong("pixel", Dtype::F32, 48 * 4);
    refused(&train("wrong.safetensors", &[]), &path, "run/injected.onnx", &["pixels", "pixel", "wrong.safetensors"]);
}

#[test]
fn a_loss_that_is_not_a_number_stops_training_and_keeps_what_was_saved() {
    let (_dir, path) = with_network();
    let mut pixels = vec![0.5; 48];
    pixels[30] = f32::NAN;
    arrays(&path, "nan.safetensors", (&[8, 6], pixels), vec![0; 8]);
    let output = bone(&train("nan.safetensors", &["--no-shuffle"]), &path);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("step 2") && stderr.contains("NaN"), "{stderr}");
    let metrics = std::fs::read_to_string(path.join("run/metrics.jsonl")).expect("the metrics");
    assert!(metrics.lines().next().is_some_and(|l| l.contains("\"step\":1")), "{metrics}");
}

#[test]
fn a_record_that_makes_no_sense() {
    let (_dir, path) = with_network();
    let whole =
        ModelProto::decode(std::fs::read(path.join("injected.onnx")).expect("a file").as_slice()).expect("a model");
    let text = whole.metadata_props[0].value().to_string();
    assert!(text.contains("\"r\":2") && text.contains("\"now\":\"h.base\""), "{text}");
    let cases = [
        text.replace("\"r\":2", "\"r\":0"),
        text.replace("\"in_features\":6", "\"in_features\":18446744073709551615"),
        text.replace("\"out_features\":5", "\"out_features\":4"),
        text.replace("\"now\":\"h.base\"", "\"now\":\"h\""),
        text.replace("\"now\":\"h.base\"", "\"now\":\"m.base\""),
        text.replace("\"active\":[\"default\"]", "\"active\":[\"other\"]"),
        text.replace("\"init_weights\":\"true\"", "\"init_weights\":\"bat\""),
        text.replace("\"format\":2", "\"format\":3"),
        text.replace("\"format\":2", "\"format\":1"),
        text.replace("fc1.miss_block.default", "fc9.miss_block.default"),
        text[..text.len() / 2].to_string(),
    ];
    arrays(&path, "data.safetensors", (&[8, 6], vec![0.5; 48]), vec![0; 8]);
    for case in cases {
        assert_ne!(case, text);
        let mut broken = whole.clone();
        broken.metadata_props[0].value = Some(case);
        std::fs::write(path.join("injected.onnx"), broken.encode_to_vec()).expect("a file");
        refused(&["fold", "injected.onnx", "-o", "out.onnx"], &path, "out.onnx", &["injected.onnx"]);
        let output = bone(&train("data.safetensors", &[]), &path);
        assert!(!text_of(&output).contains("panicked"), "{}", text_of(&output));
    }
}

fn text_of(output: &Output) -> String {
    text(&output.stderr)
}

#[test]
fn usage_errors_are_exit_code_2() {
    let (_dir, path) = with_network();
    for args in [&["inject", "base.onnx"][..], &["fold"], &["no-such-command"], &["train", "injected.onnx"]] {
        assert_eq!(bone(args, &path).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn json_is_one_object_and_nothing_else() {
    let (_dir, path) = with_network();
    for args in [
        &["inspect", "injected.onnx", "--json"][..],
        &["inject", "base.onnx", "--target-modules", "fc1", "--dry-run", "--json"],
        &["fold", "injected.onnx", "-o", "merged.onnx", "--json"],
        &["verify", "injected.onnx", "merged.onnx", "--engine", "tract", "--json"],
        &["unload", "injected.onnx", "-o", "back.onnx", "--json"],
        &["doctor", "--json"],
    ] {
        let stdout = done(args, &path);
        let value: serde_json::Value =
            serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {stdout}"));
        assert!(value.is_object() && stdout.trim_end().lines().count() == 1, "{args:?}: {stdout}");
    }
    let inspected: serde_json::Value =
        serde_json::from_str(&done(&["inspect", "base.onnx", "--json"], &path)).expect("json");
    assert_eq!(inspected["linears"][0]["module"], "fc1");
    assert_eq!(inspected["linears"][1]["module"], "fc2");
    assert_eq!(inspected["linears"][1]["in_features"], 5);
    assert_eq!(inspected["linears"][1]["out_features"], 3);
    assert_eq!(inspected["linears"][1]["dtype"], "float32");
    assert_eq!(inspected["opset"]["ai.onnx"], 17);
}

#[test]
fn models_that_differ_fail_verification() {
    let (_dir, path) = with_network();
    done(
        &["inject", "base.onnx", "-o", "random.onnx", "--target-modules", "fc1", "--init-weights", "false", "--r", "2"],
        &path,
    );
    done(&["verify", "base.onnx", "injected.onnx", "--engine", "tract"], &path);
    refused(&["verify", "base.onnx", "random.onnx", "--engine", "tract"], &path, "none", &["differ", "logits"]);
}

#[test]
fn cuda_without_a_gpu_is_an_error_not_a_fallback() {
    let (_dir, path) = with_network();
    let args = ["verify", "base.onnx", "injected.onnx", "--engine", "tract", "--device", "cuda"];
    refused(&args, &path, "none", &["CUDA"]);
}
