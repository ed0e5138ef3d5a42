//! End-to-end claims that share one expensive lab: each is a named step, run in order, reported as
//! the standard test runner reports tests.
//!
//! Test binaries with `harness = false` use it. They accept what the standard runner accepts of
//! names to select by; its other flags change nothing here.
#![expect(
    clippy::print_stdout,
    reason = "this is a test runner: it reports on stdout"
)]

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

/// Runs steps and remembers how they ended.
#[derive(Debug)]
pub struct Steps {
    title: String,
    filters: Vec<String>,
    start: Instant,
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Steps {
    /// A runner for the test binary `title`, which selects steps as the command line says.
    #[must_use]
    pub fn from_args(title: &str) -> Self {
        let mut arguments = std::env::args().skip(1);
        let mut filters = Vec::new();
        while let Some(argument) = arguments.next() {
            // The standard runner's flags that have a value of their own.
            if ["--test-threads", "--skip", "--format", "--color"].contains(&argument.as_str()) {
                arguments.next();
            } else if argument == "--list" {
                println!("{title}: test");
                std::process::exit(0);
            } else if !argument.starts_with('-') {
                filters.push(argument);
            }
        }
        println!("\nrunning the steps of {title}");
        Self {
            title: title.to_owned(),
            filters,
            start: Instant::now(),
            passed: 0,
            skipped: 0,
            failed: Vec::new(),
        }
    }

    /// Runs one step unless it is filtered out; its result text is printed beside its name.
    ///
    /// A panic counts as a failure, and the following steps still run.
    pub fn step(&mut self, name: &str, claim: impl FnOnce() -> anyhow::Result<String>) {
        let selected =
            self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter));
        if !selected {
            self.skipped += 1;
            return;
        }
        self.required(name, claim);
    }

    /// Whether a group of steps, whose names start with `group::`, is asked for at all.
    #[must_use]
    pub fn selects(&self, group: &str) -> bool {
        let wanted = |filter: &String| {
            let outer = filter.split("::").next().unwrap_or_default();
            group.contains(outer)
        };
        self.filters.is_empty() || self.filters.iter().any(wanted)
    }

    /// Runs a step that the following ones depend on, whatever was selected.
    ///
    /// Returns what it made, or `None` when it failed.
    pub fn required<T: Outcome>(
        &mut self,
        name: &str,
        claim: impl FnOnce() -> anyhow::Result<T>,
    ) -> Option<T> {
        print!("test {name} ... ");
        // Seen while it runs, also where standard output is a pipe.
        let _ = std::io::stdout().flush();
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(claim));
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(Ok(value)) => {
                self.passed += 1;
                let detail = value.detail();
                let separator = if detail.is_empty() { "" } else { "; " };
                println!("ok ({seconds:.1} s{separator}{detail})");
                Some(value)
            }
            Ok(Err(error)) => {
                self.fail(name, seconds, &format!("{error:#}"));
                None
            }
            Err(_) => {
                self.fail(name, seconds, "panicked, see above");
                None
            }
        }
    }

    /// Prints the closing line and gives the exit code.
    #[must_use]
    pub fn finish(self) -> ExitCode {
        let Self {
            title,
            start,
            passed,
            skipped,
            failed,
            ..
        } = self;
        if !failed.is_empty() {
            println!("\nfailures of {title}:");
            for name in &failed {
                println!("    {name}");
            }
        }
        let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
        println!(
            "\ntest result: {verdict}. {passed} passed; {} failed; 0 ignored; 0 measured; \
             {skipped} filtered out; finished in {:.2}s\n",
            failed.len(),
            start.elapsed().as_secs_f64()
        );
        if failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn fail(&mut self, name: &str, seconds: f64, reason: &str) {
        self.failed.push(name.to_owned());
        println!(
            "FAILED ({seconds:.1} s)\n    {}",
            reason.replace('\n', "\n    ")
        );
    }
}

/// What a step leaves, and what to print of it.
pub trait Outcome {
    /// A few words beside the step's name; may be empty.
    fn detail(&self) -> String;
}

impl Outcome for String {
    fn detail(&self) -> String {
        self.clone()
    }
}

impl Outcome for crate::Lab {
    fn detail(&self) -> String {
        format!("{} nodes", self.network().nodes().len())
    }
}
