//! `selvedge doctor`: finds problems of this node's mesh, with remedies.
//!
//! It changes nothing. It shows the agent's own report, and checks what the agent does not know or
//! cannot repair: other programs' firewalls and the host's settings.

use std::fmt;
use std::io::{self, Write as _};
use std::process::ExitCode;

use crate::config::{Config, Flags};
use crate::flannel::Files;
use crate::guard::boots;
use crate::refusal::Refusal;
use crate::status::{self, Report, Role};
use crate::text;

mod api;
pub(crate) mod firewall;
mod host;
mod kilo;
mod leaders;
mod port;

/// One result of a check.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// Its severity.
    pub severity: Severity,
    /// The fact: a sentence.
    pub found: String,
    /// The remedy: a sentence; empty where there is nothing to do.
    pub remedy: String,
}

/// The severity of a [`Finding`].
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Severity {
    /// Something does not work.
    Problem,
    /// Something may not work, or not for all nodes.
    Warning,
    /// Useful information.
    Note,
}

impl Finding {
    fn problem(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Problem,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn warning(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn note(found: impl Into<String>) -> Self {
        Self {
            severity: Severity::Note,
            found: found.into(),
            remedy: String::new(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Problem => "problem",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        write!(f, "{severity}: {}", self.found)?;
        if !self.remedy.is_empty() {
            write!(f, "\n  to do: {}", self.remedy)?;
        }
        Ok(())
    }
}

/// Checks this node and prints the findings. The exit code is 1 where there is a problem.
///
/// The flags are the agent's, so that `doctor` reads the same files and names as the agent.
pub fn run(flags: Flags) -> anyhow::Result<ExitCode> {
    let config = Config::new(flags)?;
    let report = status::ask(&config.control_socket);
    let mut findings = host::findings(&config, report.as_ref().ok());
    findings.extend(flannel(&config));
    findings.extend(kilo::findings(&config));
    findings.extend(boot_guard(boots::look(&config.state_dir)));
    let mut port = config.port;
    match report {
        Ok(report) => {
            port = report.tunnel.listen_port.unwrap_or(port);
            findings.extend(of_report(&report));
            findings.extend(leaders::findings(&report));
        }
        Err(error) => {
            findings.push(Finding::problem(
                format!("The agent does not answer: {error:#}."),
                "Start the agent, or read its log if it keeps ending.",
            ));
            findings.extend(port::finding(port));
        }
    }
    findings.extend(api::findings(&config)?);
    match firewall::ruleset() {
        Ok(ruleset) => findings.extend(firewall::findings(&ruleset, port, &config.interface)),
        Err(error) => findings.push(Finding::warning(
            format!("The firewall could not be read: {error:#}."),
            "Run this as root.",
        )),
    }
    findings.extend(firewall::legacy());
    findings.sort_by_key(|finding| finding.severity);

    let mut text = findings
        .iter()
        .map(|finding| format!("{finding}\n"))
        .collect::<String>();
    if findings
        .iter()
        .all(|finding| finding.severity == Severity::Note)
    {
        text.push_str("No problem was found on this node.\n");
    }
    // A reader may close the pipe early.
    let _ = io::stdout().write_all(text::lines(&text).as_bytes());
    let bad = findings
        .iter()
        .any(|finding| finding.severity == Severity::Problem);
    Ok(if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Whether flannel is up here, with a configuration that the agent supports.
fn flannel(config: &Config) -> Vec<Finding> {
    match Files::read(config.flannel_conf.as_deref(), &config.subnet_file) {
        Err(Refusal { sentence, .. }) => vec![Finding::problem(
            format!("An agent would refuse to run: {sentence}."),
            "Correct flannel's configuration; the agent does not start until then.",
        )],
        Ok(Files { env: None, .. }) => vec![Finding::problem(
            format!(
                "{} does not exist: flannel has not come up on this node since the last boot.",
                config.subnet_file.display()
            ),
            "Read flannel's log (that of k3s, if k3s runs flannel), or set the file's path with --subnet-file.",
        )],
        Ok(_) => Vec::new(),
    }
}

/// Whether the boot guard ran at this boot.
fn boot_guard(verdict: boots::Verdict) -> Option<Finding> {
    match verdict {
        boots::Verdict::NotInstalled => Some(Finding::note(
            "No boot guard is installed on this host: after a reboot traffic for other regions can leave in clear until the agent's first pass. Run selvedge guard --install on the host, or use the manifests of this version.",
        )),
        boots::Verdict::DidNotRun => Some(Finding::warning(
            "The boot guard is installed but did not run at this boot: until the agent's first pass traffic for other regions could leave in clear.",
            "See systemctl status of the unit that starts the kubelet (k3s, k3s-agent or kubelet). Under SELinux, systemd must be allowed to run /var/lib/selvedge/bin/selvedge.",
        )),
        boots::Verdict::NotBootedSince | boots::Verdict::Ran => None,
    }
}

/// Findings from the agent's report.
fn of_report(report: &Report) -> Vec<Finding> {
    let mut findings = report
        .problems
        .iter()
        .map(|problem| {
            Finding::problem(
                format!("The node is not ready: {problem}."),
                "The agent retries; read its log if this lasts.",
            )
        })
        .collect::<Vec<_>>();
    if report.role == Role::Outside {
        findings.push(Finding::problem(
            format!("The node {} is not in the mesh.", report.node),
            "Compare --hostname with kubectl get nodes, and check that the node has a pod CIDR and is Ready.",
        ));
    }
    if report.api.cached {
        let error = report
            .api
            .error
            .as_deref()
            .unwrap_or("no server was found yet");
        findings.push(Finding::warning(
            format!("The agent uses its cache, because no API server answers: {error}."),
            "Tunnels stay up; set a server with --kubeconfig or --master if the agent finds none.",
        ));
    }
    if report.fail_open {
        findings.push(Finding::warning(
            "Traffic to a region whose tunnel is down leaves in clear, because of --on-tunnel-down=open.",
            "Remove the flag unless this is intended.",
        ));
    }
    if let (Some(port), Some(reason)) = (report.tunnel.listen_port, &report.tunnel.port_reason) {
        findings.push(Finding::note(format!(
            "The tunnel listens on UDP port {port} {reason}: a NAT on the way seems to keep that port for another node. To fix the port, forward it and annotate the node with kilo.squat.ai/force-endpoint."
        )));
    }
    findings.extend(report.excluded.iter().map(|excluded| {
        Finding::warning(
            format!("Left out of the mesh: {excluded}."),
            "Correct the object; the rest of the mesh is not affected.",
        )
    }));
    findings.extend(report.overlaps.iter().map(|overlap| {
        Finding::note(format!(
            "Reached by an alias: {overlap}. The API server reaches the kubelet by it if the alias is the node's ExternalIP and that type comes first in --kubelet-preferred-address-types."
        ))
    }));
    findings.extend(report.connected.iter().map(|connected| {
        Finding::warning(
            format!("Left to a connected network: {connected}."),
            "Change one of the two addresses, if this node should reach the one in the mesh.",
        )
    }));
    if let Some(drops @ 1..) = report.leak_drops {
        findings.push(Finding::warning(
            format!("{drops} VXLAN packets to other regions were dropped by the firewall: they would have left in clear."),
            "No such packet should be sent while the agent's routes are in place; check whether another program removes them.",
        ));
    }
    findings.extend(report.peers.iter().filter_map(silent));
    findings.extend(report.paths.iter().filter_map(path));
    findings.extend(report.paths.iter().filter_map(relayed));
    findings.extend(mtu(report));
    findings
}

/// A path that is down, by the echoes.
fn path(path: &status::LeaderPath) -> Option<Finding> {
    let cause = match path.cause.as_deref()? {
        "not_forwarding" => "it says that it does not forward for its region",
        _ => "it does not answer echoes",
    };
    Some(Finding::warning(
        format!(
            "Leader {} of {} is not used since {} s: {cause}.",
            path.name, path.region, path.since
        ),
        "Run selvedge doctor on that node. Other leaders of the region carry its traffic meanwhile.",
    ))
}

/// A path that goes through a relay.
fn relayed(path: &status::LeaderPath) -> Option<Finding> {
    let via = path.via.as_ref()?;
    Some(Finding::warning(
        format!(
            "Leader {} of {} is reached through leader {} of {} since {} s, not directly.",
            path.name, path.region, via.leader, via.region, via.since
        ),
        "Nothing is lost by it but speed. For a direct path let UDP through between the two regions: the candidates above show what was tried.",
    ))
}

fn silent(peer: &status::Peer) -> Option<Finding> {
    if !peer.is_silent() {
        return None;
    }
    let age = match peer.handshake_age {
        Some(age) => format!("for {age} s"),
        None => "yet".to_owned(),
    };
    let (remedy, severity) = match &peer.endpoint {
        Some(endpoint) if peer.both_behind_nat => (
            format!(
                "This node and {endpoint} are both behind NAT. If one of the NATs maps each destination to another port (symmetric NAT), they cannot connect, and no third region relays: give one region a leader with a public address, or forward a port to its leader and annotate it with force-endpoint."
            ),
            Severity::Problem,
        ),
        Some(endpoint) => (
            format!(
                "Check that UDP to {endpoint} gets through: firewalls and NAT on both sides, and the endpoint annotation."
            ),
            Severity::Problem,
        ),
        None => (
            "The peer has no endpoint, so it must start the handshake: check that it runs."
                .to_owned(),
            Severity::Warning,
        ),
    };
    Some(Finding {
        severity,
        found: format!("There was no handshake with {} {age}.", peer.name),
        remedy,
    })
}

/// A path that is too small for IPv6, or a fixed MTU that is too large for the underlay.
fn mtu(report: &Report) -> Option<Finding> {
    if report.tunnel.measures_mtu {
        return path_mtu(report);
    }
    let (tunnel, flannel) = (report.tunnel.mtu?, report.flannel.as_ref()?);
    // flannel subtracts 50 bytes for VXLAN: its device's MTU plus 50 is the underlay's.
    let underlay = flannel.mtu + 50;
    let v6 = report.peers.iter().any(|peer| {
        peer.endpoint
            .as_deref()
            .is_some_and(|endpoint| endpoint.starts_with('['))
    });
    let overhead = if v6 { 80 } else { 60 };
    if tunnel > 1420 && tunnel + overhead <= underlay {
        return Some(Finding::warning(
            format!(
                "--mtu sets the tunnel's MTU to {tunnel} bytes: its full datagrams have {} and are fragmented where the path to another region carries less.",
                tunnel + overhead
            ),
            "Leave --mtu at auto, unless the whole path to every other region carries that much.",
        ));
    }
    (flannel.backend == "vxlan" && tunnel + overhead > underlay).then(|| {
        Finding::warning(
            format!("The tunnel's MTU {tunnel} and its overhead of {overhead} exceed {underlay}, the MTU of flannel's underlay."),
            "Leave --mtu at auto, unless tunnels use another link than flannel's packets.",
        )
    })
}

/// A path below IPv6 must carry 1,280 bytes (RFC 8200, 5).
fn path_mtu(report: &Report) -> Option<Finding> {
    let mut networks = report.flannel.iter().flat_map(|flannel| &flannel.networks);
    let v6 = networks.any(|network| network.contains(':'));
    let small = |path: &&status::LeaderPath| path.mtu.is_some_and(|mtu| mtu < 1280);
    let path = report.paths.iter().filter(|_| v6).find(small)?;
    Some(Finding::warning(
        format!(
            "The path to leader {} of {} carries packets of {} bytes, and IPv6 needs 1280: larger packets of IPv6 are sent in fragments.",
            path.name,
            path.region,
            path.mtu.unwrap_or_default()
        ),
        "Raise the MTU of the network between the two regions to 1360 bytes or more.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Api, Flannel, Peer, Tunnel};

    fn healthy() -> Report {
        Report {
            node: "a1".into(),
            ready: true,
            role: Role::Leader,
            api: Api {
                server: Some("https://127.0.0.1:6444".into()),
                ..Api::default()
            },
            flannel: Some(Flannel {
                backend: "vxlan".into(),
                mtu: 1450,
                ..Flannel::default()
            }),
            tunnel: Tunnel {
                mtu: Some(1420),
                ..Tunnel::default()
            },
            peers: vec![Peer {
                name: "location:default".into(),
                endpoint: Some("203.0.113.10:51820".into()),
                handshake_age: Some(30),
                persistent_keepalive: 25,
                ..Peer::default()
            }],
            leak_drops: Some(0),
            ..Report::default()
        }
    }

    fn found(report: &Report) -> String {
        of_report(report)
            .iter()
            .map(|finding| format!("{finding}\n"))
            .collect()
    }

    #[test]
    fn a_healthy_node_has_no_findings() {
        assert_eq!(found(&healthy()), "");
    }

    #[test]
    fn a_peer_without_a_handshake_is_a_problem_with_its_address() {
        let mut report = healthy();
        report.peers[0].handshake_age = None;
        assert!(found(&report).contains("no handshake with location:default yet"));
        assert!(found(&report).contains("UDP to 203.0.113.10:51820"));
        report.peers[0].both_behind_nat = true;
        assert!(found(&report).contains("203.0.113.10:51820 are both behind NAT"));

        report.peers[0].handshake_age = Some(200);
        assert!(found(&report).contains("for 200 s"));
        report.peers[0].persistent_keepalive = 0;
        assert_eq!(found(&report), "", "no traffic was expected");
    }

    #[test]
    fn leaks_and_fail_open_are_reported() {
        let mut report = healthy();
        report.leak_drops = Some(3);
        report.fail_open = true;
        let text = found(&report);
        assert!(text.contains("3 VXLAN packets"));
        assert!(text.contains("--on-tunnel-down=open"));
    }

    #[test]
    fn a_path_that_is_down_is_reported_with_its_cause() {
        let mut report = healthy();
        report.paths = vec![status::LeaderPath {
            name: "b1".into(),
            region: "location:b".into(),
            state: "up".into(),
            ..status::LeaderPath::default()
        }];
        assert_eq!(found(&report), "");
        report.paths[0].cause = Some("not_forwarding".into());
        let text = found(&report);
        assert!(
            text.contains("Leader b1 of location:b is not used"),
            "{text}"
        );
        assert!(text.contains("does not forward for its region"), "{text}");
    }

    #[test]
    fn a_path_through_a_relay_is_reported() {
        let mut report = healthy();
        report.paths = vec![status::LeaderPath {
            name: "b1".into(),
            region: "location:b".into(),
            state: "up".into(),
            via: Some(status::Via {
                leader: "c1".into(),
                region: "location:c".into(),
                since: 7,
            }),
            ..status::LeaderPath::default()
        }];
        let text = found(&report);
        assert!(
            text.contains("b1 of location:b is reached through leader c1 of location:c since 7 s"),
            "{text}"
        );
    }

    #[test]
    fn a_tunnel_mtu_above_the_underlays_is_reported() {
        let mut report = healthy();
        report.tunnel.mtu = Some(1500);
        assert!(found(&report).contains("exceed 1500"));
    }

    #[test]
    fn a_measured_path_that_is_too_small_for_ipv6_is_reported_and_no_other() {
        let mut report = healthy();
        report.tunnel.measures_mtu = true;
        report.tunnel.mtu = Some(1440);
        report.paths = vec![status::LeaderPath {
            name: "b1".into(),
            region: "location:b".into(),
            state: "up".into(),
            mtu: Some(1220),
            ..status::LeaderPath::default()
        }];
        assert_eq!(found(&report), "");
        let flannel = report.flannel.as_mut().unwrap();
        flannel.networks.push("fd42::/56".into());
        assert!(found(&report).contains("carries packets of 1220 bytes, and IPv6 needs 1280"));
    }

    #[test]
    fn a_tunnel_mtu_of_jumbo_frames_is_reported() {
        let mut report = healthy();
        report.flannel.as_mut().unwrap().mtu = 8950;
        assert_eq!(found(&report), "");
        report.tunnel.mtu = Some(8920);
        assert!(found(&report).contains("full datagrams have 8980"));
    }
}
