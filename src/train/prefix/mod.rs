//! The frozen-prefix cache: where only late layers learn, what is computed before them is computed once for each row of
//! the data, kept on disk, and read in every epoch.
//!
//! | file | what lives there |
//! |---|---|
//! | `cut` | which values are kept |
//! | `sizes`, `work` | how large they are, and what they spare |
//! | `check` | whether a step with them is the step without them |
//! | `cache`, `rows`, `store` | computing them, and batches out of them |

mod cache;
mod check;
mod cut;
mod rows;
mod sizes;
mod store;
mod work;

use serde::Serialize;

use super::data::{Feed, Field};
use super::goal::Feeds;
use super::graph::LossModel;
use super::record::report::size;
use super::{Progress, TrainOptions};
use crate::engine::{Device, Engine};
use crate::words::words;
use crate::{Error, Result};
pub(super) use cache::Cache;
pub(super) use check::Steps;
use check::{Sample, Step};
use cut::Cut;
use sizes::Sizes;
use store::Store;

/// Whether what is frozen is computed once and kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheFrozen {
    /// Where that pays.
    #[default]
    Auto,
    On,
    Off,
}

words!(CacheFrozen, "cache-frozen" { Auto = "auto", On = "on", Off = "off" });

/// What the cache of a run is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CachePlan {
    /// Why there is none; `None` where there is one.
    pub why_not: Option<String>,
    /// On disk, at most.
    pub bytes: u64,
    /// How much of the run's work it spares, about, in hundredths.
    pub spares_percent: u32,
    /// The values of the model that are kept.
    pub values: Vec<String>,
}

/// What an engine does in a second, and what reading a byte of the cache costs: in operations, by order of magnitude.
struct Speed {
    second: f64,
    byte: f64,
}

impl Speed {
    fn of(engine: &dyn Engine) -> Self {
        match engine.memory().map_or(Device::Cpu, |memory| memory.device()) {
            Device::Cpu => Self { second: 2e10, byte: 64.0 },
            Device::Cuda(_) => Self { second: 1e13, byte: 8192.0 },
        }
    }
}

/// Less than this is not worth it: a share of the run's work, and seconds.
const WORTH: (f64, f64) = (0.05, 1.0);

/// The part of a model that is frozen, and whether it is to be kept.
pub(super) struct FrozenPrefix {
    pub plan: CachePlan,
    cut: Option<Cut>,
    /// Rows of a run of the frozen part, and whether it takes no other number of them.
    group: (usize, bool),
    left: bool,
}

impl FrozenPrefix {
    /// Looks for it, and decides by `options` and by what it would spare.
    ///
    /// # Errors
    /// Why there can be none, where one is asked for.
    pub fn find(training: &LossModel, feeds: &Feeds, options: &TrainOptions, engine: &dyn Engine) -> Result<Self> {
        let found = match options.cache_frozen {
            CacheFrozen::Off => Err("it is off".into()),
            _ => Self::found(training, feeds, options, engine),
        };
        match found {
            Err(why) if options.cache_frozen == CacheFrozen::On => Err(refused(why)),
            Err(why) => {
                let plan = CachePlan { why_not: Some(why), ..CachePlan::default() };
                Ok(Self { plan, cut: None, group: (1, false), left: false })
            }
            Ok(found) => Ok(found),
        }
    }

    fn found(training: &LossModel, feeds: &Feeds, options: &TrainOptions, engine: &dyn Engine) -> Result<Self, String> {
        let asked = options.cache_frozen == CacheFrozen::On;
        let train = &feeds.train;
        let epochs = match options.steps {
            Some(steps) => {
                let samples =
                    steps.saturating_mul(feeds.batch_size).saturating_mul(options.gradient_accumulation_steps);
                samples as f64 / train.rows() as f64
            }
            None => options.epochs.unwrap_or(3) as f64,
        };
        if epochs <= 1.0 && !asked {
            return Err("each row is seen once".into());
        }
        let mut sides = all(feeds).filter_map(Feed::pads_left).collect::<Vec<_>>();
        sides.dedup();
        let left = match sides[..] {
            [] => false,
            [side] => side.ok_or("some inputs are padded on the left, others on the right")?,
            _ => return Err("training and evaluation data are padded on different sides".into()),
        };
        let model = training.proto();
        let graph = model.graph.as_ref().ok_or("the model holds no graph")?;
        let fields = Field::inputs(graph);
        let fixed = train.input_names().find_map(|name| fields.iter().find(|f| f.name == name)?.fixed_rows());
        let group = fixed.map_or((feeds.batch_size * train.roles(), false), |rows| (rows, true));
        let sizes = Sizes::new(model, train, group).map_err(|e| e.to_string())?;
        let cut = cut::find(model, &training.added_inputs(), train, &sizes)?;
        let values: Vec<String> = cut.values.iter().map(|kept| kept.name.clone()).collect();
        let bytes = all(feeds).map(|feed| sizes.bytes(&values, feed)).sum::<Result<Option<u64>>>();
        let bytes = bytes.map_err(|e| e.to_string())?;
        let bytes = bytes.ok_or("the size of what is frozen is not known before a run")?;
        if bytes > options.cache_limit {
            return Err(format!(
                "it would take {}, which is more than cache-limit ({})",
                size(bytes),
                size(options.cache_limit)
            ));
        }
        let (speed, rows) = (Speed::of(engine), train.input_rows() as f64);
        let runs = rows / group.0 as f64;
        let gain = runs * (epochs - 1.0) * cut.spared - epochs * bytes as f64 * speed.byte;
        let share = (gain / (runs * epochs * cut.step)).max(0.0);
        let percent = (share * 100.0).round() as u32;
        if !asked && (share < WORTH.0 || gain < WORTH.1 * speed.second) {
            return Err(format!("it would spare too little: about {percent} % of a short run's work"));
        }
        let plan = CachePlan { why_not: None, bytes, spares_percent: percent, values };
        Ok(Self { plan, cut: Some(cut), group, left })
    }

    /// Computes and keeps what is frozen; then `training` and `evaluated` are what is left of them, and batches of `feeds`
    /// go with that. Where a step would come out otherwise, or it cannot be kept, all stays as it is, and `progress`
    /// hears why.
    ///
    /// # Errors
    /// An operator without a derivative rule; a cache that is asked for and cannot be.
    pub fn fill(
        self,
        (training, evaluated): (&mut LossModel, &mut Option<LossModel>),
        feeds: &mut Feeds,
        steps: Steps,
        progress: &mut dyn Progress,
    ) -> Result<CachePlan> {
        let Some(cut) = &self.cut else { return Ok(self.plan) };
        let samples = check::samples(feeds)?;
        let whole = steps.results(training, feeds, &samples)?;
        let rest_of = |model: &LossModel| model.split(&self.plan.values).map(|(_, rest)| rest);
        let rests = rest_of(training).and_then(|rest| Ok((rest, evaluated.as_ref().map(rest_of).transpose()?)));
        let filled = rests.and_then(|(rest, rest_evaluated)| {
            let going_on = self.filled(cut, (training, &rest), feeds, (steps, &samples, &whole), progress)?;
            Ok(going_on.then_some((rest, rest_evaluated)))
        });
        let why = match filled {
            Ok(Some(rests)) => {
                (*training, *evaluated) = rests;
                return Ok(self.plan);
            }
            Ok(None) => "it was interrupted".into(),
            Err(error) if steps.options.cache_frozen == CacheFrozen::On => return Err(refused(error.to_string())),
            Err(error) => {
                progress.warned(&format!("the frozen part is computed in every step, not once: {error}"));
                error.to_string()
            }
        };
        all_mut(feeds).for_each(|feed| feed.keep(None));
        Ok(CachePlan { why_not: Some(why), ..CachePlan::default() })
    }

    /// Keeps all that is frozen in `training`, of which `rest` is left; false where `progress` asks to stop.
    fn filled(
        &self,
        cut: &Cut,
        (training, rest): (&LossModel, &LossModel),
        feeds: &mut Feeds,
        (steps, samples, whole): (Steps, &[Sample], &[Step]),
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        let (first, _) = training.split(&self.plan.values)?;
        let added = rest.added_inputs();
        let inputs = rest.proto().graph.iter().flat_map(|g| &g.input).map(|input| input.name().to_string());
        let inputs: Vec<String> = inputs.filter(|name| !added.contains(name.as_str())).collect();
        let cache = |rows| Cache { inputs: inputs.clone(), values: cut.values.clone(), rows, left: self.left };
        let mut session = steps.engine.load(&first, &steps.options.load)?;

        for (at, feed) in all_mut(feeds).enumerate() {
            let samples = samples.iter().filter(|sample| sample.evaluation == (at > 0));
            let mut numbers: Vec<usize> = samples.flat_map(|sample| feed.input_numbers(&sample.rows)).collect();
            numbers.sort_unstable();
            numbers.dedup();
            let mut few = cache(Store::in_memory());
            few.fill(session.as_mut(), feed, &numbers, self.group, &mut |_| true)?;
            feed.keep(Some(few));
        }
        check::same(whole, &steps.results(rest, feeds, samples)?, training.in_halves())?;

        let out = &steps.options.out;
        std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
        let (mut done, of) = (0, all(feeds).map(Feed::input_rows).sum());
        let mut limit = steps.options.cache_limit;
        for feed in all_mut(feeds) {
            let numbers: Vec<usize> = (0..feed.input_rows()).collect();
            let store = Store::on_disk(out, limit).map_err(Error::io("write to", out))?;
            let mut whole = cache(store);
            let mut going_on = |rows| {
                progress.caching(done, of);
                done += rows;
                !progress.stop()
            };
            if !whole.fill(session.as_mut(), feed, &numbers, self.group, &mut going_on)? {
                return Ok(false);
            }
            limit = limit.saturating_sub(whole.rows.len());
            feed.keep(Some(whole));
        }
        Ok(true)
    }
}

fn refused(why: String) -> Error {
    Error::config(format!("cache-frozen on: {why}"))
}

fn all<'a, 'b>(feeds: &'a Feeds<'b>) -> impl Iterator<Item = &'a Feed<'b>> {
    std::iter::once(&feeds.train).chain(&feeds.eval)
}

fn all_mut<'a, 'b>(feeds: &'a mut Feeds<'b>) -> impl Iterator<Item = &'a mut Feed<'b>> {
    std::iter::once(&mut feeds.train).chain(&mut feeds.eval)
}
