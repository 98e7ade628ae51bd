//! Where text goes: remarks and progress to stderr, results to stdout, JSON alone on stdout when asked for.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::Error;

pub struct Printer {
    pub json: bool,
    quiet: bool,
    /// Whether the one JSON object is out.
    answered: AtomicBool,
}

impl Printer {
    pub fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, answered: AtomicBool::new(false) }
    }

    /// A remark for people.
    pub fn say(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("{}", text.as_ref());
        }
    }

    pub fn warn(&self, text: impl AsRef<str>) {
        eprintln!("warning: {}", text.as_ref());
    }

    pub fn error(&self, error: &Error) {
        // A check that fails has said how.
        if self.json && !self.answered.load(Ordering::Relaxed) {
            self.line(&serde_json::json!({ "error": error.to_string() }).to_string());
        }
        eprintln!("error: {error}");
    }

    /// The command's result: JSON where asked for, else what `text` prints.
    pub fn result(&self, value: &impl Serialize, text: impl FnOnce(&Self)) {
        if self.json {
            self.answered.store(true, Ordering::Relaxed);
            match serde_json::to_string(value) {
                Ok(json) => self.line(&json),
                Err(e) => eprintln!("error: the result cannot be written as JSON: {e}"),
            }
        } else {
            text(self);
        }
    }

    /// A line on stdout. A reader that has gone away (`| head`) is no error.
    pub fn line(&self, text: &str) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    pub fn table(&self, header: &[&str], rows: Vec<Vec<String>>) {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(header);
        table.add_rows(rows);
        for line in table.lines() {
            self.line(line.trim_end());
        }
    }

    /// A progress bar of `steps` on stderr; hidden where nobody watches.
    pub fn bar(&self, steps: u64) -> ProgressBar {
        let shown = !self.quiet && std::io::stderr().is_terminal();
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(steps), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:28} {pos}/{len}  {msg}  {elapsed} (ETA {eta})") {
            bar.set_style(style.progress_chars("━╸ "));
        }
        bar
    }
}
