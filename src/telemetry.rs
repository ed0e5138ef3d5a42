//! Logs, metrics and the HTTP pages for probes and people.

pub mod metrics;

use std::io::{self, Write};
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::text;

/// `--log-level`, in Kilo's words.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogLevel {
    /// Everything, packets included.
    All,
    /// What helps to find a fault.
    Debug,
    /// Changes: one line each, none while nothing happens.
    #[default]
    Info,
    /// What someone should look at.
    Warn,
    /// What failed.
    Error,
    /// Nothing.
    None,
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "debug" => Ok(Self::Debug),
            "info" => Ok(Self::Info),
            "warn" => Ok(Self::Warn),
            "error" => Ok(Self::Error),
            "none" => Ok(Self::None),
            _ => Err("unknown; possible values are: all, debug, info, warn, error, none".into()),
        }
    }
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("unknown; possible values are: text, json".into()),
        }
    }
}

/// Starts logging to stderr; later calls change nothing.
pub fn start_logging(level: LogLevel, format: LogFormat) {
    let level = match level {
        LogLevel::All => LevelFilter::TRACE,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::None => LevelFilter::OFF,
    };
    // Libraries speak up only when something is wrong with them.
    let others = level.min(LevelFilter::WARN);
    // kube's client logs every request that fails as an error, and hands the error on as well.
    let filter = Targets::new()
        .with_default(others)
        .with_target("selvedge", level)
        .with_target("kube_client", LevelFilter::OFF);
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(move || Fit::new(io::stderr(), format))
        .with_target(false);
    // An error means that a subscriber is there already, as in tests.
    let _ = match format {
        LogFormat::Text => subscriber.with_ansi(false).finish().with(filter).try_init(),
        LogFormat::Json => {
            let subscriber = subscriber.json().flatten_event(true);
            subscriber.finish().with(filter).try_init()
        }
    };
}

/// Writes lines of the log fit to be shown: whatever a field holds, a line stays one line and drives no
/// terminal.
struct Fit<W> {
    out: W,
    format: LogFormat,
}

impl<W: Write> Fit<W> {
    fn new(out: W, format: LogFormat) -> Self {
        Self { out, format }
    }
}

impl<W: Write> Write for Fit<W> {
    /// Takes all of it: the subscriber writes each line with one call.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        let body = line.strip_suffix('\n');
        let shown = match self.format {
            LogFormat::Text => text::line(body.unwrap_or(&line)),
            LogFormat::Json => text::json(body.unwrap_or(&line)),
        };
        // One write to the terminal or the pipe, so that lines of several threads do not mix.
        let end = if body.is_some() { "\n" } else { "" };
        self.out.write_all(format!("{shown}{end}").as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str, format: LogFormat) -> String {
        let mut out = Vec::new();
        let mut fit = Fit::new(&mut out, format);
        fit.write_all(text.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_region_that_turns_text_around_turns_no_log_line() {
        let line = "INFO region=n\u{202e}d\nWARN forged\n";
        assert_eq!(
            written(line, LogFormat::Text),
            "INFO region=n\\u{202e}d\\nWARN forged\n"
        );
        let json = "{\"region\":\"n\u{202e}d\"}\n";
        assert_eq!(
            written(json, LogFormat::Json),
            "{\"region\":\"n\\u202ed\"}\n"
        );
    }
}
