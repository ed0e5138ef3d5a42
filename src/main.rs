//! The program's entry point.

use std::process::ExitCode;

fn main() -> ExitCode {
    selvedge::cli::main(std::env::args_os())
}
