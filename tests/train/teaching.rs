//! What else a loss can be made of: a teacher's scores, a graph of one's own; and where its gradients end.

use std::path::{Path, PathBuf};

use bone_onnx::adapter::{BoneConfig, TargetModules};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, Model, ModelProto, NodeProto, Tensor, node, value_info};
use bone_onnx::train::{self, Loss, Plan, Progress, Summary, Teacher, TrainOptions};
use prost::Message;

use crate::common::{arrays, injected, mlp, onnxruntime, shared, write_arrays};

/// Class ids of 16 rows.
fn ids() -> Tensor {
    Tensor::new(&[16], (0..16).map(|i| i % 4).collect::<Vec<i64>>())
}

struct Case {
    dir: tempfile::TempDir,
    model: Model,
    options: TrainOptions,
}

impl Case {
    fn new(loss: Loss, labels: (&str, &Tensor)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.safetensors");
        let x = arrays(&shared("goldens/mlp/base.safetensors"))["x"].clone();
        write_arrays(&path, &[("x", &x), labels]);
        let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "all-linear", None);
        let out = dir.path().join("out");
        let options = TrainOptions {
            lr: 1e-2,
            shuffle: false,
            batch_size: Some(16),
            steps: Some(10),
            ..TrainOptions::new(out, path, loss)
        };
        Self { dir, model, options }
    }

    fn run(&self) -> Result<Summary, String> {
        train::run(&self.model, &self.options, onnxruntime(), &mut ()).map_err(|e| e.to_string())
    }

    fn refused(&self, words: &[&str]) {
        let complaint = self.run().unwrap_err();
        for word in words {
            assert!(complaint.contains(word), "{word:?} is missing in {complaint:?}");
        }
        assert!(!self.options.out.exists(), "{complaint}");
    }

    fn output(&self) -> String {
        self.model.graph().output[0].name().into()
    }
}

fn teacher(model: PathBuf) -> Option<Teacher> {
    Some(Teacher { model, output: None, temperature: 2.0, alpha: 0.0 })
}

#[test]
fn a_student_comes_to_say_what_its_teacher_says() {
    // The base teaches its own copy nothing.
    let mut case = Case::new(Loss::cross_entropy(), ("labels", &ids()));
    case.options.teacher = teacher(mlp("base_gemm.onnx"));
    let summary = case.run().unwrap();
    assert!(summary.steps[0].loss.abs() < 1e-6, "{}", summary.steps[0].loss);

    // What was trained on the labels teaches a fresh one.
    let mut taught = Case::new(Loss::cross_entropy(), ("labels", &ids()));
    taught.options.steps = Some(40);
    let trained = taught.run().unwrap().injected;
    taught.options.out = taught.dir.path().join("student");
    taught.options.teacher = teacher(trained);
    taught.options.eval_data = taught.options.data.clone();
    let summary = taught.run().unwrap();
    let (first, last) = (summary.steps[0].loss, summary.steps[39].loss);
    assert!(first > 1e-3 && last < 0.1 * first, "{first} → {last}");
    assert!(summary.evals[39].eval_loss < last);

    // Half of the labels' loss, half of the teacher's.
    let hard = Case::new(Loss::cross_entropy(), ("labels", &ids())).run().unwrap().steps[0].loss;
    taught.options.out = taught.dir.path().join("both");
    taught.options.teacher = taught.options.teacher.map(|t| Teacher { alpha: 0.5, ..t });
    let both = train::run(&taught.model, &taught.options, onnxruntime(), &mut ()).unwrap().steps[0].loss;
    assert!((both - (hard + first) / 2.0).abs() < 1e-5 * both, "{both} {hard} {first}");
}

#[test]
fn a_teacher_that_does_not_fit_is_refused() {
    let mut case = Case::new(Loss::cross_entropy(), ("labels", &ids()));
    case.options.teacher = teacher(shared("models/bert.ts17.onnx"));
    case.refused(&["bert.ts17.onnx", "input", "x"]);
    case.options.teacher = teacher(mlp("base_gemm.onnx")).map(|t| Teacher { output: Some("nothing".into()), ..t });
    case.refused(&["teacher-output", "\"nothing\"", &case.output()]);
    case.options.teacher = teacher(case.dir.path().join("none.onnx"));
    case.refused(&["none.onnx"]);
}

/// A loss of one node after `nodes`, at operator set 13.
fn loss(path: &Path, inputs: &[(&str, DataType, &[&str])], nodes: Vec<NodeProto>, dims: &[&str]) {
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { version: Some(13), ..Default::default() }],
        graph: Some(GraphProto {
            name: Some("loss".into()),
            node: nodes,
            input: inputs.iter().map(|(name, t, dims)| value_info(name, *t, dims)).collect(),
            output: vec![value_info("value", DataType::Float, dims)],
            ..Default::default()
        }),
        ..Default::default()
    };
    std::fs::write(path, model.encode_to_vec()).unwrap();
}

fn mean(of: &str) -> NodeProto {
    NodeProto { attribute: vec![AttributeProto::int("keepdims", 0)], ..node("ReduceMean", &[of], &["value"]) }
}

#[test]
fn a_loss_of_ones_own_trains_as_the_built_in_one() {
    let y = arrays(&shared("goldens/mlp/base.safetensors"))["y"].clone();
    let built_in = Case::new(Loss::Mse, ("labels", &y)).run().unwrap();
    let mut case = Case::new(Loss::Own, ("goal", &y));
    let (path, output) = (case.dir.path().join("loss.onnx"), case.output());
    let float = DataType::Float;
    let rows = ["n", "4"].as_slice();
    let difference = || node("Sub", &[&output, "goal"], &["d"]);
    loss(
        &path,
        &[(&output, float, rows), ("goal", float, rows)],
        vec![difference(), node("Mul", &["d", "d"], &["squares"]), mean("squares")],
        &[],
    );
    case.options.loss_model = Some(path.clone());
    case.options.eval_data = case.options.data.clone();
    let own = case.run().unwrap();
    for (own, built_in) in own.steps.iter().zip(&built_in.steps) {
        assert!((own.loss - built_in.loss).abs() <= 1e-6 * built_in.loss, "{own:?} {built_in:?}");
    }
    assert!(own.steps[9].loss < own.steps[0].loss && own.evals.len() == 10);

    std::fs::remove_dir_all(&case.options.out).unwrap();
    let pair = [(output.as_str(), float, rows), ("goal", float, rows)];
    loss(
        &path,
        &[(&output, float, rows), ("gaol", float, rows)],
        vec![node("Sub", &[&output, "gaol"], &["d"]), mean("d")],
        &[],
    );
    case.refused(&["\"gaol\"", "goal", "Did you mean goal"]);
    loss(&path, &[("goal", float, rows)], vec![mean("goal")], &[]);
    case.refused(&["loss.onnx", "named after an output", &output]);
    loss(&path, &pair, vec![node("Sub", &[&output, "goal"], &["value"])], rows);
    case.refused(&["loss.onnx", "value has 2 axes", "scalar"]);
    let odd = NodeProto { domain: Some("com.example".into()), ..node("Odd", &["d"], &["odd"]) };
    loss(&path, &pair, vec![difference(), odd, mean("odd")], &[]);
    case.refused(&["com.example.Odd"]);
    case.options.loss_model = None;
    case.refused(&["loss-model"]);
}

/// Remembers what a run is going to do.
#[derive(Default)]
struct Frozen(Vec<String>);

impl Progress for Frozen {
    fn started(&mut self, plan: &Plan) {
        self.0.clone_from(&plan.frozen);
    }
}

#[test]
fn what_lies_before_a_node_stays_as_it_is_and_the_rest_learns_as_if_it_were_alone() {
    let y = arrays(&shared("goldens/mlp/base.safetensors"))["y"].clone();
    let mut case = Case::new(Loss::Mse, ("labels", &y));
    let base = Model::open(mlp("base_gemm.onnx")).unwrap();
    let first = base.graph().node[0].name().to_string();
    case.options.freeze_until = Some(first.clone());
    let mut frozen = Frozen::default();
    let summary = train::run(&case.model, &case.options, onnxruntime(), &mut frozen).unwrap();
    assert_eq!(frozen.0.len(), 1, "{:?}", frozen.0);

    // The same with an adapter that is not trained on that layer.
    let dir = tempfile::tempdir().unwrap();
    let (early, late) = (dir.path().join("early.onnx"), dir.path().join("late.onnx"));
    let module = |parameter: &str| parameter.split(".miss_block").next().unwrap().to_string();
    let adapter = |base: &Model, name: &str, module: &str, path: &Path| {
        let config = BoneConfig { r: 4, target_modules: Some(TargetModules::parse(module)), ..Default::default() };
        let options = InjectOptions { adapter_name: name.into(), config, seed: 1, ..Default::default() };
        inject(base, &options).unwrap().write(base, path).unwrap();
        Model::open(path).unwrap()
    };
    let all: Vec<String> = case
        .model
        .graph()
        .initializer
        .iter()
        .map(|t| t.name())
        .filter(|n| n.contains("miss_block"))
        .map(module)
        .collect();
    let before = module(&frozen.0[0]);
    let after: Vec<String> = all.iter().filter(|m| **m != before).cloned().collect();
    assert!(!after.is_empty());
    let two = adapter(&adapter(&base, "early", &before, &early), "late", &after.join(","), &late);
    let options = TrainOptions {
        freeze_until: None,
        adapter_names: Some(vec!["late".into()]),
        out: dir.path().join("out"),
        ..case.options.clone()
    };
    let alone = train::run(&two, &options, onnxruntime(), &mut ()).unwrap();
    for (a, b) in summary.steps.iter().zip(&alone.steps) {
        assert!((a.loss - b.loss).abs() <= 1e-6 * b.loss && (a.grad_norm - b.grad_norm).abs() <= 1e-6 * b.grad_norm);
    }
    assert!(summary.steps[9].loss < summary.steps[0].loss);
    let value = |path: &Path, name: &str| {
        let model = Model::open(path).unwrap();
        let tensor = model.graph().initializer.iter().find(|t| t.name() == name).unwrap().clone();
        model.tensor(&tensor).unwrap()
    };
    assert!(value(&summary.injected, &frozen.0[0]).to_f64().iter().all(|v| *v == 0.0));
    // PEFT's form has both: what learned, and what stayed.
    let saved = arrays(&summary.adapter.join("adapter_model.safetensors"));
    assert_eq!(saved.len(), all.len());
    let learned = |t: &&Tensor| t.to_f64().iter().any(|v| *v != 0.0);
    assert_eq!(saved.values().filter(learned).count(), after.len());
    for module in &after {
        let a = value(&summary.injected, &format!("{module}.miss_block.default")).to_f64();
        let b = value(&alone.injected, &format!("{module}.miss_block.late")).to_f64();
        assert!(a.iter().any(|v| *v != 0.0) && a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6), "{module}");
    }

    std::fs::remove_dir_all(&case.options.out).unwrap();
    case.options.freeze_until = Some(format!("{first}x"));
    case.refused(&["freeze-until", "no node", &first]);
    let last = base.graph().node.last().unwrap().name().to_string();
    case.options.freeze_until = Some(last);
    case.refused(&["freeze-until", "nothing to train"]);
}
