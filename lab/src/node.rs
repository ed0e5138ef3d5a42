//! One machine of a lab: a network namespace together with its own hostname and its own view of
//! `/run` and `/var/lib`, where flannel, CNI plugins and agents keep their files.
//!
//! Programs of several nodes thus use the same well-known paths without meeting each other.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::sethostname;

use crate::family::Family;
use crate::netns::Namespace;
use crate::process::Process;

/// A directory of the host, hidden behind one of the node's own.
const PRIVATE: [(&str, &str); 2] = [("run", "/run"), ("var-lib", "/var/lib")];

/// A machine of the lab.
#[derive(Debug)]
pub struct Node {
    name: String,
    addresses: Vec<IpAddr>,
    namespace: Namespace,
    directory: PathBuf,
    mounts: File,
    hostname: File,
}

impl Node {
    /// Turns a namespace into a node called `name`, which keeps its files under `directory`.
    ///
    /// `directory` must lie outside `/run` and `/var/lib`, because the node cannot see those.
    ///
    /// # Errors
    ///
    /// Without root, or when the kernel refuses a mount.
    pub fn new(
        name: &str,
        address: impl Into<IpAddr>,
        namespace: Namespace,
        directory: PathBuf,
    ) -> anyhow::Result<Self> {
        Self::with_addresses(name, &[address.into()], namespace, directory)
    }

    /// The same, with an address of each family for Kubernetes, the primary one first.
    ///
    /// # Errors
    ///
    /// As [`Node::new`], and when there is no address.
    pub fn with_addresses(
        name: &str,
        addresses: &[IpAddr],
        namespace: Namespace,
        directory: PathBuf,
    ) -> anyhow::Result<Self> {
        ensure!(!addresses.is_empty(), "{name} has no address");
        for (own, _) in PRIVATE {
            fs::create_dir_all(directory.join(own))?;
        }
        fs::create_dir_all(directory.join("run/netns"))?;
        fs::create_dir_all(directory.join("log"))?;
        let names = addresses
            .iter()
            .map(|address| format!("{address} {name}\n"));
        let hosts = format!("127.0.0.1 localhost\n{}", names.collect::<String>());
        fs::write(directory.join("hosts"), hosts)?;
        let (mounts, hostname) = namespace
            .within(|| private_view(name, &directory))
            .with_context(|| format!("giving {name} its own mounts"))?;
        Ok(Self {
            name: name.to_owned(),
            addresses: addresses.to_vec(),
            namespace,
            directory,
            mounts,
            hostname,
        })
    }

    /// The node's name in Kubernetes, which is its hostname too.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address of its `eth0`: its first `InternalIP`.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.addresses[0]
    }

    /// All of its `InternalIP`s.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its `InternalIP` of a family.
    #[must_use]
    pub fn address_of(&self, family: Family) -> Option<IpAddr> {
        let mut addresses = self.addresses.iter().copied();
        addresses.find(|ip| Family::of(*ip) == family)
    }

    /// Its network namespace, for commands that need nothing but the network.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub(crate) fn namespace_mut(&mut self) -> &mut Namespace {
        &mut self.namespace
    }

    /// Where a file that the node sees under `/run` or `/var/lib` lies on the host.
    ///
    /// Other paths are the same for all.
    #[must_use]
    pub fn outside(&self, path: &str) -> PathBuf {
        for (own, seen) in PRIVATE {
            if let Ok(below) = Path::new(path).strip_prefix(seen) {
                return self.directory.join(own).join(below);
            }
        }
        PathBuf::from(path)
    }

    /// The file a background program's output is appended to.
    #[must_use]
    pub fn log(&self, program: &str) -> PathBuf {
        self.directory.join("log").join(program)
    }

    /// Runs `work` on a new thread that has the node's network, mounts and hostname.
    ///
    /// # Panics
    ///
    /// When `work` panics, with its message.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.namespace.within(|| {
            enter_view(self.mounts.as_fd(), self.hostname.as_fd())
                .expect("the view's files are open, so it exists");
            work()
        })
    }

    /// Runs a command line whose words are separated by blanks, and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it cannot be started or fails; the error repeats the line and its standard error.
    pub fn run(&self, line: &str) -> anyhow::Result<String> {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().context("an empty command line")?);
        command.args(words);
        let output = self
            .output(command)
            .with_context(|| format!("[{}] {line}", self.name))?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!(
                "[{}] {line}: {} ({})",
                self.name,
                complaint.trim(),
                output.status
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a command to its end and returns its outcome, whatever it is.
    ///
    /// # Errors
    ///
    /// Only when it cannot be started.
    pub fn output(&self, mut command: Command) -> anyhow::Result<Output> {
        Ok(self.within(|| command.stdin(Stdio::null()).output())?)
    }

    /// Whether a tunnel in userspace answers for the link `link`.
    ///
    /// Asked while it comes up, `wg` takes its socket for a leftover and deletes it.
    #[must_use]
    pub fn tunnel_answers(&self, link: &str) -> bool {
        let socket = format!("/run/wireguard/{link}.sock");
        UnixStream::connect(self.outside(&socket)).is_ok()
    }

    /// Starts a program in the background, with its output in [`log`](Self::log)`(what)`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(&self, what: &str, command: Command) -> anyhow::Result<Process> {
        let log = self.log(what);
        let what = format!("{what} on {}", self.name);
        self.within(|| Process::start_logging(&what, command, &log))
    }
}

/// On a thread that may be spoilt: makes the mounts and the hostname, and holds on to them.
fn private_view(name: &str, directory: &Path) -> anyhow::Result<(File, File)> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
    // A slave still sees namespaces that `ip netns` makes later, but passes nothing back.
    mount(NONE, "/", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE)?;
    let bind = |from: &Path, to: &str, flags: MsFlags| {
        mount(Some(from), to, NONE, MsFlags::MS_BIND | flags, NONE)
            .with_context(|| format!("mounting {} on {to}", from.display()))
    };
    let names = directory.join("run/netns");
    let names = names.to_str().context("the lab's directory is not UTF-8")?;
    bind(Path::new("/run/netns"), names, MsFlags::MS_REC)?;
    for (own, seen) in PRIVATE {
        bind(&directory.join(own), seen, MsFlags::MS_REC)?;
    }
    bind(&directory.join("hosts"), "/etc/hosts", MsFlags::empty())?;
    // sysfs shows the links of the namespace it was mounted in.
    let _ = umount2("/sys", MntFlags::MNT_DETACH);
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE).context("mounting /sys")?;
    sethostname(name)?;
    Ok((
        File::open("/proc/thread-self/ns/mnt")?,
        File::open("/proc/thread-self/ns/uts")?,
    ))
}

fn enter_view(mounts: impl AsFd, hostname: impl AsFd) -> nix::Result<()> {
    // A thread may change its mounts only while it shares its working directory with no other.
    unshare(CloneFlags::CLONE_FS)?;
    setns(mounts, CloneFlags::CLONE_NEWNS)?;
    setns(hostname, CloneFlags::CLONE_NEWUTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, directory: &Path) -> Node {
        let namespace = Namespace::new(name).unwrap();
        Node::new(name, [192, 0, 2, 1], namespace, directory.join(name)).unwrap()
    }

    #[test]
    fn two_nodes_keep_different_files_under_the_same_path() {
        let directory = crate::scratch("nodes").unwrap();
        let (one, two) = (node("one", directory.path()), node("two", directory.path()));

        one.within(|| fs::write("/run/name", "one")).unwrap();

        assert_eq!(fs::read_to_string(one.outside("/run/name")).unwrap(), "one");
        assert!(two.run("cat /run/name").is_err());
        assert_eq!(one.run("hostname").unwrap().trim(), "one");
    }

    #[test]
    fn a_node_sees_namespaces_made_after_it() {
        let directory = crate::scratch("late").unwrap();
        let node = node("early", directory.path());

        let late = Namespace::new("late").unwrap();

        node.run(&format!("ip -n {} link show lo", late.name()))
            .unwrap();
        let path = late.path();
        drop(late);
        assert!(!path.exists());
    }
}
