//! Checks through the mesh whether its leaders answer.
//!
//! The kernel that owns an address answers a datagram to a closed port (RFC 1122, 4.1.3.1), so the check
//! needs neither privileges nor a program at the other end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::thread::sleep;
use std::time::Duration;

use super::Finding;
use crate::status::{Peer, Report, Role};

/// The port `discard`, which is closed on almost every host today.
const PORT: u16 = 9;
/// Interval and number of polls: enough for an answer from another continent.
const POLL: Duration = Duration::from_millis(20);
const POLLS: usize = 50;

/// A leader and its address in the mesh.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Leader {
    name: String,
    segment: String,
    ip: IpAddr,
}

/// The leaders that do not answer, and the results of each peer's candidates.
pub(super) fn findings(report: &Report) -> Vec<Finding> {
    let mut findings = findings_at(report, PORT);
    findings.extend(report.peers.iter().filter_map(candidates));
    findings
}

/// The candidates of a peer, one per line.
fn candidates(peer: &Peer) -> Option<Finding> {
    if peer.candidates.is_empty() {
        return None;
    }
    let mut text = format!("Candidates of {}:", peer.name);
    for candidate in &peer.candidates {
        let (address, origin) = (&candidate.address, &candidate.origin);
        text += &format!("\n  {address} ({origin}): {}", candidate.outcome());
    }
    Some(Finding::note(text))
}

fn findings_at(report: &Report, port: u16) -> Vec<Finding> {
    let mut probes = leaders(report)
        .into_iter()
        .map(|leader| (probe(leader.ip, port), leader))
        .collect::<Vec<_>>();
    for _ in 0..POLLS {
        probes.retain(|(socket, _)| !socket.as_ref().is_ok_and(has_answered));
        if probes.iter().all(|(socket, _)| socket.is_err()) {
            break;
        }
        sleep(POLL);
    }
    probes
        .into_iter()
        .map(|(outcome, leader)| finding(&leader, outcome.err()))
        .collect()
}

/// The leaders that this node depends on: those of all other regions, and its own region's unless it leads.
fn leaders(report: &Report) -> Vec<Leader> {
    if report.role == Role::Outside {
        return Vec::new();
    }
    report
        .segments
        .iter()
        .filter(|segment| segment.leader != report.node)
        .filter_map(|segment| {
            Some(Leader {
                name: segment.leader.clone(),
                segment: segment.name.clone(),
                ip: segment.wireguard_ips.first()?.parse().ok()?,
            })
        })
        .collect()
}

fn probe(ip: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let any: IpAddr = match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect((ip, port))?;
    socket.send(b"")?;
    Ok(socket)
}

/// Whether the address answered or refused; an ICMP error from a router on the path does not count.
fn has_answered(socket: &UdpSocket) -> bool {
    match socket.recv(&mut [0; 8]) {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
    }
}

fn finding(leader: &Leader, error: Option<io::Error>) -> Finding {
    let Leader { name, segment, ip } = leader;
    let why = error.map_or_else(String::new, |error| format!(" ({error})"));
    Finding::warning(
        format!("{name}, the leader of {segment}, does not answer on {ip}{why}."),
        format!(
            "Check that {name} is up, and run selvedge doctor there; the firewall of {name} may also drop packets from the tunnel."
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{self, Segment};

    fn report(ips: &[&str]) -> Report {
        let segment = |(number, ip): (usize, &&str)| Segment {
            name: format!("location:{number}"),
            leader: format!("n{number}"),
            wireguard_ips: vec![(*ip).to_owned()],
            ..Segment::default()
        };
        Report {
            node: "n0".to_owned(),
            role: Role::Follower,
            segments: ips.iter().enumerate().map(segment).collect(),
            ..Report::default()
        }
    }

    #[test]
    fn a_leader_that_does_not_answer_is_named() {
        // This socket listens and never answers; this node itself, n0, is not probed.
        let silent = UdpSocket::bind("127.0.0.9:0").unwrap();
        let port = silent.local_addr().unwrap().port();
        let report = report(&["127.0.0.9", "127.0.0.1", "127.0.0.2", "127.0.0.9"]);
        let found = findings_at(&report, port);
        let [finding] = &found[..] else {
            panic!("{found:?}");
        };
        assert!(
            finding
                .found
                .starts_with("n3, the leader of location:3, does not answer on 127.0.0.9"),
            "{finding}"
        );
    }

    #[test]
    fn each_candidate_is_shown_with_its_result() {
        let candidate = |address: &str, answered_in, answered, tried| status::Candidate {
            address: address.into(),
            origin: "announced".into(),
            in_use: false,
            answered_in,
            answered,
            tried,
        };
        let peer = Peer {
            name: "location:nd".into(),
            candidates: vec![
                candidate("192.0.2.1:1", Some(7), Some(60), Some(60)),
                candidate("192.0.2.2:1", Some(7), Some(60), Some(3)),
                candidate("192.0.2.3:1", None, None, Some(3)),
                candidate("192.0.2.4:1", None, None, None),
            ],
            ..Peer::default()
        };
        let note = candidates(&peer).unwrap();
        assert_eq!(note.severity, crate::doctor::Severity::Note);
        let lines: Vec<_> = note.found.lines().collect();
        assert_eq!(
            lines,
            [
                "Candidates of location:nd:",
                "  192.0.2.1:1 (announced): answered in 7 ms, 60 s ago",
                "  192.0.2.2:1 (announced): no answer since 60 s",
                "  192.0.2.3:1 (announced): tried 3 s ago, no answer",
                "  192.0.2.4:1 (announced): never tried",
            ]
        );
        assert_eq!(candidates(&Peer::default()), None);
    }

    #[test]
    fn a_node_outside_the_mesh_probes_no_leader() {
        let outside = Report {
            role: Role::Outside,
            ..report(&["127.0.0.9", "127.0.0.9"])
        };
        assert_eq!(findings(&outside), vec![]);
    }
}
