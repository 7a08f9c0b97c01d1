//! `exo-node`: the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    exo::cli::main()
}
