//! The node's private keys on disk: the current one and, while it is replaced, a second one.
//!
//! Each step is one atomic change of a file, or resumes at the next start. What is decided by which evidence is in
//! [`super::key_rotation`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::key_rotation::{KeyStep, OwnKeys};
use super::keyfile::{self, Origin};
use crate::refusal::Refusal;
use crate::secure_file;
use crate::topology::OtherKeys;
use crate::wireguard::key::PrivateKey;

/// The files below `--state-dir`.
const CURRENT: &str = "key";
const NEXT: &str = "key.next";
const PREVIOUS: &str = "key.previous";
/// A retired key that is being erased.
const RETIRED: &str = ".key.retired";

/// The private keys of the node.
pub struct KeyRing {
    dir: PathBuf,
    kilo: PathBuf,
    current: PrivateKey,
    next: Option<PrivateKey>,
    previous: Option<PrivateKey>,
    since: i64,
}

impl KeyRing {
    /// Reads the keys from `state_dir`; makes one there, from Kilo's where that exists, if there is none yet.
    ///
    /// # Errors
    /// A key that others could have read or written, or that is damaged.
    pub fn load(state_dir: &Path, kilo: &Path) -> Result<(Self, Origin), Refusal> {
        let (current, origin) = keyfile::load(state_dir, kilo)?;
        let mut ring = Self {
            dir: state_dir.to_owned(),
            kilo: kilo.to_owned(),
            next: keyfile::read(&state_dir.join(NEXT))?,
            previous: keyfile::read(&state_dir.join(PREVIOUS))?,
            since: modified(&state_dir.join(CURRENT)),
            current,
        };
        ring.resume().map_err(|error| {
            Refusal::configuration(format!(
                "cannot go on with the replacement of the key in {}: {error}",
                state_dir.display()
            ))
        })?;
        Ok((ring, origin))
    }

    /// Ends a step during which the agent ended.
    fn resume(&mut self) -> io::Result<()> {
        if self.previous.as_ref() == Some(&self.current) {
            // Before the next key took its place.
            secure_file::remove(&self.dir.join(PREVIOUS))?;
            self.previous = None;
        }
        if self.next.as_ref() == Some(&self.current) {
            secure_file::remove(&self.dir.join(NEXT))?;
            self.next = None;
        }
        self.erase_retired()
    }

    /// The public keys.
    pub fn public(&self) -> OwnKeys {
        OwnKeys {
            current: self.current.public_key(),
            others: OtherKeys {
                next: self.next.as_ref().map(PrivateKey::public_key),
                previous: self.previous.as_ref().map(PrivateKey::public_key),
            },
            since: self.since,
        }
    }

    /// The current key, and the other one that the tunnel answers under.
    pub fn identities(&self) -> (PrivateKey, Option<PrivateKey>) {
        let other = self.next.as_ref().or(self.previous.as_ref());
        (self.current.clone(), other.cloned())
    }

    /// The files that hold the current key.
    pub fn holders(&self) -> Vec<PathBuf> {
        keyfile::holders(&self.current, &self.dir, &self.kilo)
    }

    /// Makes a step. A step that is done already changes nothing.
    ///
    /// # Errors
    /// The error of the disk; the step can be made again.
    pub fn step(&mut self, step: KeyStep) -> io::Result<()> {
        match step {
            KeyStep::Make => self.make(),
            KeyStep::Switch => self.switch(),
            KeyStep::Retire => self.retire(),
        }
    }

    fn make(&mut self) -> io::Result<()> {
        if self.next.is_none() {
            let next = PrivateKey::generate();
            self.write(NEXT, &next)?;
            self.next = Some(next);
        }
        Ok(())
    }

    fn switch(&mut self) -> io::Result<()> {
        let Some(next) = self.next.clone() else {
            return Ok(());
        };
        self.write(PREVIOUS, &self.current)?;
        self.write(CURRENT, &next)?;
        self.previous = Some(std::mem::replace(&mut self.current, next));
        self.next = None;
        self.since = modified(&self.dir.join(CURRENT));
        secure_file::remove(&self.dir.join(NEXT))
    }

    fn retire(&mut self) -> io::Result<()> {
        let Some(previous) = self.previous.clone() else {
            return self.erase_retired();
        };
        match fs::rename(self.dir.join(PREVIOUS), self.dir.join(RETIRED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        self.previous = None;
        // Kilo's copy would be taken over if the own file were lost.
        if matches!(keyfile::read(&self.kilo), Ok(Some(found)) if found == previous)
            && let Err(error) = erase(&self.kilo)
        {
            let path = self.kilo.display();
            tracing::warn!(%path, %error, "erasing Kilo's copy of the retired key failed: remove it");
        }
        self.erase_retired()
    }

    fn erase_retired(&self) -> io::Result<()> {
        erase(&self.dir.join(RETIRED))?;
        File::open(&self.dir)?.sync_all()
    }

    fn write(&self, name: &str, key: &PrivateKey) -> io::Result<()> {
        secure_file::replace(&self.dir, name, key.to_base64().as_bytes())
    }
}

/// Overwrites a file with zeros and removes it. A file system that never writes in place keeps the old blocks until
/// it needs them. A missing file is no error.
fn erase(path: &Path) -> io::Result<()> {
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path);
    let mut file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let length = usize::try_from(file.metadata()?.len())
        .unwrap_or(0)
        .min(4096);
    file.write_all(&vec![0; length])?;
    file.sync_all()?;
    secure_file::remove(path)
}

/// When a file was last written, in Unix seconds; 0 where that is not known.
fn modified(path: &Path) -> i64 {
    fs::metadata(path).map_or(0, |metadata| metadata.mtime())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(dir: &tempfile::TempDir) -> KeyRing {
        let state = dir.path().join("selvedge");
        KeyRing::load(&state, &dir.path().join("kilo-key"))
            .unwrap()
            .0
    }

    fn files(dir: &tempfile::TempDir) -> Vec<String> {
        let entries = fs::read_dir(dir.path().join("selvedge")).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn each_step_is_on_disk_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let mut ring = load(&dir);
        let first = ring.public().current;
        for (step, expected) in [
            (KeyStep::Make, &["key", "key.next"][..]),
            (KeyStep::Switch, &["key", "key.previous"]),
            (KeyStep::Retire, &["key"]),
        ] {
            ring.step(step).unwrap();
            assert_eq!(files(&dir), expected);
            assert_eq!(load(&dir).public(), ring.public(), "{step:?}");
            // A step that is asked for twice is made once.
            if step != KeyStep::Make {
                ring.step(step).unwrap();
                assert_eq!(load(&dir).public(), ring.public(), "{step:?}");
            }
        }
        assert_ne!(ring.public().current, first);
        assert_eq!(ring.public().others, OtherKeys::default());
    }

    #[test]
    fn a_crash_between_two_files_resumes_where_the_step_was() {
        let dir = tempfile::tempdir().unwrap();
        let mut ring = load(&dir);
        ring.step(KeyStep::Make).unwrap();
        let before = ring.public();
        // The previous key is written, the next one is not yet the current one.
        ring.write(PREVIOUS, &ring.current).unwrap();
        assert_eq!(load(&dir).public(), before);
        assert_eq!(files(&dir), ["key", "key.next"]);
        // The current one is written, and the next one is still there.
        ring.write(PREVIOUS, &ring.current).unwrap();
        ring.write(CURRENT, ring.next.as_ref().unwrap()).unwrap();
        let after = load(&dir).public();
        assert_eq!(Some(after.current), before.others.next);
        assert_eq!(after.others.previous, Some(before.current));
        assert_eq!(files(&dir), ["key", "key.previous"]);
        // The retired one is being erased.
        let state = dir.path().join("selvedge");
        fs::rename(state.join(PREVIOUS), state.join(RETIRED)).unwrap();
        assert_eq!(load(&dir).public().others, OtherKeys::default());
        assert_eq!(files(&dir), ["key"]);
    }

    #[test]
    fn kilos_copy_of_a_retired_key_is_erased_and_another_key_of_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let kilo = dir.path().join("kilo-key");
        let key = PrivateKey::generate();
        secure_file::replace(dir.path(), "kilo-key", key.to_base64().as_bytes()).unwrap();
        let mut ring = load(&dir);
        assert_eq!(ring.public().current, key.public_key());
        for step in [KeyStep::Make, KeyStep::Switch] {
            ring.step(step).unwrap();
            assert!(kilo.exists());
        }
        ring.step(KeyStep::Retire).unwrap();
        assert!(!kilo.exists());
        let other = PrivateKey::generate();
        secure_file::replace(dir.path(), "kilo-key", other.to_base64().as_bytes()).unwrap();
        for step in [KeyStep::Make, KeyStep::Switch, KeyStep::Retire] {
            ring.step(step).unwrap();
        }
        assert!(kilo.exists());
    }
}
