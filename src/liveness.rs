//! Decides from probes which leaders carry traffic. Pure: time is passed in.
