//! The program: arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    selvedge::cli::main(std::env::args_os())
}
