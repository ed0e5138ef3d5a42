//! The flannel stand-in leaves on every node what the real flanneld leaves.
//!
//! Needs root and the programs of `lab/build.sh`.

use std::collections::BTreeMap;
use std::fs;

use selvedge_lab::flannel::{Backend, SUBNET_ENV};
use selvedge_lab::lab::{Options, Parts};
use selvedge_lab::netns::unique_prefix;
use selvedge_lab::topology::Shape;
use selvedge_lab::{Lab, scratch};

/// What flannel is known by, on every node: command lines, and what they print.
type State = BTreeMap<String, String>;

fn state(backend: Backend, parts: Parts) -> anyhow::Result<State> {
    let options = Options {
        shape: Shape {
            agents: 2,
            ..Shape::default()
        },
        backend,
        parts,
        ..Options::default()
    };
    let directory = scratch("stand-in")?;
    let lab = Lab::up(&unique_prefix(), directory, options, &|_| {})?;
    let mut state = State::new();
    let mut names = Vec::new();
    for name in lab.node_names() {
        let node = lab.node(&name)?;
        for line in [
            "ip -d -o link show flannel.1",
            "ip -o -4 address show dev flannel.1",
            "ip -4 route",
            "bridge fdb show dev flannel.1",
            "ip -4 neighbour show nud permanent",
            "iptables-save",
        ] {
            let text = node.run(line).unwrap_or_default();
            state.insert(format!("{name}: {line}"), steady(&text));
        }
        let env = fs::read_to_string(node.outside(SUBNET_ENV))?;
        state.insert(format!("{name}: {SUBNET_ENV}"), env);
        for pods in lab.pod_cidrs(&name)? {
            // 10.42.1.0 without its last digit, 2001:cafe:42:1:: as a whole.
            let text = pods.network().to_string();
            let text = text.trim_end_matches('0').to_owned();
            names.push((text, format!("<the pods of {name}>.")));
        }
        let object = lab.api().get(&format!("/api/v1/nodes/{name}"))?;
        let annotations = object["metadata"]["annotations"].as_object();
        for (key, value) in annotations.into_iter().flatten() {
            if key.starts_with("flannel.alpha.coreos.com/") {
                let value = value.as_str().unwrap_or_default().to_owned();
                if let Some((_, rest)) = value.split_once("VtepMAC\":\"") {
                    names.push((rest[..17].to_owned(), format!("<the MAC of {name}>")));
                }
                state.insert(format!("{name}: {key}"), value);
            }
        }
    }
    // flannel's devices have random addresses, and pod CIDRs go to the node that comes first.
    for text in state.values_mut() {
        for (name, meaning) in &names {
            *text = text.replace(name, meaning);
        }
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        *text = lines.join("\n");
    }
    Ok(state)
}

/// Without counters, comments, link numbers and entries that the kernel adds.
fn steady(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.starts_with(['#', ':']) || line.contains("33:33:") || line.contains("01:00:5e:") {
            continue;
        }
        let (number, rest) = line.split_once(": ").unwrap_or_default();
        let line = if number.parse::<u32>().is_ok() {
            rest
        } else {
            line
        };
        lines.push(line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    lines.join("\n")
}

fn assert_same(backend: Backend) -> anyhow::Result<()> {
    let real = state(backend, Parts::Real)?;
    let imitated = state(backend, Parts::StandIns)?;

    assert_eq!(
        real.keys().collect::<Vec<_>>(),
        imitated.keys().collect::<Vec<_>>()
    );
    for (what, text) in &real {
        assert_eq!(text, &imitated[what], "{what}: real, then stand-in");
    }
    Ok(())
}

#[test]
fn the_stand_in_is_like_flannel_with_vxlan() {
    assert_same(Backend::Vxlan).unwrap();
}

#[test]
fn the_stand_in_is_like_flannel_with_direct_routing() {
    assert_same(Backend::DirectRouting).unwrap();
}

#[test]
fn the_stand_in_is_like_flannel_with_host_gateways() {
    assert_same(Backend::HostGateway).unwrap();
}
