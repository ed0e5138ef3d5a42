//! Finds the program that holds the tunnel's UDP port.

use std::fmt;
use std::fs;
use std::path::Path;

use crate::text;

/// The kernel's lists of UDP sockets of this network namespace (`udp4_format_sock` in
/// `net/ipv4/udp.c`).
const SOCKETS: [&str; 2] = ["/proc/net/udp", "/proc/net/udp6"];

/// The owner of a socket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Holder {
    /// A process, by its name and number.
    Process(String, u32),
    /// An owner that this process cannot see: in another container, or the kernel.
    Unseen,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(name, pid) => write!(f, "{} (process {pid})", text::quote(name)),
            Self::Unseen => f.write_str(
                "an owner not visible from here: a process of another container, or a WireGuard link of the kernel",
            ),
        }
    }
}

/// The sentence about a UDP port held by another program.
pub(crate) fn taken(port: u16) -> String {
    let holder = holder(port).map_or_else(
        || "by a socket that has just been closed".to_owned(),
        |holder| format!("by {holder}"),
    );
    format!(
        "UDP port {port} is held {holder}, so other nodes cannot reach this node: stop that program, or choose another port with --port on all nodes; the agent retries each second"
    )
}

/// The owner of a UDP port, so that it cannot be bound; `None` where the port is free.
pub(crate) fn holder(port: u16) -> Option<Holder> {
    let inode = socket(port)?;
    Some(process(Path::new("/proc"), inode).unwrap_or(Holder::Unseen))
}

/// The inode of the socket on a UDP port of this network namespace: 0 for a socket of the kernel, `None` where
/// the port is free.
pub(crate) fn socket(port: u16) -> Option<u64> {
    SOCKETS
        .iter()
        .find_map(|list| inode(&fs::read_to_string(list).ok()?, port))
}

/// The inode of the socket on a port, from the text of a list; 0 for a socket without a process.
fn inode(list: &str, port: u16) -> Option<u64> {
    list.lines().skip(1).find_map(|line| {
        let fields = line.split_whitespace().collect::<Vec<_>>();
        let (_, hex) = fields.get(1)?.rsplit_once(':')?;
        let inode = fields.get(9)?.parse().ok()?;
        (u16::from_str_radix(hex, 16) == Ok(port)).then_some(inode)
    })
}

/// The process with an open file descriptor of a socket.
fn process(proc: &Path, inode: u64) -> Option<Holder> {
    let wanted = format!("socket:[{inode}]");
    fs::read_dir(proc).ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let holds = fs::read_dir(entry.path().join("fd"))
            .ok()?
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|link| link.as_os_str() == &*wanted));
        let name = || fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        holds.then(|| Holder::Process(name().trim().to_owned(), pid))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  151: 00000000:CA6C 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 73301 2 0000000000000000 0
  152: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 2 0000000000000000 0
";

    #[test]
    fn a_port_is_found_in_the_kernels_list() {
        assert_eq!(inode(LIST, 51820), Some(73301));
        assert_eq!(inode(LIST, 53), Some(0));
        assert_eq!(inode(LIST, 51821), None);
        assert_eq!(inode("", 1), None);
    }

    #[test]
    fn a_socket_leads_to_the_process_that_holds_it() {
        use std::os::unix::fs::MetadataExt as _;
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        let inode = fs::metadata(format!("/proc/self/fd/{fd}")).unwrap().ino();
        let Some(Holder::Process(name, pid)) = process(Path::new("/proc"), inode) else {
            panic!("not found");
        };
        assert_eq!(pid, std::process::id());
        assert!(!name.is_empty());
        assert_eq!(process(Path::new("/proc"), u64::MAX), None);
    }
}
