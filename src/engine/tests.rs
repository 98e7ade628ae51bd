//! Both engines on small models built in code, and on an encoder whose outputs PyTorch computed.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use prost::Message;

use super::*;
use crate::onnx::proto::{OperatorSetIdProto, TypeProto, ValueInfoProto, type_proto};
use crate::onnx::{AttributeProto, DataType, GraphProto, Model, NodeProto, TensorProto, node, value_info};

const ENGINES: [EngineKind; 2] = [EngineKind::OnnxRuntime, EngineKind::Tract];

fn engine(kind: EngineKind) -> Box<dyn Engine> {
    open(kind, Device::Cpu).unwrap()
}

fn model(nodes: Vec<NodeProto>, input: Vec<ValueInfoProto>, output: Vec<ValueInfoProto>) -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto { name: Some("g".into()), node: nodes, input, output, ..Default::default() }),
        ..Default::default()
    }
}

fn load(kind: EngineKind, model: &ModelProto, optimize: bool) -> Result<Box<dyn Session>> {
    engine(kind).load(model, &LoadOptions { threads: Some(1), optimize })
}

fn shared(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// `y = Identity(x)` for `x` of the element type and the declared dimensions.
fn identity(element: DataType, dims: &[&str]) -> ModelProto {
    let values = ["x", "y"].map(|name| value_info(name, element, dims));
    let [x, y] = values;
    model(vec![node("Identity", &["x"], &["y"])], vec![x], vec![y])
}

/// Every element type with its extremes, in as many elements.
fn samples() -> Vec<Tensor> {
    vec![
        Tensor::new(&[2, 2], vec![0f32, -1.5, f32::MAX, f32::MIN_POSITIVE]),
        Tensor::new(&[2, 2], vec![0f64, -1.5, f64::MAX, f64::MIN_POSITIVE]),
        Tensor::new(&[2, 2], [0.0, -1.5, 65504.0, 6e-8].map(f16::from_f64).to_vec()),
        Tensor::new(&[2, 2], [0.0, -1.5, 3e38, 1e-38].map(bf16::from_f64).to_vec()),
        Tensor::new(&[2, 2], vec![0, -1, i64::MAX, i64::MIN]),
        Tensor::new(&[2, 2], vec![0, -1, i32::MAX, i32::MIN]),
        Tensor::new(&[2, 2], vec![0, -1, i16::MAX, i16::MIN]),
        Tensor::new(&[2, 2], vec![0, -1, i8::MAX, i8::MIN]),
        Tensor::new(&[2, 2], vec![0, 1, u64::MAX, 2]),
        Tensor::new(&[2, 2], vec![0, 1, u32::MAX, 2]),
        Tensor::new(&[2, 2], vec![0, 1, u16::MAX, 2]),
        Tensor::new(&[2, 2], vec![0, 1, u8::MAX, 2]),
        Tensor::Bool(ndarray::arr2(&[[true, false], [false, true]]).into_dyn()),
    ]
}

#[test]
fn every_element_type_makes_the_round_trip() {
    for kind in ENGINES {
        for x in samples() {
            let made =
                load(kind, &identity(x.data_type(), &["n", "m"]), true).and_then(|mut s| s.run(&[("x", &x)], &["y"]));
            if kind == EngineKind::Tract && x.data_type() == DataType::Bfloat16 {
                let error = made.unwrap_err().to_string();
                assert!(error.to_lowercase().contains("bfloat16"), "{error}");
                continue;
            }
            assert_eq!(made.unwrap(), [x], "{kind:?}");
        }
    }
}

#[test]
fn scalars_and_empty_tensors_pass() {
    for kind in ENGINES {
        let scalar = Tensor::scalar(7.5f32);
        let mut session = load(kind, &identity(DataType::Float, &[]), true).unwrap();
        assert_eq!(session.run(&[("x", &scalar)], &["y"]).unwrap(), [scalar], "{kind:?}");
        let empty = Tensor::new(&[0, 3], Vec::<f32>::new());
        let mut session = load(kind, &identity(DataType::Float, &["n", "3"]), true).unwrap();
        assert_eq!(session.run(&[("x", &empty)], &["y"]).unwrap(), [empty], "{kind:?}");
    }
}

#[test]
fn a_column_major_tensor_is_read_in_its_own_order() {
    for kind in ENGINES {
        let x = ndarray::arr2(&[[1f32, 2., 3.], [4., 5., 6.]]);
        let mut session = load(kind, &identity(DataType::Float, &["n", "m"]), true).unwrap();
        let y = session.run(&[("x", &Tensor::from(x.t().to_owned().into_dyn()))], &["y"]).unwrap();
        assert_eq!(y, [Tensor::new(&[3, 2], vec![1f32, 4., 2., 5., 3., 6.])], "{kind:?}");
    }
}

/// `a = x · w`, `b = a + a`, with free dimensions.
fn product() -> ModelProto {
    model(
        vec![node("MatMul", &["x", "w"], &["a"]), node("Add", &["a", "a"], &["b"])],
        vec![value_info("x", DataType::Float, &["n", "2"]), value_info("w", DataType::Float, &["2", "k"])],
        vec![value_info("a", DataType::Float, &["n", "k"]), value_info("b", DataType::Float, &["n", "k"])],
    )
}

#[test]
fn products_come_out_in_the_order_asked_for_at_changing_shapes() {
    let w = Tensor::new(&[2, 2], vec![1f32, 2., 3., 4.]);
    let one = Tensor::new(&[1, 2], vec![1f32, -1.]);
    let three = Tensor::new(&[3, 2], vec![1f32, 0., 0., 1., 2., 2.]);
    let (a1, b1) = (vec![-2f32, -2.], vec![-4f32, -4.]);
    let (a3, b3) = (vec![1f32, 2., 3., 4., 8., 12.], vec![2f32, 4., 6., 8., 16., 24.]);
    for kind in ENGINES {
        for optimize in [false, true] {
            let mut s = load(kind, &product(), optimize).unwrap();
            assert_eq!(
                (s.inputs(), s.outputs()),
                (&["x".to_string(), "w".into()][..], &["a".to_string(), "b".into()][..])
            );
            // More shapes than plans are kept, each twice.
            for rows in (1..=6).chain(1..=6) {
                let x = Tensor::new(&[rows, 2], vec![1f32; rows * 2]);
                let y = s.run(&[("x", &x), ("w", &w)], &["a"]).unwrap();
                assert_eq!(y, [Tensor::new(&[rows, 2], [4f32, 6.].repeat(rows))], "{kind:?}");
            }
            for _ in 0..2 {
                let y = s.run(&[("x", &one), ("w", &w)], &["b", "a", "b"]).unwrap();
                let wanted = [&b1, &a1, &b1].map(|v| Tensor::new(&[1, 2], v.clone()));
                assert_eq!(y, wanted, "{kind:?}");
                let y = s.run(&[("w", &w), ("x", &three)], &["a", "b"]).unwrap();
                assert_eq!(y, [&a3, &b3].map(|v| Tensor::new(&[3, 2], v.clone())), "{kind:?}");
            }
            assert_eq!(s.run(&[("x", &one), ("w", &w)], &[]).unwrap(), []);
        }
    }
}

#[test]
fn a_wrong_call_says_what_is_wrong() {
    let x = Tensor::new(&[1, 2], vec![1f32, 2.]);
    let wide = Tensor::new(&[1, 3], vec![1f32, 2., 3.]);
    let flat = Tensor::new(&[2], vec![1f32, 2.]);
    let whole = Tensor::new(&[1, 2], vec![1i64, 2]);
    let w = Tensor::new(&[2, 1], vec![1f32, 2.]);
    for kind in ENGINES {
        let mut s = load(kind, &product(), true).unwrap();
        let mut told = |inputs: &[(&str, &Tensor)], wanted: &[&str], words: &[&str]| {
            let error = s.run(inputs, wanted).unwrap_err().to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{kind:?}: {error}");
        };
        told(&[("x", &wide), ("w", &w)], &["a"], &["\"x\"", "[?, 2]", "[1, 3]"]);
        told(&[("x", &flat), ("w", &w)], &["a"], &["\"x\"", "[?, 2]", "[2]"]);
        told(&[("x", &whole), ("w", &w)], &["a"], &["\"x\"", "float32", "int64"]);
        told(&[("x", &x)], &["a"], &["\"w\"", "not given"]);
        told(&[("x", &x), ("w", &w), ("weight", &w)], &["a"], &["no input \"weight\"", "x, w"]);
        told(&[("x", &x), ("x", &x), ("w", &w)], &["a"], &["\"x\"", "twice"]);
        told(&[("x", &x), ("w", &w)], &["c"], &["no output \"c\"", "a, b"]);
        // And goes on after it.
        assert_eq!(s.run(&[("x", &x), ("w", &w)], &["a"]).unwrap(), [Tensor::new(&[1, 1], vec![5f32])]);
    }
}

#[test]
fn an_initializer_listed_as_input_is_a_default() {
    let mut model = product();
    let default = Tensor::new(&[2, 1], vec![1f32, 1.]);
    model.graph.as_mut().unwrap().initializer.push(default.to_proto("w"));
    let x = Tensor::new(&[1, 2], vec![3f32, 4.]);
    let other = Tensor::new(&[2, 1], vec![10f32, 1.]);
    for kind in ENGINES {
        let mut s = load(kind, &model, true).unwrap();
        assert_eq!(s.inputs(), ["x"]);
        for _ in 0..2 {
            assert_eq!(s.run(&[("x", &x)], &["a"]).unwrap(), [Tensor::new(&[1, 1], vec![7f32])], "{kind:?}");
            let y = s.run(&[("x", &x), ("w", &other)], &["a"]).unwrap();
            assert_eq!(y, [Tensor::new(&[1, 1], vec![34f32])], "{kind:?}");
        }
    }
}

#[test]
fn dimensions_computed_in_the_graph_come_out_as_int64() {
    let model = model(
        vec![node("Shape", &["x"], &["s"])],
        vec![value_info("x", DataType::Float, &["n", "2"])],
        vec![value_info("s", DataType::Int64, &["2"])],
    );
    for kind in ENGINES {
        let x = Tensor::new(&[3, 2], vec![0f32; 6]);
        let y = load(kind, &model, true).unwrap().run(&[("x", &x)], &["s"]).unwrap();
        assert_eq!(y, [Tensor::new(&[2], vec![3i64, 2])], "{kind:?}");
    }
}

/// Whatever a model holds, it is an error that names the node, never a panic.
#[test]
fn a_bad_model_is_an_error_that_names_the_node() {
    let x = || vec![value_info("x", DataType::Float, &["2"])];
    let y = || vec![value_info("y", DataType::Float, &["2"])];
    let input = Tensor::new(&[2], vec![1f32, 2.]);
    let no_inputs = NodeProto { name: Some("the_add".into()), ..node("Add", &[], &["y"]) };
    let unknown = NodeProto { name: Some("the_add".into()), ..node("Frobnicate", &["x"], &["y"]) };
    let foreign = NodeProto { domain: Some("my.domain".into()), ..unknown_as("Relu") };
    fn unknown_as(op: &str) -> NodeProto {
        NodeProto { name: Some("the_add".into()), ..node(op, &["x"], &["y"]) }
    }
    let pads = Tensor::new(&[2], vec![-1i64, 0]).to_proto("pads");
    for kind in ENGINES {
        let tried = |model: &ModelProto| {
            load(kind, model, true).and_then(|mut s| s.run(&[("x", &input)], &["y"])).map_err(|e| e.to_string())
        };
        for node in [&no_inputs, &unknown, &foreign] {
            let error = tried(&model(vec![node.clone()], x(), y())).unwrap_err();
            assert!(error.contains("the_add") || error.contains(node.op_type()), "{kind:?}: {error}");
        }
        // An output that nothing makes; no graph at all.
        assert!(tried(&model(vec![], x(), y())).unwrap_err().contains('y'));
        assert!(tried(&ModelProto::default()).is_err());
        // A value that is no tensor.
        let element = value_info("x", DataType::Float, &["2"]).r#type.unwrap_or_default();
        let kind_of =
            AttributeProto { name: Some("type".into()), tp: Some(element), r#type: Some(13), ..Default::default() };
        let nothing = NodeProto { attribute: vec![kind_of.clone()], ..node("Optional", &[], &["y"]) };
        let optional = type_proto::Optional { elem_type: kind_of.tp.clone().map(Box::new) };
        let mut y_is_optional = y();
        y_is_optional[0].r#type =
            Some(TypeProto { value: Some(type_proto::Value::OptionalType(Box::new(optional))), ..Default::default() });
        assert!(tried(&model(vec![nothing], x(), y_is_optional)).unwrap_err().contains('y'));
        // tract panics on negative pads.
        let mut crop =
            model(vec![node("Pad", &["x", "pads"], &["y"])], x(), vec![value_info("y", DataType::Float, &["1"])]);
        crop.graph.as_mut().unwrap().initializer.push(pads.clone());
        match tried(&crop) {
            Ok(y) => assert_eq!(y, [Tensor::new(&[1], vec![2f32])], "{kind:?}"),
            Err(error) => assert!(kind == EngineKind::Tract, "{error}"),
        }
    }
}

#[test]
fn a_model_above_protobufs_limit_is_told() {
    let mut model = product();
    // Zeroed pages are never touched: the length alone counts.
    let huge = TensorProto { raw_data: Some(vec![0u8; 1 << 31].into()), ..Tensor::scalar(0f32).to_proto("huge") };
    model.graph.as_mut().unwrap().initializer.push(huge);
    let error = load(EngineKind::OnnxRuntime, &model, true).map(|s| s.inputs().len()).unwrap_err().to_string();
    assert!(error.contains("2.1 GB") && error.contains("limit"), "{error}");
}

/// Models of six architectures from two exporters, against what PyTorch computed when they were exported.
#[test]
fn both_engines_agree_with_pytorch() {
    let tensor =
        |path: PathBuf| Tensor::from_proto(&TensorProto::decode(&*std::fs::read(path).unwrap()).unwrap()).unwrap();
    const TEXT: &[&str] = &["input_ids", "attention_mask"];
    for (file, reference, names) in [
        ("bert.ts17.onnx", "bert", TEXT),
        ("bert_ext.dyn18.onnx", "bert", TEXT),
        ("gpt2.ts17.onnx", "gpt2", TEXT),
        ("llama.dyn18.onnx", "llama", TEXT),
        ("vit.ts17.onnx", "vit", &["pixel_values"]),
        ("mlp2d.dyn23.onnx", "mlp2d", &["x"]),
        ("mlp3d.dyn18.onnx", "mlp3d", &["x"]),
    ] {
        let refs = shared("models/refs").join(reference);
        let given: Vec<Tensor> = names.iter().map(|name| tensor(refs.join(format!("in.{name}.pb")))).collect();
        let inputs: Vec<(&str, &Tensor)> = names.iter().copied().zip(&given).collect();
        let wanted = tensor(refs.join("out.0.pb"));
        let model = Model::open(shared("models").join(file)).unwrap().to_inline().unwrap();
        for (kind, optimize) in ENGINES.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let mut session = load(kind, &model, optimize).unwrap();
            let first = session.outputs()[0].clone();
            let outputs = session.run(&inputs, &[&first]).unwrap();
            assert_eq!(outputs[0].dims(), wanted.dims(), "{file} {kind:?}");
            let differences = outputs[0].to_f64().into_iter().zip(wanted.to_f64()).map(|(a, b)| (a - b).abs());
            let worst = differences.fold(0f64, |worst, d| if d > worst || d.is_nan() { d } else { worst });
            assert!(worst < 1e-5, "{file} {kind:?} optimize={optimize}: {worst:e}");
        }
    }
}

/// No silent fall-back: where CUDA cannot be had, opening fails and says why.
#[test]
fn cuda_fails_strictly_where_there_is_none() {
    let error = |kind| match open(kind, Device::Cuda(0)) {
        Err(e) => e.to_string(),
        Ok(engine) => {
            // A machine with a GPU: then it has to compute.
            let x = Tensor::new(&[2], vec![1f32, 2.]);
            let mut s = engine.load(&identity(DataType::Float, &["2"]), &LoadOptions::default()).unwrap();
            assert_eq!(s.run(&[("x", &x)], &["y"]).unwrap(), [x]);
            format!("CUDA {}", engine.describe())
        }
    };
    for kind in [EngineKind::OnnxRuntime, EngineKind::Auto] {
        let told = error(kind);
        assert!(told.contains("CUDA"), "{told}");
    }
    assert!(error(EngineKind::Tract).contains("onnxruntime"));
}

#[test]
fn auto_takes_tract_where_there_is_no_library_but_not_for_cuda() {
    let nowhere = Places::default();
    let open =
        |kind, device| open_in(&nowhere, kind, device, Arena::default()).map(|e| e.name()).map_err(|e| e.to_string());
    assert_eq!(open(EngineKind::Auto, Device::Cpu), Ok("tract"));
    assert!(open(EngineKind::OnnxRuntime, Device::Cpu).unwrap_err().contains("pip install onnxruntime"));
    assert!(open(EngineKind::Auto, Device::Cuda(0)).unwrap_err().contains("libonnxruntime"));
    // A path that was set by hand is never passed over.
    let explicit = Places { explicit: Some("/no/such/library.so".into()), ..Places::default() };
    let error =
        open_in(&explicit, EngineKind::Auto, Device::Cpu, Arena::default()).map(|e| e.name()).unwrap_err().to_string();
    assert!(error.contains("ORT_DYLIB_PATH=/no/such/library.so"), "{error}");
}

#[test]
fn names_are_read_as_they_are_shown() {
    assert_eq!("ort".parse::<EngineKind>().unwrap(), EngineKind::OnnxRuntime);
    assert!("tracts".parse::<EngineKind>().unwrap_err().to_string().contains("Did you mean tract?"));
    for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(3)] {
        assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
    }
    assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
    assert!("cuda:x".parse::<Device>().is_err() && "gpu".parse::<Device>().is_err());
}

#[test]
fn the_version_of_tract_is_that_of_the_lock_file() {
    let lock = include_str!("../../Cargo.lock");
    assert!(lock.contains(&format!("name = \"tract-onnx\"\nversion = \"{}\"\n", tract::VERSION)));
}

#[test]
fn large_weights_are_lent_wherever_they_stand_and_whatever_they_are() {
    let values: Vec<f32> = (0..512 * 256).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect();
    let x = Tensor::new(&[2, 512], (0..1024).map(|i| ((i * 7 % 13) as f32 - 6.0) / 8.0).collect());
    let w = Tensor::new(&[512, 256], values.clone());
    let stored = [
        w.clone(),
        Tensor::new(&[512, 256], values.iter().map(|v| f64::from(*v)).collect()),
        Tensor::new(&[512, 256], values.iter().map(|v| f16::from_f32(*v)).collect()),
        Tensor::new(&[512, 256], values.iter().map(|v| (*v * 64.0) as i8).collect()),
    ];
    for stored in &stored {
        // One byte off, as weights may stand in a model file; then a second copy of the model uses the same bytes.
        let mut bytes = vec![0u8];
        bytes.extend(stored.to_bytes());
        let mut tensor = stored.to_proto("w");
        tensor.raw_data = Some(bytes::Bytes::from(bytes).slice(1..));
        let (x_info, y_info) =
            (value_info("x", DataType::Float, &["n", "512"]), value_info("y", DataType::Float, &["n", "256"]));
        let mut cast = node("Cast", &["w"], &["f"]);
        cast.attribute = vec![AttributeProto::int("to", 1)];
        let mut model = model(vec![cast, node("MatMul", &["x", "f"], &["y"])], vec![x_info], vec![y_info]);
        model.graph.as_mut().unwrap().initializer.push(tensor);
        let mut results = Vec::new();
        for optimize in [false, true] {
            for kind in ENGINES {
                let mut session = load(kind, &model, optimize).unwrap();
                results.push(session.run(&[("x", &x)], &["y"]).unwrap().remove(0).to_f64());
            }
        }
        assert!(results[0].iter().any(|v| v.abs() > 1.0));
        for result in &results[1..] {
            let off = result.iter().zip(&results[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < 1e-3, "{:?}: off by {off}", stored.data_type());
        }
    }
}

#[test]
fn a_large_weight_that_nothing_uses_is_left_out() {
    let (x, y) = (value_info("x", DataType::Float, &["n"]), value_info("y", DataType::Float, &["n"]));
    let mut model = model(vec![node("Neg", &["x"], &["y"])], vec![x], vec![y]);
    model.graph.as_mut().unwrap().initializer.push(Tensor::new(&[1 << 15], vec![1f32; 1 << 15]).to_proto("w"));
    for kind in ENGINES {
        let mut session = load(kind, &model, true).unwrap();
        let got = session.run(&[("x", &Tensor::new(&[1], vec![2f32]))], &["y"]).unwrap();
        assert_eq!(got[0], Tensor::new(&[1], vec![-2f32]));
    }
}

#[test]
fn a_log_softmax_stays_finite_far_out_on_both_engines() {
    let x = Tensor::new(&[2, 3], vec![1000f32, 0.0, -1000.0, 1.0, 2.0, 3.0]);
    for (axis, opset) in [(-1, 17), (0, 17), (1, 18)] {
        let infos = ["x", "y"].map(|name| value_info(name, DataType::Float, &["n", "3"]));
        let [input, output] = infos;
        let mut op = node("LogSoftmax", &["x"], &["y"]);
        op.attribute = vec![AttributeProto::int("axis", axis)];
        let mut model = model(vec![op], vec![input], vec![output]);
        model.opset_import[0].version = Some(opset);
        let [a, b] = ENGINES.map(|kind| load(kind, &model, true).unwrap().run(&[("x", &x)], &["y"]).unwrap().remove(0));
        let off = a.to_f64().iter().zip(b.to_f64()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-4 && b.to_f64().iter().all(|v| v.is_finite()), "{axis}: {b:?}");
        assert_eq!(a.dims(), b.dims());
    }
}
