//! Models in ONNX Runtime, as the checks need them.

use std::sync::OnceLock;

use bone_onnx::engine::{Device, Engine, EngineKind, LoadOptions, Session, open};
use bone_onnx::onnx::proto::type_proto::Value;
use bone_onnx::onnx::{AttributeProto, ModelProto, Tensor};

use super::case::Feeds;

/// What a case is declared as where the engine does not take it as it stands: first the newest operator set that ONNX
/// Runtime 1.31 takes, then older ones, for new types often came without kernels.
pub const OLDER_OPSETS: [i64; 9] = [26, 24, 22, 21, 20, 18, 17, 16, 15];
const NEWEST_IR: i64 = 13;

fn engine() -> &'static dyn Engine {
    static ENGINE: OnceLock<Box<dyn Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| open(EngineKind::OnnxRuntime, Device::Cpu).expect("ONNX Runtime")).as_ref()
}

fn load(model: &ModelProto, optimize: bool) -> Result<Box<dyn Session>, String> {
    engine().load(model, &LoadOptions { threads: Some(1), optimize }).map_err(|e| e.to_string())
}

/// Runs one model; an operator that draws random numbers starts from its seed at every run.
pub struct Runner<'a> {
    model: &'a ModelProto,
    session: Box<dyn Session>,
    /// Whether every run has a session of its own.
    pub anew: bool,
    wanted: Vec<String>,
}

impl<'a> Runner<'a> {
    pub fn new(model: &'a ModelProto, optimize: bool, wanted: &[String]) -> Result<Self, String> {
        Ok(Self { model, session: load(model, optimize)?, anew: draws(model), wanted: wanted.to_vec() })
    }

    pub fn run(&mut self, feeds: &Feeds) -> Result<Vec<Tensor>, String> {
        if self.anew {
            self.session = load(self.model, false)?;
        }
        let wanted: Vec<&str> = self.wanted.iter().map(String::as_str).collect();
        let lent: Vec<(&str, &Tensor)> = feeds.iter().map(|(n, t)| (n.as_str(), t)).collect();
        self.session.run(&lent, &wanted).map_err(|e| e.to_string())
    }
}

const DRAWING: [&str; 5] = ["Dropout", "Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike"];

fn draws(model: &ModelProto) -> bool {
    model.graph.iter().flat_map(|g| &g.node).any(|n| DRAWING.iter().any(|op| n.is(op)))
}

/// Gives every operator that draws random numbers a seed, where it has none.
pub fn seed_draws(model: &mut ModelProto) {
    // Before operator set 12 a Dropout drew nothing in an inference, and had no seed.
    let old = model.opset() < 12;
    for node in model.graph.iter_mut().flat_map(|g| &mut g.node) {
        if DRAWING.iter().any(|op| node.is(op)) && node.attr("seed").is_none() && !(old && node.is("Dropout")) {
            let seed =
                if node.is("Dropout") { AttributeProto::int("seed", 5) } else { AttributeProto::float("seed", 5.0) };
            node.attribute.push(seed);
        }
    }
}

/// Takes back the sizes that a model declares for what Unique gives: they hold at its own input alone, where values are
/// equal, and not next to it.
pub fn open_counts(model: &mut ModelProto) {
    let Some(graph) = model.graph.as_mut().filter(|g| g.node.iter().any(|n| n.is("Unique"))) else { return };
    for output in &mut graph.output {
        if let Some(Value::TensorType(tensor)) = output.r#type.as_mut().and_then(|t| t.value.as_mut()) {
            tensor.shape.iter_mut().flat_map(|s| &mut s.dim).for_each(|dim| dim.value = None);
        }
    }
}

/// Declares a model that is newer than `opset` as of that; whether it was.
pub fn lower(model: &mut ModelProto, opset: i64) -> bool {
    model.ir_version = model.ir_version.map(|v| v.min(NEWEST_IR));
    let newer = model.opset() > opset;
    for import in model.opset_import.iter_mut().filter(|o| matches!(o.domain(), "" | "ai.onnx")) {
        import.version = import.version.map(|v| v.min(opset));
    }
    newer
}
