//! What a run's result depends on, in words and checksums: two runs with the same settings end with the same bits.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::engine::{Engine, LoadOptions};
use crate::onnx::Model;
use crate::onnx::external::{self, map_file};
use crate::train::TrainOptions;
use crate::train::data::{self, ImageOptions, TextOptions};
use crate::{Error, Result};

/// Values by the name of the flag, as text.
pub(in crate::train) type Settings = Map<String, Value>;

/// The settings of a run over `model` on `engine`.
///
/// # Errors
/// A file that cannot be read.
pub(in crate::train) fn settings(model: &Model, options: &TrainOptions, engine: &dyn Engine) -> Result<Settings> {
    // Every field is named, so that none can be forgotten.
    let TrainOptions {
        out: _,
        save_steps: _,
        save_total_limit: _,
        resume: _,
        settings: _,
        data_memory: _,
        data,
        eval_data,
        eval_strategy,
        metric_for_best_model,
        load_best_model_at_end,
        early_stopping_patience,
        early_stopping_threshold,
        loss,
        loss_model,
        teacher,
        freeze_until,
        adapter_names,
        output,
        pooling,
        labels,
        map,
        text:
            TextOptions {
                tokenizer,
                text_field,
                text_pair_field,
                label_field,
                anchor_field,
                positive_field,
                negative_field,
                max_length,
                packing,
                eos_token,
            },
        image: ImageOptions { field: image_field, size: image_size, mean: image_mean, std: image_std },
        optimizer,
        lr,
        head_lr,
        weight_decay,
        decay_all,
        schedule,
        warmup_steps,
        warmup_ratio,
        max_grad_norm,
        optimizer_on_device,
        precision,
        recompute,
        cache_frozen,
        cache_limit,
        plan: _,
        batch_size,
        gradient_accumulation_steps,
        steps,
        epochs,
        shuffle,
        group_by_length,
        seed,
        load: LoadOptions { threads, optimize },
    } = options;
    let data_content = |paths: &[PathBuf]| match paths {
        [] => Ok("none".into()),
        paths => contents(&data::files(paths)?),
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.map_or_else(|| format!("those of {} cores", cores()), |n| n.to_string());
    let pairs = [
        ("bone-onnx", env!("CARGO_PKG_VERSION").into()),
        ("engine", engine.describe()),
        ("threads", threads),
        ("optimize", optimize.to_string()),
        ("model", model_content(model)?),
        ("data", data_content(data)?),
        ("eval-data", data_content(eval_data)?),
        (
            "map",
            map.iter().map(|(name, columns)| format!("{name}={}", columns.join(","))).collect::<Vec<_>>().join(" "),
        ),
        ("tokenizer", tokenizer.as_ref().map_or(Ok("none".into()), |path| contents(std::slice::from_ref(path)))?),
        ("text-field", text_field.clone()),
        ("text-pair-field", number(text_pair_field)),
        ("label-field", label_field.clone()),
        ("anchor-field", anchor_field.clone()),
        ("positive-field", positive_field.clone()),
        ("negative-field", number(negative_field)),
        ("max-length", number(max_length)),
        ("packing", packing.to_string()),
        ("eos-token", number(eos_token)),
        ("labels", labels.clone()),
        ("image-field", number(image_field)),
        ("image-size", format!("{image_size:?}")),
        ("image-mean", format!("{image_mean:?}")),
        ("image-std", format!("{image_std:?}")),
        ("eval-strategy", format!("{eval_strategy:?}")),
        ("metric-for-best-model", metric_for_best_model.to_string()),
        ("load-best-model-at-end", load_best_model_at_end.to_string()),
        ("early-stopping-patience", number(early_stopping_patience)),
        ("early-stopping-threshold", early_stopping_threshold.to_string()),
        ("loss", format!("{loss:?}")),
        ("loss-model", contents(loss_model.as_slice())?),
        ("teacher", contents(teacher.as_ref().map(|t| t.model.clone()).as_slice())?),
        ("teacher-output", number(&teacher.as_ref().and_then(|t| t.output.clone()))),
        ("alpha", number(&teacher.as_ref().map(|t| t.alpha))),
        ("temperature", number(&teacher.as_ref().map(|t| t.temperature))),
        ("freeze-until", number(freeze_until)),
        ("adapter-names", adapter_names.as_ref().map_or("all active".into(), |names| names.join(","))),
        ("output", output.clone().unwrap_or_else(|| "not given".into())),
        ("pool", format!("{pooling:?}")),
        ("optimizer", format!("{optimizer:?}")),
        ("lr", lr.to_string()),
        ("head-lr", number(head_lr)),
        ("weight-decay", weight_decay.to_string()),
        ("decay-all", decay_all.to_string()),
        ("schedule", format!("{schedule:?}")),
        ("warmup-steps", warmup_steps.to_string()),
        ("warmup-ratio", warmup_ratio.to_string()),
        ("max-grad-norm", number(max_grad_norm)),
        ("optimizer-on-device", number(optimizer_on_device)),
        ("precision", format!("{precision:?}")),
        ("recompute", recompute.to_string()),
        ("cache-frozen", format!("{cache_frozen:?}")),
        ("cache-limit", cache_limit.to_string()),
        ("batch-size", number(batch_size)),
        ("gradient-accumulation-steps", gradient_accumulation_steps.to_string()),
        ("steps", number(steps)),
        ("epochs", number(epochs)),
        ("shuffle", shuffle.to_string()),
        ("group-by-length", group_by_length.to_string()),
        ("seed", seed.to_string()),
    ];
    Ok(pairs.into_iter().map(|(name, value)| (name.to_string(), Value::String(value))).collect())
}

/// What is different in `now`, in words: "lr was 0.1 and is 0.2 now"; `None` where nothing is.
pub(in crate::train) fn changes(then: &Settings, now: &Settings) -> Option<String> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("not there").to_string();
    let gone = then.keys().filter(|name| !now.contains_key(*name));
    let changes: Vec<String> = now
        .keys()
        .chain(gone)
        .filter(|name| then.get(*name) != now.get(*name))
        .map(|name| format!("{name} was {} and is {} now", text(then.get(name)), text(now.get(name))))
        .collect();
    (!changes.is_empty()).then(|| changes.join("; "))
}

fn number(value: &Option<impl ToString>) -> String {
    value.as_ref().map_or_else(|| "not given".into(), ToString::to_string)
}

/// Length and checksum of files, one after the other; their names may change.
fn contents(paths: &[PathBuf]) -> Result<String> {
    // Not in a map, whose pages would count as this process's memory: data may be larger than that.
    let mut sum = Sum::default();
    for path in paths {
        let mut file = File::open(path).map_err(Error::io("read", path))?;
        io::copy(&mut file, &mut sum).map_err(Error::io("read", path))?;
    }
    Ok(format!("{} bytes with CRC-32 {:08x}", sum.len, sum.crc.finalize()))
}

/// Counts what is written to it.
#[derive(Default)]
struct Sum {
    len: usize,
    crc: crc32fast::Hasher,
}

impl Write for Sum {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.len += bytes.len();
        self.crc.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The same of a model and of its external data.
fn model_content(model: &Model) -> Result<String> {
    let (mut len, mut crc) = (model.source.len(), crc32fast::Hasher::new());
    crc.update(&model.source);
    for location in external::locations(model)? {
        let path = model
            .external
            .resolve(&location)
            .map_err(|what| Error::file(&model.path, format!("its external data is at {location:?}, {what}")))?;
        let bytes = map_file(&path).map_err(Error::io("read", &path))?;
        len = len.saturating_add(bytes.len());
        crc.update(&bytes);
    }
    Ok(format!("{len} bytes with CRC-32 {:08x}", crc.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named_with_both_values() {
        let settings = |pairs: &[(&str, &str)]| -> Settings {
            pairs.iter().map(|(name, value)| (name.to_string(), Value::String(value.to_string()))).collect()
        };
        let then = settings(&[("lr", "0.1"), ("seed", "1"), ("old", "x")]);
        let now = settings(&[("lr", "0.2"), ("seed", "1"), ("new", "y")]);
        let text = "lr was 0.1 and is 0.2 now; new was not there and is y now; old was x and is not there now";
        assert_eq!(changes(&then, &now).as_deref(), Some(text));
        assert_eq!(changes(&then, &then), None);
    }
}
