//! `selvedge doctor`: what is wrong with this node's mesh, and what to do.
//!
//! Looks and changes nothing. What the agent itself reports comes first; then what it cannot know
//! or cannot mend: other programs' firewalls, the host's settings.

use std::fmt;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use crate::agent::preflight;
use crate::config::{Config, Flags};
use crate::flannel::Files;
use crate::refusal::Refusal;
use crate::status::{self, Report, Role};

mod firewall;

/// One thing that is not as it should be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// Whether traffic suffers.
    pub severity: Severity,
    /// What was found: a sentence.
    pub found: String,
    /// What to do about it: a sentence.
    pub remedy: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Severity {
    /// Something does not work.
    Problem,
    /// Something may not work, or not for everybody.
    Warning,
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
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Problem => "problem",
            Severity::Warning => "warning",
        };
        write!(f, "{severity}: {}\n  to do: {}", self.found, self.remedy)
    }
}

/// Looks at this node and prints what was found. The exit code is 1 where there is a problem.
///
/// The flags are the agent's own, so that files and names are looked for where it looks.
pub fn run(flags: Flags) -> anyhow::Result<ExitCode> {
    let config = Config::new(flags)?;
    let mut findings = host();
    findings.extend(flannel(&config));
    let mut port = config.port;
    match status::ask(&config.control_socket) {
        Ok(report) => {
            port = report.tunnel.listen_port.unwrap_or(port);
            findings.extend(of_report(&report));
        }
        Err(error) => findings.push(Finding::problem(
            format!("The agent cannot be asked: {error:#}."),
            "Start the agent, or look into its log if it keeps ending.",
        )),
    }
    match firewall::ruleset() {
        Ok(ruleset) => findings.extend(firewall::findings(&ruleset, port, &config.interface)),
        Err(error) => findings.push(Finding::warning(
            format!("The firewall could not be looked at: {error:#}."),
            "Run this as root.",
        )),
    }
    findings.sort_by_key(|finding| finding.severity);

    let mut text = findings
        .iter()
        .map(|finding| format!("{finding}\n"))
        .collect::<String>();
    if findings.is_empty() {
        text.push_str("Nothing is wrong with this node, as far as it can tell.\n");
    }
    // A reader that closed the pipe has read enough.
    let _ = io::stdout().write_all(text.as_bytes());
    let bad = findings
        .iter()
        .any(|finding| finding.severity == Severity::Problem);
    Ok(if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// What the host must have and be set to.
fn host() -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Err(Refusal { sentence, .. }) = preflight::check() {
        findings.push(Finding::problem(
            format!("An agent started like this would refuse to run: {sentence}."),
            "Mend that, or run this as root on the node.",
        ));
    }
    let sysctl = |path: &str| std::fs::read_to_string(Path::new("/proc/sys").join(path)).ok();
    findings.extend(forwarding(
        sysctl("net/ipv4/ip_forward").as_deref(),
        "net.ipv4.ip_forward",
    ));
    #[expect(
        clippy::disallowed_methods,
        reason = "whether the clock is right is what is asked"
    )]
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    findings.extend(clock(now));
    findings
}

/// Leaders forward, and so do nodes to their own pods.
fn forwarding(value: Option<&str>, name: &str) -> Option<Finding> {
    (value?.trim() == "0").then(|| {
        Finding::problem(
            format!("{name} is 0: this node forwards nothing, not even to its own pods."),
            format!("Run sysctl -w {name}=1 and make it last in /etc/sysctl.d."),
        )
    })
}

/// Handshakes carry the time, and a peer takes none that is older than the last (WireGuard paper,
/// 5.1); certificates are valid from some day on.
fn clock(now: u64) -> Option<Finding> {
    /// The first of January 2026, before which this program was not there.
    const BEGINNING: u64 = 1_767_225_600;
    (now < BEGINNING).then(|| {
        Finding::problem(
            "The clock is years behind: the API server's certificate is not valid yet for this node.",
            "Set the clock, and run an NTP client.",
        )
    })
}

/// Whether flannel has come up here in a way that can be worked beside.
fn flannel(config: &Config) -> Vec<Finding> {
    match Files::read(config.flannel_conf.as_deref(), &config.subnet_file) {
        Err(Refusal { sentence, .. }) => vec![Finding::problem(
            format!("An agent would refuse to run: {sentence}."),
            "Mend flannel's configuration; the agent does not start until then.",
        )],
        Ok(Files { env: None, .. }) => vec![Finding::problem(
            format!(
                "{} does not exist: flannel has not come up on this node since it was booted.",
                config.subnet_file.display()
            ),
            "Look into flannel's log (of k3s, where that runs it), or name the file with --subnet-file.",
        )],
        Ok(_) => Vec::new(),
    }
}

/// What the agent's own report tells.
fn of_report(report: &Report) -> Vec<Finding> {
    let mut findings = report
        .problems
        .iter()
        .map(|problem| {
            Finding::problem(
                format!("The agent is not done: {problem}."),
                "It tries again by itself; look into its log if that lasts.",
            )
        })
        .collect::<Vec<_>>();
    if report.role == Role::Outside {
        findings.push(Finding::problem(
            format!("The mesh does not know node {}.", report.node),
            "Compare --hostname with kubectl get nodes, and see whether the node has a pod CIDR and is Ready.",
        ));
    }
    if report.api.cached {
        let error = report.api.error.as_deref().unwrap_or("none was found yet");
        findings.push(Finding::warning(
            format!("The agent works from its cache, because no API server answers: {error}."),
            "Tunnels stay up; name a server with --kubeconfig or --master if it cannot find one.",
        ));
    }
    if report.fail_open {
        findings.push(Finding::warning(
            "Traffic for a region whose tunnel is down leaves in clear, because of --on-tunnel-down=open.",
            "Leave the flag out unless that is meant.",
        ));
    }
    findings.extend(report.excluded.iter().map(|excluded| {
        Finding::warning(
            format!("Left out of the mesh: {excluded}."),
            "Correct the object; the rest of the mesh is not affected.",
        )
    }));
    if let Some(drops @ 1..) = report.leak_drops {
        findings.push(Finding::warning(
            format!("{drops} VXLAN packets to other regions were dropped by the firewall: they would have left in clear."),
            "None should be sent while the agent's routes are in place; see whether another program removes them.",
        ));
    }
    findings.extend(report.peers.iter().filter_map(silent));
    findings.extend(mtu(report));
    findings
}

/// Handshakes are renewed every two minutes while there is traffic; three without one mean that
/// nothing comes through (WireGuard paper, 6.1).
fn silent(peer: &status::Peer) -> Option<Finding> {
    let age = match peer.handshake_age {
        Some(age) if age > 180 && peer.persistent_keepalive > 0 => format!("for {age} s"),
        // Without traffic or keepalives none is due.
        Some(_) => return None,
        None => "yet".to_owned(),
    };
    let (remedy, severity) = match &peer.endpoint {
        Some(endpoint) => (
            format!(
                "See whether UDP to {endpoint} gets through: firewalls and NAT on both sides, and the endpoint annotation."
            ),
            Severity::Problem,
        ),
        None => (
            "It has no endpoint, so it must connect by itself: see whether it runs.".to_owned(),
            Severity::Warning,
        ),
    };
    Some(Finding {
        severity,
        found: format!("There was no handshake with {} {age}.", peer.name),
        remedy,
    })
}

/// The tunnel must fit into what it leaves by, where the pods' packets are told of it.
fn mtu(report: &Report) -> Option<Finding> {
    let (tunnel, flannel) = (report.tunnel.mtu?, report.flannel.as_ref()?);
    // VXLAN's overhead is 50 (contract of flannel): what its device has and 50 is the underlay's.
    let underlay = flannel.mtu + 50;
    let v6 = report.peers.iter().any(|peer| {
        peer.endpoint
            .as_deref()
            .is_some_and(|endpoint| endpoint.starts_with('['))
    });
    let overhead = if v6 { 80 } else { 60 };
    (flannel.backend == "vxlan" && tunnel + overhead > underlay).then(|| {
        Finding::warning(
            format!("The tunnel's MTU {tunnel} and its overhead of {overhead} exceed {underlay}, the MTU of flannel's underlay."),
            "Leave --mtu at auto, unless tunnels leave by another link than flannel's packets.",
        )
    })
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

        report.peers[0].handshake_age = Some(200);
        assert!(found(&report).contains("for 200 s"));
        report.peers[0].persistent_keepalive = 0;
        assert_eq!(found(&report), "", "nothing was to be sent");
    }

    #[test]
    fn leaks_and_open_failing_are_told() {
        let mut report = healthy();
        report.leak_drops = Some(3);
        report.fail_open = true;
        let text = found(&report);
        assert!(text.contains("3 VXLAN packets"));
        assert!(text.contains("--on-tunnel-down=open"));
    }

    #[test]
    fn a_tunnel_that_does_not_fit_its_underlay_is_told() {
        let mut report = healthy();
        report.tunnel.mtu = Some(1500);
        assert!(found(&report).contains("exceed 1500"));
    }

    #[test]
    fn forwarding_and_the_clock_are_looked_at() {
        assert!(forwarding(Some("0\n"), "net.ipv4.ip_forward").is_some());
        assert!(forwarding(Some("1\n"), "net.ipv4.ip_forward").is_none());
        assert!(forwarding(None, "net.ipv4.ip_forward").is_none());
        assert!(clock(0).is_some());
        assert!(clock(1_800_000_000).is_none());
    }
}
