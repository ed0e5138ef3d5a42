//! The envelope of the files in the state directory: a format number and a checksum around the content.

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

/// How a file of the state directory begins: with what tells whether the rest may be believed.
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

    /// Takes the state out of the text of an envelope of this `format`.
    ///
    /// # Errors
    ///
    /// When the text is damaged or of another format. No error repeats any of it, because there may be
    /// preshared keys in it.
    pub(crate) fn open(text: &'a str, format: u32) -> anyhow::Result<&'a RawValue> {
        // Errors of serde quote the text.
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
    let digest = Sha256::digest(state.get().as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
