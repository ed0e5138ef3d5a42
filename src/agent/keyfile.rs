//! The node's private key on disk.
//!
//! The key is the node's identity in the mesh: it is written once, atomically, and never replaced
//! because it could not be read.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use zeroize::Zeroizing;

use super::private;
use crate::refusal::Refusal;
use crate::wireguard::key::PrivateKey;

/// Kilo's key, taken over so that a node keeps its identity when the agent is swapped.
pub const KILO_KEY: &str = "/var/lib/kilo/key";

/// The file's name below `--state-dir`.
const NAME: &str = "key";
/// A key is 44 bytes; whatever is longer than this was never one.
const MAX_SIZE: u64 = 4096;

/// Where a key came from, for the log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Origin {
    /// It was there.
    Existing,
    /// It was Kilo's.
    Kilo,
    /// It is new.
    Generated,
}

/// Reads the node's key from `state_dir`; makes one there, from Kilo's where that exists, if there is
/// none yet.
pub fn load(state_dir: &Path, kilo: &Path) -> Result<(PrivateKey, Origin), Refusal> {
    let path = state_dir.join(NAME);
    if let Some(key) = read(&path)? {
        return Ok((key, Origin::Existing));
    }
    secure_directory(state_dir)?;
    let (key, origin) = match read(kilo)? {
        Some(key) => (key, Origin::Kilo),
        None => (PrivateKey::generate(), Origin::Generated),
    };
    private::replace(state_dir, NAME, key.to_base64().as_bytes()).map_err(|error| {
        Refusal::configuration(format!(
            "cannot write the private key {}: {error}: make --state-dir a writable directory",
            path.display()
        ))
    })?;
    Ok((key, origin))
}

/// The key in `path`, or `None` where there is no such file.
fn read(path: &Path) -> Result<Option<PrivateKey>, Refusal> {
    let shown = path.display();
    let refuse = |what: String| Err(Refusal::configuration(what));
    let file = match private::open(path) {
        Ok(Some(file)) => file,
        Ok(None) => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return refuse(format!(
                "the private key {shown} is a symbolic link: put the file itself there"
            ));
        }
        Err(error) => return refuse(format!("cannot read the private key {shown}: {error}")),
    };
    let metadata = file.metadata().map_err(|error| {
        Refusal::configuration(format!("cannot read the private key {shown}: {error}"))
    })?;
    if !metadata.is_file() {
        return refuse(format!("the private key {shown} is not a file"));
    }
    if metadata.mode() & 0o077 != 0 {
        return refuse(format!(
            "the private key {shown} is open to others (mode {:03o}): run chmod 600, or remove it to get a new one",
            metadata.mode() & 0o777
        ));
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return refuse(format!(
            "the private key {shown} belongs to user {}: make it this agent's own",
            metadata.uid()
        ));
    }
    let mut text = Zeroizing::new(String::new());
    let valid = file
        .take(MAX_SIZE)
        .read_to_string(&mut text)
        .ok()
        .and_then(|_| {
            text.trim_end_matches(['\n', '\r'])
                .parse::<PrivateKey>()
                .ok()
        });
    match valid {
        Some(key) => Ok(Some(key)),
        None => refuse(format!(
            "the private key {shown} is damaged: restore it, or remove it to get a new one"
        )),
    }
}

/// Makes the directory, or closes an existing one to others.
fn secure_directory(dir: &Path) -> Result<(), Refusal> {
    let cannot = |error: io::Error| {
        Refusal::configuration(format!("cannot use --state-dir {}: {error}", dir.display()))
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(cannot)?;
    let mode = fs::metadata(dir).map_err(cannot)?.mode();
    if mode & 0o077 != 0 {
        // Made by the kubelet for a hostPath volume, which knows no mode but 0755.
        fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(cannot)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place {
        dir: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            Self {
                dir: tempfile::tempdir().unwrap(),
            }
        }

        fn state_dir(&self) -> std::path::PathBuf {
            self.dir.path().join("selvedge")
        }

        fn load(&self) -> Result<(PrivateKey, Origin), Refusal> {
            load(&self.state_dir(), &self.dir.path().join("kilo-key"))
        }

        fn put(&self, name: &str, content: &[u8], mode: u32) {
            fs::create_dir_all(self.state_dir()).unwrap();
            let path = self.dir.path().join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        }
    }

    #[test]
    fn a_new_key_is_for_the_agent_alone_and_stays() {
        let place = Place::new();
        let (key, origin) = place.load().unwrap();
        assert_eq!(origin, Origin::Generated);

        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&place.state_dir()), 0o700);
        assert_eq!(mode(&place.state_dir().join("key")), 0o600);
        assert_eq!(fs::read_dir(place.state_dir()).unwrap().count(), 1);

        assert_eq!(place.load().unwrap(), (key, Origin::Existing));
    }

    #[test]
    fn kilos_key_is_taken_over() {
        let place = Place::new();
        let key = PrivateKey::generate();
        place.put(
            "kilo-key",
            format!("{}\n", &*key.to_base64()).as_bytes(),
            0o600,
        );

        assert_eq!(place.load().unwrap(), (key.clone(), Origin::Kilo));
        assert_eq!(place.load().unwrap(), (key, Origin::Existing));
    }

    #[test]
    fn a_key_that_cannot_be_trusted_is_refused_and_left_alone() {
        let good = PrivateKey::generate().to_base64().as_bytes().to_vec();
        let cases: [(&[u8], u32, &str); 5] = [
            (b"", 0o600, "damaged"),
            (b"not a key", 0o600, "damaged"),
            (&good[..30], 0o600, "damaged"),
            (b"\xff\xfe", 0o600, "damaged"),
            (&good, 0o640, "open to others (mode 640)"),
        ];
        for (content, mode, expected) in cases {
            for name in ["selvedge/key", "kilo-key"] {
                let place = Place::new();
                place.put(name, content, mode);
                let error = place.load().unwrap_err();
                assert!(error.sentence.contains(expected), "{error}");
                assert!(error.sentence.contains("key"), "{error}");
                assert_eq!(fs::read(place.dir.path().join(name)).unwrap(), content);
            }
        }
    }

    #[test]
    fn a_key_behind_a_symbolic_link_is_refused() {
        let place = Place::new();
        let key = PrivateKey::generate();
        place.put("elsewhere", key.to_base64().as_bytes(), 0o600);
        std::os::unix::fs::symlink(
            place.dir.path().join("elsewhere"),
            place.state_dir().join("key"),
        )
        .unwrap();
        assert!(place.load().unwrap_err().sentence.contains("symbolic link"));
    }

    #[test]
    fn a_state_directory_that_cannot_be_is_named() {
        let place = Place::new();
        place.put("file", b"", 0o600);
        let dir = place.dir.path().join("file").join("below");
        let error = load(&dir, Path::new("/nonexistent")).unwrap_err();
        assert!(
            error.sentence.contains(&dir.display().to_string()),
            "{error}"
        );
    }
}
