//! Logs, metrics and the HTTP pages for probes and people.

pub mod metrics;
pub mod pages;
mod visitors;

use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

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
        .with_writer(std::io::stderr)
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
