//! `report.html`: a run on one page that needs nothing beside it.

use std::fmt::{Display, Write};

use super::curve::Curve;
use crate::train::{Summary, TrainOptions};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;color:#333;max-width:60em;margin:2em auto;padding:0 1em}\
                     h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse}\
                     td,th{padding:.2em 1.2em .2em 0;text-align:left;border-bottom:1px solid #eee;vertical-align:top}\
                     h1,td{overflow-wrap:anywhere}td:first-child{white-space:nowrap}.best{font-weight:bold}\
                     svg{width:100%;height:auto;margin-top:1.5em}pre{background:#f7f7f7;padding:1em;white-space:pre-wrap}";

/// The page of a run that is over. `title`: what was trained.
pub(in crate::train) fn html(
    title: &str,
    engine: &str,
    options: &TrainOptions,
    summary: &Summary,
    curves: &[Curve],
) -> Result<String, String> {
    let title = escaped(title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width\">\n<title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>\n"
    );
    page += &table(&[], &facts(engine, summary), None);
    for curve in curves {
        let _ = writeln!(page, "{}", curve.svg()?);
    }
    if !summary.evals.is_empty() {
        let number = |value: f64| format!("{value:.4}");
        let row = |e: &crate::train::EvalReport| {
            let values = [Some(e.eval_loss), e.eval_accuracy].into_iter().flatten().map(number);
            [e.step.to_string()].into_iter().chain(values).collect()
        };
        let rows: Vec<_> = summary.evals.iter().map(row).collect();
        let best = summary.best.and_then(|best| summary.evals.iter().position(|e| e.step == best.step));
        page += "<h2>Evaluations</h2>\n";
        let accurate = summary.evals.iter().any(|e| e.eval_accuracy.is_some());
        let header = ["after step", "loss", "accuracy"];
        page += &table(&header[..if accurate { 3 } else { 2 }], &rows, best);
    }
    if !options.settings.is_empty() {
        page += &settings(&options.settings);
    }
    page += "</html>\n";
    Ok(page)
}

/// The settings, and behind a click the whole file: what is not set is there as remarks, many times as long as the rest.
fn settings(file: &str) -> String {
    let set: Vec<&str> = file.lines().filter(|line| !line.starts_with('#')).collect();
    format!(
        "<h2>Settings</h2>\n<pre>{}</pre>\n<details>\n<summary>All of train.toml</summary>\n<pre>{}</pre>\n</details>\n",
        escaped(set.join("\n")),
        escaped(file)
    )
}

fn facts(engine: &str, summary: &Summary) -> Vec<Vec<String>> {
    let row = |what: &str, value: String| vec![what.to_string(), value];
    let (steps, here) = (summary.steps.len(), summary.steps.len() - summary.steps_before);
    let mut rows = vec![
        row("engine", engine.into()),
        row("trainable parameters", summary.trainable.to_string()),
        row("steps", steps.to_string()),
    ];
    if let (Some(first), Some(last)) = (summary.steps.first(), summary.steps.last()) {
        rows.push(row("loss, first and last step", format!("{:.4}, {:.4}", first.loss, last.loss)));
    }
    if let Some(best) = summary.best {
        let accuracy = best.eval_accuracy.map(|a| format!(", accuracy {a:.4}")).unwrap_or_default();
        let text = format!("after step {}: loss {:.4}{accuracy}", best.step, best.eval_loss);
        rows.push(row(
            if summary.best_kept { "best evaluation (its values are kept)" } else { "best evaluation" },
            text,
        ));
    }
    let end = if summary.stopped {
        "interrupted"
    } else if summary.stopped_early {
        "stopped early: evaluations became no better"
    } else {
        "all steps taken"
    };
    rows.push(row("end", end.into()));
    let since = if here < steps { format!(" for the last {here} steps") } else { String::new() };
    rows.push(row("time", format!("{:.1} s{since}", summary.seconds)));
    rows.push(row("samples per second", format!("{:.1}", summary.samples_per_second)));
    rows.extend(summary.tokens_per_second.map(|rate| row("tokens per second", format!("{rate:.0}"))));
    rows.extend(summary.peak_memory.map(|bytes| row("peak memory of the process", size(bytes))));
    rows.push(row("adapter", size(summary.adapter_bytes)));
    rows
}

/// `rows` below `header`, if there is one; `best` is set in bold.
fn table(header: &[&str], rows: &[Vec<String>], best: Option<usize>) -> String {
    let mut text = String::from("<table>\n");
    if !header.is_empty() {
        let cells: String = header.iter().map(|cell| format!("<th>{cell}</th>")).collect();
        let _ = writeln!(text, "<tr>{cells}</tr>");
    }
    for (at, row) in rows.iter().enumerate() {
        let class = if best == Some(at) { " class=\"best\"" } else { "" };
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
        let _ = writeln!(text, "<tr{class}>{cells}</tr>");
    }
    text + "</table>\n"
}

/// Text that HTML shows as it is.
fn escaped(text: impl Display) -> String {
    text.to_string().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number of bytes for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} bytes"),
        10_000..10_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// The most memory that this process ever held (its peak resident set), where the system tells.
pub(in crate::train) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_markup_does_not_become_any() {
        assert_eq!(escaped("a<b> & \"c\""), "a&lt;b&gt; &amp; &quot;c&quot;");
        assert!(table(&["x"], &[vec!["<script>".into()]], Some(0)).contains("class=\"best\"><td>&lt;script&gt;"));
    }

    #[test]
    fn what_is_set_is_seen_at_once() {
        let page = settings("# blank: The class <none>\nlr = 0.1\n");
        let (seen, folded) = page.split_once("<details>").unwrap();
        assert!(seen.contains("<pre>lr = 0.1</pre>") && !seen.contains("blank"), "{seen}");
        assert!(folded.contains("# blank: The class &lt;none&gt;\nlr = 0.1\n"), "{folded}");
    }

    #[test]
    fn sizes_have_units() {
        let sizes = [0, 9_999, 21_400, 12_340_000, 20_000_000_000].map(size);
        assert_eq!(sizes, ["0 bytes", "9999 bytes", "21.4 kB", "12.3 MB", "20.0 GB"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_was_used_is_counted() {
        let used = vec![1u8; 64 << 20];
        assert!(peak_memory().is_some_and(|bytes| bytes > used.iter().map(|v| u64::from(*v)).sum()));
    }
}
