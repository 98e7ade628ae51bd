//! Runs that are killed, interrupted, or out of room, and go on: they end with the bits of a run left alone.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use super::{done, text};

const BINARY: &str = env!("CARGO_BIN_EXE_bone-onnx");
const STEPS: usize = 200;

/// A directory with the digit reader, injected, and its data.
fn digits() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().to_path_buf();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/digits");
    for name in ["digits.onnx", "train.safetensors", "test.safetensors"] {
        std::fs::copy(fixtures.join(name), path.join(name)).expect("a copy");
    }
    done(&["inject", "digits.onnx", "-o", "injected.onnx", "--target-modules", "all-linear", "--r", "16"], &path);
    (dir, path)
}

/// Shuffled epochs of 13 steps, each evaluated; a schedule, warm-up, clipping: all that a step can depend on.
fn command(dir: &Path, out: &str, more: &str) -> Command {
    let words = "train injected.onnx --data train.safetensors --eval-data test.safetensors --loss cross-entropy \
                 --batch-size 32 --schedule linear --warmup-steps 5 --max-grad-norm 1 --seed 3 \
                 --weight-decay 0.01 --steps";
    let mut command = Command::new(BINARY);
    command.args(words.split_whitespace()).arg(STEPS.to_string()).args(["-o", out]).args(more.split_whitespace());
    if !more.contains("--engine") {
        command.args(["--engine", "tract"]);
    }
    command.current_dir(dir).stdin(Stdio::null());
    command
}

fn run(dir: &Path, out: &str, more: &str) -> Output {
    command(dir, out, more).output().expect("a run")
}

fn finished(dir: &Path, out: &str, more: &str) -> String {
    let output = run(dir, out, more);
    assert!(output.status.success(), "{more}: {}", text(&output.stderr));
    text(&output.stderr)
}

fn finished_json(dir: &Path, out: &str, more: &str) -> serde_json::Value {
    let output = run(dir, out, &format!("{more} --json"));
    serde_json::from_slice(&output.stdout).expect("a JSON object")
}

fn failed(dir: &Path, out: &str, more: &str, parts: &[&str]) {
    let output = run(dir, out, more);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{more}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{more}: no {part:?} in: {stderr}");
    }
}

fn lines(out: &Path) -> usize {
    std::fs::read(out.join("metrics.jsonl")).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count())
}

/// Starts a run and waits until it has written `wanted` lines of metrics, or has ended.
fn started(dir: &Path, out: &str, more: &str, wanted: usize) -> Child {
    let mut command = command(dir, out, more);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("a process");
    let begun = Instant::now();
    while lines(&dir.join(out)) < wanted && child.try_wait().expect("a state").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(120), "no {wanted} lines of metrics");
        std::thread::sleep(Duration::from_micros(200));
    }
    child
}

/// Ends a run after `wanted` lines of metrics as Ctrl-C does. Returns what it said.
fn interrupted(dir: &Path, out: &str, more: &str, wanted: usize) -> String {
    let child = started(dir, out, more, wanted);
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("a signal");
    assert!(killed.success());
    let output = child.wait_with_output().expect("an end");
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    stderr
}

/// The steps that have a checkpoint; fails where anything unfinished lies about.
fn checkpoints(out: &Path) -> Vec<usize> {
    let mut steps = Vec::new();
    for entry in std::fs::read_dir(out).expect("a directory") {
        let name = entry.expect("an entry").file_name().into_string().expect("a name");
        assert!(!name.starts_with(".bone-onnx-checkpoint"), "{name} was left");
        steps.extend(name.strip_prefix("checkpoint-").map(|step| step.parse::<usize>().expect("a step")));
    }
    steps.sort_unstable();
    steps
}

/// The lines of metrics without the time that a step took.
fn metrics(out: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    text.lines().map(|line| line.split(",\"seconds\"").next().unwrap_or_default().to_string()).collect()
}

/// Adapter, model, curves, metrics and moments are the same bits, and all steps are there with 16 evaluations.
fn same(dir: &Path, alone: &str, other: &str) {
    same_bits(dir, alone, other);
    assert_eq!(metrics(&dir.join(alone)).len(), STEPS + 16);
}

fn same_bits(dir: &Path, alone: &str, other: &str) {
    let (alone, other) = (dir.join(alone), dir.join(other));
    let last = *checkpoints(&alone).last().expect("a checkpoint");
    for name in [
        "injected.onnx".to_string(),
        "adapter/adapter_model.safetensors".into(),
        "adapter/adapter_config.json".into(),
        "loss.png".into(),
        "learning_rate.png".into(),
        "eval.png".into(),
        format!("checkpoint-{last}/training_state.safetensors"),
    ] {
        let bytes = |out: &Path| std::fs::read(out.join(&name)).expect("a file");
        assert!(bytes(&alone) == bytes(&other), "{name} differs");
    }
    assert_eq!(metrics(&alone), metrics(&other));
}

/// Kills a run with the flags `more` at `times` random moments, each time gone on with, and lets it end then.
fn killed(path: &Path, out: &str, more: &str, times: usize) {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a time").as_nanos() as u64;
    println!("moments from seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let more = format!("{more} --save-steps 3 --save-total-limit 2 --resume");
    for round in 0..times {
        // What a killed run leaves may lie behind its last checkpoint by two steps, which are taken again.
        let lines = lines(&path.join(out)) + rng.random_range(0..=8);
        let mut child = started(path, out, &more, lines);
        std::thread::sleep(Duration::from_micros(rng.random_range(0..5_000)));
        child.kill().expect("a signal");
        let output = child.wait_with_output().expect("an end");
        assert!(output.status.code().is_none(), "round {round} was done before: {}", text(&output.stderr));
    }
    finished(path, out, &more);
}

#[test]
fn a_run_killed_ten_times_ends_with_the_bits_of_one_left_alone() {
    let (_dir, path) = digits();
    finished(&path, "alone", "--save-steps 1000");
    killed(&path, "killed", "", 10);
    let out = path.join("killed");
    assert_eq!(checkpoints(&out), [198, 200]);
    same(&path, "alone", "killed");
    // There is nothing left to do, and that is done as often as one likes.
    finished(&path, "killed", "--save-steps 3 --resume");
    same(&path, "alone", "killed");
}

/// The first layer is frozen, and what it gives is computed once.
const KEPT: &str = "--freeze-until /fc1/Gemm --cache-frozen on";

#[test]
fn a_run_that_keeps_its_frozen_part_is_killed_and_goes_on_to_the_same_bits() {
    let (_dir, path) = digits();
    let said = finished(&path, "alone", &format!("{KEPT} --save-steps 1000"));
    // 64 floats for each of 400 and 397 rows.
    assert!(said.contains("frozen part: computed once for each row, 204.0 kB on disk"), "{said}");
    killed(&path, "killed", KEPT, 4);
    same(&path, "alone", "killed");
    failed(&path, "killed", "--freeze-until /fc1/Gemm --resume", &["cache-frozen was On and is Auto now"]);
}

#[test]
fn a_frozen_part_that_the_disk_has_no_room_for_is_told() {
    let (_dir, path) = digits();
    let words = command(&path, "out", KEPT);
    let words: Vec<&str> = words.get_args().map(|word| word.to_str().expect("text")).collect();
    let script = format!("trap '' XFSZ; ulimit -f 40; exec {BINARY} {}", words.join(" "));
    let output = Command::new("sh").args(["-c", &script]).current_dir(&path).output().expect("a run");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cache-frozen on: the cache of the frozen part: cannot write"), "{stderr}");
    let left = std::fs::read_dir(path.join("out")).expect("a directory").count();
    assert_eq!(left, 0, "{stderr}");
}

#[test]
fn every_optimizer_and_the_best_values_go_on_to_the_same_bits() {
    for (rule, more) in [
        ("sgd", "--momentum 0.9 --nesterov --gradient-accumulation-steps 3 --load-best-model-at-end"),
        ("lion", "--lr 1e-4 --eval-steps 7 --load-best-model-at-end --metric-for-best-model eval_accuracy"),
        ("adam", "--gradient-accumulation-steps 2 --eval-strategy end --label-smoothing 0.1"),
    ] {
        let (_dir, path) = digits();
        let more = format!("--optimizer {rule} {more}");
        finished(&path, "alone", &format!("{more} --save-steps 1000"));
        killed(&path, "killed", &more, 4);
        same_bits(&path, "alone", "killed");
    }
}

#[test]
fn a_run_that_ends_early_does_so_after_a_resume_and_keeps_the_best_values() {
    let (_dir, path) = digits();
    let more = "--lr 0.02 --eval-steps 4 --early-stopping-patience 4 --early-stopping-threshold 0.01";
    let best = format!("{more} --load-best-model-at-end");
    finished(&path, "last", &format!("{more} --save-steps 1000"));
    finished(&path, "alone", &format!("{best} --save-steps 1000"));
    killed(&path, "killed", &best, 5);
    same_bits(&path, "alone", "killed");
    assert_eq!(metrics(&path.join("alone")), metrics(&path.join("last")));

    // The evaluations by hand: the last four gain no more than 0.01 on the best before each.
    let text = std::fs::read_to_string(path.join("alone/metrics.jsonl")).expect("metrics");
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).expect("json")).collect();
    let evals: Vec<(usize, f64)> =
        lines.iter().filter_map(|l| Some((l["step"].as_u64()? as usize, l["eval_loss"].as_f64()?))).collect();
    let lowest =
        |evals: &[(usize, f64)]| evals.iter().copied().fold((0, f64::INFINITY), |a, b| if b.1 < a.1 { b } else { a });
    let waited = (1..evals.len()).rev().take_while(|i| lowest(&evals[..*i]).1 - evals[*i].1 <= 0.01).count();
    assert_eq!(waited, 4, "{evals:?}");
    let (step, _) = lowest(&evals);
    let ended = evals.last().expect("an evaluation").0;
    assert!(step < ended && ended < STEPS && checkpoints(&path.join("alone")) == [ended], "{evals:?}");

    // The model has the values that the parameters had at that step.
    finished(&path, "steps", &format!("{best} --save-steps 4"));
    let state =
        std::fs::read(path.join(format!("steps/checkpoint-{step}/training_state.safetensors"))).expect("a file");
    let state = safetensors::SafeTensors::deserialize(&state).expect("tensors");
    let model = |out: &str| std::fs::read(path.join(out).join("injected.onnx")).expect("a file");
    let (alone, last) = (model("alone"), model("last"));
    let holds = |model: &[u8], part: &[u8]| model.windows(part.len()).any(|bytes| bytes == part);
    let values: Vec<_> = state.iter().filter(|(name, _)| name.starts_with("parameter/")).collect();
    assert_eq!(values.len(), 3);
    for (name, value) in values {
        assert!(holds(&alone, value.data()) && !holds(&last, value.data()), "{name}");
    }

    let said = finished(&path, "alone", &format!("{best} --resume"));
    assert!(said.contains(&format!("going on after step {ended}\n")), "{said}");
    let evaluated = finished_json(&path, "alone", &format!("{best} --resume"));
    assert_eq!((evaluated["best"]["step"].as_u64(), &evaluated["stopped_early"]), (Some(step as u64), &true.into()));
}

#[test]
fn ctrl_c_saves_a_checkpoint_and_says_how_to_go_on() {
    let (_dir, path) = digits();
    finished(&path, "alone", "--save-steps 1000");
    // None was asked for, and nothing is there yet.
    let said = interrupted(&path, "out", "--resume", 20);
    let [step] = checkpoints(&path.join("out"))[..] else { panic!("one checkpoint") };
    assert!((18..STEPS).contains(&step), "{step}");
    let hint = format!(
        "interrupted after step {step}: what was trained so far is saved; go on from out/checkpoint-{step} with"
    );
    assert!(said.contains(&hint), "{said}");
    let command = said.lines().find(|line| line.trim_start().starts_with(BINARY)).expect("a command line").trim();
    assert_eq!(command.matches("--resume").count(), 1, "{command}");

    let again = Command::new("sh").args(["-c", &format!("{command} --save-steps 50")]).current_dir(&path).output();
    let stderr = text(&again.expect("a run").stderr);
    assert!(stderr.contains(&format!("going on after step {step}\n")), "{stderr}");
    same(&path, "alone", "out");
}

#[test]
fn a_full_disk_keeps_the_last_good_checkpoint() {
    let (_dir, path) = digits();
    finished(&path, "alone", "--save-steps 1000");
    interrupted(&path, "out", "", 10);
    let [step] = checkpoints(&path.join("out"))[..] else { panic!("one checkpoint") };
    let state = |name: &str| std::fs::read(path.join(format!("out/checkpoint-{step}/{name}"))).expect("a file");
    let before = [state("trainer_state.json"), state("training_state.safetensors")];

    // Files may grow to 40 blocks of 512 bytes: enough for the metrics, too little for a checkpoint.
    let words = command(&path, "out", "--resume --save-steps 1 --save-total-limit 1");
    let words: Vec<&str> = words.get_args().map(|word| word.to_str().expect("text")).collect();
    let script = format!("trap '' XFSZ; ulimit -f 40; exec {BINARY} {}", words.join(" "));
    let output = Command::new("sh").args(["-c", &script]).current_dir(&path).output().expect("a run");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let (next, kept) =
        (format!("out/checkpoint-{}: cannot write", step + 1), format!("out/checkpoint-{step} is whole"));
    assert!(stderr.contains(&next) && stderr.contains(&kept) && stderr.contains("--resume"), "{stderr}");
    assert_eq!(checkpoints(&path.join("out")), [step]);
    assert!(before == [state("trainer_state.json"), state("training_state.safetensors")]);

    finished(&path, "out", "--resume --save-steps 1000");
    same(&path, "alone", "out");
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let (_dir, path) = digits();
    finished(&path, "two", "--save-steps 60 --save-total-limit 2");
    assert_eq!(checkpoints(&path.join("two")), [180, 200]);
    finished(&path, "all", "--save-steps 60");
    assert_eq!(checkpoints(&path.join("all")), [60, 120, 180, 200]);
    finished(&path, "none", "");
    assert_eq!(checkpoints(&path.join("none")), [0; 0]);
}

#[test]
fn what_would_change_the_result_is_refused_by_name() {
    let (_dir, path) = digits();
    interrupted(&path, "out", "", 10);
    let before = (metrics(&path.join("out")), std::fs::read(path.join("out/injected.onnx")).expect("a file"));
    failed(&path, "out", "", &["out holds checkpoints of an earlier run", "--resume"]);
    failed(&path, "out", "--resume --lr 0.5 --head-lr 0.5", &["lr was 0.0001 and is 0.5 now", "head-lr was not given"]);
    failed(&path, "out", "--resume --no-shuffle", &["shuffle was true and is false now"]);
    failed(&path, "out", "--resume --threads 7", &["threads was", "is 7 now"]);

    let data = path.join("train.safetensors");
    let original = std::fs::read(&data).expect("a file");
    let mut changed = original.clone();
    *changed.last_mut().expect("a byte") ^= 1;
    std::fs::write(&data, changed).expect("a file");
    failed(&path, "out", "--resume", &["checkpoint-", "data was 105744 bytes"]);
    assert!(before == (metrics(&path.join("out")), std::fs::read(path.join("out/injected.onnx")).expect("a file")));
    // Back as it was, the run goes on.
    std::fs::write(&data, original).expect("a file");
    finished(&path, "out", "--resume");
}

#[test]
fn a_damaged_checkpoint_is_passed_over_with_a_warning() {
    let (_dir, path) = digits();
    finished(&path, "alone", "--save-steps 40");
    finished(&path, "out", "--save-steps 40");
    let file = |step: usize, name: &str| path.join(format!("out/checkpoint-{step}/{name}"));
    // Cut short; a bit of an array turned over; a digit of a counter changed; a file gone.
    let tensors = std::fs::read(file(200, "training_state.safetensors")).expect("a file");
    std::fs::write(file(200, "training_state.safetensors"), &tensors[..tensors.len() / 2]).expect("a file");
    let mut tensors = std::fs::read(file(160, "training_state.safetensors")).expect("a file");
    *tensors.last_mut().expect("a byte") ^= 1;
    std::fs::write(file(160, "training_state.safetensors"), tensors).expect("a file");
    let state = std::fs::read_to_string(file(120, "trainer_state.json")).expect("a file");
    std::fs::write(file(120, "trainer_state.json"), state.replace("\"updates\": 120", "\"updates\": 121"))
        .expect("a file");
    std::fs::remove_file(file(80, "trainer_state.json")).expect("a file");

    let said = finished(&path, "out", "--resume --save-steps 40");
    for (step, what) in
        [(200, "checksum"), (160, "checksum"), (120, "checksum"), (80, "trainer_state.json cannot be read")]
    {
        let warning =
            said.lines().find(|line| line.contains(&format!("warning: out/checkpoint-{step} is passed over")));
        assert!(warning.is_some_and(|line| line.contains(what)), "{step}: {said}");
    }
    assert!(said.contains("going on after step 40\n"), "{said}");
    assert_eq!(checkpoints(&path.join("out")), [40, 80, 120, 160, 200]);
    same(&path, "alone", "out");

    // The metrics of the last steps are lost: so are their checkpoints.
    let text = std::fs::read_to_string(path.join("out/metrics.jsonl")).expect("metrics");
    std::fs::write(path.join("out/metrics.jsonl"), &text[..text.len() * 9 / 10]).expect("metrics");
    let said = finished(&path, "out", "--resume --save-steps 40");
    assert!(
        said.contains("out/checkpoint-200 is passed over: metrics.jsonl") && said.contains("after step 160\n"),
        "{said}"
    );
    same(&path, "alone", "out");

    std::fs::remove_file(path.join("out/metrics.jsonl")).expect("metrics");
    failed(&path, "out", "--resume", &["none of the checkpoints is whole"]);
    assert_eq!(checkpoints(&path.join("out")).len(), 5);
}
