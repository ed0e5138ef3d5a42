//! The socket under which `wg` finds a device.
//!
//! Its directory and its mode permit root only. The limits here bound the memory and threads that a faulty
//! client can use.

use std::fs::{self, DirBuilder};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use zeroize::Zeroizing;

use super::{Control, Parser, Request, errno_text};

/// The directory in which `wg` looks for sockets, one per device, `NAME.sock`.
pub const DIRECTORY: &str = "/var/run/wireguard";

/// The most connections. One more is closed at once.
const MAX_CONNECTIONS: usize = 100;

/// The connection is closed after the client has sent nothing, or not read its answer, for this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection's thread parses and formats, and calls into the device for a table of peers.
const STACK: usize = 256 << 10;

/// A socket being served. Dropping it removes the socket and ends the accepting thread;
/// connections that are open end with their clients.
pub struct Server {
    path: PathBuf,
    /// Device and inode of this socket, so that no other is ever removed.
    identity: (u64, u64),
    listener: UnixListener,
    thread: Option<JoinHandle<()>>,
}

/// Serves the device `name` in [`DIRECTORY`].
///
/// # Errors
/// See [`serve_in`].
pub fn serve(name: &str, control: Arc<dyn Control>) -> anyhow::Result<Server> {
    serve_in(Path::new(DIRECTORY), name, control)
}

/// Serves the device `name` in a directory, which is made (mode 0700) where there is none.
///
/// # Errors
/// An invalid interface name, a socket that another process serves, or an error of the file system.
pub fn serve_in(directory: &Path, name: &str, control: Arc<dyn Control>) -> anyhow::Result<Server> {
    ensure!(
        !name.is_empty() && name.len() < 16 && !name.starts_with('.') && !name.contains('/'),
        "{name:?} cannot be the name of an interface"
    );
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("making the directory {}", directory.display()))?;
    let path = directory.join(format!("{name}.sock"));
    let listener = listen(&path)?;
    let metadata = fs::symlink_metadata(&path)
        .with_context(|| format!("looking at the socket {}", path.display()))?;
    let acceptor = listener.try_clone().context("cloning the socket")?;
    let thread = thread::Builder::new()
        .name("uapi".to_owned())
        .stack_size(STACK)
        .spawn(move || accept(&acceptor, &control))
        .context("starting the thread that serves the socket")?;
    Ok(Server {
        path,
        identity: (metadata.dev(), metadata.ino()),
        listener,
        thread: Some(thread),
    })
}

impl Server {
    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "could not remove the configuration socket");
        }
        // Wakes the thread: accepting from a socket that is shut down fails.
        if let Err(error) =
            socket2::SockRef::from(&self.listener).shutdown(std::net::Shutdown::Both)
        {
            tracing::warn!(%error, "could not stop the thread of the configuration socket");
        } else if let Some(thread) = self.thread.take() {
            // It returns nothing, and a panic in it has been reported.
            let _ = thread.join();
        }
    }
}

/// Listens, and gives the socket its name only then: `wg` takes a bound socket that does not listen yet for
/// a stale one and removes it.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let context = || format!("listening on {}", path.display());
    // A name that `wg` does not take for a socket.
    let unnamed = path.with_extension(process::id().to_string());
    let listener = listen_unnamed(&unnamed).with_context(context)?;
    let named = give_name(&unnamed, path);
    // The socket has the other name now, or none.
    let _ = fs::remove_file(&unnamed);
    named.map(|()| listener)
}

fn listen_unnamed(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        // There is none any more.
        Ok(()) | Err(_) => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The mode of the file is that of the socket. No client can connect between the two calls.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(128)?;
    Ok(socket.into())
}

/// Gives a socket its name unless another process serves one there. By a link, which replaces no file.
fn give_name(unnamed: &Path, path: &Path) -> anyhow::Result<()> {
    let context = || format!("listening on {}", path.display());
    match fs::hard_link(unnamed, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => return result.with_context(context),
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!("another process serves {}: stop it first", path.display()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path)
                .with_context(|| format!("removing the stale socket {}", path.display()))?;
            fs::hard_link(unnamed, path).with_context(context)
        }
        Err(error) => Err(error).with_context(context),
    }
}

fn accept(listener: &UnixListener, control: &Arc<dyn Control>) {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // EINVAL: shut down. Other errors are temporary; without free descriptors they last a while.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(error) => {
                tracing::debug!(%error, "could not accept a connection to the configuration socket");
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let slot = Slot(Arc::clone(&connections));
        if slot.0.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            continue;
        }
        let control = Arc::clone(control);
        let spawned = thread::Builder::new()
            .name("uapi-client".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let _slot = slot;
                if let Err(error) = converse(&stream, &*control) {
                    tracing::debug!(%error, "client of the configuration socket disconnected");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "could not start a thread for a client of the configuration socket");
        }
    }
}

struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(mut stream: &UnixStream, control: &dyn Control) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut parser = Parser::default();
    let mut buffer = Zeroizing::new([0; 16 << 10]);
    loop {
        let length = match stream.read(&mut *buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut input = buffer.get(..length).unwrap_or_default();
        while let Some(request) = parser.feed(&mut input) {
            match request {
                Ok(Request::Get) => stream.write_all(control.get().to_text().as_bytes())?,
                Ok(Request::Set(set)) => {
                    stream.write_all(errno_text(control.set(set)).as_bytes())?;
                }
                Err(errno) => stream.write_all(errno_text(Err(errno)).as_bytes())?,
            }
        }
    }
}
