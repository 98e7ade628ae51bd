//! AdamW, Adam, SGD and Lion over host memory, one fused pass a parameter, and clipping by the global norm.
//!
//! The formulas and their order are PyTorch's (`torch/optim/adam.py`, `torch/optim/sgd.py`, 2.15, the single-tensor
//! path; `torch/nn/utils/clip_grad.py`); Lion, which torch has not, is its paper's (Chen et al. 2023, "Symbolic
//! discovery of optimization algorithms", algorithm 2). Bias corrections are computed on the host in f64, as torch
//! does: an in-graph f32 power drifts.

/// Which update rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay: `p -= lr·wd·p`, then the Adam step; ε is added outside the root.
    AdamW { betas: (f64, f64), eps: f64 },
    /// Adam as it was first: weight decay is an L2 term of the gradient.
    Adam { betas: (f64, f64), eps: f64 },
    /// Gradient descent, with a heavy ball (`momentum` above 0) or Nesterov's; weight decay is an L2 term of the
    /// gradient, and nothing is dampened.
    Sgd { momentum: f64, nesterov: bool },
    /// The sign of a momentum, with decoupled weight decay.
    Lion { betas: (f64, f64) },
}

impl Rule {
    /// Whether it keeps a running mean of the gradients, and one of their squares.
    pub(in crate::train) fn moments(self) -> (bool, bool) {
        match self {
            Self::AdamW { .. } | Self::Adam { .. } => (true, true),
            Self::Sgd { momentum, .. } => (momentum > 0.0, false),
            Self::Lion { .. } => (true, false),
        }
    }

    /// What update number `updates` (from 1) of a group is made with, at `factor` of its learning rate.
    pub(in crate::train) fn rates(self, group: Group, updates: i32, factor: f64) -> Rates {
        let lr = group.lr * factor;
        let decayed = (1.0 - lr * group.weight_decay) as f32;
        match self {
            Self::AdamW { betas: (beta1, beta2), .. } | Self::Adam { betas: (beta1, beta2), .. } => Rates {
                keep: if matches!(self, Self::Adam { .. }) { 1.0 } else { decayed },
                size: (lr / (1.0 - beta1.powi(updates))) as f32,
                root: (1.0 - beta2.powi(updates)).sqrt() as f32,
            },
            Self::Sgd { .. } => Rates { keep: 1.0, size: lr as f32, root: 1.0 },
            Self::Lion { .. } => Rates { keep: decayed, size: lr as f32, root: 1.0 },
        }
    }
}

/// The scalars that change from update to update, computed in f64 and rounded once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::train) struct Rates {
    /// What decoupled weight decay leaves of a value.
    pub keep: f32,
    /// What the direction is multiplied by: the learning rate, with Adam's bias correction of the mean.
    pub size: f32,
    /// Root of Adam's bias correction of the squares.
    pub root: f32,
}

/// How one parameter is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// Peak learning rate; the schedule multiplies it.
    pub lr: f64,
    pub weight_decay: f64,
}

/// One parameter's settings and running moments (empty where the rule keeps none).
#[derive(Debug, Clone)]
struct State {
    group: Group,
    mean: Vec<f32>,
    square: Vec<f32>,
}

/// An optimizer over a fixed list of parameters.
#[derive(Debug, Clone)]
pub struct Optimizer {
    rule: Rule,
    steps: i32,
    states: Vec<State>,
}

/// What one update does to every parameter.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// The schedule's multiplier of each group's learning rate.
    pub lr: f64,
    /// What the gradients are multiplied by first ([`clip_factor`]); 1 to leave them.
    pub gradient: f64,
}

impl Optimizer {
    /// `parameters`: the number of elements and the settings of each, in the order that [`Optimizer::step`] gets them.
    pub fn new(rule: Rule, parameters: impl IntoIterator<Item = (usize, Group)>) -> Self {
        let (mean, square) = rule.moments();
        let zeros = |len, kept| if kept { vec![0.0; len] } else { Vec::new() };
        let states = parameters
            .into_iter()
            .map(|(len, group)| State { group, mean: zeros(len, mean), square: zeros(len, square) })
            .collect();
        Self { rule, steps: 0, states }
    }

    /// Updates made, and each parameter's moments (empty where the rule keeps none): all that the next one depends on.
    pub fn state(&self) -> (i32, impl Iterator<Item = [&[f32]; 2]>) {
        (self.steps, self.states.iter().map(|s| [s.mean.as_slice(), s.square.as_slice()]))
    }

    /// [`Optimizer::state`], to be put back.
    pub fn state_mut(&mut self) -> (&mut i32, impl Iterator<Item = [&mut [f32]; 2]>) {
        (&mut self.steps, self.states.iter_mut().map(|s| [s.mean.as_mut_slice(), s.square.as_mut_slice()]))
    }

    /// One update of all parameters (values and gradient of each, in the order of [`Optimizer::new`]).
    pub fn step<'a>(&mut self, parameters: impl IntoIterator<Item = (&'a mut [f32], &'a [f32])>, scale: Scale) {
        self.steps = self.steps.saturating_add(1);
        for (state, (values, gradient)) in self.states.iter_mut().zip(parameters) {
            let weight_decay = state.group.weight_decay as f32;
            let Rates { keep, size, root } = self.rule.rates(state.group, self.steps, scale.lr);
            let clip = scale.gradient as f32;
            match self.rule {
                Rule::AdamW { betas: (beta1, beta2), eps } | Rule::Adam { betas: (beta1, beta2), eps } => {
                    let step = AdamStep {
                        keep,
                        decay: if matches!(self.rule, Rule::Adam { .. }) { weight_decay } else { 0.0 },
                        mean_rate: (1.0 - beta1) as f32,
                        square_keep: beta2 as f32,
                        square_rate: (1.0 - beta2) as f32,
                        size,
                        root,
                        eps: eps as f32,
                        clip,
                    };
                    step.apply(values, gradient, &mut state.mean, &mut state.square);
                }
                Rule::Sgd { momentum, nesterov } => {
                    let (lr, decay, momentum) = (size, weight_decay, momentum as f32);
                    if state.mean.is_empty() {
                        for (p, g) in values.iter_mut().zip(gradient) {
                            *p -= lr * (g * clip + decay * *p);
                        }
                    }
                    for ((p, g), m) in values.iter_mut().zip(gradient).zip(&mut state.mean) {
                        let g = g * clip + decay * *p;
                        *m = *m * momentum + g;
                        *p -= lr * if nesterov { g + momentum * *m } else { *m };
                    }
                }
                Rule::Lion { betas: (beta1, beta2) } => {
                    let (lr, keep1, keep2) = (size, beta1 as f32, beta2 as f32);
                    let (rate1, rate2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
                    for ((p, g), m) in values.iter_mut().zip(gradient).zip(&mut state.mean) {
                        let g = g * clip;
                        let direction = *m * keep1 + rate1 * g;
                        // Nothing moves where there is no direction (`signum` of 0 is 1).
                        let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
                        *p = *p * keep - lr * sign;
                        *m = *m * keep2 + rate2 * g;
                    }
                }
            }
        }
    }
}

/// The scalars of one step of AdamW or Adam, rounded once.
struct AdamStep {
    keep: f32,
    decay: f32,
    mean_rate: f32,
    square_keep: f32,
    square_rate: f32,
    size: f32,
    root: f32,
    eps: f32,
    clip: f32,
}

impl AdamStep {
    fn apply(&self, values: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32]) {
        for (((p, g), m), v) in values.iter_mut().zip(gradient).zip(mean).zip(square) {
            let g = g * self.clip + self.decay * *p;
            *m += self.mean_rate * (g - *m);
            *v = *v * self.square_keep + self.square_rate * g * g;
            *p = *p * self.keep - self.size * *m / (v.sqrt() / self.root + self.eps);
        }
    }
}

/// Euclidean norm over all gradients together, summed in f64.
pub fn global_norm<'a>(gradients: impl IntoIterator<Item = &'a [f32]>) -> f64 {
    // Eight sums side by side, which the processor can add at once.
    let mut sums = [0f64; 8];
    for gradient in gradients {
        let (eights, rest) = gradient.as_chunks::<8>();
        for eight in eights {
            sums.iter_mut().zip(eight).for_each(|(sum, g)| *sum += f64::from(*g) * f64::from(*g));
        }
        sums.iter_mut().zip(rest).for_each(|(sum, g)| *sum += f64::from(*g) * f64::from(*g));
    }
    sums.iter().sum::<f64>().sqrt()
}

/// What gradients of this norm are multiplied by so that it is at most `max` (torch's `clip_grad_norm_`).
pub fn clip_factor(norm: f64, max: f64) -> f64 {
    (max / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADAMW: Rule = Rule::AdamW { betas: (0.9, 0.999), eps: 1e-8 };

    /// The textbook form (Loshchilov & Hutter 2019, algorithm 2) in f64, written apart from the code under test.
    fn reference(start: &[f64], gradients: &[Vec<f64>], lr: f64, wd: f64) -> Vec<f64> {
        let (mut p, mut m, mut v) = (start.to_vec(), vec![0.0; start.len()], vec![0.0; start.len()]);
        for (t, g) in gradients.iter().enumerate() {
            for i in 0..p.len() {
                m[i] = 0.9 * m[i] + 0.1 * g[i];
                v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t as i32 + 1)), v[i] / (1.0 - 0.999f64.powi(t as i32 + 1)));
                p[i] -= lr * wd * p[i] + lr * mh / (vh.sqrt() + 1e-8);
            }
        }
        p
    }

    #[test]
    fn adamw_follows_the_formula_over_many_steps() {
        let start = [0.5, -1.25, 3.0];
        let gradients: Vec<Vec<f64>> =
            (0..40).map(|t| (0..3).map(|i| ((t * 7 + i * 3) as f64 * 0.37).sin() * 0.1f64.powi(i)).collect()).collect();
        let expected = reference(&start, &gradients, 0.01, 0.1);
        let mut values: Vec<f32> = start.iter().map(|v| *v as f32).collect();
        let mut optimizer = Optimizer::new(ADAMW, [(3, Group { lr: 0.02, weight_decay: 0.1 })]);
        for g in &gradients {
            let g: Vec<f32> = g.iter().map(|v| *v as f32).collect();
            optimizer.step([(values.as_mut_slice(), g.as_slice())], Scale { lr: 0.5, gradient: 1.0 });
        }
        for (got, want) in values.iter().zip(&expected) {
            assert!((f64::from(*got) - want).abs() < 2e-6, "{values:?} {expected:?}");
        }
    }

    #[test]
    fn the_first_adamw_step_is_lr_times_the_sign() {
        let mut values = [1.0f32, 1.0];
        let mut optimizer = Optimizer::new(ADAMW, [(2, Group { lr: 0.25, weight_decay: 0.0 })]);
        optimizer.step([(values.as_mut_slice(), [3.0f32, -1e-3].as_slice())], Scale { lr: 1.0, gradient: 1.0 });
        assert!((values[0] - 0.75).abs() < 1e-6 && (values[1] - 1.25).abs() < 1e-5, "{values:?}");
    }

    #[test]
    fn sgd_decays_through_the_gradient_and_groups_keep_apart() {
        let (mut a, mut b) = ([2.0f32], [2.0f32]);
        let groups = [(1, Group { lr: 0.5, weight_decay: 0.25 }), (1, Group { lr: 0.125, weight_decay: 0.0 })];
        let mut optimizer = Optimizer::new(Rule::Sgd { momentum: 0.0, nesterov: false }, groups);
        let scale = Scale { lr: 1.0, gradient: 0.5 };
        optimizer.step([(a.as_mut_slice(), [4.0f32].as_slice()), (b.as_mut_slice(), [4.0f32].as_slice())], scale);
        assert_eq!((a[0], b[0]), (2.0 - 0.5 * (2.0 + 0.5), 2.0 - 0.125 * 2.0));
    }

    #[test]
    fn lion_moves_nothing_where_there_is_no_direction() {
        let mut values = [1.0f32, 1.0, 1.0];
        let rule = Rule::Lion { betas: (0.9, 0.99) };
        let mut optimizer = Optimizer::new(rule, [(3, Group { lr: 0.25, weight_decay: 0.0 })]);
        optimizer.step([(values.as_mut_slice(), [0.0f32, 7.0, -1e-9].as_slice())], Scale { lr: 1.0, gradient: 1.0 });
        assert_eq!(values, [1.0, 0.75, 1.25]);
    }

    #[test]
    fn clipping_shrinks_and_never_grows() {
        let norm = global_norm([[3.0f32, 0.0].as_slice(), [4.0f32].as_slice()]);
        assert_eq!(norm, 5.0);
        assert_eq!(global_norm([[2.0f32; 25].as_slice()]), 10.0);
        assert!((clip_factor(norm, 1.0) - 1.0 / (5.0 + 1e-6)).abs() < 1e-15);
        assert_eq!(clip_factor(norm, 10.0), 1.0);
    }
}
