//! The optimizer as a graph, for parameters that stay on a device: the formulas of `optimizer.rs`, operator by operator
//! in the same order, over the vectors of `flat.rs`. What changes from step to step (learning rates, bias corrections)
//! comes as one small input, computed on the host in f64.

use super::flat::Flat;
use super::optimizer::Rule;
use crate::onnx::proto::OperatorSetIdProto;
use crate::onnx::{AttributeProto, DataType, GraphProto, ModelProto, Names, NodeProto, Tensor, node, value_info};
use crate::train::loss::nodes::Nodes;

/// Input: [`rates`] as a vector.
pub(in crate::train) const RATES: &str = "rates";
/// Output: the gradients' norm, and a number that is 0 where every updated value is finite.
pub(in crate::train) const REPORT: &str = "report";
/// Input of [`sum_model`]: what a batch counts for.
pub(in crate::train) const SHARE: &str = "share";

/// What there is of each group: inputs, and outputs where `.new` is appended.
pub(in crate::train) fn value(group: usize, kind: &str) -> String {
    format!("{kind}.{group}")
}

/// The numbers of update number `updates` (from 1) at `factor` of the learning rates; gradients are multiplied by
/// `unscale` first.
pub(in crate::train) fn rates(rule: Rule, flats: &[Flat], updates: i32, factor: f64, unscale: f32) -> Tensor {
    let groups = flats.iter().map(|flat| rule.rates(flat.group, updates, factor));
    let mut numbers = vec![unscale, 1.0];
    for rates in groups {
        // The same for all of them.
        numbers[1] = rates.root;
        numbers.extend([rates.keep, rates.size]);
    }
    Tensor::new(&[numbers.len()], numbers)
}

/// The update of all `flats` by `rule`, with the gradients clipped to `max_norm`. `scaled`: they come multiplied by a
/// loss scale.
pub(in crate::train) fn update_model(rule: Rule, flats: &[Flat], max_norm: Option<f64>, scaled: bool) -> ModelProto {
    let mut graph = GraphProto { name: Some("update".into()), ..Default::default() };
    let mut names = Names::default();
    let (has_mean, has_square) = rule.moments();
    let numbers = 2 + 2 * flats.len();
    graph.input.push(value_info(RATES, DataType::Float, &[&numbers.to_string()]));
    graph.output.push(value_info(REPORT, DataType::Double, &["2"]));
    for (i, flat) in flats.iter().enumerate() {
        let len = flat.len.to_string();
        let moments = [("mean", has_mean), ("square", has_square)].into_iter().filter(|(_, kept)| *kept);
        for kind in ["values"].into_iter().chain(moments.map(|(kind, _)| kind)) {
            let name = value(i, kind);
            graph.input.push(value_info(&name, DataType::Float, &[&len]));
            graph.output.push(value_info(&format!("{name}.new"), DataType::Float, &[&len]));
        }
        graph.input.push(value_info(&value(i, "gradient"), DataType::Float, &[&len]));
    }
    names.take(graph.input.iter().chain(&graph.output).map(|v| v.name()).collect::<Vec<_>>());

    let parts: Vec<String> = (0..numbers).map(|i| format!("{RATES}.{i}")).collect();
    names.take(parts.iter().map(String::as_str));
    graph.initializer.push(Tensor::new(&[numbers], vec![1i64; numbers]).to_proto("ones"));
    names.take(["ones"]);
    graph.node.push(NodeProto { output: parts.clone(), ..node("Split", &[RATES, "ones"], &[&parts[0]]) });

    let mut n = Nodes::new(&mut graph, &mut names, "update");
    let gradients: Vec<String> = (0..flats.len())
        .map(|i| {
            let gradient = value(i, "gradient");
            if scaled { n.op("Mul", &[&gradient, &parts[0]]) } else { gradient }
        })
        .collect();
    let squares: Vec<String> = gradients
        .iter()
        .map(|g| {
            let wide = n.cast(g, DataType::Double);
            n.op_with("ReduceSumSquare", &[&wide], Some(AttributeProto::int("keepdims", 0)))
        })
        .collect();
    let all = total(&mut n, &squares);
    let norm = n.op("Sqrt", &[&all]);
    let clip = max_norm.map(|max| {
        let [max, tiny, one] = [max, 1e-6, 1.0].map(|v| n.constant(Tensor::scalar(v)));
        let divisor = n.op("Add", &[&norm, &tiny]);
        let ratio = n.op("Div", &[&max, &divisor]);
        let least = n.op("Min", &[&ratio, &one]);
        n.float(&least)
    });

    let mut checks = Vec::new();
    for (i, (flat, gradient)) in flats.iter().zip(&gradients).enumerate() {
        let gradient = match &clip {
            Some(clip) => n.op("Mul", &[gradient, clip]),
            None => gradient.clone(),
        };
        let group = Vectors {
            values: &value(i, "values"),
            gradient: &gradient,
            mean: &value(i, "mean"),
            square: &value(i, "square"),
            root: &parts[1],
            keep: &parts[2 + 2 * i],
            size: &parts[3 + 2 * i],
            weight_decay: flat.group.weight_decay,
        };
        let made = group.update(&mut n, rule);
        // Nothing but NaN and the infinities is not 0 when multiplied by 0.
        let zero = n.number(0.0);
        let zeros = n.op("Mul", &[&made.values, &zero]);
        let check = n.sum(&zeros);
        checks.push(n.cast(&check, DataType::Double));
        let outputs = [("values", Some(made.values)), ("mean", made.mean), ("square", made.square)];
        for (kind, new) in outputs {
            if let Some(new) = new {
                n.rename(&new, &format!("{}.new", value(i, kind)));
            }
        }
    }
    let check = total(&mut n, &checks);
    let row = n.integers(&[1]);
    let both = [norm, check].map(|v| n.op("Reshape", &[&v, &row]));
    let report = n.op_with("Concat", &[&both[0], &both[1]], Some(AttributeProto::int("axis", 0)));
    n.rename(&report, REPORT);
    model(graph)
}

fn total(n: &mut Nodes, values: &[String]) -> String {
    let values: Vec<&str> = values.iter().map(String::as_str).collect();
    n.op("Sum", &values)
}

/// Values by name of one group in the graph.
struct Vectors<'a> {
    values: &'a str,
    /// Clipped.
    gradient: &'a str,
    mean: &'a str,
    square: &'a str,
    root: &'a str,
    keep: &'a str,
    size: &'a str,
    weight_decay: f64,
}

/// What they become.
struct Updated {
    values: String,
    mean: Option<String>,
    square: Option<String>,
}

impl Vectors<'_> {
    fn update(&self, n: &mut Nodes, rule: Rule) -> Updated {
        match rule {
            Rule::AdamW { betas: (beta1, beta2), eps } | Rule::Adam { betas: (beta1, beta2), eps } => {
                let g = match rule {
                    Rule::Adam { .. } => self.decayed(n),
                    _ => self.gradient.to_string(),
                };
                let off = n.op("Sub", &[&g, self.mean]);
                let step = n.times(&off, 1.0 - beta1);
                let mean = n.op("Add", &[self.mean, &step]);
                let kept = n.times(self.square, beta2);
                let rated = n.times(&g, 1.0 - beta2);
                let squared = n.op("Mul", &[&rated, &g]);
                let square = n.op("Add", &[&kept, &squared]);
                let root = n.op("Sqrt", &[&square]);
                let corrected = n.op("Div", &[&root, self.root]);
                let eps = n.number(eps);
                let divisor = n.op("Add", &[&corrected, &eps]);
                let sized = n.op("Mul", &[&mean, self.size]);
                let step = n.op("Div", &[&sized, &divisor]);
                let kept = match rule {
                    Rule::Adam { .. } => self.values.to_string(),
                    _ => n.op("Mul", &[self.values, self.keep]),
                };
                Updated { values: n.op("Sub", &[&kept, &step]), mean: Some(mean), square: Some(square) }
            }
            Rule::Sgd { momentum, nesterov } => {
                let g = self.decayed(n);
                let mean = (momentum > 0.0).then(|| {
                    let kept = n.times(self.mean, momentum);
                    n.op("Add", &[&kept, &g])
                });
                let direction = match &mean {
                    None => g,
                    Some(mean) if nesterov => {
                        let ahead = n.times(mean, momentum);
                        n.op("Add", &[&g, &ahead])
                    }
                    Some(mean) => mean.clone(),
                };
                let step = n.op("Mul", &[&direction, self.size]);
                Updated { values: n.op("Sub", &[self.values, &step]), mean, square: None }
            }
            Rule::Lion { betas: (beta1, beta2) } => {
                let mut mixed = |beta: f64| {
                    let kept = n.times(self.mean, beta);
                    let rated = n.times(self.gradient, 1.0 - beta);
                    n.op("Add", &[&kept, &rated])
                };
                let (direction, mean) = (mixed(beta1), mixed(beta2));
                let sign = n.op("Sign", &[&direction]);
                let step = n.op("Mul", &[&sign, self.size]);
                let kept = n.op("Mul", &[self.values, self.keep]);
                Updated { values: n.op("Sub", &[&kept, &step]), mean: Some(mean), square: None }
            }
        }
    }

    /// The gradient with weight decay as an L2 term.
    fn decayed(&self, n: &mut Nodes) -> String {
        if self.weight_decay == 0.0 {
            return self.gradient.into();
        }
        let decay = n.times(self.values, self.weight_decay);
        n.op("Add", &[self.gradient, &decay])
    }
}

/// Adds a batch's share to the sum of gradients: `sum.new = sum + share · gradient`, group by group.
pub(in crate::train) fn sum_model(flats: &[Flat]) -> ModelProto {
    let mut graph = GraphProto { name: Some("sum".into()), ..Default::default() };
    graph.input.push(value_info(SHARE, DataType::Float, &[]));
    for (i, flat) in flats.iter().enumerate() {
        let len = flat.len.to_string();
        let [sum, gradient] = ["sum", "gradient"].map(|kind| value(i, kind));
        let (new, part) = (format!("{sum}.new"), format!("{gradient}.part"));
        graph.input.extend([&sum, &gradient].map(|name| value_info(name, DataType::Float, &[&len])));
        graph.output.push(value_info(&new, DataType::Float, &[&len]));
        graph.node.push(node("Mul", &[SHARE, &gradient], &[&part]));
        graph.node.push(node("Add", &[&sum, &part], &[&new]));
    }
    model(graph)
}

fn model(graph: GraphProto) -> ModelProto {
    let opset_import = vec![OperatorSetIdProto { version: Some(17), ..Default::default() }];
    ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() }
}
