//! Distillation: a teacher's scores of the same batch as soft targets beside the labels (Hinton et al. 2015).

use std::collections::HashMap;
use std::path::PathBuf;

use super::merge::merge;
use crate::onnx::{Model, ModelProto, data_type_name};
use crate::train::data::Field;
use crate::train::loss::{Distilled, Pooling};
use crate::{Error, Result, did_you_mean};

/// Who teaches, and how much that counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Teacher {
    /// A model whose inputs are among the student's, by name.
    pub model: PathBuf,
    /// Its output with the scores; `None`: the one with the name of the student's, or its only one.
    pub output: Option<String>,
    /// Both models' scores are divided by it before their softmax.
    pub temperature: f64,
    /// The part of the labels' loss, from 0 to 1; the rest is `temperature`² times the divergence of the student's
    /// probabilities from the teacher's, mean over the rows whose label counts.
    pub alpha: f64,
}

/// A teacher that was read and fits.
pub(in crate::train) struct TeacherModel<'a> {
    options: &'a Teacher,
    proto: ModelProto,
    output: Field,
}

impl<'a> TeacherModel<'a> {
    /// # Errors
    /// An output or an input that is not there, classes that are not as many as those of the `student`'s output.
    pub fn open(options: &'a Teacher, inputs: &[Field], student: &Field) -> Result<Self> {
        let model = Model::open(&options.model)?;
        let bad = |what: String| Error::file(&options.model, what);
        let graph = model.graph();
        let names = || graph.output.iter().map(|o| o.name());
        let list = || names().collect::<Vec<_>>().join(", ");
        let wanted = options.output.as_deref();
        let same = names().find(|name| *name == student.name);
        let name = match (wanted.or(same), graph.output.as_slice()) {
            (Some(name), _) => name,
            (None, [only]) => only.name(),
            _ => return Err(bad(format!("it has several outputs ({}); choose one with --teacher-output", list()))),
        };
        let info = graph.output.iter().find(|o| o.name() == name).ok_or_else(|| {
            let near = did_you_mean(name, names());
            Error::config(format!("teacher-output {name:?} is no output of the teacher ({}).{near}", list()))
        })?;
        let output = Field::of(info);
        for input in Field::inputs(graph) {
            let Some(given) = inputs.iter().find(|own| own.name == input.name) else {
                let own: Vec<&str> = inputs.iter().map(|own| own.name.as_str()).collect();
                return Err(bad(format!(
                    "its input {} is none of the model's ({}); a teacher is given the student's inputs.{}",
                    input.name,
                    own.join(", "),
                    did_you_mean(&input.name, own.iter().copied())
                )));
            };
            if let (Some(want), Some(given)) = (input.data_type, given.data_type)
                && want != given
            {
                let (want, given) = (data_type_name(want), data_type_name(given));
                return Err(bad(format!("its input {} is {want}, and the model's is {given}", input.name)));
            }
        }
        if let (Some(a), Some(b)) = (output.classes(), student.classes())
            && a != b
        {
            return Err(bad(format!(
                "its output {name} scores {a} classes, and the model's output {} scores {b}",
                student.name
            )));
        }
        if let (Some(a), Some(b)) = (&output.dims, &student.dims)
            && a.len() != b.len()
        {
            return Err(bad(format!(
                "its output {name} has {} axes, and the model's output {} has {}",
                a.len(),
                student.name,
                b.len()
            )));
        }
        Ok(Self { options, proto: model.to_inline()?, output })
    }

    /// Puts the teacher behind `model`; the scores that it gives, pooled as the student's are.
    pub fn append(&self, model: &mut ModelProto, pooling: &Pooling) -> Result<Distilled> {
        let own = Field::inputs(self.proto.graph.as_ref().unwrap_or(&Default::default()));
        let bound: HashMap<String, String> = own.into_iter().map(|i| (i.name.clone(), i.name)).collect();
        let outputs = self.proto.graph.iter().flat_map(|g| &g.output).map(|o| o.name());
        let at = outputs.into_iter().position(|name| name == self.output.name).unwrap_or(0);
        let made = merge(model, self.proto.clone(), &self.options.model, "teacher", &bound)?;
        let name = made.get(at).cloned().unwrap_or_default();
        let mut scores = pooling.checked(&Field { name, ..self.output.clone() }, &[])?;
        pooling.append(model, &mut scores);
        let Teacher { temperature, alpha, .. } = *self.options;
        Ok(Distilled { scores, temperature, alpha })
    }
}
