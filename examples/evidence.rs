//! `make evidence`: runs the table of attacks and field reports, and prints one line for each case.
//!
//! The cases are in `docs/evidence.md`: a number, the attack or fault, the test of the present behaviour, and the
//! control that shows that the test can fail. A case passes when its test and its control pass. Arguments select
//! cases by a prefix of their number (`1.`, `3.6`).
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "it runs the tests and prints a table"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Longest title of a case in a line of the table, in characters.
const TITLE: usize = 66;

/// A row of the table.
struct Case {
    number: String,
    title: String,
    test: Test,
    /// `None` where the test contains its control.
    control: Option<Test>,
}

/// A test: `lib` or the name of a test binary, and the name of the function or the step.
#[derive(Clone, Eq, Ord, PartialEq, PartialOrd)]
struct Test {
    binary: String,
    name: String,
}

/// The outcome of a test.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Outcome {
    Passed,
    Failed,
    Missing,
}

impl Outcome {
    const fn word(self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::Failed => "FAIL",
            Self::Missing => "NOT RUN",
        }
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let table = fs::read_to_string(Path::new(ROOT).join("docs/evidence.md"))?;
    let mut cases = cases(&table)?;
    cases.retain(|case| {
        let starts = |wanted: &String| case.number.starts_with(wanted.as_str());
        wanted.is_empty() || wanted.iter().any(starts)
    });
    ensure!(!cases.is_empty(), "no case begins with any of {wanted:?}");

    let mut tests = BTreeMap::<&str, BTreeSet<&str>>::new();
    let all = cases
        .iter()
        .flat_map(|case| [Some(&case.test), case.control.as_ref()])
        .flatten();
    for Test { binary, name } in all {
        tests.entry(binary).or_default().insert(name);
    }
    let mut outcomes = BTreeMap::new();
    for (binary, names) in &tests {
        let output = run(binary, names)?;
        for name in names {
            outcomes.insert((*binary, *name), outcome(&output, name));
        }
    }

    let of = |test: &Test| outcomes[&(test.binary.as_str(), test.name.as_str())];
    let mut passed = 0;
    let mut controls = 0;
    println!(
        "\n{:<6} {:<TITLE$}  {:<8} control",
        "case", "attack or fault", "result"
    );
    for case in &cases {
        let result = of(&case.test);
        let control = case.control.as_ref().map_or(result, of);
        let title: String = case.title.chars().take(TITLE).collect();
        let inside = if case.control.is_none() {
            " (in it)"
        } else {
            ""
        };
        println!(
            "{:<6} {title:<TITLE$}  {:<8} {}{inside}",
            case.number,
            result.word(),
            control.word(),
        );
        passed += usize::from(result == Outcome::Passed && control == Outcome::Passed);
        controls += usize::from(control == Outcome::Passed);
    }
    println!(
        "\n{passed} of {} cases pass, {controls} with a control that works",
        cases.len()
    );
    Ok(if passed == cases.len() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Reads the rows: `| number | title | binary: test | control |`.
fn cases(table: &str) -> anyhow::Result<Vec<Case>> {
    let rows = table.lines().filter(|line| {
        let number = line.strip_prefix("| ");
        number.is_some_and(|number| number.starts_with(|c: char| c.is_ascii_digit()))
    });
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [number, title, test, control] = cells[..] else {
            bail!("not four cells: {row}");
        };
        let control = match control {
            "in it" => None,
            control => Some(read(control).with_context(|| row.to_owned())?),
        };
        Ok(Case {
            number: number.to_owned(),
            title: title.to_owned(),
            test: read(test).with_context(|| row.to_owned())?,
            control,
        })
    })
    .collect()
}

/// Reads a test: the binary, a colon, and the name between backticks.
fn read(cell: &str) -> anyhow::Result<Test> {
    let (binary, name) = cell.split_once(": `").context("no binary and name")?;
    let name = name
        .strip_suffix('`')
        .context("no name between backticks")?;
    Ok(Test {
        binary: binary.to_owned(),
        name: name.to_owned(),
    })
}

/// Runs the tests of one binary, and returns their output.
fn run(binary: &str, names: &BTreeSet<&str>) -> anyhow::Result<String> {
    let logs = PathBuf::from(ROOT).join("target/evidence");
    fs::create_dir_all(&logs)?;
    let log = logs.join(format!("{binary}.log"));
    println!("{binary}: {} tests, {}", names.len(), log.display());
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(ROOT).arg("test");
    match binary {
        "lib" => command.arg("--lib"),
        binary => command.args(["--test", binary]),
    };
    command.arg("--").args(names).arg("--format=pretty");
    // Separate, so that errors of programs do not split a test's line.
    command.stdout(File::create(&log)?);
    command.stderr(File::create(log.with_extension("err"))?);
    // The output shows which tests passed.
    command.status().context("running cargo")?;
    Ok(fs::read_to_string(&log)?)
}

/// The outcome of a test, from the lines of its runner: `test path::name ... ok`. A test that runs for
/// several pairs of programs passes when it passes for each.
fn outcome(output: &str, name: &str) -> Outcome {
    let lines = output.lines().filter_map(|line| line.strip_prefix("test "));
    let results: Vec<_> = lines
        .filter_map(|line| {
            let (path, result) = line.split_once(" ... ")?;
            let path = path.split(" - ").next().unwrap_or(path);
            (path == name || path.rsplit("::").next() == Some(name)).then_some(result)
        })
        .collect();
    if results.is_empty() {
        Outcome::Missing
    } else if results.iter().all(|result| result.starts_with("ok")) {
        Outcome::Passed
    } else {
        Outcome::Failed
    }
}
