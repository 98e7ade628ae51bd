//! What came out: counts, what is open, the manifest, and the table in `docs/OPS.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use bone_onnx::autodiff::{Rule, Rules};
use bone_onnx::onnx::{GraphProto, ModelProto};

use super::check::{Kind, Outcome};

pub struct Row {
    pub outcome: Outcome,
    opset: i64,
    /// Domain and operator of each node, those of subgraphs included.
    ops: BTreeSet<(String, String)>,
}

impl Row {
    pub fn new(model: &ModelProto, outcome: Outcome) -> Self {
        let mut ops = BTreeSet::new();
        model.graph.iter().for_each(|g| collect(g, &mut ops));
        Self { outcome, opset: model.opset(), ops }
    }

    /// As the manifest has it: messages of the engine, which change with its version, are left out.
    pub fn line(&self) -> String {
        match self.outcome.kind {
            Kind::EngineCannot | Kind::NoTensors | Kind::Fail | Kind::NoRule => self.outcome.kind.text().to_string(),
            kind if self.outcome.detail.is_empty() => kind.text().to_string(),
            kind => format!("{}: {}", kind.text(), self.outcome.detail),
        }
    }
}

fn collect(graph: &GraphProto, ops: &mut BTreeSet<(String, String)>) {
    for node in &graph.node {
        let domain = if node.domain() == "ai.onnx" { "" } else { node.domain() };
        ops.insert((domain.to_string(), node.op_type().to_string()));
        node.attribute.iter().filter_map(|a| a.g.as_ref()).for_each(|g| collect(g, ops));
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn manifest() -> PathBuf {
    root().join("fixtures/node_tests/manifest.tsv")
}

/// Case to outcome, as committed.
pub fn recorded() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(manifest()).unwrap_or_default();
    text.lines().filter_map(|l| l.split_once('\t')).map(|(name, line)| (name.into(), line.into())).collect()
}

pub fn counts(rows: &BTreeMap<String, Row>) -> String {
    let count = |kind| rows.values().filter(|r| r.outcome.kind == kind).count();
    let relevant = rows.values().filter(|r| r.outcome.kind.counts()).count();
    let good = count(Kind::Pass) + count(Kind::Zero);
    let mut text = String::from("| outcome | cases |\n|---|---|\n");
    for kind in Kind::ALL {
        let _ = writeln!(text, "| {} | {} |", kind.text(), count(kind));
    }
    let _ = writeln!(text, "| all | {} |\n", rows.len());
    let _ = writeln!(
        text,
        "Of {relevant} cases that ONNX Runtime runs and that have a floating-point input and output, {good} pass or are a \
         checked zero."
    );
    text
}

/// All that is neither a pass nor a zero, the cases to be mended first.
pub fn open(rows: &BTreeMap<String, Row>) -> String {
    let mut text = String::new();
    for kind in [Kind::Fail, Kind::NoRule, Kind::NotDifferentiable, Kind::EngineCannot] {
        let _ = writeln!(text, "== {}", kind.text());
        for (name, row) in rows.iter().filter(|(_, r)| r.outcome.kind == kind) {
            let _ = writeln!(text, "{name}: {}", row.outcome.detail);
        }
    }
    text
}

fn put(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    std::fs::write(path, text).expect("a file");
}

/// Writes the manifest and `docs/OPS.md`.
pub fn write(rows: &BTreeMap<String, Row>) {
    let lines: String = rows.iter().map(|(name, row)| format!("{name}\t{}\n", row.line())).collect();
    put(&manifest(), &lines);
    put(&root().join("docs/OPS.md"), &table(rows));
}

fn table(rows: &BTreeMap<String, Row>) -> String {
    let mut text = String::from(
        "# Operators and their gradients\n\nMade by `scripts/node_tests.py --report` from the table of rules and a run of \
         the ONNX backend node tests\n(package onnx 1.23.2): each case's vector-Jacobian product against central \
         differences along random directions, in\nfloat64 where ONNX Runtime has the kernels, with its graph \
         optimizations off and on. A case that the engine does not take as it stands is declared as of an older\noperator \
         set, or run in float32 in place of its own type, where it takes that.\nDo not edit.\n\n",
    );
    text += &counts(rows);
    text += "\n## By operator\n\n\"Proven by\" counts the cases that hold the operator (alone, or in another operator's \
             function body) and pass or are\na checked zero, of those that the engine runs and that have a gradient; the \
             rules that no case reaches have cases in\n`tests/autodiff`.\n\n";
    text += "| domain | operator | gradient | opsets of the cases | proven by | such as |\n|---|---|---|---|---|---|\n";
    for (domain, op, rule) in Rules::standard().iter() {
        let key = (domain.to_string(), op.to_string());
        let with: Vec<(&String, &Row)> =
            rows.iter().filter(|(_, r)| r.outcome.kind.counts() && r.ops.contains(&key)).collect();
        let good = |row: &Row| matches!(row.outcome.kind, Kind::Pass | Kind::Zero);
        let how = match rule {
            Rule::Vjp(_) => "by rule".to_string(),
            Rule::Zero(why) => format!("zero: {why}"),
            Rule::Refused(why) => format!("refused: {why}"),
        };
        let opsets: BTreeSet<i64> = with.iter().map(|(_, r)| r.opset).collect();
        let opsets: Vec<String> = opsets.iter().map(i64::to_string).collect();
        let proven = match with.len() {
            0 => "-".to_string(),
            n => format!("{} of {n}", with.iter().filter(|(_, r)| good(r)).count()),
        };
        // The plainest proof: a passing case with the fewest other operators.
        let best = with.iter().filter(|(_, r)| good(r)).min_by_key(|(name, r)| (r.ops.len(), name.len(), *name));
        let best = best.map_or(String::new(), |(name, _)| format!("`{name}`"));
        let domain = if domain.is_empty() { "ai.onnx" } else { domain };
        let _ = writeln!(text, "| {domain} | {op} | {how} | {} | {proven} | {best} |", opsets.join(", "));
    }
    text += "\n## Cases that are not differentiated\n\n";
    for (name, row) in
        rows.iter().filter(|(_, r)| matches!(r.outcome.kind, Kind::NotDifferentiable | Kind::NoRule | Kind::Fail))
    {
        let _ = writeln!(text, "- `{name}`: {}: {}", row.outcome.kind.text(), row.outcome.detail);
    }
    text
}
