//! Data in all its formats, from the file to the loss: the same rows make the same run, bad ones are named, and what
//! memory does not hold lies on the disk.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use arrow_array::types::Float32Type;
use arrow_array::{
    ArrayRef, BinaryArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch, StringArray, StructArray,
};
use arrow_ipc::writer::{FileWriter, StreamWriter};
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, node, value_info};
use parquet::arrow::ArrowWriter;
use prost::Message;
use serde_json::Value;

use super::{arrays, bone, done, floats, model, refused, text, with_network};

/// The row of a table that trains the network: six numbers that every format can tell, and a class.
fn row(at: usize) -> ([f32; 6], i64) {
    (std::array::from_fn(|i| ((at * 11 + i * 7) % 16) as f32 / 4.0 - 2.0), (at % 3) as i64)
}

const ROWS: usize = 14;

fn table(rows: std::ops::Range<usize>) -> RecordBatch {
    let column = |i: usize| Arc::new(rows.clone().map(|at| row(at).0[i]).collect::<Float32Array>()) as ArrayRef;
    let mut columns: Vec<(String, ArrayRef)> = (0..6).map(|i| (format!("pixels_{i}"), column(i))).collect();
    columns.push(("label".into(), Arc::new(rows.clone().map(|at| row(at).1).collect::<Int64Array>())));
    RecordBatch::try_from_iter(columns).expect("a batch")
}

/// An Arrow stream of these batches.
fn stream(batches: &[RecordBatch]) -> Vec<u8> {
    let mut writer = StreamWriter::try_new(Vec::new(), &batches[0].schema()).expect("a writer");
    batches.iter().for_each(|batch| writer.write(batch).expect("a batch"));
    writer.into_inner().expect("a stream")
}

fn parquet(path: &Path, batch: &RecordBatch) {
    let mut writer = ArrowWriter::try_new(File::create(path).expect("a file"), batch.schema(), None).expect("a writer");
    writer.write(batch).expect("a batch");
    writer.close().expect("an end");
}

fn separated(rows: std::ops::Range<usize>, by: &str) -> String {
    let mut lines: Vec<String> =
        vec![(0..6).map(|i| format!("pixels_{i}")).chain(["label".into()]).collect::<Vec<_>>().join(by)];
    for (pixels, label) in rows.map(row) {
        let cells = pixels.iter().map(f32::to_string).chain([label.to_string()]);
        lines.push(cells.collect::<Vec<_>>().join(by));
    }
    lines.join("\n") + "\n"
}

/// The steps of a run, without the time they took.
fn steps(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    let mut steps: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
    steps.iter_mut().filter_map(Value::as_object_mut).for_each(|step| drop(step.remove("seconds")));
    steps
}

/// Trains `injected.onnx` into `run` on `data`.
fn command<'a>(data: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let words = "train injected.onnx -o run --loss cross-entropy --engine tract --lr 0.01 --data";
    let size: &[&str] = if more.contains(&"--batch-size") { &[] } else { &["--batch-size", "4"] };
    words.split(' ').chain([data]).chain(size.iter().chain(more).copied()).collect()
}

/// The steps of such a run, which is gone after that.
fn trained(dir: &Path, data: &str, more: &[&str]) -> Vec<Value> {
    done(&command(data, more), dir);
    let steps = steps(&dir.join("run"));
    fs::remove_dir_all(dir.join("run")).expect("a directory");
    steps
}

#[test]
fn the_same_rows_in_any_format_make_the_same_run() {
    let (_dir, path) = with_network();
    let write = |name: &str, bytes: &[u8]| fs::write(path.join(name), bytes).expect("a file");
    let (all, half) = (table(0..ROWS), ROWS / 2);
    let rows: Vec<f32> = (0..ROWS).flat_map(|at| row(at).0).collect();
    arrays(&path, "data.safetensors", (&[ROWS, 6], rows.clone()), (0..ROWS).map(|at| row(at).1).collect());
    write("data.csv", separated(0..ROWS, ",").as_bytes());
    write("data.tsv", separated(0..ROWS, "\t").as_bytes());
    write("part-0.csv", separated(0..half, ",").as_bytes());
    write("part-1.csv", separated(half..ROWS, ",").as_bytes());
    let lines = (0..ROWS).map(row).map(|(x, label)| format!("{{\"pixels\": {x:?}, \"label\": {label}}}\n"));
    write("data.jsonl", lines.collect::<String>().as_bytes());
    parquet(&path.join("data.parquet"), &all);
    write("stream.arrow", &stream(&[table(0..5), table(5..ROWS)]));
    let mut file = FileWriter::try_new(Vec::new(), &all.schema()).expect("a writer");
    file.write(&all).expect("a batch");
    write("file.arrow", &file.into_inner().expect("a file"));
    fs::create_dir(path.join("saved")).expect("a directory");
    write("saved/data-00000-of-00002.arrow", &stream(&[table(0..half)]));
    write("saved/data-00001-of-00002.arrow", &stream(&[table(half..ROWS)]));
    let shards = "{\"_data_files\": [{\"filename\": \"data-00000-of-00002.arrow\"}, {\"filename\": \"data-00001-of-00002.arrow\"}]}";
    write("saved/state.json", shards.as_bytes());
    for (name, of) in [("shard-0", 0..half), ("shard-1", half..ROWS)] {
        let labels = of.clone().map(|at| row(at).1).collect();
        let pixels = rows[of.start * 6..of.end * 6].to_vec();
        arrays(&path, &format!("{name}.safetensors"), (&[of.len(), 6], pixels), labels);
    }

    let truth = trained(&path, "data.safetensors", &[]);
    // Three epochs of four batches, the last of which are short.
    assert_eq!(truth.len(), 12);
    let formats = [
        "data.csv",
        "data.tsv",
        "part-*.csv",
        "part-0.csv,part-1.csv",
        "data.jsonl",
        "data.parquet",
        "stream.arrow",
        "file.arrow",
        "saved",
        "shard-0.safetensors,shard-1.safetensors",
    ];
    for data in formats {
        for memory in ["1024", "0"] {
            assert_eq!(trained(&path, data, &["--data-memory", memory]), truth, "{data} with {memory} MiB");
        }
    }
    // They would be other losses with other rows.
    assert_ne!(trained(&path, "part-0.csv", &["--epochs", "6"]), truth);
}

#[test]
fn an_arrow_stream_that_was_cut_is_no_shorter_one() {
    let (_dir, path) = with_network();
    let whole = stream(&[table(0..5), table(5..10)]);
    let first = stream(&[table(0..5)]);
    // Without the mark of its end; between two batches; within one.
    let mark = 8;
    for bytes in [&whole[..whole.len() - mark], &first[..first.len() - mark], &whole[..whole.len() - mark - 40]] {
        fs::write(path.join("cut.arrow"), bytes).expect("a file");
        refused(&command("cut.arrow", &[]), &path, "run", &["cut.arrow: this is not a whole Arrow file"]);
    }
    let saved = path.join("saved");
    fs::create_dir(&saved).expect("a directory");
    fs::write(saved.join("state.json"), "{\"_data_files\": [{\"filename\": \"data.arrow\"}]}").expect("a file");
    fs::write(saved.join("data.arrow"), &whole[..whole.len() - mark]).expect("a file");
    refused(&command("saved", &[]), &path, "run", &["saved/data.arrow: this is not a whole Arrow file", "end"]);
}

/// pictures[n,3,2,2] → Flatten → fc (Gemm) → logits[n,2], injected; and a folder of six pictures of each of two classes.
fn with_pictures() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_path_buf();
    let mut graph = GraphProto { name: Some("net".into()), ..Default::default() };
    graph.input.push(value_info("pictures", DataType::Float, &["n", "3", "2", "2"]));
    graph.output.push(value_info("logits", DataType::Float, &["n", "2"]));
    graph.initializer = vec![floats(&[12, 2]).to_proto("fc.weight")];
    graph.node = vec![node("Flatten", &["pictures"], &["x"]), node("Gemm", &["x", "fc.weight"], &["logits"])];
    inject(&path, &model(graph));
    for (class, name) in ["round", "square"].into_iter().enumerate() {
        fs::create_dir_all(path.join("pictures").join(name)).expect("a directory");
        for at in 0..6 {
            let colour = |x: u32, y: u32| ::image::Rgb([at * 40, (x * 90) as u8, (y * 50) as u8 + class as u8 * 100]);
            let picture = ::image::RgbImage::from_fn(2, 2, colour);
            picture.save(path.join(format!("pictures/{name}/{at}.png"))).expect("a picture");
        }
    }
    (dir, path)
}

fn inject(path: &Path, base: &ModelProto) {
    fs::write(path.join("base.onnx"), base.encode_to_vec()).expect("a file");
    done(&["inject", "base.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--r", "2"], path);
}

/// The paths of the pictures below `pictures/` in their order, and their classes.
fn listed() -> Vec<(String, &'static str)> {
    let of = |name: &'static str| (0..6).map(move |at| (format!("{name}/{at}.png"), name));
    of("round").chain(of("square")).collect()
}

#[test]
fn pictures_in_folders_lists_and_tables_make_the_same_run() {
    let (_dir, path) = with_pictures();
    let lines: Vec<String> = listed().iter().map(|(file, class)| format!("{file},{class}\n")).collect();
    fs::write(path.join("pictures/list.csv"), format!("image,label\n{}", lines.concat())).expect("a file");
    let bytes: Vec<Vec<u8>> =
        listed().iter().map(|(file, _)| fs::read(path.join("pictures").join(file)).expect("a picture")).collect();
    let bytes: ArrayRef = Arc::new(bytes.iter().map(|bytes| Some(bytes.as_slice())).collect::<BinaryArray>());
    let paths: ArrayRef = Arc::new(StringArray::from_iter_values(listed().iter().map(|(file, _)| file)));
    let labels: ArrayRef = Arc::new(StringArray::from_iter_values(listed().iter().map(|(_, class)| class)));
    let images = StructArray::try_from(vec![("bytes", bytes), ("path", paths)]).expect("a column");
    let batch = RecordBatch::try_from_iter([("image", Arc::new(images) as ArrayRef), ("label", labels)]);
    parquet(&path.join("table.parquet"), &batch.expect("a batch"));

    let truth = trained(&path, "pictures", &[]);
    assert_eq!(truth.len(), 9);
    for data in ["pictures/list.csv", "table.parquet"] {
        for memory in ["1024", "0"] {
            assert_eq!(trained(&path, data, &["--data-memory", memory]), truth, "{data} with {memory} MiB");
        }
    }
}

#[test]
fn pictures_that_are_missing_or_damaged_are_named_with_file_and_line() {
    let (_dir, path) = with_pictures();
    let list = |second: &str| {
        let lines = format!("image,label\nround/0.png,round\n{second},round\nsquare/0.png,square\n");
        fs::write(path.join("pictures/list.csv"), lines).expect("a file");
    };
    let whole = fs::read(path.join("pictures/round/1.png")).expect("a picture");
    list("round/gone.png");
    let command = |data| command(data, &["--batch-size", "1", "--no-shuffle", "--steps", "12"]);
    let named = "pictures/list.csv:3: field \"image\" holds an image that cannot be used: pictures/round/";
    refused(&command("pictures/list.csv"), &path, "run", &[named, "gone.png: cannot open"]);
    list("round/1.png");
    fs::write(path.join("pictures/round/1.png"), "no picture at all").expect("a file");
    refused(&command("pictures/list.csv"), &path, "run", &[named, "1.png: this is no image that can be read"]);
    fs::remove_file(path.join("pictures/list.csv")).expect("a file");
    refused(&command("pictures"), &path, "run", &["pictures/round/1.png", "this is no image that can be read"]);

    // One that begins well is found when its batch is made; the steps before that are kept.
    fs::write(path.join("pictures/round/1.png"), &whole[..whole.len() - 20]).expect("a file");
    for (data, named) in [
        ("pictures", "pictures: array pictures: pictures/round/1.png: this is no whole image"),
        ("pictures/list.csv", "pictures/list.csv:3: pictures/round/1.png: this is no whole image"),
    ] {
        if data != "pictures" {
            list("round/1.png");
        }
        let output = bone(&command(data), &path);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(named) && said.matches("error: ").count() == 1, "{said}");
        assert_eq!(steps(&path.join("run")).len(), 1);
        assert!(path.join("run/injected.onnx").exists());
        fs::remove_dir_all(path.join("run")).expect("a directory");
    }
}

const WIDE: usize = 4096;

/// Writes `count` rows of [`WIDE`] numbers and a class as an Arrow stream.
fn wide(path: &Path, count: usize) {
    let batch = |from: usize| {
        let rows = from..(from + 64).min(count);
        let numbers =
            rows.clone().map(|at| Some((0..WIDE).map(move |i| Some(((at * 31 + i * 7) % 251) as f32 / 251.0))));
        let pixels = FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(numbers, WIDE as i32);
        let labels = rows.map(|at| (at % 3) as i64).collect::<Int64Array>();
        RecordBatch::try_from_iter([("pixels", Arc::new(pixels) as ArrayRef), ("label", Arc::new(labels) as ArrayRef)])
    };
    let batches: Vec<RecordBatch> = (0..count).step_by(64).map(|from| batch(from).expect("a batch")).collect();
    fs::write(path, stream(&batches)).expect("a file");
}

#[test]
fn data_larger_than_its_memory_is_read_from_the_disk_to_the_same_bits() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    let mut graph = GraphProto { name: Some("net".into()), ..Default::default() };
    graph.input.push(value_info("pixels", DataType::Float, &["n", &WIDE.to_string()]));
    graph.output.push(value_info("logits", DataType::Float, &["n", "3"]));
    graph.initializer = vec![floats(&[3, WIDE]).to_proto("fc.weight")];
    let mut gemm = node("Gemm", &["pixels", "fc.weight"], &["logits"]);
    gemm.attribute = vec![AttributeProto::int("transB", 1)];
    graph.node = vec![gemm];
    inject(path, &model(graph));
    // 24 and 48 MiB, with room for 2.
    wide(&path.join("half.arrow"), 1536);
    wide(&path.join("whole.arrow"), 3072);
    let run = |data: &str, memory: &str| -> (u64, Vec<Value>, Vec<u8>) {
        let said = done(&command(data, &["--steps", "40", "--data-memory", memory, "--json"]), path);
        let said: Value = serde_json::from_str(&said).expect("JSON");
        let peak = said["peak_memory_bytes"].as_u64().expect("a number");
        let made = (peak, steps(&path.join("run")), fs::read(path.join("run/injected.onnx")).expect("a model"));
        fs::remove_dir_all(path.join("run")).expect("a directory");
        made
    };
    let (in_memory, steps_in_memory, model_in_memory) = run("whole.arrow", "1024");
    let (bounded, steps, model) = run("whole.arrow", "2");
    assert!(steps == steps_in_memory && model == model_in_memory);
    let (half, ..) = run("half.arrow", "2");
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let [in_memory, bounded, half] = [in_memory, bounded, half].map(mebibytes);
    assert!(bounded < in_memory - 40.0, "{bounded} MiB, and {in_memory} with all in memory");
    assert!(bounded < half + 6.0, "{bounded} MiB, and {half} for half of the data");
    // Nothing lies about, and nothing is written where there is no need.
    let mut names: Vec<String> = fs::read_dir(path)
        .expect("a directory")
        .map(|e| e.expect("an entry").file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["base.onnx", "half.arrow", "injected.onnx", "whole.arrow"]);

    // Files may grow to 4 MiB: as good as a full disk.
    let words = command("half.arrow", &["--data-memory", "2"]).join(" ");
    let script = format!("trap '' XFSZ; ulimit -f 8192; exec {} {words}", env!("CARGO_BIN_EXE_bone-onnx"));
    let output = std::process::Command::new("sh").args(["-c", &script]).current_dir(path).output().expect("a run");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: .: rows of the data that are more than --data-memory cannot be written"), "{said}");
    assert!(said.matches("error: ").count() == 1 && !path.join("run").exists(), "{said}");
}
