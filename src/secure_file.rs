//! Files of the agent: read only if no other user could have written them, replaced atomically.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{bail, ensure};
use zeroize::Zeroizing;

/// Opens a file for reading; `None` where there is no such file. A symbolic link fails with `ELOOP`.
///
/// The caller checks owner and type by the file's metadata: a pipe opens without waiting.
pub(crate) fn open(path: &Path) -> io::Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        // Do not follow a planted link, and do not block on a pipe.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a file that no other user could have written, of at most `max` bytes; `None` where there is no such
/// file.
pub(crate) fn read(path: &Path, max: u64) -> anyhow::Result<Option<Zeroizing<String>>> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    let metadata = file.metadata()?;
    ensure!(metadata.is_file(), "it is not a file");
    ensure!(
        metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o077 == 0,
        "other users may read or write it"
    );
    if metadata.len() > max {
        bail!("it is too large");
    }
    let mut text = Zeroizing::new(String::new());
    file.take(max).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// Removes a file. A missing file is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Replaces a file atomically: after a power failure it has either the old or the new content.
pub(crate) fn replace(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let new = dir.join(format!(".{name}.new"));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, dir.join(name))?;
        // The rename is stored in the directory.
        File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        // Remove the partial file; the first error is the one to report.
        let _ = fs::remove_file(&new);
    }
    written
}
