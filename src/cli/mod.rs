//! The command line: parse, call the library, print. People's text and progress go to stderr, results to stdout.

mod adapter;
mod data;
mod doctor;
mod engine;
mod fold;
mod grad;
mod inject;
mod inspect;
mod printer;
mod quickstart;
mod train;
mod unload;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::Result;
use printer::Printer;

/// Fine-tune ONNX files: inject Bone adapters, train them, fold them back. No PyTorch.
#[derive(Parser)]
#[command(name = "bone-onnx", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Print one JSON object to stdout and nothing else there.
    #[arg(long, global = true)]
    json: bool,

    /// No progress and no remarks, only results and errors.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    Inspect(inspect::Args),
    Inject(Box<inject::Args>),
    Train(Box<train::Args>),
    Fold(fold::Args),
    Unload(unload::Args),
    Adapter(adapter::Args),
    Grad(grad::Args),
    Verify(verify::Args),
    Doctor(doctor::Args),
    Quickstart(quickstart::Args),
}

/// Runs the command line. Exit codes: 0 done, 1 failed (bad input, I/O, verification), 2 usage.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // What the engines say of themselves, for those who look for a fault: BONE_ONNX_LOG=debug.
    let filter = EnvFilter::try_from_env("BONE_ONNX_LOG").unwrap_or_else(|_| EnvFilter::new("off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let printer = Printer::new(cli.json, cli.quiet);
    match run(cli.command, &printer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            printer.error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, printer: &Printer) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect::run(args, printer),
        Command::Inject(args) => inject::run(*args, printer),
        Command::Train(args) => train::run(*args, printer),
        Command::Fold(args) => fold::run(args, printer),
        Command::Adapter(args) => adapter::run(args, printer),
        Command::Unload(args) => unload::run(args, printer),
        Command::Grad(args) => grad::run(args, printer),
        Command::Verify(args) => verify::run(args, printer),
        Command::Doctor(args) => doctor::run(args, printer),
        Command::Quickstart(args) => quickstart::run(args, printer),
    }
}
