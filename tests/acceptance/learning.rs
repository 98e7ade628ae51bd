//! What the rows that train share: subjects that learn, their data, a run.

use std::path::Path;

use bone_onnx::engine::LoadOptions;
use bone_onnx::onnx::{DataType, Model, Tensor};
use bone_onnx::train::{self, Loss, Summary, TrainOptions};
use safetensors::{Dtype, tensor::TensorView};

use crate::common::{Bench, KINDS, Subject, Variant, each, engine, mlps, transformers};

/// Runs `check` on the MLPs with the variants `chosen`, and on the goldens' BERT, Llama and GPT-2, whose inputs and
/// outputs have one row for a sample, with one of each arithmetic.
pub fn each_learner(chosen: &[Variant], check: impl Fn(&Subject, &Variant, &str)) {
    let with_rows = ["goldens/bert/base", "models/llama.ts17", "models/gpt2.ts17"];
    let transformers: Vec<Subject> = transformers().into_iter().filter(|s| with_rows.contains(&s.name)).collect();
    each(&mlps(), chosen, &check);
    each(&transformers, &KINDS, &check);
}

impl Subject {
    /// What the first output is to become: the base's with every number moved.
    pub fn goal(&self) -> Tensor {
        let value = &self.base()[0];
        let moved = value.to_f64().into_iter().enumerate().map(|(i, v)| v as f32 + if i % 2 == 0 { 0.3 } else { -0.2 });
        Tensor::new(value.dims(), moved.collect())
    }

    fn first_output(&self) -> String {
        Model::open(&self.path).expect("a model").graph().output[0].name().to_string()
    }
}

/// Writes a `.safetensors` file of these arrays.
pub fn write_arrays(path: &Path, arrays: &[(&str, &Tensor)]) {
    let bytes: Vec<Vec<u8>> = arrays.iter().map(|(_, t)| t.to_bytes()).collect();
    let views = arrays.iter().zip(&bytes).map(|((name, t), bytes)| {
        let dtype = match t.data_type() {
            DataType::Float => Dtype::F32,
            DataType::Float16 => Dtype::F16,
            DataType::Bfloat16 => Dtype::BF16,
            DataType::Int64 => Dtype::I64,
            other => panic!("{name} holds {other:?}"),
        };
        (*name, TensorView::new(dtype, t.dims().to_vec(), bytes).expect("a view"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("arrays")).expect("a file");
}

impl Bench {
    /// Options of a run over the subject's rows towards its goal: three steps of AdamW on the whole of them.
    pub fn options(&self, subject: &Subject) -> TrainOptions {
        let (data, goal) = (self.next().with_extension("safetensors"), subject.goal());
        let inputs = subject.inputs.iter().map(|(n, t)| (n.as_str(), t));
        write_arrays(&data, &inputs.chain([("goal", &goal)]).collect::<Vec<_>>());
        TrainOptions {
            labels: "goal".into(),
            output: Some(subject.first_output()),
            batch_size: Some(goal.dims()[0]),
            steps: Some(3),
            shuffle: false,
            load: LoadOptions { threads: Some(1), optimize: true },
            ..TrainOptions::new(self.next().with_extension("run"), data, Loss::Mse)
        }
    }

    pub fn train(&self, subject: &Subject, model: &Path, change: impl FnOnce(TrainOptions) -> TrainOptions) -> Summary {
        let model = Model::open(model).expect("a model");
        let options = change(self.options(subject));
        train::run(&model, &options, engine(), &mut ()).unwrap_or_else(|e| panic!("{}: {e}", subject.name))
    }
}
