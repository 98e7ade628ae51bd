//! `inspect`: linear layers with module paths, adapters, inputs and outputs.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::adapter::describe;
use super::printer::Printer;
use crate::Result;
use crate::inject::check_shared;
use crate::inline::Layers;
use crate::onnx::proto::tensor_shape_proto::dimension::Value as DimValue;
use crate::onnx::{DataType, Model, Scope, ValueInfoProto, data_type_name};
use crate::select::{Linear, NameRule};

/// Show a model's linear layers, adapters, inputs and outputs
#[derive(clap::Args)]
pub struct Args {
    /// The ONNX file
    model: PathBuf,

    /// Read the files that hold its external data in full: are they all there, and what their checksums (and the record
    /// of `inject --share-data`) say? Without this, no weight is read
    #[arg(long)]
    check_data: bool,
}

#[derive(Serialize)]
struct Report {
    linears: Vec<Layer>,
    adapters: Vec<Value>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    opset: Map<String, Value>,
}

#[derive(Serialize)]
struct Layer {
    module: Option<String>,
    node: String,
    op: String,
    graph: String,
    weight: String,
    in_features: usize,
    out_features: usize,
    dtype: &'static str,
    /// How the weight is quantised, where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    quantized: Option<String>,
    /// Operators between a weight of floats and the product that convert, scale or move it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    behind: Vec<String>,
    /// Which rule found the module path, and how sure that is.
    named_by: NameRule,
    confidence: &'static str,
    /// The packed layer of which this is a part, and its first output there.
    #[serde(skip_serializing_if = "Option::is_none")]
    part_of: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_output: Option<usize>,
    /// The model-local function whose call has the layer inside.
    #[serde(skip_serializing_if = "Option::is_none")]
    function: Option<String>,
    /// Why the layer cannot be adapted, where it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_adaptable: Option<String>,
}

#[derive(Serialize)]
struct Port {
    name: String,
    dtype: String,
    shape: Option<Vec<Value>>,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let layers = Layers::of(&model)?;
    if args.check_data {
        let files = model.check_data()?;
        layers.record.iter().try_for_each(|record| check_shared(&model, record, true))?;
        printer.say(format!("{files} data files are as the model says"));
    }
    let graph = model.graph();
    let report = Report {
        linears: layers.linears.iter().map(|l| describe_layer(&layers, layers.model(&model), l)).collect(),
        adapters: layers.record.iter().flat_map(|r| r.adapters.iter().map(|a| describe(r, a, &model))).collect(),
        inputs: graph
            .input
            .iter()
            .filter(|i| !graph.initializer.iter().any(|t| t.name() == i.name()))
            .map(port)
            .collect(),
        outputs: graph.output.iter().map(port).collect(),
        opset: model
            .proto
            .opset_import
            .iter()
            .map(|o| (if o.domain().is_empty() { "ai.onnx" } else { o.domain() }.to_string(), json!(o.version())))
            .collect(),
    };
    printer.result(&report, |p| print(&report, p));
    Ok(())
}

fn describe_layer(layers: &Layers, model: &Model, l: &Linear) -> Layer {
    Layer {
        module: l.module.clone(),
        graph: graph_path(model, &l.scope),
        node: l.node_name.clone(),
        op: l.op.clone(),
        weight: l.weight.name.clone(),
        in_features: l.in_features,
        out_features: l.out_features,
        dtype: data_type_name(l.data_type),
        quantized: l.quantized.as_ref().map(|q| q.describe()),
        behind: match l.weight.is_read_as_stored() || l.quantized.is_some() {
            true => Vec::new(),
            false => l.weight.via.iter().map(|step| step.op.clone()).filter(|op| op != "Identity").collect(),
        },
        named_by: l.rule,
        confidence: l.rule.confidence(),
        part_of: l.part.as_ref().map(|p| p.of.clone()),
        first_output: l.part.as_ref().map(|p| p.start),
        function: layers.function(l).map(str::to_string),
        not_adaptable: l.adaptable.as_ref().err().cloned(),
    }
}

/// `main`, or the way down: node and attribute at each level.
fn graph_path(model: &Model, scope: &Scope) -> String {
    let mut path = String::from("main");
    let mut graph = Some(model.graph());
    for (node, attribute) in scope {
        let inner = graph.and_then(|g| g.node.get(*node)).map(|n| (n, n.attribute.get(*attribute)));
        if let Some((node, Some(attribute))) = inner {
            path = format!("{path}/{}.{}", node.name(), attribute.name());
            graph = attribute.g.as_ref();
        }
    }
    path
}

fn print(report: &Report, p: &Printer) {
    let ports = |ports: &[Port]| {
        let text = |port: &Port| {
            let shape = port.shape.as_ref().map(|s| {
                let dims: Vec<String> = s.iter().map(|d| d.as_str().map_or(d.to_string(), str::to_string)).collect();
                format!("[{}]", dims.join(", "))
            });
            format!("{} {}{}", port.name, port.dtype, shape.unwrap_or_default())
        };
        ports.iter().map(text).collect::<Vec<_>>().join("; ")
    };
    p.line(&format!("inputs   {}", ports(&report.inputs)));
    p.line(&format!("outputs  {}", ports(&report.outputs)));
    let opsets: Vec<String> = report.opset.iter().map(|(domain, version)| format!("{domain} {version}")).collect();
    p.line(&format!("opset    {}", opsets.join(", ")));
    for adapter in &report.adapters {
        p.line(&format!(
            "adapter  {} ({}{}) r={} on {} layers, {} parameters",
            adapter["name"].as_str().unwrap_or("?"),
            adapter["variant"].as_str().unwrap_or("?"),
            if adapter["active"].is_null() { ", not active" } else { "" },
            adapter["r"],
            adapter["layers"],
            adapter["parameters"]
        ));
    }
    p.line("");
    let rows = report.linears.iter().map(|l| {
        vec![
            l.module.clone().unwrap_or_else(|| "-".into()),
            match l.confidence {
                "none" => "-".into(),
                sure => format!("{sure}: {}", l.named_by.clue()),
            },
            l.op.clone(),
            format!("{} → {}", l.in_features, l.out_features),
            match (&l.quantized, l.behind.as_slice()) {
                (Some(how), _) => how.clone(),
                (None, []) => l.dtype.into(),
                (None, ops) => format!("{} ({})", l.dtype, ops.join(", ")),
            },
            l.weight.clone(),
            l.node.clone(),
            remark(l),
        ]
    });
    p.table(&["module", "name", "op", "in → out", "dtype", "weight", "node", ""], rows.collect());
    p.line("");
    let parts = report.linears.iter().filter(|l| l.part_of.is_some()).count();
    p.line(&match parts {
        0 => format!("{} linear layers", report.linears.len()),
        _ => format!("{} linear layers, and {parts} parts of them", report.linears.len() - parts),
    });
}

fn remark(l: &Layer) -> String {
    let mut remarks = Vec::new();
    remarks.extend(l.function.as_ref().map(|f| format!("in a call of {f}")));
    remarks.extend(l.part_of.as_ref().map(|whole| match l.not_adaptable {
        None => {
            let first = l.first_output.unwrap_or(0);
            format!("outputs {first} to {} of {whole}", first + l.out_features)
        }
        Some(_) => format!("part of {whole}"),
    }));
    remarks.extend(l.not_adaptable.clone());
    remarks.join("; ")
}

fn port(info: &ValueInfoProto) -> Port {
    let tensor = info.tensor();
    let data_type = tensor.and_then(|t| DataType::try_from(t.elem_type()).ok());
    Port {
        name: info.name().into(),
        dtype: data_type.map_or("?", data_type_name).into(),
        shape: tensor.and_then(|t| t.shape.as_ref()).map(|shape| {
            let dim = |value: &Option<DimValue>| match value {
                Some(DimValue::DimValue(n)) => json!(n),
                Some(DimValue::DimParam(name)) => json!(name),
                None => json!("?"),
            };
            shape.dim.iter().map(|d| dim(&d.value)).collect()
        }),
    }
}
