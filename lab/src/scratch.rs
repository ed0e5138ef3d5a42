//! Directories for the files of a lab, removed with the value that stands for them.
//!
//! With `SELVEDGE_LAB_KEEP` in the environment they stay, logs and captures with them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::netns::unique_prefix;

/// A directory that is removed, with all in it, when the value is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    keep: bool,
}

/// Makes a directory of a unique name below the system's directory for temporary files.
///
/// # Errors
///
/// When the directory cannot be made.
pub fn scratch(label: &str) -> anyhow::Result<Scratch> {
    Scratch::at(std::env::temp_dir().join(format!("selvedge-{label}-{}", unique_prefix())))
}

impl Scratch {
    /// Makes exactly this directory.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn at(path: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir_all(&path)?;
        Ok(Self { path, keep: false })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves it there when the value is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep && std::env::var_os("SELVEDGE_LAB_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
