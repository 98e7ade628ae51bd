//! RNN, GRU and LSTM: backward through time.
//!
//! All gates of all steps are computed again at once, from the states that the forward node gives; a Scan in the other
//! direction then carries the adjoint of the state from step to step and gives those of the gates' arguments, dZ. What
//! is left is one matrix product over all steps each: dX = dZ·W, dW = dZᵀ·X, dR = dZᵀ·H₋ (H₋: the state before each
//! step), dB = Σ dZ. Formulas: the operator specifications of ONNX (RNN, GRU, LSTM) and their derivatives, with
//! activations of which the derivative follows from the value. Steps behind the end of a sequence (`sequence_lens`)
//! leave the state as it is.

use super::gru::gru;
use super::lstm::lstm;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType, GraphProto, ValueInfoProto, value_info};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("RNN", |v| recurrent(v, &["Tanh"], false, rnn));
    rules.vjp("GRU", |v| recurrent(v, &["Sigmoid", "Tanh"], false, gru));
    rules.vjp("LSTM", |v| recurrent(v, &["Sigmoid", "Tanh", "Tanh"], true, lstm));
}

/// One direction of the node: T steps, batch B, I inputs, H hidden units, G gates.
pub(super) struct Cell<'a> {
    pub v: &'a Vjp<'a>,
    pub element: DataType,
    /// 0 for steps from the first to the last, 1 for the other way.
    pub reverse: bool,
    pub activations: Vec<String>,
    /// [T, B, I], [G·H, I], [G·H, H], and [2·G·H] where it is there.
    pub x: String,
    pub w: String,
    pub r: String,
    pub b: Option<String>,
    /// Peepholes of an LSTM, [3·H].
    pub p: Option<String>,
    /// The state before each step, [T, B, H].
    pub before: String,
    /// The cell state of an LSTM before the first step, [B, H].
    pub c0: Option<String>,
    /// 1 for steps inside a sequence, 0 behind its end: [T, B, 1].
    pub mask: Option<String>,
    /// Adjoint of the state that each step gives [T, B, H], and of the last ones [B, H].
    pub dy: String,
    pub dh: String,
    pub dc: String,
}

/// Adjoints that one direction gives.
pub(super) struct Found {
    /// Of the gates' arguments, as W and as R sees them: [T, B, G·H].
    pub dz: String,
    pub du: String,
    /// dR, where it is not duᵀ·H₋.
    pub dr: Option<String>,
    pub dh0: String,
    pub dc0: Option<String>,
    pub dp: Option<String>,
}

fn recurrent(v: &Vjp, defaults: &[&str], lstm: bool, cell: fn(&Cell) -> Result<Found>) -> Result<Adjoints> {
    let (x, w, r) = (v.x(0)?, v.x(1)?, v.x(2)?);
    if v.node.attr("clip").is_some() {
        return Err(v.error("it clips its gates; export the model without clip"));
    }
    let element = v.element().ok_or_else(|| v.error("its element type is not known"))?;
    let directions = match v.node.attr_s("direction").unwrap_or("forward") {
        "forward" => vec![false],
        "reverse" => vec![true],
        "bidirectional" => vec![false, true],
        other => return Err(v.error(format!("direction {other:?} does not exist"))),
    };
    let activations = activations(v, defaults, directions.len())?;
    // In layout 1 the batch comes first: [B, T, …] and states [B, D, H].
    let batch_first = v.node.attr_i("layout", 0) != 0;
    let steps_first = |value: String| if batch_first { v.transpose(value, &[1, 0, 2]) } else { value };
    let x = steps_first(x.to_string());
    let y = v.forward_output(v.node, 0);
    // [D, T, B, H]
    let by_direction = |y: &str| v.transpose(y, if batch_first { &[2, 1, 0, 3] } else { &[1, 0, 2, 3] });
    let y = by_direction(&y);
    let dy = v.adjoint(0).map(by_direction);
    let final_adjoint = |i| v.adjoint(i).map(|d| steps_first(d.to_string()));
    let (dh, dc) = (final_adjoint(1), final_adjoint(2));
    let initial = |i| v.node.input_at(i).map(|s| steps_first(s.to_string()));
    let (h0, c0) = (initial(5), initial(6));
    let zero = v.float(0.0, element).ok_or_else(|| v.error("it has no floating-point type"))?;
    let nothing = v.expand(&zero, slice(v, &v.shape(&y), 2, 4));
    let mask = v.node.input_at(4).map(|lengths| mask(v, &x, lengths, element));
    let part = |value: &str, d: usize| match directions.len() {
        1 => v.squeeze(value, v.ints(&[0])),
        _ => v.op("Gather", &[value, &v.int(d as i64)], vec![]),
    };

    let mut sums: Vec<Vec<String>> = vec![vec![]; 8];
    for (d, reverse) in directions.iter().enumerate() {
        let y = part(&y, d);
        let h0 = h0.as_ref().map_or_else(|| nothing.clone(), |h| part(h, d));
        let mut cell_of = Cell {
            v,
            element,
            reverse: *reverse,
            activations: activations[d].clone(),
            x: x.clone(),
            w: part(w, d),
            r: part(r, d),
            b: v.node.input_at(3).map(|b| part(b, d)),
            p: v.node.input_at(7).filter(|_| lstm).map(|p| part(p, d)),
            before: String::new(),
            c0: lstm.then(|| c0.as_ref().map_or_else(|| nothing.clone(), |c| part(c, d))),
            mask: mask.clone(),
            dy: dy.as_ref().map_or_else(|| v.expand(&zero, v.shape(&y)), |g| part(g, d)),
            dh: dh.as_ref().map_or_else(|| nothing.clone(), |g| part(g, d)),
            dc: dc.as_ref().map_or_else(|| nothing.clone(), |g| part(g, d)),
        };
        cell_of.before = cell_of.shifted(&y, &h0);
        let found = cell(&cell_of)?;
        let rows = |value: &str, like: &str| {
            let last = v.op("Shape", &[like], vec![AttributeProto::int("start", 1)]);
            v.op("Reshape", &[value, &v.concat(&[v.ints(&[-1]), last], 0)], vec![])
        };
        let product = |a: &str, b: &str| v.op("Gemm", &[a, b], vec![AttributeProto::int("transA", 1)]);
        let (dz, du) = (rows(&found.dz, &v.swap(&cell_of.w, 2)), rows(&found.du, &v.swap(&cell_of.w, 2)));
        sums[0].push(v.matmul(&found.dz, &cell_of.w));
        sums[1].push(product(&dz, &rows(&x, &cell_of.w)));
        sums[2].push(found.dr.unwrap_or_else(|| product(&du, &rows(&cell_of.before, &cell_of.r))));
        let bias = |d: &str| v.reduce_sum(d, v.ints(&[0]), false);
        sums[3].push(v.concat(&[bias(&dz), bias(&du)], 0));
        sums[5].push(found.dh0);
        sums[6].extend(found.dc0);
        sums[7].extend(found.dp);
    }
    let mut adjoints: Adjoints = vec![None; v.inputs.len()];
    for (i, parts) in sums.into_iter().enumerate().filter(|(i, parts)| v.wants(*i) && !parts.is_empty()) {
        if i == 0 {
            adjoints[0] = v.total(parts).map(steps_first);
            continue;
        }
        let parts: Vec<String> = parts.iter().map(|p| v.unsqueeze(p, v.ints(&[0]))).collect();
        let all = v.concat(&parts, 0);
        adjoints[i] = Some(if i == 5 || i == 6 { steps_first(all) } else { all });
    }
    Ok(adjoints)
}

/// Names of the activations of each direction: those of which the derivative follows from the value.
fn activations(v: &Vjp, defaults: &[&str], directions: usize) -> Result<Vec<Vec<String>>> {
    let given = v.node.attr("activations").map(|a| &a.strings);
    let named: Vec<String> = match given.filter(|names| !names.is_empty()) {
        Some(names) => names.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect(),
        None => defaults.iter().cycle().take(defaults.len() * directions).map(|n| n.to_string()).collect(),
    };
    if named.len() != defaults.len() * directions {
        return Err(v.error(format!("it names {} activations for {directions} directions", named.len())));
    }
    let known = ["Sigmoid", "Tanh", "Relu"];
    let spelled = |name: &String| known.iter().find(|k| k.eq_ignore_ascii_case(name)).map(|k| k.to_string());
    let refuse = |name: &String| v.error(format!("its activation {name} is not supported (of {})", known.join(", ")));
    let named = named.iter().map(|name| spelled(name).ok_or_else(|| refuse(name))).collect::<Result<Vec<_>>>()?;
    Ok(named.chunks(defaults.len()).map(<[String]>::to_vec).collect())
}

fn slice(v: &Vjp, value: &str, from: i64, to: i64) -> String {
    v.op("Slice", &[value, &v.ints(&[from]), &v.ints(&[to]), &v.ints(&[0])], vec![])
}

/// 1 where the step is before the end of its sequence: [T, B, 1].
fn mask(v: &Vjp, x: &str, lengths: &str, element: DataType) -> String {
    let steps = v.squeeze(v.dim_of_any(x, 0), v.ints(&[0]));
    let steps = v.op("Range", &[&v.int(0), &steps, &v.int(1)], vec![]);
    let lengths = v.unsqueeze(v.cast(lengths, DataType::Int64), v.ints(&[1]));
    v.cast(v.less(v.unsqueeze(steps, v.ints(&[1, 2])), lengths), element)
}

impl Vjp<'_> {
    /// Dimension `axis` of a value that may be an emitted one.
    fn dim_of_any(&self, value: &str, axis: i64) -> String {
        self.op("Shape", &[value], vec![AttributeProto::int("start", axis), AttributeProto::int("end", axis + 1)])
    }
}

impl Cell<'_> {
    /// The value before each step, where `y` has those after each and `first` is the one before all.
    pub fn shifted(&self, y: &str, first: &str) -> String {
        let v = self.v;
        let first = v.unsqueeze(first, v.ints(&[0]));
        if !self.reverse {
            return v.concat(&[first, slice(v, y, 0, -1)], 0);
        }
        let shifted = v.concat(&[slice(v, y, 1, i64::MAX), first.clone()], 0);
        match &self.mask {
            // The last step of a sequence is the first that the other direction takes.
            Some(mask) => {
                let next = v.concat(&[slice(v, mask, 1, i64::MAX), v.mul(slice(v, mask, 0, 1), self.c(0.0))], 0);
                v.select(v.greater(next, self.c(0.0)), shifted, first)
            }
            None => shifted,
        }
    }

    pub fn c(&self, value: f64) -> String {
        self.v.float(value, self.element).unwrap_or_default()
    }

    /// The arguments of the gates as far as X and the bias of W (`biases`: and that of R) give them, [T, B, G·H].
    pub fn of_inputs(&self, biases: bool) -> String {
        let v = self.v;
        let z = v.matmul(&self.x, v.swap(&self.w, 2));
        match &self.b {
            Some(b) => {
                let (wb, rb) = self.halves(b);
                v.add(z, if biases { v.add(wb, rb) } else { wb })
            }
            None => z,
        }
    }

    /// The biases of W and of R.
    pub fn halves(&self, b: &str) -> (String, String) {
        let mut halves = self.split(b, 2, 0).into_iter();
        (halves.next().unwrap_or_default(), halves.next().unwrap_or_default())
    }

    /// `value` in `parts` equal parts along `axis`.
    pub fn split(&self, value: &str, parts: usize, axis: i64) -> Vec<String> {
        if parts == 1 {
            return vec![value.to_string()];
        }
        let mut attributes = vec![AttributeProto::int("axis", axis)];
        if self.v.opset >= 18 {
            attributes.push(AttributeProto::int("num_outputs", parts as i64));
        }
        self.v.node("", "Split", &[value], attributes, parts)
    }

    /// Activation `i` at `z`.
    pub fn activate(&self, i: usize, z: impl AsRef<str>) -> String {
        self.v.op(&self.activations[i], &[z.as_ref()], vec![])
    }

    /// Derivative of activation `i` where its value is `y`.
    pub fn slope(&self, i: usize, y: &str) -> String {
        let v = self.v;
        match self.activations[i].as_str() {
            "Sigmoid" => v.mul(y, v.sub(self.c(1.0), y)),
            "Tanh" => v.sub(self.c(1.0), v.mul(y, y)),
            _ => v.cast(v.greater(y, self.c(0.0)), self.element),
        }
    }

    /// A Scan over the steps, in the order of the forward pass or against it. `states`: what is carried, at the
    /// start; `steps`: values of each step. `body` gives the next states, then what each step gives, from the names of
    /// both. The states of sequences that are over stay as they are.
    pub fn scan(
        &self,
        backwards: bool,
        states: &[&str],
        steps: &[&str],
        body: impl Fn(&[String], &[String]) -> Vec<String>,
    ) -> Vec<String> {
        let v = self.v;
        let open = |what: &str, rank: usize| value_info(&v.fresh(what), self.element, &vec![""; rank]);
        let steps: Vec<&str> = steps.iter().copied().chain(self.mask.as_deref()).collect();
        let carried: Vec<ValueInfoProto> = states.iter().map(|_| open("state", 2)).collect();
        let given: Vec<ValueInfoProto> = steps.iter().map(|_| open("step", 2)).collect();
        let names = |infos: &[ValueInfoProto]| infos.iter().map(|i| i.name().to_string()).collect::<Vec<_>>();
        let (outputs, nodes) = v.emitter.branch(|| {
            let (carried, given) = (names(&carried), names(&given));
            let mut results = body(&carried, &given);
            if let (Some(_), Some(mask)) = (&self.mask, given.last()) {
                for (k, result) in results.iter_mut().enumerate() {
                    *result = match carried.get(k) {
                        Some(state) => v.select(v.greater(mask, self.c(0.0)), &*result, state),
                        None => v.mul(mask, &*result),
                    };
                }
            }
            let named = |result: &String| {
                let info = open("result", 2);
                v.emitter.named("Identity", result, info.name());
                info
            };
            results.iter().map(named).collect::<Vec<_>>()
        });
        let count = outputs.len();
        let direction = i64::from(self.reverse != backwards);
        let graph = GraphProto {
            name: Some("through_time".into()),
            input: carried.into_iter().chain(given).collect(),
            output: outputs,
            node: nodes,
            ..Default::default()
        };
        let attributes = vec![
            AttributeProto::graph("body", graph),
            AttributeProto::int("num_scan_inputs", steps.len() as i64),
            AttributeProto::ints("scan_input_directions", &vec![direction; steps.len()]),
            AttributeProto::ints("scan_output_directions", &vec![direction; count - states.len()]),
        ];
        let inputs: Vec<&str> = states.iter().copied().chain(steps).collect();
        v.node("", "Scan", &inputs, attributes, count)
    }
}

/// H = f(X·Wᵀ + H₋·Rᵀ + b).
fn rnn(cell: &Cell) -> Result<Found> {
    let v = cell.v;
    let z = v.add(cell.of_inputs(true), v.matmul(&cell.before, v.swap(&cell.r, 2)));
    let slope = cell.slope(0, &cell.activate(0, z));
    let out = cell.scan(true, &[&cell.dh], &[&cell.dy, &slope], |state, step| {
        let dz = v.mul(v.add(&state[0], &step[0]), &step[1]);
        vec![v.matmul(&dz, &cell.r), dz]
    });
    let [dh0, dz] = [out[0].clone(), out[1].clone()];
    Ok(Found { du: dz.clone(), dz, dr: None, dh0, dc0: None, dp: None })
}
