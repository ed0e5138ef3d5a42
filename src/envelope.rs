//! The envelope of the files in the state directory: a format number and a checksum around the content.

use anyhow::{Context as _, ensure};
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The envelope of a file: its format and checksum, and the content.
#[derive(Deserialize, Serialize)]
pub(crate) struct Envelope<'a> {
    format: u32,
    /// SHA-256 of the text of `state`, in hexadecimal.
    sha256: String,
    #[serde(borrow)]
    state: &'a RawValue,
}

impl<'a> Envelope<'a> {
    /// Puts `state` into an envelope of this `format`.
    pub(crate) fn new(format: u32, state: &'a RawValue) -> Self {
        Self {
            format,
            sha256: checksum(state),
            state,
        }
    }

    /// Reads the state from the text of an envelope of this `format`.
    ///
    /// # Errors
    ///
    /// The text is damaged or has another format. No error quotes it, because it may hold preshared
    /// keys.
    pub(crate) fn open(text: &'a str, format: u32) -> anyhow::Result<&'a RawValue> {
        // Errors of serde quote the text, so they are dropped.
        let envelope: Self = serde_json::from_str(text).ok().context("it is damaged")?;
        ensure!(
            envelope.format == format,
            "it has format {}, and this version reads format {format}",
            envelope.format
        );
        ensure!(
            envelope.sha256 == checksum(envelope.state),
            "its checksum is wrong"
        );
        Ok(envelope.state)
    }
}

fn checksum(state: &RawValue) -> String {
    let digest = digest(&SHA256, state.get().as_bytes());
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
