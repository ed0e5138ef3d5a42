//! One netlink socket: dumps, single requests, and batches of changes.
//!
//! It blocks on purpose. The kernel processes a request during the send call, so a blocking call waits
//! for nothing else, and changes keep their order.

use std::fmt;
use std::io;
use std::time::Duration;

use netlink_packet_core::{
    DefaultNla, ErrorMessage, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR,
    NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable, Nla as _, NlasIterator, Parseable as _,
};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// How many requests are sent before their answers are read. Each answer takes about 1 KiB of the
/// receive buffer, and what does not fit there is lost.
const BATCH: usize = 256;
const RECEIVE_BUFFER: usize = 1 << 20;
/// The kernel answers at once. An answer that takes this long is lost.
const TIMEOUT: Duration = Duration::from_secs(5);
/// A dump is repeated if its objects changed during it. On a host whose routes change all the time the
/// last attempt is used: the monitor reports what it missed.
const DUMP_ATTEMPTS: usize = 5;
/// `NLMSGERR_ATTR_MSG`: a sentence about what was wrong.
const ERROR_TEXT: u16 = 1;

/// A request that the kernel refused, or that did not reach it.
#[derive(Debug)]
pub(super) struct Refused {
    error: io::Error,
    /// The kernel's text about it (extended acknowledgement).
    text: Option<String>,
}

impl Refused {
    /// The error's number, 0 where there is none.
    pub(super) fn errno(&self) -> i32 {
        self.error.raw_os_error().unwrap_or(0)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self { error, text: None }
    }
}

impl From<nix::Error> for Refused {
    fn from(errno: nix::Error) -> Self {
        io::Error::from(errno).into()
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.errno(), &self.text) {
            (0, _) => self.error.fmt(f),
            (errno, None) => f.write_str(Errno::from_raw(errno).desc()),
            (errno, Some(text)) => write!(f, "{}: {text}", Errno::from_raw(errno).desc()),
        }
    }
}

impl std::error::Error for Refused {}

/// A netlink socket of one protocol.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open(protocol: isize) -> Result<Self, Refused> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_rx_buf_sz(RECEIVE_BUFFER)?;
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::new(TIMEOUT.as_secs().cast_signed(), 0),
        )?;
        // Old kernels lack these options. Without them errors have no text, acknowledgements repeat the
        // request, and the kernel does not filter dumps.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Lists what `request` asks for.
    pub(super) fn dump<M>(&mut self, request: M) -> Result<Vec<M>, Refused>
    where
        M: Clone + NetlinkSerializable + NetlinkDeserializable,
    {
        let mut attempt = 1;
        loop {
            let (answers, interrupted) = self.ask(request.clone(), NLM_F_DUMP)?;
            if !interrupted || attempt == DUMP_ATTEMPTS {
                return Ok(answers);
            }
            attempt += 1;
        }
    }

    /// Sends one request and returns the answers.
    pub(super) fn get<M>(&mut self, request: M) -> Result<Vec<M>, Refused>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        Ok(self.ask(request, NLM_F_ACK)?.0)
    }

    /// Makes all changes in their order, and returns one result for each. A failure does not stop the rest.
    pub(super) fn change_all<M>(&mut self, requests: Vec<(M, u16)>) -> Vec<Result<(), Refused>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut results = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::new();
            let mut count = 0;
            for (request, flags) in requests.by_ref().take(BATCH) {
                self.emit(request, flags | NLM_F_ACK, &mut bytes);
                count += 1;
            }
            results.extend(self.exchange::<M>(&bytes, first, count));
        }
        results
    }

    /// Sends `count` requests and reads their acknowledgements.
    fn exchange<M>(&self, bytes: &[u8], first: u32, count: usize) -> Vec<Result<(), Refused>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut results: Vec<Option<Result<(), Refused>>> = (0..count).map(|_| None).collect();
        let mut missing = count;
        let failure = match self.socket.send(bytes, 0) {
            Err(error) => error,
            Ok(_) => loop {
                if missing == 0 {
                    break io::Error::other("none");
                }
                let received = self.receive::<M>(|header, payload| {
                    let index = header.sequence_number.wrapping_sub(first) as usize;
                    if let NetlinkPayload::Error(error) = payload
                        && let Some(result @ None) = results.get_mut(index)
                    {
                        *result = Some(acknowledged(header, &error));
                        missing -= 1;
                    }
                });
                if let Err(error) = received {
                    break error;
                }
            },
        };
        let failed = || io::Error::new(failure.kind(), failure.to_string()).into();
        results
            .into_iter()
            .map(|result| result.unwrap_or_else(|| Err(failed())))
            .collect()
    }

    /// Sends one request and collects the answers; the flag means that a dump was not consistent.
    fn ask<M>(&mut self, request: M, flags: u16) -> Result<(Vec<M>, bool), Refused>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut bytes = Vec::new();
        self.emit(request, flags, &mut bytes);
        let sequence = self.sequence;
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        let mut interrupted = false;
        let mut end = None;
        while end.is_none() {
            self.receive::<M>(|header, payload| {
                // The rest of an answer to an earlier request that timed out.
                if header.sequence_number != sequence {
                    return;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Error(error) => end = Some(acknowledged(header, &error)),
                    NetlinkPayload::Done(done) => {
                        end = Some(match done.code {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(code.abs()).into()),
                        });
                    }
                    _ => {}
                }
            })?;
        }
        end.unwrap_or(Ok(()))?;
        Ok((answers, interrupted))
    }

    fn emit<M: NetlinkSerializable>(&mut self, request: M, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    /// Reads one datagram.
    fn receive<M>(
        &self,
        handle: impl FnMut(&NetlinkHeader, NetlinkPayload<M>),
    ) -> Result<(), io::Error>
    where
        M: NetlinkDeserializable,
    {
        let bytes = loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => break bytes,
                // With a timeout set, no system call is restarted after a signal (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        messages(&bytes, handle);
        Ok(())
    }
}

/// Passes every message of a datagram that can be parsed to `handle`.
///
/// A message that cannot be parsed is skipped: a link of a kind that is newer than this program must not
/// hide all other links.
pub(super) fn messages<M>(bytes: &[u8], mut handle: impl FnMut(&NetlinkHeader, NetlinkPayload<M>))
where
    M: NetlinkDeserializable,
{
    let mut rest = bytes;
    while let Ok(buffer) = NetlinkBuffer::new_checked(&rest) {
        let length = buffer.length() as usize;
        match NetlinkMessage::<M>::deserialize(&rest[..length]) {
            Ok(message) => {
                let (header, payload) = message.into_parts();
                handle(&header, payload);
            }
            Err(error) => tracing::debug!(%error, "netlink message skipped"),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// The result in an acknowledgement: error 0 is success.
fn acknowledged(header: &NetlinkHeader, message: &ErrorMessage) -> Result<(), Refused> {
    if message.code.is_none() {
        return Ok(());
    }
    Err(Refused {
        error: message.to_io(),
        text: error_text(header.flags, &message.header),
    })
}

/// The kernel's text in an error message, after the request that it repeats.
fn error_text(flags: u16, payload: &[u8]) -> Option<String> {
    const HEADER: usize = 16;
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let repeated = if flags & NLM_F_CAPPED != 0 {
        HEADER
    } else {
        let length = payload.first_chunk::<4>()?;
        (u32::from_ne_bytes(*length) as usize).next_multiple_of(4)
    };
    NlasIterator::new(payload.get(repeated..)?)
        .filter_map(Result::ok)
        .filter_map(|nla| DefaultNla::parse(&nla).ok())
        .find(|nla| nla.kind() == ERROR_TEXT)
        .map(|nla| {
            let mut value = vec![0; nla.value_len()];
            nla.emit_value(&mut value);
            String::from_utf8_lossy(&value)
                .trim_end_matches('\0')
                .to_owned()
        })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NLM_F_CREATE;
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::route::{RouteAttribute, RouteMessage};
    use netlink_sys::protocols::NETLINK_ROUTE;

    use super::*;

    #[test]
    fn a_refused_request_has_an_error_number() {
        let mut netlink = Netlink::open(NETLINK_ROUTE).unwrap();
        // Refused to every user: the family is missing.
        let mut message = RouteMessage::default();
        message.attributes.push(RouteAttribute::Table(5130));
        let request = RouteNetlinkMessage::NewRoute(message);
        let results = netlink.change_all(vec![(request, NLM_F_CREATE)]);
        let [Err(error)] = &results[..] else {
            panic!("{results:?}");
        };

        assert!(error.errno() > 0, "{error}");
    }

    #[test]
    fn a_truncated_datagram_does_not_panic() {
        let mut bytes = vec![200, 0, 0, 0, 24, 0, 0, 0];
        bytes.resize(40, 0xff);
        let mut count = 0;
        for length in 0..bytes.len() {
            messages::<RouteNetlinkMessage>(&bytes[..length], |_, _| count += 1);
            let _ = error_text(NLM_F_ACK_TLVS, &bytes[..length]);
        }
        assert_eq!(count, 0);
    }
}
