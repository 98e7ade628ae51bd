//! Losses, optimizers and schedules against PyTorch's and transformers' (`fixtures/train/make.py` made the truth).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use prost::Message;

use super::data::{Field, read_arrays};
use super::loss::{self, Distance, Distilled, Loss, OwnLoss, Pooling};
use super::update::optimizer::{Group, Optimizer, Rule, Scale};
use super::update::schedule::{Schedule, Shape};
use crate::adapter::Pool;
use crate::autodiff::{self, Request, Seed};
use crate::engine::{self, Device, Engine, EngineKind, LoadOptions};
use crate::onnx::proto::OperatorSetIdProto;
use crate::onnx::{AttributeProto, DataType, GraphProto, ModelProto, NodeProto, Tensor, node, value_info};

const STEPS: usize = 50;
/// Learning rate of the schedules' goldens, and of the optimizers'.
const PEAK: f64 = 2e-3;
const LR: f64 = 0.01;

fn goldens(kind: &str) -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/train/goldens.safetensors");
    let all = read_arrays(&path).unwrap().into_iter();
    all.filter_map(|(name, tensor)| Some((name.strip_prefix(kind)?.strip_prefix('/')?.to_string(), tensor))).collect()
}

/// That a table of settings and the goldens speak of the same cases.
fn assert_same_cases<'a>(table: impl Iterator<Item = &'a str>, goldens: impl Iterator<Item = &'a str>) {
    assert_eq!(table.collect::<BTreeSet<_>>(), goldens.collect::<BTreeSet<_>>());
}

fn losses() -> Vec<(&'static str, Loss)> {
    let ranking = |scale, symmetric| Loss::MultipleNegativesRanking { scale, symmetric };
    let triplet = |margin, distance| Loss::Triplet { margin, distance };
    vec![
        ("cross_entropy", Loss::cross_entropy()),
        ("cross_entropy_smooth", Loss::CrossEntropy { label_smoothing: 0.1 }),
        ("cross_entropy_even", Loss::CrossEntropy { label_smoothing: 1.0 }),
        ("causal_lm", Loss::CausalLm { label_smoothing: 0.0 }),
        ("causal_lm_smooth", Loss::CausalLm { label_smoothing: 0.1 }),
        ("bce", Loss::BceWithLogits),
        ("mse", Loss::Mse),
        ("mae", Loss::Mae),
        ("huber", Loss::Huber { delta: 1.0 }),
        ("huber_near", Loss::Huber { delta: 0.25 }),
        ("huber_far", Loss::Huber { delta: 3.5 }),
        ("kl_div", Loss::KlDiv { temperature: 1.0 }),
        ("kl_div_warm", Loss::KlDiv { temperature: 2.5 }),
        ("cosine", Loss::CosineEmbedding),
        ("ranking", "multiple-negatives-ranking".parse().unwrap()),
        ("ranking_warm", ranking(1.5, false)),
        ("ranking_both", ranking(20.0, true)),
        ("ranking_mean", ranking(20.0, false)),
        ("ranking_cls", ranking(20.0, false)),
        ("triplet", "triplet".parse().unwrap()),
        ("triplet_wide", triplet(5.0, Distance::Euclidean)),
        ("triplet_manhattan", triplet(1.0, Distance::Manhattan)),
        ("triplet_cosine", triplet(0.5, Distance::Cosine)),
        ("ctc", "ctc".parse().unwrap()),
        ("ctc_last", Loss::Ctc { blank: 3, zero_infinity: true }),
        ("distil", Loss::cross_entropy()),
        ("distil_soft", Loss::cross_entropy()),
        ("distil_hard", Loss::cross_entropy()),
        ("distil_causal", Loss::CausalLm { label_smoothing: 0.0 }),
        ("distil_bce", Loss::BceWithLogits),
    ]
}

/// Value and gradient of the loss of a model that passes its input on, whose axes but the last are open.
fn value_and_gradient(engine: &dyn Engine, name: &str, loss: Loss, parts: &BTreeMap<&str, &Tensor>) -> (f64, Tensor) {
    let output = parts["output"];
    let rank = output.dims().len();
    let names: Vec<String> = (0..rank).map(|i| format!("d{i}")).collect();
    let last = output.dims()[rank - 1].to_string();
    let dims: Vec<&str> = names[..rank - 1].iter().map(String::as_str).chain([last.as_str()]).collect();
    let info = value_info("y", DataType::Float, &dims);
    let mut model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { version: Some(17), ..Default::default() }],
        graph: Some(GraphProto {
            name: Some("g".into()),
            node: vec![node("Identity", &["x"], &["y"])],
            input: vec![value_info("x", DataType::Float, &dims)],
            ..Default::default()
        }),
        ..Default::default()
    };
    if parts.contains_key("mask") {
        let mask = value_info("attention_mask", DataType::Int64, &dims[..2]);
        model.graph.as_mut().unwrap().input.push(mask);
    }
    // Temperature, and the labels' part.
    let (temperature, alpha) = match name {
        "distil_soft" => (4.0, 0.0),
        "distil_hard" => (1.0, 0.9),
        "distil_bce" => (3.0, 0.25),
        _ => (2.0, 0.5),
    };
    let teacher = parts.contains_key("teacher").then(|| {
        let scores = Field { name: "teacher".into(), ..Field::of(&info) };
        model.graph.as_mut().unwrap().input.push(scores.info());
        Distilled { scores, temperature, alpha }
    });
    let pool = match name {
        "ranking_mean" => Pool::Mean,
        "ranking_cls" => Pool::Cls,
        _ => Pool::None,
    };
    let pooling = Pooling { pool, mask: None };
    let mut scored = pooling.checked(&Field::of(&info), &[]).unwrap();
    let column = |t: super::data::Target| t.field(parts[t.name.as_str()].dims().len());
    let columns: Vec<Field> = loss.columns("labels", &scored).into_iter().map(column).collect();
    pooling.append(&mut model, &mut scored);
    let roles = parts.get("roles").map_or(1, |roles| roles.as_f64().unwrap() as usize);
    let names = loss::append(&mut model, loss, &scored, &columns, roles, teacher.as_ref()).unwrap();
    let request =
        Request { of: vec![(names.loss.clone(), Seed::One)], wrt: vec!["x".into()], input_dims: BTreeMap::new() };
    let gradient = autodiff::gradient(&model, &request).unwrap();
    let mut session = engine.load(&gradient.model, &LoadOptions { threads: Some(1), optimize: true }).unwrap();
    let wanted = [names.loss.as_str(), gradient.gradients[0].as_str()];
    let mut given = vec![("x", output)];
    given.extend(
        names.targets.iter().zip(&columns).map(|(input, column)| (input.as_str(), parts[column.name.as_str()])),
    );
    given.extend(parts.get("teacher").map(|scores| ("teacher", *scores)));
    given.extend(parts.get("mask").map(|mask| ("attention_mask", *mask)));
    let mut got = session.run(&given, &wanted).unwrap();
    let by_x = got.pop().unwrap();
    (got[0].as_f64().unwrap(), by_x)
}

#[test]
fn every_loss_and_its_gradient_is_pytorchs_on_both_engines() {
    let (table, goldens) = (losses(), goldens("loss"));
    let cases: BTreeSet<&str> = goldens.keys().map(|k| k.rsplit_once('/').unwrap().0).collect();
    assert_same_cases(table.iter().map(|t| t.0), cases.iter().map(|c| c.split_once('/').unwrap().0));
    let settings: BTreeMap<&str, Loss> = table.into_iter().collect();
    let mut wrong = Vec::new();
    for kind in [EngineKind::OnnxRuntime, EngineKind::Tract] {
        let engine = engine::open(kind, Device::Cpu).unwrap();
        for case in &cases {
            let part = |name: &str| &goldens[&format!("{case}/{name}")];
            let parts =
                goldens.iter().filter_map(|(key, tensor)| Some((key.strip_prefix(case)?.strip_prefix('/')?, tensor)));
            let name = case.split_once('/').unwrap().0;
            let loss = settings[name];
            let (value, gradient) = value_and_gradient(engine.as_ref(), name, loss, &parts.collect());
            let what = format!("{} of {}", case, engine.name());
            let want = part("loss").as_f64().unwrap();
            if value.is_nan() || (value - want).abs() > 1e-5 * want.abs() {
                wrong.push(format!("{what}: {value} is not {want}"));
            }
            assert_eq!(gradient.dims(), part("grad").dims(), "{what}");
            let (got, want) = (gradient.to_f64(), part("grad").to_f64());
            let largest = want.iter().fold(0.0, |a: f64, w| a.max(w.abs()));
            let close = got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-5 * largest);
            // What pulls on nothing there pulls on nothing here (a sigmoid is right to about 1e-7, no better).
            let exact = loss != Loss::BceWithLogits;
            let leaks = exact && got.iter().zip(&want).any(|(g, w)| *w == 0.0 && g.abs() > 1e-7 * largest);
            if !close || leaks {
                wrong.push(format!("{what}: gradient {got:?} is not {want:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_optimizer_is_pytorchs_over_50_steps() {
    let betas = (0.9, 0.999);
    let sgd = |momentum, nesterov| Rule::Sgd { momentum, nesterov };
    let table = [
        ("adamw", Rule::AdamW { betas, eps: 1e-8 }, 0.0),
        ("adamw_decay", Rule::AdamW { betas, eps: 1e-8 }, 0.1),
        ("adamw_betas", Rule::AdamW { betas: (0.8, 0.95), eps: 1e-3 }, 0.1),
        ("adam", Rule::Adam { betas, eps: 1e-8 }, 0.0),
        ("adam_decay", Rule::Adam { betas, eps: 1e-8 }, 0.1),
        ("sgd", sgd(0.0, false), 0.0),
        ("sgd_decay", sgd(0.0, false), 0.1),
        ("momentum", sgd(0.9, false), 0.0),
        ("momentum_decay", sgd(0.5, false), 0.1),
        ("nesterov", sgd(0.9, true), 0.0),
        ("nesterov_decay", sgd(0.9, true), 0.1),
        ("lion", Rule::Lion { betas: (0.9, 0.99) }, 0.0),
        ("lion_decay", Rule::Lion { betas: (0.95, 0.98) }, 0.1),
    ];
    let goldens = goldens("optimizer");
    let given = ["start", "gradients"];
    assert_same_cases(table.iter().map(|t| t.0).chain(given), goldens.keys().map(String::as_str));
    for (case, rule, weight_decay) in table {
        let mut values = goldens["start"].values::<f32>().unwrap().to_vec();
        let count = values.len();
        let gradients = goldens["gradients"].values::<f32>().unwrap().chunks(count);
        let trace = goldens[case].values::<f32>().unwrap().chunks(count);
        assert_eq!((gradients.len(), trace.len()), (STEPS, STEPS));
        let mut optimizer = Optimizer::new(rule, [(count, Group { lr: LR * 2.0, weight_decay })]);
        for (step, (gradient, want)) in gradients.zip(trace).enumerate() {
            // The schedule's factor makes half of the group's rate of it, clipping a quarter of four times the gradient.
            let gradient: Vec<f32> = gradient.iter().map(|g| g * 4.0).collect();
            optimizer.step([(values.as_mut_slice(), gradient.as_slice())], Scale { lr: 0.5, gradient: 0.25 });
            for (got, want) in values.iter().zip(want) {
                let off = f64::from((got - want).abs());
                assert!(off <= 1e-6 * f64::from(want.abs()).max(1.0), "{case}, step {step}: {got} is not {want}");
            }
        }
    }
}

#[test]
fn every_schedule_is_transformers_over_50_updates() {
    let polynomial = |power, lr_end| Shape::Polynomial { power, lr_end };
    let table: [(&str, Shape, usize, usize); 13] = [
        ("constant", Shape::Constant, 0, STEPS),
        ("constant_warm", "constant_with_warmup".parse().unwrap(), 7, STEPS),
        ("linear", Shape::Linear, 0, STEPS),
        ("linear_warm", Shape::Linear, 7, STEPS),
        ("linear_past", Shape::Linear, 3, 40),
        ("cosine", Shape::Cosine, 0, STEPS),
        ("cosine_warm", Shape::Cosine, 7, STEPS),
        ("restarts", "cosine_with_restarts".parse().unwrap(), 0, STEPS),
        ("restarts_3", Shape::CosineWithRestarts { cycles: 3 }, 5, STEPS),
        ("restarts_past", Shape::CosineWithRestarts { cycles: 2 }, 4, 40),
        ("polynomial", "polynomial".parse().unwrap(), 0, STEPS),
        ("polynomial_2", polynomial(2.0, 1e-4), 6, STEPS),
        ("polynomial_past", polynomial(0.5, 5e-4), 3, 40),
    ];
    let goldens = goldens("schedule");
    assert_same_cases(table.iter().map(|t| t.0), goldens.keys().map(String::as_str));
    for (case, shape, warmup, total) in table {
        let schedule = Schedule { shape, peak: PEAK, warmup, total };
        let want = goldens[case].to_f64();
        assert_eq!(want.len(), STEPS);
        for (step, want) in want.iter().enumerate() {
            let got = PEAK * schedule.factor(step);
            assert!((got - want).abs() <= 1e-12 * PEAK, "{case}, update {step}: {got} is not {want}");
        }
    }
}

/// A model that passes `y` on, and what is known of that.
fn passing(output: &Tensor) -> (ModelProto, Field) {
    let rank = output.dims().len();
    let names: Vec<String> = (0..rank).map(|i| format!("d{i}")).collect();
    let last = output.dims()[rank - 1].to_string();
    let dims: Vec<&str> = names[..rank - 1].iter().map(String::as_str).chain([last.as_str()]).collect();
    let [x, y] = ["x", "y"].map(|name| value_info(name, DataType::Float, &dims));
    let field = Field::of(&y);
    let (node, input, output) = (vec![node("Identity", &["x"], &["y"])], vec![x], vec![y]);
    (model(17, GraphProto { name: Some("g".into()), node, input, output, ..Default::default() }), field)
}

fn model(opset: i64, graph: GraphProto) -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { version: Some(opset), ..Default::default() }],
        graph: Some(graph),
        ..Default::default()
    }
}

#[test]
fn losses_of_ones_own_are_the_built_in_ones_and_pytorchs() {
    let number = |name: &str, dims: &[&str]| value_info(name, DataType::Float, dims);
    let mse = GraphProto {
        name: Some("mse".into()),
        node: vec![
            node("Sub", &["y", "goal"], &["x"]),
            node("Mul", &["x", "x"], &["squares"]),
            NodeProto {
                attribute: vec![AttributeProto::int("keepdims", 0)],
                ..node("ReduceMean", &["squares"], &["loss"])
            },
        ],
        input: vec![number("goal", &["a", "b", "c"]), number("y", &["a", "b", "c"])],
        output: vec![number("loss", &[])],
        ..Default::default()
    };
    let cross_entropy = GraphProto {
        name: Some("ce".into()),
        node: vec![
            node("LogSoftmax", &["y"], &["x"]),
            node("Unsqueeze", &["labels", "last"], &["column"]),
            NodeProto {
                attribute: vec![AttributeProto::int("axis", -1)],
                ..node("GatherElements", &["x", "column"], &["picked"])
            },
            NodeProto {
                attribute: vec![AttributeProto::int("keepdims", 0)],
                ..node("ReduceMean", &["picked"], &["mean"])
            },
            node("Neg", &["mean"], &["loss"]),
        ],
        input: vec![number("y", &["n", "c"]), value_info("labels", DataType::Int64, &["n"])],
        output: vec![number("loss", &[])],
        initializer: vec![Tensor::new(&[1], vec![-1i64]).to_proto("last")],
        ..Default::default()
    };
    let goldens = goldens("loss");
    let dir = tempfile::tempdir().unwrap();
    for (case, opset, graph, column) in [
        ("mse/cube", 13, mse.clone(), "goal"),
        ("mse/cube", 18, mse, "goal"),
        ("cross_entropy/rows", 14, cross_entropy, "labels"),
    ] {
        let part = |name: &str| &goldens[&format!("{case}/{name}")];
        let path = dir.path().join("loss.onnx");
        std::fs::write(&path, model(opset, graph).encode_to_vec()).unwrap();
        let (mut passing, output) = passing(part("output"));
        let own = OwnLoss::open(&path, passing.graph.as_ref().unwrap()).unwrap();
        assert_eq!(own.output(), Some("y"));
        let columns = own.columns(passing.graph.as_ref().unwrap());
        assert_eq!(columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), [column]);
        let columns: Vec<Field> = columns.iter().map(|c| c.field(part("labels").dims().len())).collect();
        let names = own.append(&mut passing, ("y", &output), &columns).unwrap();
        let request =
            Request { of: vec![(names.loss.clone(), Seed::One)], wrt: vec!["x".into()], input_dims: BTreeMap::new() };
        let gradient = autodiff::gradient(&passing, &request).unwrap();
        for kind in [EngineKind::OnnxRuntime, EngineKind::Tract] {
            let engine = engine::open(kind, Device::Cpu).unwrap();
            let mut session = engine.load(&gradient.model, &LoadOptions { threads: Some(1), optimize: true }).unwrap();
            let wanted = [names.loss.as_str(), gradient.gradients[0].as_str()];
            let given = [("x", part("output")), (&names.targets[0], part("labels"))];
            let got = session.run(&given, &wanted).unwrap();
            let want = part("loss").as_f64().unwrap();
            let value = got[0].as_f64().unwrap();
            assert!((value - want).abs() <= 1e-5 * want.abs(), "{case}: {value} is not {want}");
            let want = part("grad").to_f64();
            let largest = want.iter().fold(0.0, |a: f64, w| a.max(w.abs()));
            assert!(got[1].to_f64().iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-5 * largest), "{case}");
        }
    }
}
