//! Gradients against central finite differences (every rule, whole models, second derivatives) and against PyTorch.

mod cases;
mod dropout;
mod gelu;
mod harness;
mod left_out;
mod loops;
mod peer;
mod quality;
mod recurrent;
mod registry;
mod second;
mod sequences;
mod subgradients;
mod table;
mod torch;
mod whole;

#[test]
fn every_case_agrees_with_differences() {
    let filter = std::env::var("CASE").unwrap_or_default();
    let failures: Vec<String> =
        cases::all().iter().filter(|c| c.op.contains(&filter)).filter_map(|case| case.check().err()).collect();
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}
