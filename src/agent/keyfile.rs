//! The node's private key on disk.
//!
//! The key is the node's identity in the mesh: it is written atomically, and never replaced because it could not be
//! read. [`super::key_ring`] holds it together with the one that replaces it.

use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::refusal::Refusal;
use crate::secure_file;
use crate::wireguard::key::PrivateKey;

/// Kilo's key, taken over so that a node keeps its identity when the agent is swapped.
pub const KILO_KEY: &str = "/var/lib/kilo/key";

/// The file's name below `--state-dir`.
const NAME: &str = "key";
/// A key is 44 bytes; a longer file was never a key.
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
    secure_directory(state_dir)?;
    if let Some(key) = read(&path)? {
        return Ok((key, Origin::Existing));
    }
    let (key, origin) = match read(kilo)? {
        Some(key) => (key, Origin::Kilo),
        None => (PrivateKey::generate(), Origin::Generated),
    };
    secure_file::replace(state_dir, NAME, key.to_base64().as_bytes()).map_err(|error| {
        Refusal::configuration(format!(
            "cannot write the private key {}: {error}: make --state-dir a writable directory",
            path.display()
        ))
    })?;
    Ok((key, origin))
}

/// The key in `path`, or `None` where there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<PrivateKey>, Refusal> {
    let shown = path.display();
    let refuse = |what: String| Err(Refusal::configuration(what));
    let file = match secure_file::open(path) {
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

/// The files that hold this key: the node's own, and Kilo's, which would be taken over again.
pub fn holders(key: &PrivateKey, state_dir: &Path, kilo: &Path) -> Vec<PathBuf> {
    [state_dir.join(NAME), kilo.to_owned()]
        .into_iter()
        .filter(|path| matches!(read(path), Ok(Some(found)) if found == *key))
        .collect()
}

/// Makes the directory, or closes an existing one to others; refuses one that others could have changed,
/// for then nothing in it can be trusted, whatever the file's own rights are.
fn secure_directory(dir: &Path) -> Result<(), Refusal> {
    let shown = dir.display();
    let cannot = |error: io::Error| {
        Refusal::configuration(format!("cannot use --state-dir {shown}: {error}"))
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(cannot)?;
    // Where links lead counts, and not where they stand.
    let real = fs::canonicalize(dir).map_err(cannot)?;
    let metadata = fs::metadata(&real).map_err(cannot)?;
    let me = nix::unistd::geteuid().as_raw();
    if metadata.uid() != me {
        return Err(Refusal::configuration(format!(
            "--state-dir {shown} belongs to user {}, who can replace the private key in it: see what is in it, then run chown -R {me} {shown}",
            metadata.uid()
        )));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(Refusal::configuration(format!(
            "--state-dir {shown} can be written by others (mode {mode:03o}), who can replace the private key in it: see what is in it, then run chmod 700 {shown}"
        )));
    }
    for parent in real.ancestors().skip(1) {
        check_parent(dir, parent, &fs::metadata(parent).map_err(cannot)?, me)?;
    }
    if mode & 0o077 != 0 {
        // Made by the kubelet for a hostPath volume, which knows no mode but 0755.
        fs::set_permissions(&real, Permissions::from_mode(0o700)).map_err(cannot)?;
    }
    Ok(())
}

/// Refuses a directory above the agent's in which others could put another in its place. In one with the
/// sticky bit (`/tmp`) no user moves what is another's.
fn check_parent(dir: &Path, parent: &Path, metadata: &Metadata, me: u32) -> Result<(), Refusal> {
    const STICKY: u32 = 0o1000;
    let (dir, parent) = (dir.display(), parent.display());
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if owner != 0 && owner != me {
        return Err(Refusal::configuration(format!(
            "{parent}, which --state-dir {dir} is in, belongs to user {owner}, who can replace the private key: run chown root {parent}, or choose another --state-dir"
        )));
    }
    if mode & 0o022 != 0 && mode & STICKY == 0 {
        return Err(Refusal::configuration(format!(
            "{parent}, which --state-dir {dir} is in, can be written by others (mode {mode:03o}), who can replace the private key: run chmod go-w {parent}, or choose another --state-dir"
        )));
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

        fn state_dir(&self) -> PathBuf {
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
    fn a_directory_that_others_can_write_is_refused_with_the_key_in_it() {
        let place = Place::new();
        place.load().unwrap();
        for (mode, expected) in [(0o777, "(mode 777)"), (0o770, "(mode 770)")] {
            fs::set_permissions(place.state_dir(), Permissions::from_mode(mode)).unwrap();
            let error = place.load().unwrap_err();
            assert!(error.sentence.contains(expected), "{error}");
            let command = format!("chmod 700 {}", place.state_dir().display());
            assert!(error.sentence.ends_with(&command), "{error}");
        }
        // As the kubelet makes it: closed, whether or not the key is there.
        fs::set_permissions(place.state_dir(), Permissions::from_mode(0o755)).unwrap();
        assert_eq!(place.load().unwrap().1, Origin::Existing);
        assert_eq!(
            fs::metadata(place.state_dir()).unwrap().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn a_directory_above_that_others_can_write_is_refused() {
        let place = Place::new();
        place.load().unwrap();
        let above = place.dir.path();
        fs::set_permissions(above, Permissions::from_mode(0o757)).unwrap();
        let error = place.load().unwrap_err();
        let command = format!("chmod go-w {}", above.display());
        assert!(error.sentence.contains(&command), "{error}");
        // As /tmp is.
        fs::set_permissions(above, Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(place.load().unwrap().1, Origin::Existing);
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let place = Place::new();
        place.load().unwrap();
        let give = |path: &Path, user| std::os::unix::fs::chown(path, Some(user), None).unwrap();
        give(&place.state_dir(), 1234);
        let error = place.load().unwrap_err();
        assert!(error.sentence.contains("belongs to user 1234"), "{error}");
        assert!(error.sentence.contains("run chown -R 0"), "{error}");
        give(&place.state_dir(), 0);
        give(place.dir.path(), 1234);
        let error = place.load().unwrap_err();
        assert!(error.sentence.contains("run chown root"), "{error}");
    }

    #[test]
    fn the_files_with_a_key_are_found() {
        let place = Place::new();
        let (key, _) = place.load().unwrap();
        let kilo = place.dir.path().join("kilo-key");
        let own = place.state_dir().join("key");
        assert_eq!(
            holders(&key, &place.state_dir(), &kilo),
            std::slice::from_ref(&own)
        );
        place.put("kilo-key", key.to_base64().as_bytes(), 0o600);
        assert_eq!(
            holders(&key, &place.state_dir(), &kilo),
            [own, kilo.clone()]
        );
        let other = PrivateKey::generate();
        assert!(holders(&other, &place.state_dir(), &kilo).is_empty());
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
