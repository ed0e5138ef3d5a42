//! The cross-platform configuration protocol of WireGuard (wireguard.com/xplatform), which `wg` uses: requests
//! and answers as values, a strict incremental parser, the text of an answer.
//!
//! The only I/O here is the look-up of the zone of a link-local endpoint; `server` has the socket. The device
//! decides what a request does ([`Control`]).

mod server;

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use ipnet::IpNet;
pub use nix::errno::Errno;
use zeroize::{Zeroize as _, Zeroizing};

pub use self::server::{DIRECTORY, Server, serve, serve_in};
use super::key::{PresharedKey, PrivateKey, PublicKey};

/// The longest line that is accepted, in bytes. The longest valid ones, with an endpoint or a key, have
/// less than 100.
const MAX_LINE: usize = 256;

/// The longest request that is kept, in bytes of its text: twice what 130,000 allowed IPs need.
const MAX_REQUEST: usize = 16 << 20;

/// A device that executes requests.
pub trait Control: Send + Sync {
    /// Applies a request as a whole or not at all.
    ///
    /// # Errors
    /// The errno of the answer: `EADDRINUSE` for a port that is taken, `EINVAL` for an impossible value, `EIO`
    /// if the kernel refused.
    fn set(&self, set: Set) -> Result<(), Errno>;

    /// The present state of the device.
    fn get(&self) -> Get;
}

/// A finished request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Request {
    /// `get=1`
    Get,
    /// `set=1`
    Set(Set),
}

/// A change of a key, or its removal.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum KeyUpdate<K> {
    /// Not mentioned.
    #[default]
    Keep,
    /// Given as all zeros.
    Clear,
    /// A new key.
    Set(K),
}

/// A change of the device. What is `None` or `Keep` stays as it is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Set {
    /// The device's own key, clamped.
    pub private_key: KeyUpdate<PrivateKey>,
    /// The UDP port to listen on; 0 lets the kernel choose one.
    pub listen_port: Option<u16>,
    /// The mark of outgoing datagrams; 0 is none.
    pub fwmark: Option<u32>,
    /// Peers that this request does not name are removed.
    pub replace_peers: bool,
    /// Changes of peers, to be applied in this order; one peer may come several times.
    pub peers: Vec<PeerSet>,
}

/// A change of one peer, which is created where it does not exist.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerSet {
    /// The peer's key. It may be of low order or the device's own: the device accepts both without an error
    /// and makes no tunnel, as the kernel does.
    pub public_key: PublicKey,
    /// The peer is removed. The other fields have no effect then.
    pub remove: bool,
    /// The change has no effect if the peer does not exist.
    pub update_only: bool,
    /// The key mixed into handshakes with this peer.
    pub preshared_key: KeyUpdate<PresharedKey>,
    /// The new endpoint.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives; 0 is off.
    pub persistent_keepalive: Option<u16>,
    /// All allowed IPs are removed before the changes below are applied.
    pub replace_allowed_ips: bool,
    /// Changes of the allowed IPs, in this order.
    pub allowed_ips: Vec<AllowedIp>,
}

/// A change of one allowed IP, without host bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AllowedIp {
    /// The prefix belongs to this peer from now on, and to no other.
    Add(IpNet),
    /// The prefix is taken from this peer, if it has it.
    Remove(IpNet),
}

/// A device, as `wg show` prints it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Get {
    /// The device's own key.
    pub private_key: Option<PrivateKey>,
    /// The UDP port it listens on, 0 before it is up.
    pub listen_port: u16,
    /// The mark of its datagrams, 0 for none.
    pub fwmark: u32,
    /// Its peers.
    pub peers: Vec<PeerGet>,
}

/// A peer, as `wg show` prints it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerGet {
    /// The peer's key.
    pub public_key: PublicKey,
    /// The key mixed into its handshakes.
    pub preshared_key: Option<PresharedKey>,
    /// The source of its last message, or else the configured endpoint.
    pub endpoint: Option<SocketAddr>,
    /// When the last handshake was completed, since the Unix epoch.
    pub last_handshake: Option<Duration>,
    /// Bytes received in authenticated datagrams, with their WireGuard headers.
    pub rx_bytes: u64,
    /// Bytes sent in datagrams, with their WireGuard headers.
    pub tx_bytes: u64,
    /// Seconds between keepalives, 0 for none.
    pub persistent_keepalive: u16,
    /// The prefixes that are sent to it or accepted from it.
    pub allowed_ips: Vec<IpNet>,
}

impl PeerSet {
    /// Creates the peer if there is none, and changes nothing else.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: KeyUpdate::Keep,
            endpoint: None,
            persistent_keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// Reads requests from a stream of bytes that may be cut anywhere.
///
/// A request is returned only after the empty line that ends it, so a connection that breaks off changes
/// nothing. After an error the rest of the request is read and discarded: an earlier answer would be lost if
/// the client, still writing, saw the socket close.
#[derive(Default)]
pub struct Parser {
    /// The beginning of an incomplete line. While `error` is set, at most one byte.
    line: Zeroizing<Vec<u8>>,
    /// Bytes of the request so far.
    taken: usize,
    request: Option<Request>,
    error: Option<Errno>,
}

impl Parser {
    /// Takes bytes from the front of `input` up to the end of a request, which is returned, or all.
    pub fn feed(&mut self, input: &mut &[u8]) -> Option<Result<Request, Errno>> {
        while let Some(end) = input.iter().position(|&byte| byte == b'\n') {
            let (piece, rest) = input.split_at(end);
            *input = rest.get(1..).unwrap_or_default();
            self.push(piece);
            if self.line.is_empty() {
                return Some(self.finish());
            }
            let mut line = std::mem::take(&mut self.line);
            if self.error.is_none() {
                self.error = self.handle_line(&line).err();
            }
            line.zeroize();
            self.line = line;
        }
        self.push(input);
        *input = &[];
        None
    }

    fn push(&mut self, piece: &[u8]) {
        self.taken = self.taken.saturating_add(piece.len()).saturating_add(1);
        if self.line.len() + piece.len() > MAX_LINE || self.taken > MAX_REQUEST {
            self.error.get_or_insert(Errno::EINVAL);
        }
        if self.error.is_none() {
            // In one piece: a reallocation would leave half a key behind in freed memory.
            self.line.reserve(MAX_LINE);
            self.line.extend_from_slice(piece);
        } else {
            let keep = usize::from(self.line.is_empty());
            self.line.extend(piece.iter().take(keep));
            self.request = None;
        }
    }

    fn finish(&mut self) -> Result<Request, Errno> {
        self.taken = 0;
        let request = self.request.take();
        match self.error.take() {
            Some(errno) => Err(errno),
            None => request.ok_or(Errno::EPROTO),
        }
    }

    fn handle_line(&mut self, line: &[u8]) -> Result<(), Errno> {
        let line = str::from_utf8(line).map_err(|_| Errno::EINVAL)?;
        let (key, value) = line.split_once('=').ok_or(Errno::EPROTO)?;
        match &mut self.request {
            None => {
                self.request = Some(match (key, value) {
                    ("get", "1") => Request::Get,
                    ("set", "1") => Request::Set(Set::default()),
                    _ => return Err(Errno::EPROTO),
                });
                Ok(())
            }
            Some(Request::Get) => Err(Errno::EINVAL),
            Some(Request::Set(set)) => set.handle(key, value),
        }
    }
}

impl Set {
    fn handle(&mut self, key: &str, value: &str) -> Result<(), Errno> {
        if key == "public_key" {
            self.peers.push(PeerSet::new(PublicKey(hex(value)?)));
            return Ok(());
        }
        if let Some(peer) = self.peers.last_mut() {
            return peer.handle(key, value);
        }
        match key {
            "private_key" => self.private_key = key_update(value, clamped)?,
            "listen_port" => self.listen_port = Some(decimal(value)?),
            "fwmark" => self.fwmark = Some(decimal(value)?),
            "replace_peers" => self.replace_peers = only_true(value)?,
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }
}

impl PeerSet {
    fn handle(&mut self, key: &str, value: &str) -> Result<(), Errno> {
        match key {
            "remove" => self.remove = only_true(value)?,
            "update_only" => self.update_only = only_true(value)?,
            "preshared_key" => self.preshared_key = key_update(value, PresharedKey)?,
            "endpoint" => self.endpoint = Some(endpoint(value)?),
            "persistent_keepalive_interval" => self.persistent_keepalive = Some(decimal(value)?),
            "replace_allowed_ips" => {
                self.replace_allowed_ips = only_true(value)?;
                // Removes earlier changes of the same request too.
                self.allowed_ips.clear();
            }
            "allowed_ip" => self.allowed_ips.push(match value.strip_prefix('-') {
                Some(prefix) => AllowedIp::Remove(prefix_of(prefix)?),
                None => AllowedIp::Add(prefix_of(value)?),
            }),
            "protocol_version" if value == "1" => {}
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }
}

fn only_true(value: &str) -> Result<bool, Errno> {
    if value == "true" {
        Ok(true)
    } else {
        Err(Errno::EINVAL)
    }
}

fn decimal<N: std::str::FromStr>(value: &str) -> Result<N, Errno> {
    // The standard library also accepts a sign.
    if !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Errno::EINVAL);
    }
    value.parse().map_err(|_| Errno::EINVAL)
}

fn hex(value: &str) -> Result<[u8; 32], Errno> {
    let mut key = [0; 32];
    if value.len() != 2 * key.len() {
        return Err(Errno::EINVAL);
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(Errno::EINVAL);
    for (byte, pair) in key.iter_mut().zip(value.as_bytes().chunks_exact(2)) {
        for &half in pair {
            *byte = *byte << 4 | u8::try_from(digit(half)?).map_err(|_| Errno::EINVAL)?;
        }
    }
    Ok(key)
}

fn key_update<K>(value: &str, key: impl FnOnce([u8; 32]) -> K) -> Result<KeyUpdate<K>, Errno> {
    let bytes = Zeroizing::new(hex(value)?);
    Ok(if *bytes == [0; 32] {
        KeyUpdate::Clear
    } else {
        KeyUpdate::Set(key(*bytes))
    })
}

/// A private key in the form in which it is used and shown (RFC 7748, 5).
fn clamped(mut bytes: [u8; 32]) -> PrivateKey {
    bytes[0] &= 248;
    bytes[31] = bytes[31] & 127 | 64;
    PrivateKey(bytes)
}

fn prefix_of(value: &str) -> Result<IpNet, Errno> {
    let (address, length) = value.split_once('/').ok_or(Errno::EINVAL)?;
    let address: IpAddr = address.parse().map_err(|_| Errno::EINVAL)?;
    IpNet::new(address, decimal(length)?)
        .map(|net| net.trunc())
        .map_err(|_| Errno::EINVAL)
}

fn endpoint(value: &str) -> Result<SocketAddr, Errno> {
    let endpoint = match value.split_once('%') {
        None => value.parse().map_err(|_| Errno::EINVAL)?,
        Some((address, rest)) => scoped_endpoint(address, rest)?,
    };
    // Nothing can be sent to port 0.
    if endpoint.port() == 0 {
        return Err(Errno::EINVAL);
    }
    Ok(endpoint)
}

/// `[address%zone]:port` in two pieces; the zone is an interface's name or number.
fn scoped_endpoint(address: &str, rest: &str) -> Result<SocketAddr, Errno> {
    let address: Ipv6Addr = address
        .strip_prefix('[')
        .and_then(|address| address.parse().ok())
        .ok_or(Errno::EINVAL)?;
    let (zone, port) = rest.split_once("]:").ok_or(Errno::EINVAL)?;
    let scope = match decimal(zone) {
        Ok(scope) if !zone.is_empty() => scope,
        _ => nix::net::if_::if_nametoindex(zone).map_err(|_| Errno::EINVAL)?,
    };
    let endpoint = SocketAddrV6::new(address, decimal(port)?, 0, scope);
    Ok(SocketAddr::V6(endpoint))
}

impl Get {
    /// The answer to `get=1`, ending in `errno=0` and an empty line. Holds the private key.
    pub fn to_text(&self) -> Zeroizing<String> {
        let allowed_ips: usize = self.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
        // The greatest possible size: a reallocation would leave a copy with keys in freed memory.
        let size = 256 + 512 * self.peers.len() + 64 * allowed_ips;
        let mut text = Zeroizing::new(String::with_capacity(size));
        if let Some(key) = &self.private_key {
            line(&mut text, "private_key", Hex(&key.0));
        }
        if self.listen_port != 0 {
            line(&mut text, "listen_port", self.listen_port);
        }
        if self.fwmark != 0 {
            line(&mut text, "fwmark", self.fwmark);
        }
        for peer in &self.peers {
            peer.write_to(&mut text);
        }
        text.push_str("errno=0\n\n");
        text
    }
}

impl PeerGet {
    fn write_to(&self, text: &mut String) {
        line(text, "public_key", Hex(&self.public_key.0));
        let none = [0; 32];
        let preshared_key = self.preshared_key.as_ref().map_or(&none, |key| &key.0);
        line(text, "preshared_key", Hex(preshared_key));
        line(text, "protocol_version", 1);
        if let Some(endpoint) = self.endpoint {
            line(text, "endpoint", endpoint);
        }
        let handshake = self.last_handshake.unwrap_or_default();
        line(text, "last_handshake_time_sec", handshake.as_secs());
        line(text, "last_handshake_time_nsec", handshake.subsec_nanos());
        line(text, "tx_bytes", self.tx_bytes);
        line(text, "rx_bytes", self.rx_bytes);
        let keepalive = self.persistent_keepalive;
        line(text, "persistent_keepalive_interval", keepalive);
        for net in &self.allowed_ips {
            line(text, "allowed_ip", net);
        }
    }
}

/// The answer with the result only; `Ok` is `errno=0`.
pub fn errno_text(result: Result<(), Errno>) -> String {
    let errno = result.err().map_or(0, |errno| -(errno as i32));
    format!("errno={errno}\n\n")
}

struct Hex<'a>(&'a [u8; 32]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(text, "{key}={value}").expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests;
