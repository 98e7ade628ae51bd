//! What is read is what pandas, pyarrow, `datasets`, `tokenizers` and Pillow read: `fixtures/data/make.py` asked them.

use serde_json::Value;

use super::tests::Case;
use super::*;
use crate::onnx::DataType;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data").join(name)
}

fn expected(name: &str) -> Value {
    let text = std::fs::read(fixture("expected.json")).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap()[name].clone()
}

/// The numbers in nested lists.
fn flat(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(flat).collect(),
        Value::Bool(v) => vec![f64::from(u8::from(*v))],
        other => vec![other.as_f64().unwrap_or_else(|| panic!("{other} is no number"))],
    }
}

/// Equal, but for the last bit that reading the truth may cost.
fn same(read: &Tensor, truth: &Value, what: &str) {
    let (read, truth) = (read.to_f64(), flat(truth));
    assert_eq!(read.len(), truth.len(), "{what}");
    for (a, b) in read.iter().zip(&truth) {
        assert!((a - b).abs() <= 1e-15 * b.abs(), "{what}: {a} is not {b}");
    }
}

/// All rows as one batch: inputs by name, and the labels.
fn all(case: &Case, path: &Path) -> (BTreeMap<String, Tensor>, Tensor, Option<Vec<String>>) {
    let dataset = case.open(path).unwrap_or_else(|e| panic!("{e}"));
    let rows: Vec<usize> = (0..dataset.rows()).collect();
    let batch = case.feed(&dataset).and_then(|feed| feed.batch(&rows)).unwrap_or_else(|e| panic!("{e}"));
    (batch.inputs.into_iter().collect(), batch.targets[0].clone(), dataset.label_names)
}

fn strings(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn csv_is_read_as_pandas_reads_it() {
    let truth = expected("flowers");
    let map = |columns: &[&str]| vec![("x".to_string(), columns.iter().map(|c| c.to_string()).collect())];
    for (file, map) in [("flowers.csv", vec![]), ("flowers.tsv", map(&["x_0", "x_1"])), ("flowers.csv", map(&["x_*"]))]
    {
        let mut case = Case::new(&[("x", DataType::Float, &["n", "2"])]);
        case.map = map;
        case.text.label_field = "kind".into();
        let (inputs, labels, names) = all(&case, &fixture(file));
        let x: Vec<f32> = flat(&truth["x"]).iter().map(|v| *v as f32).collect();
        assert_eq!(inputs["x"], Tensor::new(&[7, 2], x));
        assert_eq!(labels.to_f64(), flat(&truth["labels"]));
        assert_eq!(names.unwrap(), strings(&truth["names"]));
    }
    // Quoted commas and quotes, as texts: each name is a class.
    let mut case = Case::new(&[("x", DataType::Float, &["n", "2"])]);
    case.text.label_field = "colour".into();
    let (_, labels, names) = all(&case, &fixture("flowers.csv"));
    let names = names.unwrap();
    let read: Vec<&String> = labels.values::<i64>().unwrap().iter().map(|id| &names[*id as usize]).collect();
    assert_eq!(read, strings(&truth["text"]).iter().collect::<Vec<_>>());
}

#[test]
fn parquet_is_read_as_pyarrow_reads_it() {
    let truth = expected("table");
    let inputs: [(&str, DataType, &[&str]); 6] = [
        ("fixed", DataType::Float, &["n", "3"]),
        ("matrix", DataType::Double, &["n", "1", "4"]),
        ("half", DataType::Float16, &["n", "2"]),
        ("flag", DataType::Bool, &["n"]),
        ("byte", DataType::Uint8, &["n"]),
        ("input_ids", DataType::Int64, &["n", "t"]),
    ];
    let mut case = Case::new(&inputs);
    case.map = vec![("input_ids".into(), vec!["tokens".into()])];
    for file in ["table.parquet", "snappy.parquet"] {
        let (read, labels, names) = all(&case, &fixture(file));
        for (name, data_type, _) in &inputs[..5] {
            assert_eq!(read[*name].data_type(), *data_type);
            same(&read[*name], &truth[name], name);
        }
        assert_eq!(read["matrix"].dims(), [10, 1, 4]);
        let tokens = truth["tokens"].as_array().unwrap();
        let longest = tokens.iter().map(|row| flat(row).len()).max().unwrap();
        let padded = tokens.iter().flat_map(|row| {
            let mut row = flat(row);
            row.resize(longest, 0.0);
            row
        });
        assert_eq!(read["input_ids"].to_f64(), padded.collect::<Vec<_>>());
        assert_eq!(read["input_ids"].data_type(), DataType::Int64);
        assert_eq!((labels.to_f64(), names), (flat(&truth["label"]), None));
    }
    // Text in a dictionary, two files at once, and a mask beside tokens that are ready.
    let mut case = Case::new(&[("input_ids", DataType::Int64, &["n", "t"])]);
    case.text.tokenizer = Some(fixture("tokenizer.json"));
    let files = [fixture("snappy.parquet"), fixture("table.parquet")];
    let dataset = case.open_all(&files, None).unwrap();
    assert_eq!(dataset.rows(), 20);
    let batch = case.feed(&dataset).unwrap().batch(&[0, 3, 12]).unwrap();
    assert_eq!(batch.inputs[0].1, Tensor::new(&[3, 3], vec![1i64, 2, 3, 1, 2, 6, 1, 2, 5]));
    let mut case =
        Case::new(&[("input_ids", DataType::Int64, &["n", "t"]), ("attention_mask", DataType::Int64, &["n", "t"])]);
    case.map = vec![("input_ids".into(), vec!["tokens".into()])];
    let (read, ..) = all(&case, &fixture("table.parquet"));
    let filled: Vec<f64> = read["input_ids"].to_f64().iter().map(|id| f64::from(u8::from(*id > 0.0))).collect();
    assert_eq!(read["attention_mask"].to_f64(), filled);
}

#[test]
fn a_folder_that_datasets_saved_keeps_its_class_names() {
    let truth = expected("saved");
    let case = Case::new(&[("vector", DataType::Float, &["n", "2"])]);
    let (read, labels, names) = all(&case, &fixture("saved"));
    same(&read["vector"], &truth["vector"], "vector");
    assert_eq!(labels.to_f64(), flat(&truth["label"]));
    let names = names.unwrap();
    assert_eq!(names, strings(&truth["names"]));
    // Evaluation data has the same classes, whether it lists them or not.
    assert!(case.open_with(&fixture("saved"), Some(&names)).is_ok());
    let complaint = case.open_with(&fixture("saved"), Some(&names[1..])).unwrap_err().to_string();
    assert!(complaint.contains("its classes are neutral, good, bad"), "{complaint}");
    let pattern = case.open(&fixture("saved/data-*.arrow")).unwrap();
    assert_eq!(pattern.rows(), 5);
}

#[test]
fn pairs_of_texts_are_the_tokenizers_pairs() {
    for max_length in [512, 7] {
        let truth = &expected("pairs")[max_length.to_string()];
        let names = ["input_ids", "attention_mask", "token_type_ids"];
        let inputs: Vec<_> = names.iter().map(|n| (*n, DataType::Int64, ["n", "t"].as_slice())).collect();
        let mut case = Case::new(&inputs);
        case.text.tokenizer = Some(fixture("tokenizer.json"));
        case.text.max_length = Some(max_length);
        case.text.text_field = "premise".into();
        case.text.text_pair_field = Some("hypothesis".into());
        let (read, labels, _) = all(&case, &fixture("pairs.jsonl"));
        for name in names {
            assert_eq!(read[name].to_f64(), flat(&truth[name]), "{name} of {max_length}");
        }
        assert_eq!(labels.to_f64(), [0.0, 1.0, 0.0]);
    }
}

/// How far two images are apart, at most.
fn worst(read: &Tensor, truth: &Value) -> f64 {
    let (read, truth) = (read.to_f64(), flat(truth));
    assert_eq!(read.len(), truth.len());
    read.iter().zip(&truth).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn images_are_decoded_and_resized_as_pillow_does_it() {
    let truth = expected("pictures");
    for file in ["pictures", "pictures.parquet"] {
        let raw = |dims: &[&str]| {
            let (mut read, labels, names) = all(&Case::new(&[("pixels", DataType::Uint8, dims)]), &fixture(file));
            assert_eq!(labels.to_f64(), flat(&truth["labels"]));
            assert_eq!(names.unwrap(), ["round", "square"]);
            read.remove("pixels").unwrap()
        };
        // All but the .jpg are the same bits; its decoder rounds in its own way.
        let as_is = raw(&["n", "12", "16", "3"]);
        let values = as_is.to_f64();
        let (lossless, lossy) = values.split_at(4 * 12 * 16 * 3);
        let wanted = flat(&truth["rgb"]);
        assert_eq!(lossless, &wanted[..lossless.len()]);
        let off = lossy.iter().zip(&wanted[lossless.len()..]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off <= 3.0, "{off}");
        assert!(worst(&raw(&["n", "12", "16", "1"]), &truth["grey"]) <= 3.0);
        assert!(worst(&raw(&["n", "6", "8", "3"]), &truth["small"]) <= 2.0);
    }
}

#[test]
fn pixels_are_normalised_by_channel_in_either_layout() {
    let truth = flat(&expected("pictures")["rgb"])[..12 * 16 * 3].to_vec();
    let dims = |first: bool| if first { ["n", "3", "h", "w"] } else { ["n", "h", "w", "3"] };
    for (first, mean, std) in [
        (true, None, None),
        (false, None, None),
        (true, Some(vec![0.5]), Some(vec![0.25])),
        (false, Some(vec![0.0, 0.1, 0.2]), Some(vec![1.0, 2.0, 4.0])),
    ] {
        let mut case = Case::new(&[("pixels", DataType::Float, &dims(first))]);
        case.image.size = Some((16, 12));
        (case.image.mean, case.image.std) = (mean.clone(), std.clone());
        let dataset = case.open(&fixture("pictures")).unwrap();
        let read = case.feed(&dataset).unwrap().batch(&[0]).unwrap().inputs[0].1.to_f64();
        let of = |given: &Option<Vec<f32>>, imagenet: [f32; 3], channel: usize| {
            let all = given.clone().unwrap_or(imagenet.to_vec());
            f64::from(*all.get(channel).unwrap_or(&all[0]))
        };
        for (at, value) in truth.iter().enumerate() {
            let (pixel, channel) = (at / 3, at % 3);
            let place = if first { channel * 12 * 16 + pixel } else { at };
            let mean = of(&mean, [0.485, 0.456, 0.406], channel);
            let wanted = (value / 255.0 - mean) / of(&std, [0.229, 0.224, 0.225], channel);
            assert!((read[place] - wanted).abs() < 1e-6, "{first} {at}: {} is not {wanted}", read[place]);
        }
    }
}

/// A file, a change of the case, and what is said about it.
type Refusal<'a> = (&'a str, &'a [u8], fn(&mut Case), &'a [&'a str]);

#[test]
fn bad_rows_are_named_by_file_and_place() {
    let parquet = std::fs::read(fixture("table.parquet")).unwrap();
    let arrow = std::fs::read(fixture("saved/data-00000-of-00002.arrow")).unwrap();
    let vector: fn(&mut Case) = |case| case.rename("x", "vector");
    let fixed: fn(&mut Case) = |case| case.map = vec![("x".into(), vec!["fixed".into()])];
    let refusals: [Refusal; 25] = [
        ("a.csv", b"x_0,x_1,label\n1,2,0\n1,2\n", |_| (), &["a.csv:3", "2 fields", "3"]),
        ("a.csv", b"x_0,x_1,label\n1,2,0\n1,,0\n", |_| (), &["a.csv:3", "\"x_1\"", "empty"]),
        ("a.csv", b"x_0,x_1,label\n1,2,0\n1,two,0\n", |_| (), &["a.csv:3", "\"x_1\"", "\"two\"", "number"]),
        ("a.csv", b"x_0,x_1,label\n1,2,0\n1,\xff,0\n", |_| (), &["a.csv:3", "field 2", "UTF-8"]),
        ("a.csv", b"x_0,x_0,label\n1,2,0\n", |_| (), &["a.csv:1", "\"x_0\"", "two columns"]),
        ("a.csv", b"x_0,x_1,label\n1,2,0\n1,2,3\n", |_| (), &["a.csv:3", "label 3", "3 classes"]),
        ("a.csv", b"x_0,x_1,label\n1,2,\n", |_| (), &["a.csv:2", "\"label\"", "null"]),
        ("a.csv", b"x_0,x_1,lable\n1,2,0\n", |_| (), &["a.csv", "--label-field", "Did you mean lable?"]),
        ("a.csv", b"x_0,x_1,label\n1,2,a\n1,2,b\n1,2,c\n1,2,d\n", |_| (), &["4 classes (a, b, c, d)", "only 3"]),
        ("a.csv", b"y,label\n1,0\n", |_| (), &["a.csv", "input x", "--map x=COLUMN", "y, label"]),
        ("a.csv", b"y,label\n1,0\n", |c| c.map = vec![("z".into(), vec!["y".into()])], &["map: z", "x"]),
        ("a.csv", b"yy,label\n1,0\n", |c| c.map = vec![("x".into(), vec!["y".into()])], &["--map", "Did you mean yy?"]),
        ("a.csv", b"y,label\n1,0\n", |c| c.map = vec![("x".into(), vec!["z*".into()])], &["map x", "z*"]),
        ("a.csv", b"x_0,x_1,label\n", |_| (), &["a.csv", "no rows"]),
        ("a.csv", b"", |_| (), &["a.csv", "no rows"]),
        ("a.jsonl", b"", |_| (), &["a.jsonl", "no rows"]),
        ("a.jsonl", b"{\"x\": [1, 2], \"label\": 0}\n{\"x\": [1], \"label\": 0}", |_| (), &["a.jsonl:2", "[1]", "[2]"]),
        ("a.jsonl", b"{\"x\": [[1, 2], [1]], \"label\": 0}", |_| (), &["a.jsonl:1", "lists of 2 and of 1"]),
        ("a.jsonl", b"{\"x\": [1, null], \"label\": 0}", |_| (), &["a.jsonl:1", "null in a list"]),
        ("a.parquet", &parquet[..parquet.len() - 20], fixed, &["a.parquet", "not a whole .parquet"]),
        ("a.parquet", &parquet[..30], fixed, &["a.parquet", "not a whole .parquet"]),
        ("a.parquet", b"", fixed, &["a.parquet", "not a whole .parquet"]),
        ("a.parquet", &parquet, |c| c.map = vec![("x".into(), vec!["fixt".into()])], &["Did you mean fixed"]),
        ("a.arrow", &arrow[..arrow.len() - 100], vector, &["a.arrow", "not a whole Arrow"]),
        ("a.arrow", b"ARROW1", vector, &["a.arrow", "not a whole Arrow"]),
    ];
    for (name, content, change, words) in refusals {
        let mut case = Case::new(&[("x", DataType::Float, &["n", "2"])]);
        change(&mut case);
        let complaint = case.open(&case.write(name, content)).map(|_| ());
        let complaint = complaint.expect_err(words[0]).to_string();
        for word in words.iter().chain(&[name]) {
            let shown = String::from_utf8_lossy(&content[..content.len().min(60)]).into_owned();
            assert!(
                complaint.contains(word) || *word == name && words[0].starts_with("map"),
                "{shown:?}: no {word:?} in {complaint:?}"
            );
        }
    }
}
