//! One case: the vector-Jacobian product against central differences along random directions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bone_onnx::autodiff::{Gradient, Request, Rules, Seed, gradient_with};
use bone_onnx::onnx::{DataType, Tensor, data_type_name};

use super::case::{Case, with_values};
use super::point::{Random, into_general_position};
use super::runner::{OLDER_OPSETS, Runner, lower, open_counts, seed_draws};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Pass,
    Zero,
    NotDifferentiable,
    EngineCannot,
    NoRule,
    Fail,
    /// No floating-point input and output: nothing to differentiate.
    NoFloat,
    /// Its inputs are no tensors of numbers that the engine takes.
    NoTensors,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Pass,
        Self::Zero,
        Self::NotDifferentiable,
        Self::NoRule,
        Self::Fail,
        Self::EngineCannot,
        Self::NoTensors,
        Self::NoFloat,
    ];

    pub fn text(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Zero => "zero (checked by differences too)",
            Self::NotDifferentiable => "not differentiable",
            Self::EngineCannot => "engine cannot run it",
            Self::NoRule => "no rule",
            Self::Fail => "fail",
            Self::NoFloat => "no floating-point input and output",
            Self::NoTensors => "no tensors of numbers as inputs",
        }
    }

    /// Whether the case is one of those that have to be a pass, a zero or a reasoned refusal.
    pub fn counts(self) -> bool {
        !matches!(self, Self::EngineCannot | Self::NoFloat | Self::NoTensors)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub kind: Kind,
    pub detail: String,
}

impl Outcome {
    pub fn new(kind: Kind, detail: impl AsRef<str>) -> Self {
        let detail = detail.as_ref().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { kind, detail: detail.chars().take(300).collect() }
    }
}

/// How finely a floating-point type can tell a derivative.
struct Precision {
    epsilon: f64,
    /// Steps of the differences, relative to the largest element; the derivative has to agree at one of them (a kink
    /// may lie within a long one, rounding may drown a short one), for every direction.
    steps: &'static [f64],
    /// Relative to Σ|gradient·direction|.
    tolerance: f64,
}

fn precision(element: DataType) -> Precision {
    match element {
        DataType::Double => Precision { epsilon: 2.2e-16, steps: &[1e-4, 1e-5, 1e-6, 1e-3], tolerance: 1e-6 },
        DataType::Float => Precision { epsilon: 1.2e-7, steps: &[1e-2, 3e-3, 3e-2, 1e-3], tolerance: 5e-3 },
        _ => Precision { epsilon: 1e-3, steps: &[1e-1, 3e-2], tolerance: 3e-2 },
    }
}

/// Some kernels for doubles round to single precision inside.
const COARSE: Precision = Precision { epsilon: 1.2e-7, steps: &[1e-2, 3e-3, 1e-3], tolerance: 5e-3 };

const DIRECTIONS: usize = 3;

/// Points tried: where the first happens to lie next to a step, the second does not. A rule that is wrong is wrong at
/// both.
const POINTS: u64 = 2;

/// The outcome of `case`, in the most precise type that the engine has its kernels for.
pub fn check(case: &Case, rules: &Rules) -> Outcome {
    if case.float_inputs().is_empty() || case.float_outputs().is_empty() {
        return Outcome::new(Kind::NoFloat, "");
    }
    let mut case = case.clone();
    seed_draws(&mut case.model);
    open_counts(&mut case.model);
    let runs = |case: &Case| {
        Runner::new(&case.model, false, &case.float_outputs()).and_then(|mut runner| runner.run(&case.feeds))
    };
    let case = match runnable(case, &runs) {
        Ok(case) => case,
        Err(message) => return Outcome::new(Kind::EngineCannot, message),
    };
    let own = match runs(&case) {
        Ok(values) => values,
        Err(message) => return Outcome::new(Kind::EngineCannot, message),
    };
    let mut last = None;
    let forms = [case.in_type(DataType::Double), case.in_type(DataType::Float), Some(case.clone())];
    for form in forms.into_iter().flatten() {
        if !runs(&form).is_ok_and(|values| alike(&values, &own)) {
            continue;
        }
        match differentiate(&form, rules) {
            Ok(outcome) => return outcome,
            Err(message) => last = Some(message),
        }
    }
    Outcome::new(Kind::Fail, last.unwrap_or_default())
}

/// `case` in the nearest form that the engine has kernels for: as it stands, declared as of an older operator set, or in
/// float32 in place of its floating-point type; else what the engine says of it as it stands.
fn runnable(case: Case, runs: &dyn Fn(&Case) -> Result<Vec<Tensor>, String>) -> Result<Case, String> {
    let Err(message) = runs(&case) else { return Ok(case) };
    let single = case.in_type(DataType::Float);
    let mut forms: Vec<Case> = single.iter().cloned().collect();
    for opset in OLDER_OPSETS {
        for mut form in [Some(case.clone()), single.clone()].into_iter().flatten() {
            if lower(&mut form.model, opset) {
                forms.push(form);
            }
        }
    }
    forms.into_iter().find(|form| runs(form).is_ok()).ok_or(message)
}

/// Whether results in another type are those in the case's own, up to rounding: some kernels for doubles compute
/// something else (ONNX Runtime 1.31's Attention places queries by an older text of the standard).
fn alike(values: &[Tensor], own: &[Tensor]) -> bool {
    values.iter().zip(own).all(|(a, b)| {
        let b = b.to_f64();
        let size = b.iter().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs()));
        let close = |(a, b): (f64, &f64)| !b.is_finite() || (a - b).abs() <= 5e-2 * size;
        a.len() == b.len() && a.to_f64().into_iter().zip(&b).all(close)
    })
}

/// The outcome of `case` as it stands; an error where the engine has no kernels for its gradient.
fn differentiate(case: &Case, rules: &Rules) -> Result<Outcome, String> {
    let (of, wrt) = (case.float_outputs(), case.float_inputs());
    let request =
        Request { of: of.iter().map(|y| (y.clone(), Seed::Input)).collect(), wrt: wrt.clone(), ..Default::default() };
    let derived = match catch_unwind(AssertUnwindSafe(|| gradient_with(&case.model, &request, rules))) {
        Ok(Ok(derived)) => derived,
        Ok(Err(e)) => {
            let text = e.to_string();
            let kind = match text.as_str() {
                _ if text.contains("there is no rule for it") => Kind::NoRule,
                _ if text.contains("no derivative:") => Kind::NotDifferentiable,
                _ => Kind::Fail,
            };
            let reason = text.lines().filter(|l| l.starts_with("  ")).collect::<Vec<_>>().join(";");
            return Ok(Outcome::new(kind, if reason.is_empty() { &text } else { &reason }));
        }
        Err(_) => return Ok(Outcome::new(Kind::Fail, "gradient panicked")),
    };

    let mut failure = None;
    for point in 0..POINTS {
        let outcome = compare(case, &derived, &of, &wrt, point, &precision)?;
        if outcome.kind != Kind::Fail {
            return Ok(outcome);
        }
        failure.get_or_insert(outcome);
    }
    if case.feeds.values().any(|t| t.data_type() == DataType::Double) {
        for point in 0..POINTS {
            let outcome = compare(case, &derived, &of, &wrt, point, &|_| COARSE)?;
            if outcome.kind == Kind::Pass {
                return Ok(Outcome::new(Kind::Pass, format!("to single precision {}", outcome.detail)));
            }
        }
    }
    Ok(failure.unwrap_or_else(|| Outcome::new(Kind::Fail, "")))
}

/// Compares the gradient of `case` with differences at the `point`th point.
fn compare(
    case: &Case,
    derived: &Gradient,
    of: &[String],
    wrt: &[String],
    point: u64,
    precision: &dyn Fn(DataType) -> Precision,
) -> Result<Outcome, String> {
    let mut forward = Runner::new(&case.model, false, of)?;
    let mut random = Random(case.name.bytes().fold(7 + point, |h, b| h * 31 % 1_000_003 + u64::from(b)));
    let feeds = into_general_position(case, wrt, &mut forward, &mut random)?;
    let values = forward.run(&feeds)?;
    let mut seeded = feeds.clone();
    let mut seeds: Vec<Vec<f64>> = Vec::new();
    let inputs = derived.model.graph.as_ref().map_or(0, |g| g.input.len());
    for (k, value) in values.iter().enumerate() {
        // Through a rounding, so that the seed is what the engine gets; elements that are not finite are left out.
        let drawn: Vec<f64> =
            value.to_f64().iter().map(|y| if y.is_finite() { random.uniform() } else { 0.0 }).collect();
        let seed = with_values(value.data_type(), value.dims(), &drawn);
        seeds.push(seed.to_f64());
        let name = derived.model.graph.as_ref().map(|g| g.input[inputs - of.len() + k].name().to_string());
        seeded.insert(name.unwrap_or_default(), seed);
    }
    let mut results = Vec::new();
    for optimize in [false, true] {
        let mut backward = Runner::new(&derived.model, optimize, &derived.gradients)?;
        backward.anew = false;
        results.push((optimize, backward.run(&seeded)?));
    }

    let (mut moved, mut outside) = (false, Vec::new());
    for (i, name) in wrt.iter().enumerate() {
        let at = &feeds[name];
        for (optimize, result) in &results {
            if result[i].dims() != at.dims() || result[i].data_type() != at.data_type() {
                let text =
                    format!("gradient of {name} is {:?}, not {:?} (optimize {optimize})", result[i].dims(), at.dims());
                return Ok(Outcome::new(Kind::Fail, text));
            }
        }
        let point = at.to_f64();
        let precision = precision(at.data_type());
        let scale = match point.iter().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs())) {
            0.0 => 1.0,
            scale => scale,
        };
        for _ in 0..DIRECTIONS {
            let direction: Vec<f64> = point.iter().map(|_| random.uniform() * scale).collect();
            // ⟨seed, f⟩ at t along the direction, and the size of its terms; `None` outside of f's domain.
            let mut along = |t: f64| -> Option<(f64, f64)> {
                let there: Vec<f64> = point.iter().zip(&direction).map(|(x, d)| x + t * d).collect();
                let mut feeds = feeds.clone();
                feeds.insert(name.clone(), with_values(at.data_type(), at.dims(), &there));
                let outputs = forward.run(&feeds).ok()?;
                let mut total = (0.0, 0.0);
                for ((y, seed), before) in outputs.iter().zip(&seeds).zip(&values) {
                    if y.dims() != before.dims() {
                        return None;
                    }
                    for (y, s) in y.to_f64().iter().zip(seed).filter(|(_, s)| **s != 0.0) {
                        total.0 += y * s;
                        total.1 += (y * s).abs();
                    }
                }
                total.0.is_finite().then_some(total)
            };
            let mut differences = Vec::new();
            for h in precision.steps {
                let (Some(a), Some(b), Some(c), Some(d)) = (along(*h), along(-h), along(2.0 * h), along(-2.0 * h))
                else {
                    continue;
                };
                let difference = (8.0 * (a.0 - b.0) - (c.0 - d.0)) / (12.0 * h);
                differences.push((difference, 4.0 * precision.epsilon * a.1 / h));
                let agrees = results.iter().all(|(_, r)| agrees(&r[i], &direction, &differences, &precision).is_ok());
                if agrees {
                    break;
                }
            }
            if differences.is_empty() {
                outside.push(name.clone());
                break;
            }
            for (optimize, result) in &results {
                if let Err(text) = agrees(&result[i], &direction, &differences, &precision) {
                    let element = data_type_name(at.data_type());
                    let text = format!("gradient of {name} {text} ({element}, optimize {optimize})");
                    return Ok(Outcome::new(Kind::Fail, text));
                }
            }
            moved |= differences.iter().any(|(d, noise)| d.abs() > *noise);
        }
    }
    if outside.len() == wrt.len() {
        return Ok(Outcome::new(Kind::Fail, "no input can be moved within the operator's domain"));
    }
    let zero = results.iter().flat_map(|(_, r)| r).all(|g| g.to_f64().iter().all(|v| *v == 0.0));
    let kind = if zero && !moved { Kind::Zero } else { Kind::Pass };
    let detail = match outside.is_empty() {
        true => String::new(),
        false => format!("but for {}, which cannot move without a change of shape or domain", outside.join(", ")),
    };
    Ok(Outcome::new(kind, detail))
}

/// Whether one of the differences (each with its noise) is what the gradient says.
fn agrees(
    gradient: &Tensor,
    direction: &[f64],
    differences: &[(f64, f64)],
    precision: &Precision,
) -> Result<(), String> {
    let products = || {
        gradient
            .to_f64()
            .into_iter()
            .zip(direction)
            .map(|(g, d)| if g == 0.0 { 0.0 } else { g * d })
            .collect::<Vec<_>>()
    };
    let claimed: f64 = products().iter().sum();
    let size: f64 = products().iter().map(|p| p.abs()).sum();
    let fits = |(difference, noise): &(f64, f64)| {
        (claimed - difference).abs() <= precision.tolerance * (size + difference.abs()) + noise
    };
    match differences.iter().any(fits) {
        true => Ok(()),
        false => Err(format!("is {claimed:.6e}, differences say {:.6e} (scale {size:.1e})", differences[0].0)),
    }
}
