//! `adapter`: the adapters of a model, one by one, and their way in and out.

mod change;
mod convert;
mod export;
mod import;
mod list;

pub use list::describe;

use super::printer::Printer;
use crate::Result;

/// List, activate, delete, rename, import, export or convert adapters
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    List(list::Args),
    Activate(change::Activate),
    Delete(change::Delete),
    Rename(change::Rename),
    Import(import::Args),
    Export(export::Args),
    Convert(convert::Args),
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    match args.command {
        Command::List(args) => list::run(args, printer),
        Command::Activate(args) => change::activate(args, printer),
        Command::Delete(args) => change::delete(args, printer),
        Command::Rename(args) => change::rename(args, printer),
        Command::Import(args) => import::run(args, printer),
        Command::Export(args) => export::run(args, printer),
        Command::Convert(args) => convert::run(args, printer),
    }
}
