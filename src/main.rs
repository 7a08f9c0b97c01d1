//! The `exo-node` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    exo::cli::main()
}
