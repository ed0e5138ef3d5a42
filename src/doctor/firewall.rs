//! Finds nf_tables rules of other programs that may drop the mesh's traffic.
//!
//! In nf_tables an accept in one table does not prevent a drop in another, so the agent can only report it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ::subprocess::Exec;
use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::{Finding, Severity};
use crate::kernel::subprocess::{self, Failure};
use crate::text;

/// The agent's own table.
const OWN: &str = "selvedge";
/// Timeout of `nft`, which may list thousands of rules on a busy host.
const TIMEOUT: Duration = Duration::from_secs(30);

/// All rules of this network namespace, as `nft` lists them.
pub(super) fn ruleset() -> anyhow::Result<Value> {
    list(&["ruleset"])
}

/// Why this node drops packets that the mesh forwards, in one sentence; `None` where nothing is found.
///
/// Only tables with a chain at the forward hook are listed: the NAT rules of thousands of
/// services are in other tables.
///
/// # Errors
///
/// When `nft` cannot be run, or does not answer within 30 s. Blocks until then.
pub(crate) fn in_the_way(link: &str) -> anyhow::Result<Option<String>> {
    let chains = list(&["chains"])?;
    let mut objects = Vec::new();
    for (family, table) in at_forward(&chains) {
        // A table that was deleted meanwhile drops nothing, and netlink reports its deletion.
        if let Ok(Value::Object(mut listed)) = list(&["table", &family, &table])
            && let Some(Value::Array(listed)) = listed.remove("nftables")
        {
            objects.extend(listed);
        }
    }
    let of_input =
        |object: &Value| object.pointer("/chain/hook").and_then(Value::as_str) == Some("input");
    objects.retain(|object| !of_input(object));
    let found = findings(&serde_json::json!({"nftables": objects}), 0, link);
    let mut problems = found
        .into_iter()
        .filter(|finding| finding.severity == Severity::Problem);
    Ok(problems.next().map(|finding| {
        let found = finding.found.trim_end_matches('.');
        let remedy = finding.remedy.trim_end_matches('.');
        format!("{found}. {remedy}")
    }))
}

/// The tables of other programs with a base chain at the forward hook, by family and name.
fn at_forward(chains: &Value) -> BTreeSet<(String, String)> {
    let list = chains.get("nftables").and_then(Value::as_array);
    let chains = list.into_iter().flatten();
    let chains = chains.filter_map(|object| object.get("chain"));
    chains
        .filter_map(|chain| {
            let text = |key| chain.get(key).and_then(Value::as_str);
            let (family, table) = (text("family")?, text("table")?);
            (text("hook") == Some("forward") && table != OWN)
                .then(|| (family.to_owned(), table.to_owned()))
        })
        .collect()
}

/// The output of `nft list`, as JSON.
#[expect(
    clippy::disallowed_methods,
    reason = "nft is the one program the product runs"
)]
fn list(what: &[&str]) -> anyhow::Result<Value> {
    let nft = Exec::cmd("nft").args(["-j", "list"]).args(what);
    let output = match subprocess::run(nft, b"", TIMEOUT) {
        Ok(output) => output,
        Err(Failure::NotRun(error)) => return Err(error).context("running nft"),
        Err(Failure::TimedOut(_)) => bail!(
            "nft does not answer within {} s: check what blocks nf_tables on this node (ps -e, dmesg)",
            TIMEOUT.as_secs()
        ),
    };
    ensure!(
        output.exit_status.success(),
        "nft says {}",
        text::message(String::from_utf8_lossy(&output.stderr).trim())
    );
    serde_json::from_slice(&output.stdout).context("reading nft's answer")
}

/// The kernel's lists of iptables-legacy tables in this network namespace.
const LEGACY: [&str; 2] = ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"];

/// Reports iptables-legacy tables, whose rules nf_tables does not show.
pub(super) fn legacy() -> Option<Finding> {
    let names = LEGACY.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    of_legacy(&names.concat())
}

fn of_legacy(names: &str) -> Option<Finding> {
    let names = names.split_whitespace().collect::<BTreeSet<_>>();
    let names = Vec::from_iter(names).join(", ");
    (!names.is_empty()).then(|| {
        Finding::warning(
            format!("There are tables of iptables-legacy in addition to those of nf_tables ({names}): a packet that either drops is lost, and doctor read only nf_tables."),
            "Run iptables-legacy-save and check whether its INPUT or FORWARD chain drops; use only one of the two.",
        )
    })
}

/// A base chain at the input or forward hook.
#[derive(Debug)]
struct Chain<'a> {
    name: &'a str,
    hook: &'a str,
    /// Whether it drops packets that no rule accepts.
    closed: bool,
    /// Whether it, or a chain of its table, has a rule about the tunnel's port.
    knows_port: bool,
    /// Whether it, or a chain of its table, has a rule about the tunnel's link.
    knows_link: bool,
    /// Whether it jumps to flannel's chain, which accepts traffic from and to the cluster
    /// network.
    knows_flannel: bool,
}

/// Chains of a ruleset that may drop datagrams to the tunnel's port, or traffic of its link.
pub(super) fn findings(ruleset: &Value, port: u16, link: &str) -> Vec<Finding> {
    let mut chains = BTreeMap::<(&str, &str, &str), Chain<'_>>::new();
    let objects = || {
        let list = ruleset.get("nftables").and_then(Value::as_array);
        list.into_iter().flatten()
    };
    for chain in objects().filter_map(|object| object.get("chain")) {
        let text = |key| chain.get(key).and_then(Value::as_str).unwrap_or_default();
        if text("table") == OWN || !matches!(text("hook"), "input" | "forward") {
            continue;
        }
        let key = (text("family"), text("table"), text("name"));
        let chain = Chain {
            name: text("name"),
            hook: text("hook"),
            closed: text("policy") == "drop",
            knows_port: false,
            knows_link: false,
            knows_flannel: false,
        };
        chains.insert(key, chain);
    }
    for rule in objects().filter_map(|object| object.get("rule")) {
        let text = |key| rule.get(key).and_then(Value::as_str).unwrap_or_default();
        let Some(expressions) = rule.get("expr").and_then(Value::as_array) else {
            continue;
        };
        let (port, link) = (
            expressions.iter().any(|e| is_about_port(e, port)),
            expressions.iter().any(|e| is_about_link(e, link)),
        );
        let table = (text("family"), text("table"));
        for ((family, of, name), chain) in &mut chains {
            if (*family, *of) != table {
                continue;
            }
            chain.knows_port |= port;
            chain.knows_link |= link;
            if *name == text("chain") && expressions.iter().any(leads_to_flannel) {
                chain.knows_flannel = true;
            }
            // Rules are in order: a final rule decides about packets that the earlier ones let pass.
            if *name == text("chain") && ends_traffic(expressions) {
                chain.closed = true;
            }
        }
    }

    chains
        .iter()
        .filter(|(_, chain)| chain.closed)
        .filter_map(|((family, table, _), chain)| {
            let whose = format!("The chain {} of the firewall table {family} {table}", chain.name);
            if chain.hook == "input" {
                (!chain.knows_port).then(|| {
                    Finding::warning(
                        format!("{whose} drops by default, and has no rule for UDP port {port}."),
                        format!("Accept UDP port {port}, if this node should be a leader that others connect to."),
                    )
                })
            } else {
                (!chain.knows_link).then(|| {
                    if chain.knows_flannel {
                        Finding::warning(
                            format!("{whose} forwards only what flannel's and other rules accept. Traffic of pods passes, and so does traffic of hosts, which has addresses of the cluster network. VPN peers do not reach the nodes behind this one, and allowed-location-ips behind it are reached by pods and hosts only."),
                            format!("Run iptables -I FORWARD -i {link} -j ACCEPT and the same with -o, if that is needed."),
                        )
                    } else {
                        Finding::problem(
                            format!("{whose} drops forwarded packets by default, and the agent's rules cannot prevent that."),
                            format!("Accept forwarding from and to {link}, flannel's links and cni0; with firewalld: firewall-cmd --permanent --zone=trusted --add-interface={link}, and the same for the others."),
                        )
                    }
                })
            }
        })
        .collect()
}

/// Whether a rule drops or rejects every packet.
fn ends_traffic(expressions: &[Value]) -> bool {
    let is = |e: &Value, what: &[&str]| what.iter().any(|key| e.get(key).is_some());
    expressions.iter().any(|e| is(e, &["drop", "reject"]))
        && expressions
            .iter()
            .all(|e| is(e, &["drop", "reject", "counter", "log", "limit", "xt"]))
}

/// Whether a rule jumps to flannel's iptables chain (`FLANNEL-FWD`).
fn leads_to_flannel(expression: &Value) -> bool {
    let target = expression.pointer("/jump/target").and_then(Value::as_str);
    target == Some("FLANNEL-FWD")
}

fn is_about_port(expression: &Value, port: u16) -> bool {
    let Some(right) = match_on(expression, |left| {
        left.pointer("/payload/field").and_then(Value::as_str) == Some("dport")
    }) else {
        return false;
    };
    holds(right, &|value| {
        let number = |value: &Value| value.as_u64();
        match value.get("range").and_then(Value::as_array) {
            Some(range) => {
                let bounds = range.iter().filter_map(number).collect::<Vec<_>>();
                matches!(bounds[..], [low, high] if (low..=high).contains(&u64::from(port)))
            }
            None => number(value) == Some(u64::from(port)),
        }
    })
}

fn is_about_link(expression: &Value, link: &str) -> bool {
    let Some(right) = match_on(expression, |left| {
        let key = left.pointer("/meta/key").and_then(Value::as_str);
        matches!(key, Some("iif" | "iifname" | "oif" | "oifname"))
    }) else {
        return false;
    };
    holds(right, &|value| value.as_str() == Some(link))
}

/// The right side of a match whose left side fulfils `wanted`.
fn match_on(expression: &Value, wanted: impl Fn(&Value) -> bool) -> Option<&Value> {
    let this = expression.get("match")?;
    wanted(this.get("left")?).then(|| this.get("right"))?
}

/// Whether a value, or a member of a set, fulfils `is`.
fn holds(value: &Value, is: &dyn Fn(&Value) -> bool) -> bool {
    match value.get("set").and_then(Value::as_array) {
        Some(members) => members.iter().any(is),
        None => is(value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chain(table: &str, name: &str, hook: &str, policy: &str) -> Value {
        json!({"chain": {"family": "inet", "table": table, "name": name, "handle": 1,
            "type": "filter", "hook": hook, "prio": 10, "policy": policy}})
    }

    fn rule(table: &str, chain: &str, expr: Value) -> Value {
        json!({"rule": {"family": "inet", "table": table, "chain": chain, "handle": 2, "expr": expr}})
    }

    fn found(objects: &[Value]) -> String {
        findings(&json!({"nftables": objects}), 51820, "kilo0")
            .iter()
            .map(|finding| format!("{finding}\n"))
            .collect()
    }

    #[test]
    fn an_open_host_has_no_findings() {
        assert_eq!(found(&[]), "");
        assert_eq!(found(&[chain("filter", "INPUT", "input", "accept")]), "");
        assert_eq!(
            found(&[chain("selvedge", "forward", "forward", "drop")]),
            ""
        );
    }

    #[test]
    fn firewalld_that_drops_forwarding_is_a_problem() {
        let text = found(&[
            chain("firewalld", "filter_FORWARD", "forward", "accept"),
            rule(
                "firewalld",
                "filter_FORWARD",
                json!([
                    {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "established"}},
                    {"accept": null},
                ]),
            ),
            rule(
                "firewalld",
                "filter_FORWARD",
                json!([
                    {"reject": {"type": "icmpx", "expr": "admin-prohibited"}},
                ]),
            ),
        ]);
        assert!(
            text.starts_with(
                "problem: The chain filter_FORWARD of the firewall table inet firewalld"
            ),
            "{text}"
        );
        assert!(text.contains("--add-interface=kilo0"), "{text}");
    }

    #[test]
    fn a_closed_forward_chain_with_flannels_jump_is_only_a_warning() {
        let closed = chain("filter", "FORWARD", "forward", "drop");
        let text = found(std::slice::from_ref(&closed));
        assert!(text.starts_with("problem: The chain FORWARD"), "{text}");

        let flannels = rule(
            "filter",
            "FORWARD",
            json!([{"counter": {}}, {"jump": {"target": "FLANNEL-FWD"}}]),
        );
        let text = found(&[closed, flannels]);
        assert!(text.starts_with("warning: The chain FORWARD"), "{text}");
        assert!(text.contains("VPN peers do not reach"), "{text}");
    }

    #[test]
    fn only_tables_of_others_at_the_forward_hook_are_listed() {
        let chains = json!({"nftables": [
            {"metainfo": {}},
            chain("filter", "FORWARD", "forward", "drop"),
            chain("nat", "PREROUTING", "prerouting", "accept"),
            chain("selvedge", "forward", "forward", "accept"),
            {"chain": {"family": "ip", "table": "filter", "name": "KUBE-FORWARD"}},
        ]});
        let found = at_forward(&chains);
        assert_eq!(found, [("inet".to_owned(), "filter".to_owned())].into());
    }

    #[test]
    fn tables_of_iptables_legacy_are_reported() {
        assert_eq!(of_legacy(""), None);
        let text = of_legacy("nat\nfilter\nfilter\n").unwrap().to_string();
        assert!(text.contains("(filter, nat)"), "{text}");
    }

    #[test]
    fn a_closed_input_chain_without_a_rule_for_the_port_is_reported() {
        let closed = chain("f", "input", "input", "drop");
        assert!(found(std::slice::from_ref(&closed)).contains("UDP port 51820"));

        for right in [
            json!(51820),
            json!({"set": [53, 51820]}),
            json!({"set": [{"range": [50000, 60000]}]}),
            json!({"range": [51820, 51820]}),
        ] {
            let accept = json!([
                {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": right}},
                {"accept": null},
            ]);
            assert_eq!(found(&[closed.clone(), rule("f", "input", accept)]), "");
        }
    }

    #[test]
    fn a_rule_that_drops_only_some_packets_does_not_close_the_chain() {
        let drop_some = json!([
            {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth1"}},
            {"drop": null},
        ]);
        let chain = chain("f", "fwd", "forward", "accept");
        assert_eq!(found(&[chain, rule("f", "fwd", drop_some)]), "");
    }
}
