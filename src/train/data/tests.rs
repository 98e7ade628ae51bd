//! Reading, batching and checking data, on files made on the spot.

use std::io::Write;
use std::path::PathBuf;

use ndarray::{Array1, Array2};
use safetensors::{Dtype, tensor::TensorView};

use super::*;
use crate::onnx::{DataType, value_info};

/// A directory with files, and how they are read.
pub(super) struct Case {
    dir: tempfile::TempDir,
    pub inputs: Vec<Field>,
    pub output: Field,
    pub map: Vec<(String, Vec<String>)>,
    pub text: TextOptions,
    pub image: ImageOptions,
    pub kind: LabelKind,
    roles: Roles,
    room: Room,
}

impl Case {
    pub fn new(inputs: &[(&str, DataType, &[&str])]) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            inputs: inputs.iter().map(|(n, t, d)| Field::of(&value_info(n, *t, d))).collect(),
            output: Field::of(&value_info("logits", DataType::Float, &["n", "3"])),
            map: Vec::new(),
            text: TextOptions::default(),
            image: ImageOptions::default(),
            kind: LabelKind::Class,
            roles: Roles::One,
            // Most of what is read fits, and all the rest is on a disk.
            room: Room::new(100, &std::env::temp_dir()),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        std::fs::File::create(self.path(name)).unwrap().write_all(content).unwrap();
        self.path(name)
    }

    fn safetensors(&self, arrays: &[(&str, Dtype, &[usize], Vec<u8>)]) -> PathBuf {
        let views: Vec<_> =
            arrays.iter().map(|(n, t, d, b)| (*n, TensorView::new(*t, d.to_vec(), b).unwrap())).collect();
        self.write("d.safetensors", &safetensors::serialize(views, None).unwrap())
    }

    pub fn open(&self, path: &Path) -> Result<Dataset> {
        self.open_with(path, None)
    }

    pub fn open_with(&self, path: &Path, label_names: Option<&[String]>) -> Result<Dataset> {
        self.open_all(&[path.into()], label_names)
    }

    pub fn open_all(&self, paths: &[PathBuf], label_names: Option<&[String]>) -> Result<Dataset> {
        let kind = (self.roles == Roles::One).then_some(self.kind);
        let options = ReadOptions {
            inputs: &self.inputs,
            labels: "labels",
            kind,
            classes: (kind == Some(LabelKind::Class)).then_some(3),
            roles: self.roles,
            map: &self.map,
            text: &self.text,
            image: &self.image,
            label_names,
            room: &self.room,
        };
        Dataset::open(paths, &options)
    }

    pub fn feed<'a>(&'a self, dataset: &'a Dataset) -> Result<Feed<'a>> {
        let targets = match self.roles {
            Roles::One => vec![Target::labels("labels", self.kind, &self.output)],
            _ => Vec::new(),
        };
        Feed::new(dataset, &self.inputs, &targets)
    }

    /// Gives an input another name.
    pub fn rename(&mut self, input: &str, name: &str) {
        self.inputs.iter_mut().filter(|i| i.name == input).for_each(|i| i.name = name.into());
    }

    /// What is said about a file of arrays that does not fit.
    fn complaint(&self, arrays: &[(&str, Dtype, &[usize], Vec<u8>)]) -> String {
        let path = self.safetensors(arrays);
        let complaint = match self.open(&path) {
            Ok(dataset) => self.feed(&dataset).and_then(|f| f.check_classes(3)).map(|_| ()),
            Err(e) => Err(e),
        };
        let complaint = complaint.expect_err("it should not fit").to_string();
        assert!(complaint.contains("d.safetensors"), "{complaint}");
        complaint
    }
}

fn f32s(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn x_case() -> Case {
    Case::new(&[("x", DataType::Float, &["n", "2"])])
}

#[test]
fn rows_of_safetensors_come_out_as_asked() {
    let case = x_case();
    let path =
        case.safetensors(&[("x", Dtype::F32, &[3, 2], f32s(6)), ("labels", Dtype::I64, &[3], i64s(&[0, 2, -100]))]);
    let dataset = case.open(&path).unwrap();
    let feed = case.feed(&dataset).unwrap();
    feed.check_classes(3).unwrap();
    let batch = feed.batch(&[2, 0]).unwrap();
    assert_eq!(batch.inputs, [("x".to_string(), Tensor::new(&[2, 2], vec![4.0f32, 5.0, 0.0, 1.0]))]);
    assert_eq!(batch.targets[0], Tensor::new(&[2], vec![-100i64, 0]));
}

#[test]
fn npz_is_read_whatever_its_types_and_order() {
    let case = Case::new(&[
        ("x", DataType::Float, &["n", "2"]),
        ("ids", DataType::Int64, &["n", "1"]),
        ("mask", DataType::Bool, &["n"]),
    ]);
    for compressed in [false, true] {
        let path = case.path("d.npz");
        let file = std::fs::File::create(&path).unwrap();
        let mut npz =
            if compressed { ndarray_npy::NpzWriter::new_compressed(file) } else { ndarray_npy::NpzWriter::new(file) };
        let columns_first = ndarray::Array::from_shape_vec((2, 3), vec![0.0f32, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        npz.add_array("x", &columns_first.t()).unwrap();
        npz.add_array("ids", &Array2::<u8>::from_elem((3, 1), 200)).unwrap();
        npz.add_array("mask", &Array1::from(vec![true, false, true])).unwrap();
        npz.add_array("labels", &Array1::<i32>::from(vec![0, 1, 2])).unwrap();
        npz.finish().unwrap();
        let dataset = case.open(&path).unwrap();
        let batch = case.feed(&dataset).unwrap().batch(&[1, 2]).unwrap();
        let expected = [
            ("x".to_string(), Tensor::new(&[2, 2], vec![1.0f32, 4.0, 2.0, 5.0])),
            ("ids".to_string(), Tensor::new(&[2, 1], vec![200i64, 200])),
            ("mask".to_string(), Tensor::from(Array1::from(vec![false, true]).into_dyn())),
        ];
        assert_eq!(batch.inputs, expected);
        assert_eq!(batch.targets[0], Tensor::new(&[2], vec![1i64, 2]));
    }
}

#[test]
fn arrays_that_do_not_fit_are_named_with_what_was_wanted() {
    let labels = || ("labels", Dtype::I64, [2usize].as_slice(), i64s(&[0, 1]));
    type Arrays<'a> = Vec<(&'a str, Dtype, &'a [usize], Vec<u8>)>;
    let cases: Vec<(Arrays, &[&str])> = vec![
        (vec![("x", Dtype::F32, &[2, 3], f32s(6)), labels()], &["x", "[2, 3]", "[n, 2]"]),
        (vec![("x", Dtype::F32, &[2], f32s(2)), labels()], &["x", "[2]", "[n, 2]"]),
        (vec![("x", Dtype::F64, &[2, 1], f32s(4)), labels()], &["x", "float64", "float32"]),
        (vec![("x", Dtype::I64, &[2, 2], i64s(&[0; 4])), labels()], &["x", "int64", "float32"]),
        (vec![("y", Dtype::F32, &[2, 2], f32s(4)), labels()], &["y", "no input", "x"]),
        (vec![labels()], &["no array", "x"]),
        (vec![("x", Dtype::F32, &[2, 2], f32s(4))], &["labels", "--labels", "x"]),
        (vec![("x", Dtype::F32, &[3, 2], f32s(6)), labels()], &["x has 3", "labels has 2"]),
        (vec![("x", Dtype::F32, &[0, 2], vec![]), ("labels", Dtype::I64, &[0], vec![])], &["no rows"]),
        (
            vec![("x", Dtype::F32, &[2, 2], f32s(4)), ("labels", Dtype::F32, &[2], f32s(2))],
            &["labels", "float32", "int64"],
        ),
        (
            vec![("x", Dtype::F32, &[2, 2], f32s(4)), ("labels", Dtype::I64, &[2, 1], i64s(&[0, 1]))],
            &["labels", "[2, 1]", "[n]"],
        ),
        (
            vec![("x", Dtype::F32, &[2, 2], f32s(4)), ("labels", Dtype::I64, &[2], i64s(&[0, 3]))],
            &["row 1", "label 3", "3 classes"],
        ),
        (
            vec![("x", Dtype::F32, &[2, 2], f32s(4)), ("labels", Dtype::I64, &[2], i64s(&[0, -1]))],
            &["row 1", "label -1"],
        ),
        (
            vec![("x", Dtype::F32, &[2, 2], f32s(4)), ("labels", Dtype::I64, &[2], i64s(&[-100, -100]))],
            &["all labels are -100"],
        ),
        (vec![("x", Dtype::F32, &[], f32s(1)), labels()], &["x", "single number"]),
    ];
    for (arrays, words) in cases {
        let complaint = x_case().complaint(&arrays);
        for word in words {
            assert!(complaint.contains(word), "{word:?} is missing in {complaint:?}");
        }
    }
}

#[test]
fn a_named_axis_is_the_same_in_all_arrays() {
    let case = Case::new(&[("ids", DataType::Int64, &["n", "t"]), ("mask", DataType::Int64, &["n", "t"])]);
    let complaint = case.complaint(&[
        ("ids", Dtype::I64, &[1, 3], i64s(&[1; 3])),
        ("mask", Dtype::I64, &[1, 2], i64s(&[1; 2])),
        ("labels", Dtype::I64, &[1], i64s(&[0])),
    ]);
    assert!(complaint.contains("mask") && complaint.contains("t is 3 in array ids"), "{complaint}");
}

#[test]
fn broken_files_and_unknown_endings_are_errors() {
    let case = x_case();
    for (name, content, word) in [
        ("a.xlsx", b"PK".as_slice(), ".safetensors"),
        ("a.safetensors", b"", "safetensors"),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{\"x\": 1", "safetensors"),
        ("a.npz", b"PK nonsense", "npz"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"{\"text\": \"a\", \"label\": 0}", "--tokenizer"),
    ] {
        let complaint = case.open(&case.write(name, content)).unwrap_err().to_string();
        assert!(complaint.contains(word) && complaint.contains(name), "{complaint}");
    }
    assert!(case.open(&case.path("none.npz")).unwrap_err().to_string().contains("none.npz"));
}

/// A word-level tokenizer: [PAD] 0, [CLS] 1, a..e 2..6; every text begins with [CLS].
const TOKENIZER: &str = include_str!("../../../fixtures/data/tokenizer.json");

fn text_case(dims: &[&str]) -> Case {
    let mut case = Case::new(&[("input_ids", DataType::Int64, dims), ("attention_mask", DataType::Int64, dims)]);
    case.text.tokenizer = Some(case.write("tokenizer.json", TOKENIZER.as_bytes()));
    case
}

#[test]
fn texts_become_padded_tokens_and_label_names_ids() {
    let mut case = text_case(&["n", "t"]);
    case.text.max_length = Some(4);
    let lines = "{\"text\": \"a b c d e\", \"label\": \"sport\"}\n\n{\"text\": \"b\", \"label\": \"art\", \"more\": 1}\n{\"text\": \"c d\", \"label\": \"sport\"}";
    let dataset = case.open(&case.write("d.jsonl", lines.as_bytes())).unwrap();
    assert_eq!(dataset.label_names.as_deref(), Some(["art".to_string(), "sport".to_string()].as_slice()));
    let batch = case.feed(&dataset).unwrap().batch(&[0, 1]).unwrap();
    assert_eq!(batch.inputs[0].1, Tensor::new(&[2, 4], vec![1i64, 2, 3, 4, 1, 3, 0, 0]));
    assert_eq!(batch.inputs[1].1, Tensor::new(&[2, 4], vec![1i64, 1, 1, 1, 1, 1, 0, 0]));
    assert_eq!(batch.targets[0], Tensor::new(&[2], vec![1i64, 0]));
    assert_eq!(batch.tokens, Some(6));
    // The longest of the batch decides.
    assert_eq!(case.feed(&dataset).unwrap().batch(&[1, 2]).unwrap().inputs[0].1.dims(), [2, 3]);
    assert_eq!(case.feed(&dataset).unwrap().lengths().unwrap(), [4, 2, 3]);

    let names = dataset.label_names.clone().unwrap();
    let other = case.write("e.jsonl", b"{\"text\": \"a\", \"label\": \"sport\"}");
    let eval = case.open_with(&other, Some(&names)).unwrap();
    assert_eq!(case.feed(&eval).unwrap().batch(&[0]).unwrap().targets[0], Tensor::new(&[1], vec![1i64]));
    let strange = case.write("f.jsonl", b"{\"text\": \"a\", \"label\": \"sports\"}");
    let complaint = case.open_with(&strange, Some(&names)).unwrap_err().to_string();
    assert!(complaint.contains("f.jsonl:1") && complaint.contains("Did you mean sport?"), "{complaint}");
}

#[test]
fn a_fixed_sequence_length_is_met_in_every_batch() {
    let case = text_case(&["n", "3"]);
    let dataset = case
        .open(&case.write("d.jsonl", b"{\"text\": \"a\", \"label\": 0}\n{\"text\": \"a b c d e\", \"label\": 1}"))
        .unwrap();
    let feed = case.feed(&dataset).unwrap();
    assert_eq!(feed.batch(&[0]).unwrap().inputs[0].1, Tensor::new(&[1, 3], vec![1i64, 2, 0]));
    assert_eq!(feed.batch(&[1]).unwrap().inputs[0].1, Tensor::new(&[1, 3], vec![1i64, 2, 3]));
}

#[test]
fn numbers_are_labels_for_mse() {
    let mut case = text_case(&["n", "t"]);
    case.kind = LabelKind::Number;
    case.output = Field::of(&value_info("score", DataType::Float, &["n", "1"]));
    let dataset = case
        .open(&case.write("d.jsonl", b"{\"text\": \"a\", \"label\": 0.5}\n{\"text\": \"b\", \"label\": 2}"))
        .unwrap();
    assert_eq!(case.feed(&dataset).unwrap().batch(&[1, 0]).unwrap().targets[0], Tensor::new(&[2], vec![2.0f32, 0.5]));
}

#[test]
fn bad_lines_are_named_by_file_and_number() {
    let good = "{\"text\": \"a\", \"label\": 0}\n";
    for (line, words) in [
        ("{\"text\": \"a\"", ["not a JSON", ":2"]),
        ("[1]", ["not a JSON object", ":2"]),
        ("{\"txt\": \"a\", \"label\": 0}", ["Did you mean txt?", ":2"]),
        ("{\"text\": 5, \"label\": 0}", ["not a string", ":2"]),
        ("{\"text\": \"a\"}", ["--label-field", ":2"]),
        ("{\"text\": \"a\", \"label\": 0.5}", ["class id", ":2"]),
        ("{\"text\": \"a\", \"label\": \"art\"}", ["on others", ":1"]),
        ("\u{1}", ["not a JSON", ":2"]),
    ] {
        let case = text_case(&["n", "t"]);
        let complaint = case.open(&case.write("d.jsonl", format!("{good}{line}").as_bytes())).unwrap_err().to_string();
        for word in words.iter().chain(&["d.jsonl"]) {
            assert!(complaint.contains(word), "{word:?} is missing in {complaint:?}");
        }
    }
}

#[test]
fn text_for_a_model_without_token_inputs_is_refused() {
    let mut case = x_case();
    case.text.tokenizer = Some(case.write("tokenizer.json", TOKENIZER.as_bytes()));
    let path = case.write("d.jsonl", b"{\"text\": \"a\", \"label\": 0}");
    let complaint = case.open(&path).unwrap_err().to_string();
    assert!(complaint.contains("input x") && complaint.contains("input_ids"), "{complaint}");
    case.text.tokenizer = Some(case.write("broken.json", b"{}"));
    assert!(case.open(&path).unwrap_err().to_string().contains("broken.json"));
    let mut case = text_case(&["n", "t"]);
    case.text.max_length = Some(1);
    let path = case.write("d.jsonl", b"{\"text\": \"a\", \"label\": 0}");
    assert!(case.open(&path).unwrap_err().to_string().contains("max-length is 1"));
}

#[test]
fn arrays_of_pairs_and_triples_are_stacked_role_below_role() {
    let mut case = Case::new(&[("x", DataType::Float, &["n", "2"])]);
    case.roles = Roles::Pair;
    let row = |first: f32| [first, first + 0.5].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let rows = |from: f32| [row(from), row(from + 1.0), row(from + 2.0)].concat();
    let role = |name: &'static str, from: f32| (name, Dtype::F32, [3usize, 2].as_slice(), rows(from));
    let (anchor, positive, negative) = (role("anchor.x", 0.0), role("positive.x", 10.0), role("negative.x", 20.0));
    let pairs = case.open(&case.safetensors(&[anchor.clone(), positive.clone()])).unwrap();
    assert_eq!((pairs.rows(), pairs.roles()), (3, 2));
    let batch = case.feed(&pairs).unwrap().batch(&[2, 0]).unwrap();
    assert_eq!((batch.samples, batch.targets.len()), (2, 0));
    assert_eq!(batch.inputs[0].1, Tensor::new(&[4, 2], vec![2f32, 2.5, 0.0, 0.5, 12.0, 12.5, 10.0, 10.5]));

    let triples = case.open(&case.safetensors(&[negative.clone(), anchor.clone(), positive.clone()])).unwrap();
    assert_eq!(triples.roles(), 3);
    let batch = case.feed(&triples).unwrap().batch(&[1]).unwrap();
    assert_eq!(batch.inputs[0].1, Tensor::new(&[3, 2], vec![1f32, 1.5, 11.0, 11.5, 21.0, 21.5]));

    let narrow = ("positive.x", Dtype::F32, [3usize, 1].as_slice(), f32s(3));
    let stray = ("x", Dtype::F32, [3usize, 2].as_slice(), rows(0.0));
    let cases: [(&[_], Roles, &str); 6] = [
        (std::slice::from_ref(&anchor), Roles::Pair, "no positive.x"),
        (&[anchor.clone(), negative], Roles::Pair, "no positive.x"),
        (std::slice::from_ref(&positive), Roles::Pair, "no anchor.x"),
        (&[anchor.clone(), positive.clone(), stray], Roles::Pair, "array x is none of a role"),
        (&[anchor.clone(), narrow], Roles::Pair, "[3, 1]"),
        (&[anchor.clone(), positive.clone()], Roles::Triple, "wants a negative"),
    ];
    for (arrays, roles, word) in cases {
        case.roles = roles;
        let complaint = case.open(&case.safetensors(arrays)).unwrap_err().to_string();
        assert!(complaint.contains(word) && complaint.contains("d.safetensors"), "{word}: {complaint}");
    }
}

#[test]
fn lines_of_pairs_and_triples_are_stacked_role_below_role() {
    let mut case = text_case(&["n", "t"]);
    case.roles = Roles::Pair;
    let pairs = "{\"anchor\": \"a\", \"positive\": \"b c\"}\n{\"anchor\": \"d e\", \"positive\": \"e\"}\n";
    let dataset = case.open(&case.write("p.jsonl", pairs.as_bytes())).unwrap();
    assert_eq!((dataset.rows(), dataset.roles()), (2, 2));
    let batch = case.feed(&dataset).unwrap().batch(&[1, 0]).unwrap();
    assert_eq!(batch.inputs[0].1, Tensor::new(&[4, 3], vec![1i64, 5, 6, 1, 2, 0, 1, 6, 0, 1, 3, 4]));
    assert_eq!(batch.inputs[1].1, Tensor::new(&[4, 3], vec![1i64, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1]));

    case.text.negative_field = Some("other".into());
    let triples = "{\"anchor\": \"a\", \"positive\": \"b\", \"other\": \"c\"}\n";
    assert_eq!(case.open(&case.write("t.jsonl", triples.as_bytes())).unwrap().roles(), 3);
    let complaint = case.open(&case.write("p.jsonl", pairs.as_bytes())).unwrap_err().to_string();
    assert!(complaint.contains("p.jsonl:1") && complaint.contains("--negative-field"), "{complaint}");
    (case.roles, case.text.negative_field) = (Roles::Triple, None);
    let complaint = case.open(&case.write("p.jsonl", pairs.as_bytes())).unwrap_err().to_string();
    assert!(complaint.contains("p.jsonl:1") && complaint.contains("--negative-field"), "{complaint}");
}

/// A folder of one class with `count` pictures of one pixel each, that of number `at` being of the colour `at`.
fn pictures(case: &Case, count: u8) -> PathBuf {
    let folder = case.path("pictures");
    std::fs::create_dir_all(folder.join("dot")).unwrap();
    for at in 0..count {
        ::image::RgbImage::from_pixel(1, 1, ::image::Rgb([at; 3]))
            .save(folder.join(format!("dot/{at:03}.png")))
            .unwrap();
    }
    folder
}

#[test]
fn portions_made_ahead_are_those_of_the_order_and_an_error_comes_with_its_own() {
    let case = Case::new(&[("pixels", DataType::Uint8, &["n", "1", "1", "3"])]);
    let folder = pictures(&case, 11);
    let dataset = case.open(&folder).unwrap();
    let feed = case.feed(&dataset).unwrap();
    let batches = || Batches::new(11, 2, Some(1));
    // Two batches at a time, three epochs of 2 + 2 + 2 batches, the last of them short.
    let colours =
        |batch: &Batch| -> Vec<u8> { batch.inputs[0].1.values::<u8>().unwrap().iter().step_by(3).copied().collect() };
    let (mut order, mut taken) = (batches(), 0);
    ahead(&feed, batches(), 2, 9, |mut portions| {
        for at in 0..9 {
            let portion = portions.take().unwrap();
            for batch in &portion.batches {
                let rows: Vec<u8> = order.next_rows().iter().map(|row| *row as u8).collect();
                assert_eq!((colours(batch), batch.samples), (rows.clone(), rows.len()));
                taken += 1;
            }
            assert_eq!((portion.position, portion.ends_epoch), (order.position(), at % 3 == 2));
        }
        assert!(portions.take().is_err());
        Ok(())
    })
    .unwrap();
    assert_eq!(taken, 18);
    // Nobody takes the rest: the thread ends all the same.
    ahead(&feed, batches(), 1, usize::MAX, |mut portions| portions.take()).unwrap();

    // A picture whose beginning alone is whole is found when its batch is made.
    let bad = folder.join("dot/007.png");
    let whole = std::fs::read(&bad).unwrap();
    std::fs::write(&bad, &whole[..whole.len() - 20]).unwrap();
    let dataset = case.open(&folder).unwrap();
    let feed = case.feed(&dataset).unwrap();
    let in_order = Batches::new(11, 2, None);
    ahead(&feed, in_order, 1, 6, |mut portions| {
        for at in [0, 2, 4] {
            assert_eq!(colours(&portions.take().unwrap().batches[0]), [at, at + 1]);
        }
        let complaint = portions.take().unwrap_err().to_string();
        assert!(complaint.contains("007.png: this is no whole image"), "{complaint}");
        Ok(())
    })
    .unwrap();
}
