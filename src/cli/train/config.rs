//! Settings files: every option of `train` under the name of its flag. The names, their aliases and what a value may be
//! are read from the flags' own definitions, so that a new flag is in the file by itself.

use std::any::TypeId;
use std::ffi::OsString;
use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use toml::de::{DeTable, DeValue};

use super::arguments::Arguments;
use crate::{Error, Result, did_you_mean};

/// Its name in a run's directory.
pub const FILE: &str = "train.toml";
/// The argument that names the file, and one that is for the moment: neither is a setting of a run.
const CONFIG: &str = "config";
const RESUME: &str = "resume";

/// `command` with nothing required that a settings file may give, and with switches that can be turned off again.
pub fn optional(command: Command) -> Command {
    command.mut_args(|arg| {
        let arg = match arg.get_action() {
            ArgAction::SetTrue => arg
                .action(ArgAction::Set)
                .value_parser(value_parser!(bool))
                .value_name("true|false")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .default_value("false")
                .hide_default_value(true)
                .hide_possible_values(true),
            _ => arg,
        };
        if arg.is_required_set() { arg.required(false).required_unless_present(CONFIG) } else { arg }
    })
}

/// The options that are `given` or else in the settings file which is named among them; and all of them as the text of
/// such a file.
///
/// # Errors
/// Names the file and the line of what cannot be used.
pub fn resolve(given: &ArgMatches) -> Result<(Arguments, String)> {
    let command = optional(Arguments::augment_args(Command::new("train")));
    let Some(path) = given.get_one::<PathBuf>(CONFIG) else {
        let arguments = Arguments::from_arg_matches(given).map_err(|e| Error::config(first(&e)))?;
        return Ok((arguments, text(&command, given)));
    };
    let mut words = vec![OsString::from(command.get_name())];
    for setting in read(path, &command)? {
        if !is_given(given, setting.arg) && !conflicts(&command, setting.arg).any(|arg| is_given(given, arg)) {
            words.extend(setting.words);
        }
    }
    words.extend(command.get_arguments().filter(|arg| is_given(given, arg)).flat_map(|arg| {
        let values = given.get_raw(arg.get_id().as_str()).unwrap_or_default();
        values.map(|value| word(arg, value.to_os_string())).collect::<Vec<_>>()
    }));
    let merged = command.clone().try_get_matches_from(words).map_err(|e| Error::file(path, first(&e)))?;
    let whole = Arguments::augment_args(Command::new("train"));
    let missing =
        whole.get_arguments().filter(|arg| arg.is_required_set() && merged.get_raw(arg.get_id().as_str()).is_none());
    let missing: Vec<String> = missing.map(key_of).collect();
    if !missing.is_empty() {
        return Err(Error::file(path, format!("neither it nor the command line gives {}", missing.join(", "))));
    }
    let arguments = Arguments::from_arg_matches(&merged).map_err(|e| Error::file(path, first(&e)))?;
    Ok((arguments, text(&command, &merged)))
}

/// An entry of a settings file.
struct Setting<'a> {
    arg: &'a Arg,
    line: usize,
    /// The same on a command line.
    words: Vec<OsString>,
}

/// Reads a settings file, in its order.
fn read<'a>(path: &Path, command: &'a Command) -> Result<Vec<Setting<'a>>> {
    let source = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let line = |span: Range<usize>| source.as_bytes().iter().take(span.start).filter(|b| **b == b'\n').count() + 1;
    let fail = |line: usize, what: String| Error::file(path, format!("line {line}: {what}"));
    let table = DeTable::parse(&source)
        .map_err(|e| fail(e.span().map_or(1, line), e.message().trim().replace('\n', "; ")))?
        .into_inner();
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let mut settings: Vec<Setting> = Vec::new();
    for (key, value) in entries {
        let (line, name) = (line(key.span()), key.get_ref());
        let arg = find(command, name).ok_or_else(|| {
            let names = command.get_arguments().filter(|a| is_setting(a)).flat_map(names);
            let names: Vec<String> = names.collect();
            fail(line, format!("there is no option {name:?}.{}", did_you_mean(name, names.iter().map(String::as_str))))
        })?;
        let words = words(arg, value.get_ref()).map_err(|what| fail(line, format!("{name}: {what}")))?;
        // Each by itself, so that the line can be told.
        let alone = std::iter::once(command.get_name().into()).chain(words.iter().cloned());
        if let Err(e) = command.clone().mut_args(|a| a.required(false)).try_get_matches_from(alone)
            && e.kind() != ErrorKind::MissingRequiredArgument
        {
            return Err(fail(line, first(&e)));
        }
        if let Some(other) = settings.iter().find(|other| other.arg == arg) {
            return Err(fail(line, format!("{name} is given on line {}, too", other.line)));
        }
        if let Some(other) = conflicts(command, arg).find_map(|a| settings.iter().find(|other| other.arg == a)) {
            let what =
                format!("{name} does not go with {} on line {}; give one of them", key_of(other.arg), other.line);
            return Err(fail(line, what));
        }
        settings.push(Setting { arg, line, words });
    }
    Ok(settings)
}

/// The words of a command line that say the same as `value` under the name of `arg`.
fn words(arg: &Arg, value: &DeValue) -> Result<Vec<OsString>, String> {
    let one = |value: &DeValue| {
        let text = match value {
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().to_string(),
            DeValue::Float(number) => number.as_str().to_string(),
            DeValue::Boolean(value) => value.to_string(),
            other => return Err(format!("a value cannot be of TOML's type {}", other.type_str())),
        };
        Ok(word(arg, text.into()))
    };
    match value {
        DeValue::Array(values) if matches!(arg.get_action(), ArgAction::Append) => {
            values.iter().map(|value| one(value.get_ref())).collect()
        }
        DeValue::Array(_) => Err("it takes one value, not a list".into()),
        value => Ok(vec![one(value)?]),
    }
}

fn word(arg: &Arg, value: OsString) -> OsString {
    let Some(long) = arg.get_long() else {
        // A leading dash would make it a flag.
        let dash = value.as_encoded_bytes().first() == Some(&b'-');
        return if dash { Path::new(".").join(value).into() } else { value };
    };
    let mut word = OsString::from(format!("--{long}="));
    word.push(value);
    word
}

/// All options of a run as a settings file; those that are not set are there as remarks.
fn text(command: &Command, matches: &ArgMatches) -> String {
    let mut text = format!("# The options of this run. Once more: bone-onnx train --config {FILE}\n");
    for arg in command.get_arguments().filter(|arg| is_setting(arg) && arg.get_id() != RESUME) {
        let key = key_of(arg);
        let Some(values) = matches.get_raw(arg.get_id().as_str()) else {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "# {key}: {}", help.split_whitespace().collect::<Vec<_>>().join(" "));
            continue;
        };
        let values: Vec<String> = values.map(|value| literal(arg, &value.to_string_lossy())).collect();
        let value = match arg.get_action() {
            ArgAction::Append => format!("[{}]", values.join(", ")),
            _ => values.concat(),
        };
        // Where two exclude each other, their defaults do as well.
        let remark = !is_given(matches, arg) && conflicts(command, arg).next().is_some();
        let _ = writeln!(text, "{}{key} = {value}", if remark { "# " } else { "" });
    }
    text
}

/// A number or a truth value as it is, anything else in quotes.
fn literal(arg: &Arg, raw: &str) -> String {
    let words = [TypeId::of::<String>(), TypeId::of::<PathBuf>()];
    let bare = raw.parse::<toml::Value>().is_ok_and(|v| v.is_integer() || v.is_float() || v.is_bool());
    if bare && !words.iter().any(|t| arg.get_value_parser().type_id() == *t) {
        raw.to_string()
    } else {
        toml::Value::from(raw).to_string()
    }
}

fn is_given(matches: &ArgMatches, arg: &Arg) -> bool {
    matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
}

fn is_setting(arg: &Arg) -> bool {
    arg.get_id() != CONFIG
}

/// Options that cannot be given together with `arg`, whichever of the two says so.
fn conflicts<'a>(command: &'a Command, arg: &'a Arg) -> impl Iterator<Item = &'a Arg> {
    let named = move |a: &Arg, b: &Arg| command.get_arg_conflicts_with(a).contains(&b);
    command.get_arguments().filter(move |other| named(arg, other) || named(other, arg))
}

/// What an option is called in a settings file.
fn key_of(arg: &Arg) -> String {
    arg.get_long().map_or_else(|| arg.get_id().as_str().replace('_', "-"), String::from)
}

/// [`key_of`] and its aliases.
fn names(arg: &Arg) -> impl Iterator<Item = String> {
    let aliases = arg.get_all_aliases().unwrap_or_default();
    std::iter::once(key_of(arg)).chain(aliases.into_iter().map(String::from))
}

/// The option of a name; with underscores, too, as transformers spells its own.
fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let name = name.replace('_', "-");
    command.get_arguments().find(|arg| is_setting(arg) && names(arg).any(|n| n == name))
}

/// What clap says, without its advice.
fn first(error: &clap::Error) -> String {
    let text = error.to_string();
    let said = text.split("\n\n").next().unwrap_or_default();
    said.trim_start_matches("error: ").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `words` and the settings file `file` come to.
    fn resolved(file: &str, words: &str) -> Result<(Arguments, String)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("my.toml");
        std::fs::write(&path, file).unwrap();
        let words = ["train", "--config", path.to_str().unwrap()].into_iter().chain(words.split_whitespace());
        resolve(&optional(Arguments::augment_args(Command::new("train"))).try_get_matches_from(words).unwrap())
    }

    const WHOLE: &str = "model = 'm.onnx'\noutput-dir = \"out\"\ndata = 'd.npz'\nloss = 'mse'\n";

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = format!(
            "{WHOLE}learning_rate = 1e-4\nepochs = 2\nbetas = [0.5, 0.75]\nno-shuffle = true\nlabels = '1'\n\
             adam-epsilon = 1\nwarmup-steps = 1_000\nnesterov = false\nadapter-names = ['a', 'b']\n"
        );
        let (found, _) = resolved(&file, "").unwrap();
        assert_eq!((found.lr, found.epochs, found.warmup_steps, found.eps), (1e-4, Some(2), 1000, Some(1.0)));
        assert_eq!((found.model.to_str(), found.data.labels.as_str()), (Some("m.onnx"), "1"));
        assert_eq!(found.betas, Some(vec![0.5, 0.75]));
        assert_eq!(found.adapter_names, Some(vec!["a".into(), "b".into()]));
        assert!(found.no_shuffle && !found.nesterov);
        assert_eq!(found.seed, 0);
        // `steps` of the command line takes the place of `epochs`, which does not go with it.
        let words = "--lr 2 --steps 5 --no-shuffle=false --betas 0.1,0.2 --nesterov -- -x.onnx";
        let (found, _) = resolved(&file, words).unwrap();
        assert_eq!((found.lr, found.epochs, found.steps), (2.0, None, Some(5)));
        assert_eq!((found.model.to_str(), found.betas), (Some("./-x.onnx"), Some(vec![0.1, 0.2])));
        assert!(!found.no_shuffle && found.nesterov);
    }

    #[test]
    fn what_was_resolved_resolves_to_itself() {
        let file =
            format!("{WHOLE}betas = [0.5, 0.75]\nlabels = 'a \"b\"'\nadapter-names = '1,2'\nno-shuffle = true\n");
        let (_, text) = resolved(&file, "--lr 3e-5 --device cuda:1 --seed 18446744073709551615 --resume").unwrap();
        for line in ["lr = 3e-5", "loss = \"mse\"", "adapter-names = [\"1\", \"2\"]", "no-shuffle = true", "batch"] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("\nresume") && !text.contains("config ="), "{text}");
        let (again, twice) = resolved(&text, "").unwrap();
        assert_eq!(text, twice);
        assert_eq!((again.seed, again.data.labels.as_str(), again.lr), (u64::MAX, "a \"b\"", 3e-5));
    }

    #[test]
    fn what_cannot_be_used_is_told_with_its_line() {
        for (more, parts) in [
            ("lerning-rate = 1", &["line 5", "lerning-rate", "learning-rate"][..]),
            ("seed = 1\n\nlr = 'high'", &["line 7", "high", "--lr"]),
            ("seed = -1", &["line 5", "-1", "--seed"]),
            ("seed = [1, 2]", &["line 5", "seed", "one value"]),
            ("[train]\nlr = 1", &["line 5", "train"]),
            ("lr = {x = 1}", &["line 5", "lr", "table"]),
            ("lr = 1\nlearning_rate = 2", &["line 6", "learning_rate", "line 5"]),
            ("steps = 3\nepochs = 2", &["line 6", "epochs", "steps on line 5"]),
            ("optimizer = 'adagrad'", &["line 5", "adagrad", "adamw"]),
            ("config = 'other.toml'", &["line 5", "config"]),
            ("lr = ", &["line 5"]),
            ("seed = 1\nseed = 2", &["line 6", "duplicate"]),
            ("decay-all = 'maybe'", &["line 5", "maybe", "--decay-all"]),
        ] {
            let Err(error) = resolved(&format!("{WHOLE}{more}\n"), "") else { panic!("{more} was taken") };
            let error = error.to_string();
            assert!(parts.iter().all(|part| error.contains(part)) && error.contains("my.toml"), "{more}: {error}");
        }
        let Err(error) = resolved("model = 'm.onnx'\nloss = 'mse'\ndata = 'd.npz'", "") else { panic!("it was taken") };
        assert!(error.to_string().contains("output-dir") && error.to_string().contains("my.toml"), "{error}");
    }
}
