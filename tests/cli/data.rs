//! Models whose weights stand in files beside them: what `fold`, `inject` and `unload` write, where, and what they refuse.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bone_onnx::onnx::external::{Place, place};
use bone_onnx::onnx::{DataType, Model, ModelProto, NodeProto, Tensor, TensorProto, value_info};
use prost::Message;
use serde_json::Value;
use tempfile::TempDir;

use super::{bone, done, external, floats, network, refused, text};

const BINARY: &str = env!("CARGO_BIN_EXE_bone-onnx");

/// The network with its matrices at these places of data files.
fn placed(places: [(&str, u64); 2]) -> ModelProto {
    let mut proto = network(false);
    let graph = proto.graph.as_mut().expect("a graph");
    for (index, (location, offset)) in [(0, places[0]), (2, places[1])] {
        let tensor = &mut graph.initializer[index];
        let length = tensor.raw_data.take().map(|raw| raw.len() as u64);
        let entries = Place { location: location.into(), offset, length, checksum: None }.entries();
        tensor.external_data = entries.external_data;
        tensor.data_location = entries.data_location;
    }
    proto
}

/// `base.onnx` (fc1.weight 120 bytes at 4096, fc2's 60 bytes at 8192 of base.bin) and `injected.onnx` in a directory; and
/// what folding the same network gives where it keeps its weights in itself.
fn with_data() -> (TempDir, PathBuf, BTreeMap<String, Tensor>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_path_buf();
    let mut data = vec![7u8; 9000];
    data[4096..4216].copy_from_slice(&floats(&[5, 6]).to_bytes());
    data[8192..8252].copy_from_slice(&floats(&[5, 3]).to_bytes());
    fs::write(path.join("base.bin"), data).expect("a file");
    let proto = placed([("base.bin", 4096), ("base.bin", 8192)]);
    fs::write(path.join("base.onnx"), proto.encode_to_vec()).expect("a file");
    inject("base.onnx", "injected.onnx", &path, &[]);
    let inline = path.join("inline");
    fs::create_dir(&inline).expect("a directory");
    fs::write(inline.join("base.onnx"), network(false).encode_to_vec()).expect("a file");
    inject("base.onnx", "injected.onnx", &inline, &[]);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], &inline);
    let merged = values(&inline.join("merged.onnx"));
    fs::remove_dir_all(inline).expect("gone");
    (dir, path, merged)
}

fn inject(base: &str, out: &str, dir: &Path, more: &[&str]) {
    let args = ["inject", base, "-o", out, "--target-modules", "fc1,fc2", "--r", "1", "--init-weights", "false"];
    done(&[&args[..], more].concat(), dir);
}

/// The model's initializers by name.
fn values(path: &Path) -> BTreeMap<String, Tensor> {
    let model = Model::open(path).unwrap_or_else(|e| panic!("{e}"));
    let tensors = model.graph().initializer.iter();
    tensors.map(|t| (t.name().to_string(), model.tensor(t).unwrap_or_else(|e| panic!("{e}")))).collect()
}

fn places(path: &Path) -> Vec<(String, u64)> {
    let model = Model::open(path).expect("a model");
    let external = model.graph().initializer.iter().filter(|t| !t.external_data.is_empty());
    external.map(|t| place(t).expect("a place")).map(|p| (p.location, p.offset)).collect()
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("a directory")
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_fold_writes_the_data_once_at_the_same_places_and_leaves_the_base_alone() {
    let (_dir, path, merged) = with_data();
    let base = fs::read(path.join("base.bin")).unwrap();
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], &path);
    assert_eq!(values(&path.join("merged.onnx")), merged);
    let name = "merged.onnx.data".to_string();
    assert_eq!(places(&path.join("merged.onnx")), [(name.clone(), 4096), (name, 8192)]);
    let data = fs::read(path.join("merged.onnx.data")).unwrap();
    assert_eq!(data.len(), base.len());
    assert!(data[..4096] == base[..4096] && data[4216..8192] == base[4216..8192] && data[8252..] == base[8252..]);
    assert_eq!(fs::read(path.join("base.bin")).unwrap(), base);
    let all = ["base.bin", "base.onnx", "injected.onnx", "merged.onnx", "merged.onnx.data"];
    assert_eq!(files(&path), all);
    // Once more: the data of the replaced model goes, under another name each time.
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], &path);
    assert_eq!(values(&path.join("merged.onnx")), merged);
    assert_eq!(files(&path), ["base.bin", "base.onnx", "injected.onnx", "merged.onnx", "merged.onnx.1.data"]);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], &path);
    assert_eq!(files(&path), all);
    // In another directory it keeps its name.
    fs::create_dir(path.join("sub")).unwrap();
    done(&["fold", "injected.onnx", "-o", "sub/merged.onnx"], &path);
    assert_eq!(files(&path.join("sub")), ["base.bin", "merged.onnx"]);
    assert_eq!(values(&path.join("sub/merged.onnx")), merged);
}

#[test]
fn a_fold_in_place_takes_new_data_over_and_removes_what_nobody_uses() {
    let (_dir, path, merged) = with_data();
    // The base still needs its file.
    done(&["fold", "injected.onnx", "--in-place"], &path);
    assert_eq!(values(&path.join("injected.onnx")), merged);
    assert_eq!(files(&path), ["base.bin", "base.onnx", "injected.onnx", "injected.onnx.data"]);
    // Without it, nobody does; and modes are kept.
    inject("base.onnx", "base.onnx", &path, &[]);
    for name in ["base.onnx", "base.bin"] {
        fs::set_permissions(path.join(name), fs::Permissions::from_mode(0o640)).unwrap();
    }
    done(&["fold", "base.onnx", "-o", "base.onnx"], &path);
    assert_eq!(values(&path.join("base.onnx")), merged);
    assert_eq!(files(&path), ["base.onnx", "base.onnx.data", "injected.onnx", "injected.onnx.data"]);
    for name in ["base.onnx", "base.onnx.data"] {
        assert_eq!(fs::metadata(path.join(name)).unwrap().mode() & 0o777, 0o640, "{name}");
    }
}

#[test]
fn shards_in_which_nothing_changes_stay_and_others_are_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    fs::write(path.join("one.bin"), floats(&[5, 6]).to_bytes()).unwrap();
    fs::write(path.join("two.bin"), floats(&[5, 3]).to_bytes()).unwrap();
    fs::write(path.join("base.onnx"), placed([("one.bin", 0), ("two.bin", 0)]).encode_to_vec()).unwrap();
    let args = ["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "fc2", "--r", "1"];
    done(&[&args[..], &["--init-weights", "false"]].concat(), path);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], path);
    assert_eq!(places(&path.join("merged.onnx")), [("one.bin".into(), 0), ("merged.two.bin".into(), 0)]);
    fs::create_dir(path.join("sub")).unwrap();
    done(&["fold", "injected.onnx", "-o", "sub/merged.onnx"], path);
    assert_eq!(places(&path.join("sub/merged.onnx")), [("one.bin".into(), 0), ("two.bin".into(), 0)]);
    assert_eq!(values(&path.join("sub/merged.onnx")), values(&path.join("merged.onnx")));
}

#[test]
fn data_is_joined_split_and_drawn_in_on_request() {
    let (_dir, path, merged) = with_data();
    // The matrices are too small for a file, so larger ones.
    let wide = |rows: usize, columns: usize| floats(&[rows, columns]);
    let mut proto = network(false);
    let graph = proto.graph.as_mut().unwrap();
    graph.initializer[0] = wide(400, 6).to_proto("fc1.weight");
    graph.initializer[1] = wide(400, 1).to_proto("fc1.bias");
    graph.initializer[1].dims = vec![400];
    graph.initializer[2] = wide(400, 3).to_proto("onnx::MatMul_9");
    fs::write(path.join("wide.onnx"), proto.encode_to_vec()).unwrap();
    inject("wide.onnx", "wide-injected.onnx", &path, &[]);
    done(&["fold", "wide-injected.onnx", "-o", "plain.onnx"], &path);
    let plain = values(&path.join("plain.onnx"));
    let fold = |out: &str, more: &[&str]| done(&[&["fold", "wide-injected.onnx", "-o", out], more].concat(), &path);
    fold("joined.onnx", &["--external-data-location", "weights.bin"]);
    assert_eq!(values(&path.join("joined.onnx")), plain);
    assert_eq!(
        places(&path.join("joined.onnx")),
        [("weights.bin".into(), 0), ("weights.bin".into(), 12288), ("weights.bin".into(), 16384)]
    );
    fold("split.onnx", &["--external-data-location", "shards.bin", "--shard-size", "10KB"]);
    assert_eq!(values(&path.join("split.onnx")), plain);
    let shards: Vec<String> = places(&path.join("split.onnx")).into_iter().map(|(location, _)| location).collect();
    assert_eq!(shards, ["shards-00001-of-00002.bin", "shards-00002-of-00002.bin", "shards-00002-of-00002.bin"]);
    inject("split.onnx", "again.onnx", &path, &[]);
    done(&["unload", "again.onnx", "-o", "back.onnx"], &path);
    assert_eq!(fs::read(path.join("back.onnx")).unwrap(), fs::read(path.join("split.onnx")).unwrap());
    // A name that is there is not written over.
    let args = ["fold", "wide-injected.onnx", "-o", "out.onnx", "--external-data-location", "weights.bin"];
    refused(&args, &path, "out.onnx", &["weights.bin", "is there already"]);
    let args = ["fold", "wide-injected.onnx", "-o", "out.onnx", "--external-data-location", "../weights.bin"];
    refused(&args, &path, "out.onnx", &["../weights.bin", "relative"]);
    // And into the model.
    done(&["fold", "injected.onnx", "-o", "inline.onnx", "--inline"], &path);
    assert_eq!(places(&path.join("inline.onnx")), []);
    assert_eq!(values(&path.join("inline.onnx")), merged);
}

#[test]
fn safetensors_as_external_data_stay_valid() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let (a, b) = (floats(&[5, 6]).to_bytes(), floats(&[5, 3]).to_bytes());
    let views = [
        ("fc1", safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![5, 6], &a).unwrap()),
        ("fc2", safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![5, 3], &b).unwrap()),
    ];
    safetensors::serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
    let file = fs::read(path.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
    let proto = placed([("model.safetensors", header), ("model.safetensors", header + 120)]);
    fs::write(path.join("base.onnx"), proto.encode_to_vec()).unwrap();
    inject("base.onnx", "injected.onnx", path, &[]);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], path);
    let merged = values(&path.join("merged.onnx"));
    let file = fs::read(path.join("merged.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(file.tensor("fc1").unwrap().data(), merged["fc1.weight"].to_bytes());
    assert_eq!(file.tensor("fc2").unwrap().data(), merged["onnx::MatMul_9"].to_bytes());
}

/// A weight of its own finds no place in a .safetensors file; a new one takes all of them.
#[test]
fn new_tensors_go_beside_a_safetensors_file_or_into_a_new_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    // A weight of 400 × 6, which two layers read.
    let weight = floats(&[400, 6]).to_bytes();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![400, 6], &weight).unwrap();
    safetensors::serialize_to_file([("fc1", view)], None, &path.join("model.safetensors")).unwrap();
    let header = fs::metadata(path.join("model.safetensors")).unwrap().len() - 9600;
    let mut proto = network(false);
    let graph = proto.graph.as_mut().unwrap();
    let place = Place { location: "model.safetensors".into(), offset: header, length: Some(9600), checksum: None };
    let shared = graph.initializer[0].name().to_string();
    graph.initializer[0] = TensorProto { name: Some(shared.clone()), ..place.entries() };
    graph.initializer[0].dims = vec![400, 6];
    graph.initializer[0].data_type = Some(DataType::Float as i32);
    graph.initializer[1].dims = vec![400];
    graph.initializer[1].raw_data = Some(floats(&[400]).to_bytes().into());
    graph.initializer[2] = floats(&[400, 3]).to_proto("onnx::MatMul_9");
    graph.node.push(NodeProto { name: Some("/again/Gemm".into()), ..graph.node[0].clone() });
    let last = graph.node.last_mut().unwrap();
    last.output[0] = "again".into();
    graph.output.push(value_info("again", DataType::Float, &["n", "400"]));
    fs::write(path.join("base.onnx"), proto.encode_to_vec()).unwrap();
    let inject =
        ["inject", "base.onnx", "-o", "injected.onnx", "--r", "2", "--init-weights", "false", "--target-nodes"];
    done(&[&inject[..], &["/fc1/Gemm"]].concat(), path);
    let said = |args: &[&str]| text(&bone(args, path).stderr);
    assert!(
        said(&["fold", "injected.onnx", "-o", "merged.onnx"])
            .contains("1 new tensors are in merged.onnx.data: model.safetensors has no place")
    );
    let merged = values(&path.join("merged.onnx"));
    assert_eq!(merged[&shared].to_bytes(), weight);
    done(&["verify", "injected.onnx", "merged.onnx", "--engine", "tract"], path);
    // All in one new file, which the format's own reader takes.
    let args = ["fold", "injected.onnx", "-o", "one.onnx", "--external-data-location", "one.safetensors"];
    assert!(!said(&args).contains("no place"));
    assert_eq!(values(&path.join("one.onnx")), merged);
    let file = fs::read(path.join("one.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert!(file.names().len() > 2, "{:?}", file.names());
    for name in file.names() {
        let (there, wanted) = (file.tensor(name).unwrap(), &merged[name]);
        assert_eq!((there.shape(), there.data()), (wanted.dims(), &wanted.to_bytes()[..]), "{name}");
    }
    done(&["verify", "injected.onnx", "one.onnx", "--engine", "tract"], path);
    // Folded again, it stays one.
    done(
        &[
            "inject",
            "one.onnx",
            "-o",
            "next.onnx",
            "--target-nodes",
            "/again/Gemm",
            "--r",
            "2",
            "--init-weights",
            "false",
        ],
        path,
    );
    done(&["fold", "next.onnx", "-o", "last.onnx"], path);
    let file = fs::read(path.join("last.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_ne!(file.tensor(&shared).unwrap().data(), weight);
    assert_eq!(file.tensor(&shared).unwrap().data(), values(&path.join("last.onnx"))[&shared].to_bytes());
}

#[test]
fn checksums_are_checked_before_and_made_after() {
    let (_dir, path, merged) = with_data();
    let sum = |name: &str| {
        let output = Command::new("sha1sum").arg(path.join(name)).output().expect("sha1sum");
        text(&output.stdout)[..40].to_string()
    };
    let mut proto = placed([("base.bin", 4096), ("base.bin", 8192)]);
    for index in [0, 2] {
        let tensor = &mut proto.graph.as_mut().unwrap().initializer[index];
        let place = Place { checksum: Some(sum("base.bin")), ..place(tensor).unwrap() };
        tensor.external_data = place.entries().external_data;
    }
    fs::write(path.join("base.onnx"), proto.encode_to_vec()).unwrap();
    done(&["inspect", "base.onnx", "--check-data"], &path);
    inject("base.onnx", "injected.onnx", &path, &[]);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], &path);
    assert_eq!(values(&path.join("merged.onnx")), merged);
    let model = Model::open(path.join("merged.onnx")).unwrap();
    for index in [0, 2] {
        let place = place(&model.graph().initializer[index]).unwrap();
        assert_eq!((place.location.as_str(), place.checksum), ("merged.onnx.data", Some(sum("merged.onnx.data"))));
    }
    // One bit in the padding.
    let mut data = fs::read(path.join("base.bin")).unwrap();
    data[0] ^= 1;
    fs::write(path.join("base.bin"), data).unwrap();
    refused(&["fold", "injected.onnx", "-o", "out.onnx"], &path, "out.onnx", &["base.bin", "SHA-1", "damaged"]);
    refused(&["inspect", "base.onnx", "--check-data"], &path, "none", &["base.bin", "SHA-1"]);
    done(&["inspect", "base.onnx"], &path);
}

#[test]
fn bytes_of_two_tensors_change_for_the_adapted_one_only() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    // fc2's 60 bytes are the first half of fc1's 120.
    fs::write(path.join("base.bin"), floats(&[5, 6]).to_bytes()).unwrap();
    fs::write(path.join("base.onnx"), placed([("base.bin", 0), ("./base.bin", 0)]).encode_to_vec()).unwrap();
    let before = values(&path.join("base.onnx"));
    let args = ["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "fc2", "--r", "1"];
    done(&[&args[..], &["--init-weights", "false"]].concat(), path);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], path);
    let after = values(&path.join("merged.onnx"));
    assert_eq!(after["fc1.weight"], before["fc1.weight"]);
    assert_ne!(after["onnx::MatMul_9"], before["onnx::MatMul_9"]);
    done(&["verify", "injected.onnx", "merged.onnx", "--engine", "tract"], path);
}

#[test]
fn shared_data_is_referred_to_where_it_is_and_known_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let (_kept, base, merged) = with_data();
    fs::create_dir(path.join("base")).unwrap();
    for name in ["base.onnx", "base.bin"] {
        fs::copy(base.join(name), path.join("base").join(name)).unwrap();
    }
    inject("base/base.onnx", "injected.onnx", path, &["--share-data", "--hash-data"]);
    assert_eq!(files(path), ["base", "injected.onnx"]);
    assert_eq!(places(&path.join("injected.onnx"))[0], ("base/base.bin".into(), 4096));
    done(&["inspect", "injected.onnx", "--check-data"], path);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], path);
    assert_eq!(values(&path.join("merged.onnx")), merged);
    done(&["unload", "injected.onnx", "-o", "base/back.onnx"], path);
    assert_eq!(fs::read(path.join("base/back.onnx")).unwrap(), fs::read(path.join("base/base.onnx")).unwrap());
    // From below, data cannot be shared.
    fs::create_dir(path.join("sub")).unwrap();
    let args = ["inject", "base/base.onnx", "-o", "sub/out.onnx", "--target-modules", "fc1", "--share-data"];
    refused(&args, path, "sub/out.onnx", &["base.bin", "--share-data", "sub"]);
    // A changed value and a changed length are seen before a use; a changed byte of padding only on demand.
    let data = fs::read(path.join("base/base.bin")).unwrap();
    let changed = |at: usize| {
        let mut data = data.clone();
        data[at] ^= 1;
        fs::write(path.join("base/base.bin"), data).unwrap();
    };
    let fold = ["fold", "injected.onnx", "-o", "out.onnx"];
    changed(4150);
    refused(&fold, path, "out.onnx", &["base/base.bin", "no longer", "values"]);
    changed(4300);
    refused(&["inspect", "injected.onnx", "--check-data"], path, "none", &["base/base.bin", "SHA-1"]);
    fs::write(path.join("base/base.bin"), &data[..8990]).unwrap();
    refused(&fold, path, "out.onnx", &["base/base.bin", "8990 bytes instead of 9000"]);
    refused(&["unload", "injected.onnx", "-o", "out.onnx"], path, "out.onnx", &["base/base.bin", "no longer"]);
    let args = ["inject", "plain.onnx", "-o", "out.onnx", "--target-modules", "fc1", "--share-data"];
    fs::write(path.join("plain.onnx"), network(false).encode_to_vec()).unwrap();
    refused(&args, path, "out.onnx", &["plain.onnx", "no data file"]);
}

/// A download cache with the model: links in a snapshot to blobs.
fn cached(path: &Path, base: &Path) -> PathBuf {
    let snapshot = path.join("hub/snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(path.join("hub/blobs")).unwrap();
    for (name, blob) in [("base.onnx", "1111"), ("base.bin", "2222")] {
        fs::copy(base.join(name), path.join("hub/blobs").join(blob)).unwrap();
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    snapshot
}

#[test]
fn a_download_cache_is_read_and_not_written_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let (_kept, base, merged) = with_data();
    let snapshot = cached(path, &base);
    inject("hub/snapshots/abc/base.onnx", "injected.onnx", path, &[]);
    assert!(!path.join("base.bin").is_symlink() && path.join("base.bin").is_file());
    inject("hub/snapshots/abc/base.onnx", "hub/snapshots/abc/injected.onnx", path, &["--share-data"]);
    done(&["fold", "hub/snapshots/abc/injected.onnx", "-o", "merged.onnx"], path);
    assert_eq!(values(&path.join("merged.onnx")), merged);
    // Over the link to the blob: no.
    let args = ["fold", "hub/snapshots/abc/injected.onnx", "-o", "hub/snapshots/abc/base.onnx"];
    refused(&args, path, "none", &["base.onnx", "cache"]);
    assert_eq!(fs::read(path.join("hub/blobs/1111")).unwrap(), fs::read(base.join("base.onnx")).unwrap());
    assert_eq!(files(&snapshot), ["base.bin", "base.onnx", "injected.onnx"]);
    // In place beside it: the blob stays.
    done(&["fold", "hub/snapshots/abc/injected.onnx", "--in-place"], path);
    assert_eq!(values(&snapshot.join("injected.onnx")), merged);
    assert_eq!(fs::read(path.join("hub/blobs/2222")).unwrap(), fs::read(base.join("base.bin")).unwrap());
}

#[test]
fn hostile_locations_are_not_read() {
    let outer = tempfile::tempdir().expect("a directory");
    let dir = outer.path().join("base");
    let evil = outer.path().join("base_evil");
    fs::create_dir_all(dir.join("plain")).unwrap();
    fs::create_dir(&evil).unwrap();
    for at in [evil.join("secret.bin"), outer.path().join("secret.bin")] {
        fs::write(at, [0; 120]).unwrap();
    }
    // A linked directory, a directory whose name begins like ours, a pipe, a device.
    symlink(outer.path(), dir.join("up")).unwrap();
    symlink("../base_evil/secret.bin", dir.join("near.bin")).unwrap();
    symlink("/dev/zero", dir.join("zero.bin")).unwrap();
    assert!(Command::new("mkfifo").arg(dir.join("pipe.bin")).status().expect("mkfifo").success());
    let cases = [
        ("up/secret.bin", "link"),
        ("near.bin", "link"),
        ("zero.bin", "link"),
        ("pipe.bin", "not a regular file"),
        ("plain", "not a regular file"),
        ("plain\\..\\..\\secret.bin", "relative"),
        ("C:secret.bin", "relative"),
        ("C:\\secret.bin", "relative"),
        ("secret.bin\0.png", "relative"),
        ("/dev/zero", "relative"),
        ("plain/../../secret.bin", "relative"),
    ];
    let inject = ["inject", "base.onnx", "-o", "plain/out.onnx", "--target-modules", "all-linear", "--r", "2"];
    for (location, part) in cases {
        fs::write(dir.join("base.onnx"), external(location, Some("120")).encode_to_vec()).unwrap();
        // The model's directory is not spelled out: it is the one we are in.
        refused(&inject, &dir, "plain/out.onnx", &["base.onnx", part]);
    }
    // Ranges and sizes that make no sense.
    fs::write(dir.join("right.bin"), [0; 120]).unwrap();
    let huge = (1u64 << 50).to_string();
    for (length, part) in [("32", "needs 120 bytes"), (huge.as_str(), "too short"), ("-1", "not a number")] {
        fs::write(dir.join("base.onnx"), external("right.bin", Some(length)).encode_to_vec()).unwrap();
        refused(&["inspect", "base.onnx", "--check-data"], &dir, "none", &["fc1.weight", part]);
    }
    let mut proto = external("right.bin", None);
    proto.graph.as_mut().unwrap().initializer[0].dims = vec![1 << 40, 1 << 40];
    fs::write(dir.join("base.onnx"), proto.encode_to_vec()).unwrap();
    refused(&["inspect", "base.onnx", "--check-data"], &dir, "none", &["fc1.weight", "impossible shape"]);
}

#[test]
fn hostile_locations_are_not_written_to() {
    let outer = tempfile::tempdir().expect("a directory");
    let (home, out) = (outer.path().join("home"), outer.path().join("out"));
    fs::create_dir_all(home.join("sub")).unwrap();
    fs::create_dir_all(&out).unwrap();
    fs::create_dir(outer.path().join("etc")).unwrap();
    fs::write(home.join("sub/passwd"), [0; 120]).unwrap();
    fs::write(home.join("base.onnx"), external("sub/passwd", Some("120")).encode_to_vec()).unwrap();
    let inject = ["inject", "home/base.onnx", "-o", "out/out.onnx", "--target-modules", "all-linear", "--r", "2"];
    // The directory in which the data would go is a link to another one.
    symlink("../etc", out.join("sub")).unwrap();
    refused(&inject, outer.path(), "out/out.onnx", &["sub/passwd", "symbolic link"]);
    assert!(files(&outer.path().join("etc")).is_empty());
    // The file is a link to another one, and to nothing.
    fs::remove_file(out.join("sub")).unwrap();
    fs::create_dir(out.join("sub")).unwrap();
    for target in ["../../etc/passwd", "../../etc/shadow"] {
        fs::write(outer.path().join("etc/passwd"), b"root").unwrap();
        symlink(target, out.join("sub/passwd")).unwrap();
        refused(&inject, outer.path(), "out/out.onnx", &["sub/passwd", "symbolic link"]);
        assert_eq!(fs::read(outer.path().join("etc/passwd")).unwrap(), b"root");
        fs::remove_file(out.join("sub/passwd")).unwrap();
    }
    assert_eq!(files(&outer.path().join("etc")), ["passwd"]);
    // Another model's data is not written over.
    fs::write(out.join("sub/passwd"), b"mine").unwrap();
    refused(&inject, outer.path(), "out/out.onnx", &["sub/passwd", "another model's"]);
    assert_eq!(fs::read(out.join("sub/passwd")).unwrap(), b"mine");
}

/// A chain of products with weights of 8 MiB in one data file: `base.onnx`, `injected.onnx` and `merged.onnx`.
fn large(path: &Path) {
    const LAYERS: usize = 6;
    let mut data = Vec::new();
    let mut proto = network(false);
    let graph = proto.graph.as_mut().unwrap();
    let (initializers, nodes) = (&mut graph.initializer, &mut graph.node);
    initializers.clear();
    nodes.clear();
    for layer in 0..LAYERS {
        let (name, x, y) = (format!("layer.{layer}.weight"), format!("x{layer}"), format!("x{}", layer + 1));
        let value: Vec<f32> = (0..1024 * 2048).map(|k| ((k + layer) % 997) as f32).collect();
        let place =
            Place { location: "base.bin".into(), offset: data.len() as u64, length: Some(1 << 23), checksum: None };
        data.extend(Tensor::new(&[1024 * 2048], value).to_bytes());
        let dims = if layer % 2 == 0 { [1024, 2048] } else { [2048, 1024] };
        initializers.push(bone_onnx::onnx::TensorProto {
            name: Some(name.clone()),
            dims: dims.to_vec(),
            data_type: Some(1),
            ..place.entries()
        });
        nodes.push(bone_onnx::onnx::node("MatMul", &[&x, &name], &[&y]));
    }
    let float = bone_onnx::onnx::DataType::Float;
    graph.input = vec![bone_onnx::onnx::value_info("x0", float, &["n", "1024"])];
    graph.output = vec![bone_onnx::onnx::value_info(&format!("x{LAYERS}"), float, &["n", "1024"])];
    fs::write(path.join("base.bin"), data).unwrap();
    fs::write(path.join("base.onnx"), proto.encode_to_vec()).unwrap();
    let args =
        ["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--init-weights", "false"];
    done(&args, path);
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], path);
}

#[test]
fn a_fold_in_place_that_is_killed_leaves_the_old_model_or_the_new_one_each_with_its_data() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    large(path);
    fs::remove_file(path.join("base.onnx")).unwrap();
    let (old, new) = (values(&path.join("injected.onnx")), values(&path.join("merged.onnx")));
    let injected = fs::read(path.join("injected.onnx")).unwrap();
    let data = fs::read(path.join("base.bin")).unwrap();
    let mut ends = BTreeMap::new();
    for millis in [1, 5, 10, 20, 30, 45, 60, 80, 110, 150, 200, 300, 500] {
        let work = path.join(format!("work{millis}"));
        fs::create_dir(&work).unwrap();
        fs::write(work.join("model.onnx"), &injected).unwrap();
        fs::write(work.join("base.bin"), &data).unwrap();
        let fold = ["fold", "model.onnx", "--in-place", "-q"];
        let mut child =
            Command::new(BINARY).args(fold).stdout(Stdio::null()).current_dir(&work).spawn().expect("a process");
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().expect("a signal");
        let done = child.wait().expect("an end").success();
        let found = values(&work.join("model.onnx"));
        assert!(found == old || found == new, "killed after {millis} ms: neither the old model nor the new one");
        assert!(!done || found == new);
        *ends.entry((done, found == new)).or_insert(0) += 1;
        fs::remove_dir_all(work).unwrap();
    }
    assert!(ends.contains_key(&(false, false)), "no fold was killed in its work: {ends:?}");
}

#[test]
fn a_full_disk_and_a_directory_one_may_not_write_to_leave_all_as_it_was() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    large(path);
    let all = files(path);
    let model = fs::read(path.join("injected.onnx")).unwrap();
    // Files may grow to 16 MiB, a third of the data.
    let script = format!("trap '' XFSZ; ulimit -f 32768; exec {BINARY} fold injected.onnx --in-place");
    let output = Command::new("sh").args(["-c", &script]).current_dir(path).output().expect("a run");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write"), "{stderr}");
    assert_eq!(files(path), all);
    assert_eq!(fs::read(path.join("injected.onnx")).unwrap(), model);

    fs::set_permissions(path, fs::Permissions::from_mode(0o555)).unwrap();
    let root = fs::write(path.join("probe"), b"").is_ok();
    fs::remove_file(path.join("probe")).ok();
    let output = if root {
        // Modes do not bind root, so somebody else tries.
        let script = "exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" fold injected.onnx --in-place";
        let copy = dir.path().with_extension("bin");
        fs::copy(BINARY, &copy).unwrap();
        let output = Command::new("sh").args(["-c", script]).arg(&copy).current_dir(path).output();
        fs::remove_file(copy).unwrap();
        output.expect("a run")
    } else {
        bone(&["fold", "injected.onnx", "--in-place"], path)
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write") && stderr.contains("denied"), "{stderr}");
    assert_eq!(files(path), all);
}

#[test]
fn weights_are_compared_without_an_engine() {
    let (_dir, path, _) = with_data();
    done(&["fold", "injected.onnx", "-o", "merged.onnx"], &path);
    let verify = |a: &str, b: &str| bone(&["verify", a, b, "--weights", "--json"], &path);
    // What the adapters make of the weights is what was merged.
    let said: Value = serde_json::from_slice(&verify("injected.onnx", "merged.onnx").stdout).expect("JSON");
    assert_eq!((&said["within"], &said["weights"]["compared"]), (&true.into(), &4.into()));
    assert_eq!(said["weights"]["identical"], 4);
    let output = verify("base.onnx", "merged.onnx");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("fc1.weight") || text(&output.stderr).contains("onnx::MatMul_9"));
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let (before, after) = (values(&path.join("base.onnx")), values(&path.join("merged.onnx")));
    for difference in said["weights"]["differences"].as_array().expect("a list") {
        let name = difference["name"].as_str().expect("a name");
        let (a, b) = (before[name].to_f64(), after[name].to_f64());
        let off = |f: fn(f64, f64) -> f64| a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f);
        let norm = b.iter().map(|b| b * b).sum::<f64>().sqrt();
        let relative = off(|sum, d| sum + d * d).sqrt() / norm;
        assert!((difference["relative"].as_f64().unwrap() - relative).abs() < 1e-12, "{name}");
        assert_eq!(difference["max_abs"].as_f64().unwrap(), off(f64::max), "{name}");
    }
    assert_eq!(said["weights"]["differences"].as_array().unwrap().len(), 2);
}
