//! A writer of nodes: each call adds one and gives the name of its value.

use crate::onnx::{AttributeProto, DataType, GraphProto, Names, Tensor, constant_i64, node, value_info};

pub(in crate::train) struct Nodes<'a> {
    graph: &'a mut GraphProto,
    names: &'a mut Names,
    /// All names begin with it.
    prefix: &'a str,
}

impl<'a> Nodes<'a> {
    pub fn new(graph: &'a mut GraphProto, names: &'a mut Names, prefix: &'a str) -> Self {
        Self { graph, names, prefix }
    }

    fn name(&mut self, part: &str) -> String {
        self.names.fresh(&format!("{}/{part}", self.prefix))
    }

    pub fn op(&mut self, op: &str, inputs: &[&str]) -> String {
        self.op_with(op, inputs, None)
    }

    pub fn op_with(&mut self, op: &str, inputs: &[&str], attribute: Option<AttributeProto>) -> String {
        let output = self.name(op);
        let mut node = node(op, inputs, &[&output]);
        node.attribute.extend(attribute);
        self.graph.node.push(node);
        output
    }

    pub fn number(&mut self, value: f64) -> String {
        let name = self.name("number");
        self.graph.initializer.push(Tensor::scalar(value as f32).to_proto(&name));
        name
    }

    pub fn integers(&mut self, values: &[i64]) -> String {
        let name = self.name("integers");
        constant_i64(self.graph, &name, values);
        name
    }

    pub fn constant(&mut self, value: Tensor) -> String {
        let name = self.name("constant");
        self.graph.initializer.push(value.to_proto(&name));
        name
    }

    pub fn cast(&mut self, value: &str, to: DataType) -> String {
        self.op_with("Cast", &[value], Some(AttributeProto::int("to", to as i64)))
    }

    pub fn float(&mut self, value: &str) -> String {
        self.cast(value, DataType::Float)
    }

    /// Calls `value` by the name of a graph's output.
    pub fn rename(&mut self, value: &str, name: &str) {
        self.graph.node.push(node("Identity", &[value], &[name]));
    }

    /// `value` with a last axis of length one.
    pub fn unsqueeze(&mut self, value: &str) -> String {
        let axis = self.integers(&[-1]);
        self.op("Unsqueeze", &[value, &axis])
    }

    /// As many equal pieces of the first axis as `parts`.
    pub fn split(&mut self, value: &str, parts: usize, opset: i64) -> Vec<String> {
        let outputs: Vec<String> = (0..parts).map(|_| self.name("Split")).collect();
        let mut node = node("Split", &[value], &outputs.iter().map(String::as_str).collect::<Vec<_>>());
        node.attribute.push(AttributeProto::int("axis", 0));
        if opset >= 18 {
            node.attribute.push(AttributeProto::int("num_outputs", parts as i64));
        }
        self.graph.node.push(node);
        outputs
    }

    /// Along the first axis.
    pub fn concat(&mut self, values: &[&str]) -> String {
        self.op_with("Concat", values, Some(AttributeProto::int("axis", 0)))
    }

    /// Along the last axis.
    pub fn append(&mut self, value: &str, other: &str) -> String {
        self.op_with("Concat", &[value, other], Some(AttributeProto::int("axis", -1)))
    }

    /// 0, 1, … below the number in `count`, which has one axis.
    pub fn range(&mut self, count: &str) -> String {
        let limit = self.op("Squeeze", &[count]);
        let bounds = [0i64, 1].map(|n| {
            let name = self.name("integer");
            self.graph.initializer.push(Tensor::scalar(n).to_proto(&name));
            name
        });
        self.op("Range", &[&bounds[0], &limit, &bounds[1]])
    }

    /// What `step` makes of a state and each element of the first axis of `sequence`, one after the other from `initial`
    /// on: all states, stacked. States and elements have two axes.
    pub fn scan(
        &mut self,
        initial: &str,
        sequence: &str,
        step: impl FnOnce(&mut Nodes, &str, &str) -> String,
    ) -> String {
        let [state, element, next, each, last, all] =
            ["state", "element", "next", "each", "last", "all"].map(|part| self.name(part));
        let matrix = |name: &str| value_info(name, DataType::Float, &["", ""]);
        let mut body = GraphProto { name: Some(self.name("step")), ..Default::default() };
        let made = step(&mut Nodes::new(&mut body, self.names, self.prefix), &state, &element);
        body.node.extend([&next, &each].map(|output| node("Identity", &[&made], &[output])));
        body.input = vec![matrix(&state), matrix(&element)];
        body.output = vec![matrix(&next), matrix(&each)];
        let mut scan = node("Scan", &[initial, sequence], &[&last, &all]);
        scan.attribute = vec![AttributeProto::graph("body", body), AttributeProto::int("num_scan_inputs", 1)];
        self.graph.node.push(scan);
        all
    }

    /// Of a matrix.
    pub fn transpose(&mut self, value: &str) -> String {
        self.op_with("Transpose", &[value], Some(AttributeProto::ints("perm", &[1, 0])))
    }

    /// `value` times a number; itself for 1.
    pub fn times(&mut self, value: &str, factor: f64) -> String {
        if factor == 1.0 {
            return value.into();
        }
        let factor = self.number(factor);
        self.op("Mul", &[value, &factor])
    }

    /// Over all axes, to a scalar.
    pub fn sum(&mut self, value: &str) -> String {
        self.op_with("ReduceSum", &[value], Some(AttributeProto::int("keepdims", 0)))
    }

    /// Over all axes, to a scalar.
    pub fn mean(&mut self, value: &str) -> String {
        self.op_with("ReduceMean", &[value], Some(AttributeProto::int("keepdims", 0)))
    }

    /// Over the last axis, which goes.
    pub fn sum_of_last(&mut self, value: &str) -> String {
        let axis = self.integers(&[-1]);
        self.op_with("ReduceSum", &[value, &axis], Some(AttributeProto::int("keepdims", 0)))
    }

    /// Along the last axis.
    pub fn log_softmax(&mut self, value: &str) -> String {
        self.op_with("LogSoftmax", &[value], Some(AttributeProto::int("axis", -1)))
    }

    /// Elements `from..to` of an axis.
    pub fn slice(&mut self, value: &str, axis: i64, from: i64, to: i64) -> String {
        let bounds = [from, to, axis].map(|n| self.integers(&[n]));
        self.op("Slice", &[value, &bounds[0], &bounds[1], &bounds[2]])
    }
}
