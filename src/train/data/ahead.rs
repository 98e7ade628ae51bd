//! Batches are made ahead of their step on a thread of their own: while the engine is at work, rows are gathered and
//! images decoded. Their order, and what each holds, is what it would be without.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use super::{Batch, Batches, Feed};
use crate::{Error, Result};

/// Portions that lie ready beside the one in the making.
const READY: usize = 1;

/// The batches of one step.
#[derive(Debug)]
pub struct Portion {
    pub batches: Vec<Batch>,
    /// Where the data stands after them, as [`Batches::position`] tells it.
    pub position: (u64, usize),
    /// Whether they were the last ones of an epoch.
    pub ends_epoch: bool,
}

/// Portions in their order, made ahead.
pub struct Portions {
    made: Receiver<Result<Portion>>,
}

impl Portions {
    /// Waits for the next one.
    ///
    /// # Errors
    /// A row of it that cannot be read; that there is none.
    pub fn take(&mut self) -> Result<Portion> {
        self.made.recv().map_err(|_| Error::data("there are no more batches"))?
    }
}

/// Gives `work` the next `count` portions of `feed`. Each is `most` batches, fewer where the epoch ends before (as in
/// transformers' Trainer). The thread ends with `work`, whether all of them were taken or not.
///
/// # Errors
/// Those of `work`; a thread that cannot be started.
pub fn ahead<T>(
    feed: &Feed,
    mut batches: Batches,
    most: usize,
    count: usize,
    work: impl FnOnce(Portions) -> Result<T>,
) -> Result<T> {
    let (ready, made) = sync_channel(READY);
    let make = move || {
        for _ in 0..count {
            let portion = portion(feed, &mut batches, most);
            let failed = portion.is_err();
            // Where nobody takes it any more, the work is over.
            if ready.send(portion).is_err() || failed {
                return;
            }
        }
    };
    thread::scope(|scope| {
        let started = thread::Builder::new().name("data".into()).spawn_scoped(scope, make);
        started.map_err(|e| Error::config(format!("the thread that reads data could not be started: {e}")))?;
        work(Portions { made })
    })
}

fn portion(feed: &Feed, batches: &mut Batches, most: usize) -> Result<Portion> {
    let mut taken = Vec::new();
    loop {
        taken.push(feed.batch(batches.next_rows())?);
        let ends_epoch = batches.at_epoch_end();
        if taken.len() >= most || ends_epoch {
            return Ok(Portion { batches: taken, position: batches.position(), ends_epoch });
        }
    }
}
