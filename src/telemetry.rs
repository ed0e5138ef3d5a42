//! Logs and metrics.

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
    /// Details that help to find a fault.
    Debug,
    /// Changes, one line each; no lines while nothing happens.
    #[default]
    Info,
    /// What an operator should look at.
    Warn,
    /// Failures.
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
    // Libraries log warnings and errors only.
    let others = level.min(LevelFilter::WARN);
    // kube's client logs every failed request as an error, and returns the error too.
    let filter = Targets::new()
        .with_default(others)
        .with_target("selvedge", level)
        .with_target("kube_client", LevelFilter::OFF);
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(move || EscapingWriter::new(io::stderr(), format))
        .with_target(false);
    // An error means that a subscriber is already installed, as in tests.
    let _ = match format {
        LogFormat::Text => subscriber.with_ansi(false).finish().with(filter).try_init(),
        LogFormat::Json => {
            let subscriber = subscriber.json().flatten_event(true);
            subscriber.finish().with(filter).try_init()
        }
    };
}

/// Escapes log lines: a field cannot add a line or control a terminal.
struct EscapingWriter<W> {
    out: W,
    format: LogFormat,
}

impl<W: Write> EscapingWriter<W> {
    fn new(out: W, format: LogFormat) -> Self {
        Self { out, format }
    }
}

impl<W: Write> Write for EscapingWriter<W> {
    /// Writes all bytes: the subscriber writes each line in one call.
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
        let mut writer = EscapingWriter::new(&mut out, format);
        writer.write_all(text.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_region_with_bidirectional_marks_is_escaped_in_the_log() {
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
