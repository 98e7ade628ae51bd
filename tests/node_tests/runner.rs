//! Models in ONNX Runtime, as the checks need them.

use std::sync::OnceLock;

use bone_onnx::engine::{Device, Engine, EngineKind, LoadOptions, Session, open};
use bone_onnx::onnx::{AttributeProto, ModelProto, Tensor};

use super::case::Feeds;

/// The newest versions that ONNX Runtime 1.31 takes. Newer cases are run as if they were of these.
const NEWEST_OPSET: i64 = 26;
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
    for node in model.graph.iter_mut().flat_map(|g| &mut g.node) {
        if DRAWING.iter().any(|op| node.is(op)) && node.attr("seed").is_none() {
            let seed =
                if node.is("Dropout") { AttributeProto::int("seed", 5) } else { AttributeProto::float("seed", 5.0) };
            node.attribute.push(seed);
        }
    }
}

/// Declares a model that is too new for the engine as its newest.
pub fn lower(model: &mut ModelProto) {
    model.ir_version = model.ir_version.map(|v| v.min(NEWEST_IR));
    for import in model.opset_import.iter_mut().filter(|o| matches!(o.domain(), "" | "ai.onnx")) {
        import.version = import.version.map(|v| v.min(NEWEST_OPSET));
    }
}
