//! Checks the host's requirements and settings.
//!
//! Reverse path filters are not checked: the mesh works under strict ones, except for one path to a
//! `NodePort`, which may be unused. A clock that is off by minutes or hours is not reported either: no
//! decision of the agent compares clocks of different nodes.

use std::path::Path;

use super::Finding;
use crate::config::Config;
use crate::kernel::Rtnetlink;
use crate::preflight;
use crate::refusal::Refusal;
use crate::status::Report;

/// Why an agent would refuse to start here, and settings that stop the node from forwarding. `report`
/// is from the running agent, if any.
pub(super) fn findings(config: &Config, report: Option<&Report>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let sentence = match preflight::check() {
        Err(Refusal { sentence, .. }) => Some(sentence),
        Ok(()) => others(config).err().map(|error| format!("{error:#}")),
    };
    findings.extend(sentence.map(|sentence| {
        Finding::problem(
            format!("An agent started like this would refuse to run: {sentence}."),
            "Correct that, or run this as root on the node.",
        )
    }));
    let sysctl = |path: &str| std::fs::read_to_string(Path::new("/proc/sys").join(path)).ok();
    findings.extend(forwarding(
        sysctl("net/ipv4/ip_forward").as_deref(),
        "net.ipv4.ip_forward",
    ));
    let flannel = report.and_then(|report| report.flannel.as_ref());
    if flannel.is_some_and(|flannel| flannel.networks.iter().any(|net| net.contains(':'))) {
        findings.extend(forwarding(
            sysctl("net/ipv6/conf/all/forwarding").as_deref(),
            "net.ipv6.conf.all.forwarding",
        ));
    }
    #[expect(clippy::disallowed_methods, reason = "this check is about the clock")]
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    findings.extend(clock(now));
    findings
}

/// A link, a rule or routes of another program where the agent's belong.
fn others(config: &Config) -> anyhow::Result<()> {
    Rtnetlink::open(&config.interface)?.check()
}

/// Leaders forward, and every node forwards to its own pods.
fn forwarding(value: Option<&str>, name: &str) -> Option<Finding> {
    (value?.trim() == "0").then(|| {
        Finding::problem(
            format!("{name} is 0: this node forwards nothing, not even to its own pods."),
            format!("Run sysctl -w {name}=1 and make it permanent in /etc/sysctl.d."),
        )
    })
}

/// Handshakes carry a timestamp, and a peer refuses one that is older than the last (WireGuard paper,
/// 5.1). Certificates have a start of validity.
fn clock(now: u64) -> Option<Finding> {
    /// 1 January 2026; this program is younger than that.
    const EARLIEST: u64 = 1_767_225_600;
    (now < EARLIEST).then(|| {
        Finding::problem(
            "The clock is years behind: the API server's certificate is not valid yet for this node.",
            "Set the clock, and run an NTP client.",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarding_and_the_clock_are_checked() {
        assert!(forwarding(Some("0\n"), "net.ipv4.ip_forward").is_some());
        assert!(forwarding(Some("1\n"), "net.ipv4.ip_forward").is_none());
        assert!(forwarding(None, "net.ipv4.ip_forward").is_none());
        assert!(clock(0).is_some());
        assert!(clock(1_800_000_000).is_none());
    }
}
