//! Errors that the user can fix: one sentence and an exit code.

use std::fmt;

/// The command line is wrong (`EX_USAGE` of sysexits.h).
pub const USAGE: u8 = 64;
/// A file, a permission, a port or a link on this host is missing or wrong (`EX_CONFIG`).
pub const CONFIGURATION: u8 = 78;

/// An error that the user can fix: what is wrong, where, and what to do.
///
/// Any other error that ends the program gives exit code 1.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// The exit code, [`USAGE`] or [`CONFIGURATION`].
    pub code: u8,
    /// One sentence.
    pub sentence: String,
}

impl Refusal {
    /// Refuses the command line.
    pub fn usage(sentence: impl Into<String>) -> Self {
        Self {
            code: USAGE,
            sentence: sentence.into(),
        }
    }

    /// Refuses the state of this host or of the cluster.
    pub fn configuration(sentence: impl Into<String>) -> Self {
        Self {
            code: CONFIGURATION,
            sentence: sentence.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Refusal {}

/// The exit code for an error: that of a [`Refusal`] anywhere in its chain, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Refusal>())
        .map_or(1, |refusal| refusal.code)
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_refusal_keeps_its_code_under_context() {
        let error = Err::<(), _>(Refusal::configuration("the key file is empty"))
            .context("starting")
            .unwrap_err();

        assert_eq!(exit_code(&error), CONFIGURATION);
        assert_eq!(exit_code(&anyhow::anyhow!("netlink: busy")), 1);
    }
}
