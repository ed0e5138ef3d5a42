//! The requests to nf_tables that need no `nft` program: its generation, whether a table exists, and the
//! agent's counters.

use std::convert::Infallible;

use netlink_packet_core::{
    DefaultNla, Emitable as _, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, Nla as _,
    NlasIterator, Parseable as _,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Netlink, Refused};

/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u16 = 10;
/// `NFPROTO_INET`: the family of tables for both IPv4 and IPv6.
const INET: u8 = 1;
const GET_TABLE: u8 = 1;
const GET_GENERATION: u8 = 16;
/// `NFT_MSG_DELSETELEM`: messages up to here begin with the name of a table; then come generations.
const LAST_WITH_TABLE: u8 = 14;
const GET_OBJECT: u8 = 19;
/// `NFTA_…_TABLE` and `NFTA_TABLE_NAME`: in every message about a part of a table, its name.
const TABLE_NAME: u16 = 1;
const GENERATION_ID: u16 = 1;
const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
const OBJECT_DATA: u16 = 4;
const COUNTER: u32 = 1;
const COUNTER_PACKETS: u16 = 2;
/// The flag of an attribute that holds attributes, and that of one in network order.
const NLA_FLAGS: u16 = 0xc000;

/// A message of nf_tables.
#[derive(Clone, Debug)]
pub(super) struct NftMessage {
    kind: u8,
    family: u8,
    attributes: Vec<DefaultNla>,
}

impl NftMessage {
    fn new(kind: u8, family: u8, attributes: Vec<DefaultNla>) -> Self {
        Self {
            kind,
            family,
            attributes,
        }
    }

    /// Whether it is about the table of this name and the family `inet`, or about a part of it.
    pub(super) fn is_about(&self, table: &str) -> bool {
        self.family == INET
            && self
                .value(TABLE_NAME)
                .is_some_and(|name| name.strip_suffix(&[0]) == Some(table.as_bytes()))
    }

    /// Whether it is about a table or a part of one, but not that of this name and the family `inet`.
    pub(super) fn is_about_another_than(&self, table: &str) -> bool {
        // The number of a generation, which follows every change, has another meaning in the same place.
        self.kind <= LAST_WITH_TABLE && self.value(TABLE_NAME).is_some() && !self.is_about(table)
    }

    fn value(&self, kind: u16) -> Option<Vec<u8>> {
        value(&self.attributes, kind)
    }
}

impl NetlinkSerializable for NftMessage {
    fn message_type(&self) -> u16 {
        SUBSYSTEM << 8 | u16::from(self.kind)
    }

    fn buffer_len(&self) -> usize {
        4 + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        // struct nfgenmsg: family, version 0, resource 0.
        buffer[..4].copy_from_slice(&[self.family, 0, 0, 0]);
        self.attributes.as_slice().emit(&mut buffer[4..]);
    }
}

impl NetlinkDeserializable for NftMessage {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        let [kind, _] = header.message_type.to_le_bytes();
        Ok(Self {
            kind,
            family: payload.first().copied().unwrap_or(0),
            attributes: attributes(payload.get(4..).unwrap_or_default()),
        })
    }
}

/// A socket for these requests.
#[derive(Debug)]
pub(super) struct Nfnetlink {
    netlink: Netlink,
}

impl Nfnetlink {
    pub(super) fn open() -> Result<Self, Refused> {
        Ok(Self {
            netlink: Netlink::open(NETLINK_NETFILTER)?,
        })
    }

    /// A number that changes with every change of any program to nf_tables.
    pub(super) fn generation(&mut self) -> Result<u32, Refused> {
        let request = NftMessage::new(GET_GENERATION, 0, Vec::new());
        let answers = self.netlink.get(request)?;
        Ok(answers
            .iter()
            .find_map(|answer| be_u32(&answer.value(GENERATION_ID)?))
            .unwrap_or(0))
    }

    /// Whether there is a table of this name and the family `inet`.
    pub(super) fn has_table(&mut self, table: &str) -> Result<bool, Refused> {
        let request = NftMessage::new(GET_TABLE, INET, vec![text(TABLE_NAME, table)]);
        match self.netlink.get(request) {
            Ok(answers) => Ok(!answers.is_empty()),
            Err(error) if error.errno() == libc::ENOENT => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The packets that a named counter of the table has seen.
    pub(super) fn packets(&mut self, table: &str, counter: &str) -> Result<u64, Refused> {
        let request = NftMessage::new(
            GET_OBJECT,
            INET,
            vec![
                text(TABLE_NAME, table),
                text(OBJECT_NAME, counter),
                DefaultNla::new(OBJECT_TYPE, COUNTER.to_be_bytes().to_vec()),
            ],
        );
        let answers = self.netlink.get(request)?;
        Ok(answers
            .iter()
            .find_map(|answer| {
                let data = attributes(&answer.value(OBJECT_DATA)?);
                let packets = value(&data, COUNTER_PACKETS)?;
                Some(u64::from_be_bytes(packets.try_into().ok()?))
            })
            .unwrap_or(0))
    }
}

fn text(kind: u16, text: &str) -> DefaultNla {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    DefaultNla::new(kind, bytes)
}

fn attributes(bytes: &[u8]) -> Vec<DefaultNla> {
    NlasIterator::new(bytes)
        .filter_map(Result::ok)
        .filter_map(|nla| DefaultNla::parse(&nla).ok())
        .collect()
}

fn value(attributes: &[DefaultNla], kind: u16) -> Option<Vec<u8>> {
    let found = attributes
        .iter()
        .find(|nla| nla.kind() & !NLA_FLAGS == kind)?;
    let mut value = vec![0; found.value_len()];
    found.emit_value(&mut value);
    Some(value)
}

fn be_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}
