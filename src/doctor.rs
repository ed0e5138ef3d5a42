//! `selvedge doctor`: what is wrong with this node's mesh, and what to do.
//!
//! Looks and changes nothing. What the agent itself reports comes first; then what it cannot know
//! or cannot mend: other programs' firewalls, the host's settings.

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

/// One thing that is not as it should be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// Whether traffic suffers.
    pub severity: Severity,
    /// What was found: a sentence.
    pub found: String,
    /// What to do about it: a sentence; empty where there is nothing to do.
    pub remedy: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Severity {
    /// Something does not work.
    Problem,
    /// Something may not work, or not for everybody.
    Warning,
    /// Nothing is wrong; it helps to know.
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

/// Looks at this node and prints what was found. The exit code is 1 where there is a problem.
///
/// The flags are the agent's own, so that files and names are looked for where it looks.
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
                format!("The agent cannot be asked: {error:#}."),
                "Start the agent, or look into its log if it keeps ending.",
            ));
            findings.extend(port::finding(port));
        }
    }
    findings.extend(api::findings(&config)?);
    match firewall::ruleset() {
        Ok(ruleset) => findings.extend(firewall::findings(&ruleset, port, &config.interface)),
        Err(error) => findings.push(Finding::warning(
            format!("The firewall could not be looked at: {error:#}."),
            "Run this as root.",
        )),
    }
    findings.extend(firewall::legacy());
    findings.sort_by_key(|finding| finding.severity);

    let mut told = findings
        .iter()
        .map(|finding| format!("{finding}\n"))
        .collect::<String>();
    if findings
        .iter()
        .all(|finding| finding.severity == Severity::Note)
    {
        told.push_str("Nothing is wrong with this node, as far as it can tell.\n");
    }
    // A reader that closed the pipe has read enough.
    let _ = io::stdout().write_all(text::lines(&told).as_bytes());
    let bad = findings
        .iter()
        .any(|finding| finding.severity == Severity::Problem);
    Ok(if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
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

/// Whether the guard was there at this boot before flannel.
fn boot_guard(verdict: boots::Verdict) -> Option<Finding> {
    match verdict {
        boots::Verdict::NotInstalled => Some(Finding::note(
            "No boot guard is installed on this host: after a reboot traffic for other regions can leave in clear until the agent's first pass. Run selvedge guard --install on the host, or use the manifests of this version.",
        )),
        boots::Verdict::DidNotRun => Some(Finding::warning(
            "The boot guard is installed and did not run at this boot: until the agent's first pass traffic for other regions could leave in clear.",
            "See systemctl status of the unit that starts the kubelet (k3s, k3s-agent or kubelet). Under SELinux, systemd must be allowed to run /var/lib/selvedge/bin/selvedge.",
        )),
        boots::Verdict::NotBootedSince | boots::Verdict::Ran => None,
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
    findings.extend(report.connected.iter().map(|connected| {
        Finding::warning(
            format!("Left to a connected network: {connected}."),
            "Give one of the two another address, if this node should reach what is elsewhere.",
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
                "This node and {endpoint} are both behind NAT. If one of the NATs gives each destination another port (symmetric), they cannot meet: give one region a leader with a public address, or forward a port to its leader and annotate it with force-endpoint."
            ),
            Severity::Problem,
        ),
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
    // flannel takes off 50 bytes for VXLAN: what its device has and 50 is the underlay's.
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
                "--mtu gives the tunnel {tunnel} bytes: its full datagrams have {} and are fragmented wherever the way to another region carries less.",
                tunnel + overhead
            ),
            "Leave --mtu at auto, unless the whole way to every other region carries that much.",
        ));
    }
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
        report.peers[0].both_behind_nat = true;
        assert!(found(&report).contains("203.0.113.10:51820 are both behind NAT"));

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
    fn a_tunnel_of_jumbo_frames_is_told() {
        let mut report = healthy();
        report.flannel.as_mut().unwrap().mtu = 8950;
        assert_eq!(found(&report), "");
        report.tunnel.mtu = Some(8920);
        assert!(found(&report).contains("full datagrams have 8980"));
    }
}
