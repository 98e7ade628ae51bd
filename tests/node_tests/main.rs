//! The ONNX backend node tests as a proof of the gradient rules: every case's vector-Jacobian product against central
//! differences, with ONNX Runtime's optimizations off and on. `scripts/node_tests.py` makes the cases; what came out is
//! in `fixtures/node_tests/manifest.tsv` and `docs/OPS.md`, which `scripts/node_tests.py --report` writes anew.

mod case;
mod check;
mod point;
mod report;
mod runner;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bone_onnx::autodiff::{Rule, Rules};
use case::Case;
use check::{Kind, Outcome, check};
use report::Row;

/// The folder that `scripts/node_tests.py` names, where it is there.
fn cases() -> Option<PathBuf> {
    let named = std::env::var_os("BONE_ONNX_NODE_TESTS").map(PathBuf::from);
    let cached = || Some(PathBuf::from(std::env::var_os("BONE_ONNX_CACHE")?).join("node-tests-onnx-1.23.2-1"));
    named.or_else(cached).filter(|root| root.join("complete").is_file())
}

fn run(root: &std::path::Path) -> BTreeMap<String, Row> {
    let filter = std::env::var("CASE").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(root)
        .expect("the cases")
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.is_dir() && p.to_string_lossy().contains(&filter))
        .collect();
    dirs.sort();
    let rules = Rules::standard();
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(dir) = dirs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let name = dir.file_name().expect("a name").to_string_lossy().into_owned();
                    if std::env::var_os("BONE_ONNX_NODE_TESTS_TRACE").is_some() {
                        eprintln!("{name}");
                    }
                    let (model, outcome) = match Case::read(dir) {
                        Ok(case) => (case.model.clone(), check(&case, &rules)),
                        Err(unread) => {
                            let (model, why) = *unread;
                            (model, Outcome::new(Kind::NoTensors, why))
                        }
                    };
                    rows.lock().expect("the rows").insert(name, Row::new(&model, outcome));
                }
            });
        }
    });
    rows.into_inner().expect("the rows")
}

#[test]
fn every_node_test_comes_out_as_recorded() {
    let Some(root) = cases() else {
        eprintln!(
            "skipped: no node tests in the cache; run scripts/node_tests.py and set BONE_ONNX_NODE_TESTS to what it prints"
        );
        return;
    };
    let rows = run(&root);
    println!("{}", report::counts(&rows));
    println!("{}", report::open(&rows));
    if std::env::var_os("BONE_ONNX_NODE_TESTS_REPORT").is_some() {
        report::write(&rows);
        return;
    }
    let recorded = report::recorded();
    let mut changed = Vec::new();
    for (name, row) in &rows {
        let now = row.line();
        let then = recorded.get(name).cloned().unwrap_or_default();
        if now != then {
            changed.push(format!("{name}: recorded {then:?}, now {now:?} {}", row.outcome.detail));
        }
    }
    assert!(
        changed.is_empty(),
        "{} cases differ from the record (scripts/node_tests.py --report writes it anew):\n{}",
        changed.len(),
        changed.join("\n")
    );
}

/// The proof can fail: the same case with a rule that is wrong by a factor, and with one that says zero.
#[test]
fn wrong_rules_are_seen() {
    let Some(root) = cases() else { return };
    let case = Case::read(&root.join("test_tanh")).unwrap_or_else(|unread| panic!("{}", unread.1));
    assert_eq!(check(&case, &Rules::standard()).kind, Kind::Pass);
    let scaled = Rule::vjp(|v| v.first(v.mul(v.dy()?, v.c(0.99))));
    for wrong in [scaled, Rule::Zero("is said to be constant")] {
        assert_eq!(check(&case, &Rules::standard().with("", "Tanh", wrong)).kind, Kind::Fail);
    }
}
