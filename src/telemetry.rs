//! Logs, metrics and the HTTP pages for probes and people.
