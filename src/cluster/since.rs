//! The text form of the ledger of claims, `selvedge.dev/since`, read and written.
//!
//! A list of `KIND:VALUE=TIME`, separated by single spaces:
//!
//! ```text
//! address:192.168.50.11=2026-11-30T23:28:04Z key:jm4P…10w==2026-11-30T23:28:04Z
//! region:location:nd=2026-11-30T23:28:04Z lead:location:nd=2026-11-30T23:28:34Z
//! ```
//!
//! KIND is `address`, `key`, `region` or `lead`. TIME has the form of RFC 3339, in UTC and whole seconds,
//! and follows the *last* `=`, because keys end in `=`. In the names of regions and nodes, `%`, `=`, spaces,
//! control characters and all non-ASCII characters are percent-encoded. An entry has exactly one text form,
//! so an unchanged entry keeps its text. The admission policy relies on that: it lets an agent keep
//! entries unchanged, drop them, and add entries that are not older than the object.

use k8s_openapi::jiff::Timestamp;

use super::annotation::Malformed;
use crate::topology::{Claim, Ledger, MAX_ENTRIES, NodeName, RegionName, SegmentName};

/// Longest text that is read, in bytes.
pub const MAX_LENGTH: usize = 4096;

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// A parsed ledger, and the number of its entries that are malformed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Since {
    /// The valid entries.
    pub ledger: Ledger,
    /// The number of malformed or surplus entries.
    pub skipped: usize,
}

/// Parses a ledger. A malformed entry is skipped; a text of more than [`MAX_LENGTH`] bytes is an error.
pub fn parse(text: &str) -> Result<Since, Malformed> {
    if text.len() > MAX_LENGTH {
        return Err(Malformed("it is longer than 4096 bytes"));
    }
    let mut entries = Vec::new();
    let mut skipped = 0;
    for item in text.split(' ').filter(|item| !item.is_empty()) {
        match entry(item) {
            Some(entry) if entries.len() < MAX_ENTRIES => entries.push(entry),
            Some(_) | None => skipped += 1,
        }
    }
    Ok(Since {
        ledger: Ledger::new(entries),
        skipped,
    })
}

/// Formats a ledger as [`parse`] reads it; an empty ledger gives an empty text.
pub fn format(ledger: &Ledger) -> String {
    let entries = ledger
        .iter()
        .map(|(claim, since)| format_entry(claim, since));
    let mut text = String::new();
    for entry in entries {
        // Only absurdly long names reach this limit; entries left out count as not recorded.
        if text.len() + 1 + entry.len() > MAX_LENGTH {
            break;
        }
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&entry);
    }
    text
}

fn entry(item: &str) -> Option<(Claim, i64)> {
    let (what, time) = item.rsplit_once('=')?;
    let (kind, value) = what.split_once(':')?;
    let claim = match kind {
        "address" => Claim::Address(super::annotation::address(value).ok()?),
        "key" => Claim::Key(value.parse().ok()?),
        "region" => Claim::Region(segment(value)?),
        "lead" => Claim::Lead(segment(value)?),
        _ => return None,
    };
    let since = time.parse::<Timestamp>().ok()?.as_second();
    // Other text forms of an entry are refused, or an entry could change its text and keep its age.
    (since >= 0 && format_entry(&claim, since) == item).then_some((claim, since))
}

fn format_entry(claim: &Claim, since: i64) -> String {
    let time = Timestamp::from_second(since).unwrap_or(Timestamp::UNIX_EPOCH);
    match claim {
        Claim::Address(ip) => format!("address:{ip}={time}"),
        Claim::Key(key) => format!("key:{key}={time}"),
        Claim::Region(segment) => format!("region:{}={time}", format_segment(segment)),
        Claim::Lead(segment) => format!("lead:{}={time}", format_segment(segment)),
    }
}

fn segment(text: &str) -> Option<SegmentName> {
    let (kind, name) = text.split_once(':')?;
    let name = decode(name)?;
    match kind {
        "location" => Some(SegmentName::Location(RegionName(name))),
        "node" => Some(SegmentName::Node(NodeName(name))),
        _ => None,
    }
}

fn format_segment(segment: &SegmentName) -> String {
    match segment {
        SegmentName::Location(RegionName(name)) => format!("location:{}", encode(name)),
        SegmentName::Node(NodeName(name)) => format!("node:{}", encode(name)),
    }
}

fn encode(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'%' | b'=') {
            text.push(char::from(byte));
        } else {
            text.push('%');
            text.push(char::from(HEX[usize::from(byte >> 4)]));
            text.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    text
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| HEX.iter().position(|digit| *digit == byte);
        let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
        bytes.push(u8::try_from(high << 4 | low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "address:192.168.50.11=2026-11-30T23:28:04Z \
        address:fd00::11=2026-11-30T23:28:04Z \
        key:jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w==2026-11-30T23:28:05Z \
        region:location:nd=2026-11-30T23:28:06Z \
        lead:location:nd=2026-11-30T23:28:34Z";

    fn location(name: &str) -> SegmentName {
        SegmentName::Location(RegionName(name.into()))
    }

    #[test]
    fn a_ledger_reads_back_as_written() {
        let read = parse(TEXT).unwrap();
        assert_eq!(read.skipped, 0);
        assert_eq!(read.ledger.iter().count(), 5);
        assert_eq!(
            read.ledger.since(&Claim::Lead(location("nd"))),
            Some(1_796_081_314)
        );
        assert_eq!(format(&read.ledger), TEXT);
        assert_eq!(parse("").unwrap(), Since::default());
    }

    #[test]
    fn names_with_spaces_and_signs_are_one_entry() {
        for name in ["a b", "a=b", "100%", "käse", "", "a:b", "\u{202e}"] {
            let ledger = Ledger::new([(Claim::Region(location(name)), 1_796_081_284)]);
            let text = format(&ledger);
            assert!(text.is_ascii() && !text.contains(' '), "{text}");
            assert_eq!(text.matches('=').count(), 1, "{text}");
            assert_eq!(parse(&text).unwrap().ledger, ledger, "{text}");
        }
    }

    #[test]
    fn an_entry_in_another_text_form_is_refused() {
        for text in [
            "address:192.168.50.11",
            "address:192.168.50.11=",
            "address:192.168.50.11=2026-11-30",
            "address:192.168.50.11=2026-11-30T23:28:04+00:00",
            "address:192.168.50.11=2026-11-30T23:28:04.5Z",
            "address:192.168.50.11=2026-11-30t23:28:04z",
            "address:192.168.50.11=1769-11-30T23:28:04Z",
            "address:192.168.050.11=2026-11-30T23:28:04Z",
            "address:FD00::11=2026-11-30T23:28:04Z",
            "address:127.0.0.1=2026-11-30T23:28:04Z",
            "key:short=2026-11-30T23:28:04Z",
            "region:nd=2026-11-30T23:28:04Z",
            "region:location:%6Ed=2026-11-30T23:28:04Z",
            "region:location:%zz=2026-11-30T23:28:04Z",
            "region:location:%2=2026-11-30T23:28:04Z",
            "pods:10.42.0.0/24=2026-11-30T23:28:04Z",
            "\u{202e}",
        ] {
            let read = parse(text).unwrap();
            assert!(read.ledger.is_empty(), "{text:?} was accepted");
            assert_eq!(read.skipped, 1, "{text:?}");
        }
    }

    #[test]
    fn a_malformed_entry_is_skipped_and_a_long_ledger_cut() {
        let read = parse(&format!("nonsense {TEXT}")).unwrap();
        assert_eq!((read.ledger.iter().count(), read.skipped), (5, 1));

        let many = (0..60).map(|host| format!("address:10.0.0.{host}=2026-11-30T23:28:04Z"));
        let read = parse(&many.collect::<Vec<_>>().join(" ")).unwrap();
        assert_eq!((read.ledger.iter().count(), read.skipped), (16, 44));
        assert!(parse(&"x".repeat(MAX_LENGTH + 1)).is_err());
    }

    #[test]
    fn a_formatted_ledger_is_never_too_long_to_parse() {
        let names = (0..16).map(|number| format!("{number}{}", "ä".repeat(63)));
        let ledger = Ledger::new(names.map(|name| (Claim::Region(location(&name)), 0)));
        let text = format(&ledger);
        assert!(text.len() <= MAX_LENGTH);
        assert_eq!(parse(&text).unwrap().skipped, 0);
    }
}
