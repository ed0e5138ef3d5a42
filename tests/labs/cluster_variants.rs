//! The same mesh in other clusters, on a real flannel and a real kube-apiserver: flannel's other
//! backends and firewalls, a master behind 1:1 NAT, a third region behind a NAT of its own, a third
//! region that uses the very subnet of the second, regions joined by leased lines, agents without a
//! kubeconfig, nodes without any annotation.
//!
//! `two_regions_behind_nat` has the usual cluster and all faults; here each cluster only has to work. The
//! clusters come up one after the other, and each combines several independent variants.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge::topology::is_public;
use selvedge_lab::capture::Capture;
use selvedge_lab::claims::{self, By, Pairs};
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::flannel::{Backend, Firewall};
use selvedge_lab::lab::{Access, Mesh, Options, Proxy};
use selvedge_lab::topology::{LEADER, MASTER, Master, Nat, SECOND_LEADER, Shape, Third};
use selvedge_lab::{Lab, Steps, wait_for};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// A cluster, and what its steps' names start with.
struct Variant {
    name: &'static str,
    options: Options,
    access: Access,
    /// Whether the nodes are annotated, or have only their regions' labels.
    annotate: bool,
}

fn main() -> ExitCode {
    let mut steps = Steps::from_args("cluster_variants");
    for variant in variants() {
        run(&mut steps, &variant);
    }
    steps.finish()
}

fn variants() -> [Variant; 5] {
    [
        Variant {
            name: "host_gw_with_legacy_iptables_behind_one_to_one_nat",
            options: Options {
                shape: Shape {
                    master: Master::ElasticIp,
                    ..Shape::default()
                },
                backend: Backend::HostGateway,
                firewall: Firewall::IptablesLegacy,
                proxy: Proxy::Nftables,
                ..Options::default()
            },
            access: Access::Kubeconfig,
            annotate: true,
        },
        Variant {
            name: "direct_routing_with_nftables_and_a_third_region",
            options: Options {
                shape: Shape {
                    third: Third::Distinct,
                    ..Shape::default()
                },
                backend: Backend::DirectRouting,
                firewall: Firewall::Nftables,
                proxy: Proxy::Nftables,
                ..Options::default()
            },
            access: Access::Kubeconfig,
            annotate: true,
        },
        Variant {
            name: "no_annotations_and_no_kubeconfig",
            options: Options {
                proxy: Proxy::Iptables,
                ..Options::default()
            },
            access: Access::InCluster,
            annotate: false,
        },
        Variant {
            name: "private_regions_joined_by_leased_lines",
            options: Options {
                shape: Shape {
                    agents: 2,
                    master: Master::ElasticIp,
                    routed: true,
                    // Nodes reach the API server's private address directly, and its host answers
                    // through the tunnel.
                    strict: false,
                    ..Shape::default()
                },
                proxy: Proxy::Nftables,
                ..Options::default()
            },
            access: Access::InCluster,
            annotate: false,
        },
        Variant {
            name: "a_third_region_in_the_subnet_of_the_second",
            options: Options {
                shape: Shape {
                    third: Third::Overlapping,
                    nat: Nat::Cone,
                    ..Shape::default()
                },
                proxy: Proxy::Iptables,
                ..Options::default()
            },
            access: Access::Kubeconfig,
            annotate: true,
        },
    ]
}

fn run(steps: &mut Steps, variant: &Variant) -> Option<()> {
    let Variant {
        name,
        options,
        access,
        annotate,
    } = variant;
    let overlapping = options.shape.third == Third::Overlapping;
    if !steps.selects(name) {
        return None;
    }
    let (mut lab, _servers) = steps.cluster(
        &format!("{name}::the_cluster_comes_up"),
        "variants",
        *options,
    )?;
    let routed = options.shape.routed;
    if routed {
        steps.step(
            &format!("{name}::flannel_alone_joins_the_regions_in_clear"),
            || in_clear(&lab),
        );
    } else {
        steps.step(
            &format!("{name}::flannel_alone_connects_no_two_regions"),
            || claims::only_regions_are_connected(&lab),
        );
    }

    let mesh = Mesh {
        access: *access,
        annotate: *annotate,
        ..Mesh::annotated(Path::new(SELVEDGE), Path::new(MANIFEST))
    };
    steps.required(&format!("{name}::all_agents_become_ready"), || {
        let time = lab.join(&mesh)?;
        Ok(format!(
            "{:.1} s after the last was started",
            time.as_secs_f64()
        ))
    })?;
    let file = lab.directory().join("wan.pcap");
    let capture = Capture::start(lab.network().internet(), &file).ok()?;
    steps.step(
        &format!("{name}::the_regions_are_joined_within_fifteen_seconds"),
        || joined(&lab),
    );
    if overlapping {
        steps.step(
            &format!("{name}::all_pods_and_nodes_reach_every_pod"),
            || claims::all_places_reach_every_pod(&lab),
        );
        steps.step(&format!("{name}::pods_reach_pods_everywhere"), || {
            claims::pods_keep_their_address(&lab)
        });
        steps.step(
            &format!("{name}::inside_the_regions_hosts_reach_hosts"),
            || claims::regions_are_undisturbed(&lab),
        );
    } else {
        steps.step(
            &format!("{name}::all_pods_and_nodes_reach_each_other"),
            || claims::all_places_reach_each_other(&lab, By::OwnAddress),
        );
        steps.step(
            &format!("{name}::all_pods_and_nodes_reach_each_other_by_cluster_ip"),
            || claims::all_places_reach_each_other(&lab, By::Service),
        );
        steps.step(
            &format!("{name}::a_server_sees_the_address_of_the_pod"),
            || claims::pods_keep_their_address(&lab),
        );
        steps.step(&format!("{name}::the_master_reaches_every_kubelet"), || {
            claims::master_reaches_every_kubelet(&lab)
        });
        if routed {
            steps.step(&format!("{name}::tunnels_take_the_leased_line"), || {
                untranslated(&lab)
            });
        } else {
            // Hosts reach an address that is a tunnel's endpoint without the tunnel, if they can.
            steps.step(&format!("{name}::a_megabyte_arrives_intact"), || {
                claims::bytes_arrive_intact(&lab, 1_000_000, Pairs::BesidesPublicHosts)
            });
        }
    }
    steps.step(
        &format!("{name}::pods_reach_the_service_kubernetes"),
        || claims::pods_reach_the_api(&lab),
    );
    steps.step(
        &format!("{name}::nothing_crosses_the_internet_in_clear"),
        || {
            let findings = capture.finish(POD_NETWORK.parse()?)?;
            // A public address that no operator declared is any address of the internet: pods send there
            // as flannel alone lets them, from their host's address.
            let undeclared = !*annotate && is_public(lab.node(MASTER)?.address());
            let in_clear = if undeclared {
                findings.pod_addresses + findings.vxlan > 0
            } else {
                !findings.nothing_in_clear()
            };
            ensure!(!in_clear, "{findings}");
            Ok(findings.to_string())
        },
    );
    if !annotate {
        steps.step(
            &format!("{name}::leaders_and_addresses_are_agreed_without_annotations"),
            || agreed(&lab),
        );
    }
    Some(())
}

/// The control run of regions whose private networks are routed: flannel's VXLAN finds its way alone.
fn in_clear(lab: &Lab) -> anyhow::Result<String> {
    let file = lab.directory().join("flannel-alone.pcap");
    let capture = Capture::start(lab.network().internet(), &file)?;
    let reached = claims::all_places_reach_every_pod(lab)?;
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    ensure!(!findings.nothing_in_clear(), "{findings}");
    Ok(format!("{reached}: {findings}"))
}

/// The leaders send from and to their private addresses, which no router translates.
fn untranslated(lab: &Lab) -> anyhow::Result<String> {
    let mut summary = Vec::new();
    let near = [LEADER, SECOND_LEADER];
    for (leader, others) in [
        (MASTER, &near[..]),
        (LEADER, &[MASTER]),
        (SECOND_LEADER, &[MASTER]),
    ] {
        let expected = others
            .iter()
            .map(|other| Ok(format!("{}:51820", lab.node(other)?.address())))
            .collect::<anyhow::Result<BTreeSet<_>>>()?;
        let peers = claims::wg_show(lab, leader)?;
        let endpoints: BTreeSet<_> = peers.iter().map(|peer| peer.endpoint.clone()).collect();
        ensure!(
            endpoints == expected && peers.len() == others.len(),
            "{leader}: {peers:?}"
        );
        summary.push(format!("{leader} to {}", others.join(" and ")));
    }
    Ok(summary.join(", "))
}

/// From the last node of each region to the last of each other one.
fn joined(lab: &Lab) -> anyhow::Result<String> {
    let mut slowest = Duration::ZERO;
    let names = lab.node_names();
    for from in &names {
        for to in &names {
            if lab.apart(from, to)? {
                let (from, to) = (format!("pod@{from}"), format!("pod@{to}"));
                let patience = Duration::from_secs(15);
                slowest = slowest.max(claims::reached_within(lab, &from, &to, patience)?);
            }
        }
    }
    Ok(format!("the slowest pair after {slowest:.1?} more"))
}

/// Without annotations the agents still agree on leaders and number them.
///
/// The first nodes to start lead first, and keep their numbers when others lead. So a leader is known by
/// the tunnel's link, which is up on leaders only. The master is alone in its region; the data centre has two
/// leaders.
fn agreed(lab: &Lab) -> anyhow::Result<String> {
    let mut leaders = Vec::new();
    wait_for(
        "one leader with the master and two in the data centre",
        Duration::from_secs(60),
        || {
            leaders = lab
                .node_names()
                .into_iter()
                .filter_map(|name| Some((tunnel_addresses(lab, &name)?, name)))
                .collect();
            let far = |(_, name): &&(String, String)| lab.apart(MASTER, name).unwrap_or(false);
            leaders.len() == 3 && leaders.iter().filter(far).count() == 2
        },
    )
    .with_context(|| format!("{leaders:?}"))?;
    for (addresses, name) in &leaders {
        let published = wireguard_ip(lab, name).with_context(|| format!("{name} has no number"))?;
        let (address, _) = published.split_once('/').unwrap_or_default();
        ensure!(
            published.starts_with("10.4.") && addresses.contains(&format!(" {address}/")),
            "{name} publishes {published} and has {addresses}"
        );
    }
    Ok(format!("{leaders:?}"))
}

/// The addresses of a node's tunnel, where it is up.
fn tunnel_addresses(lab: &Lab, node: &str) -> Option<String> {
    let line = "ip -4 -br address show dev kilo0 up";
    let addresses = lab.node(node).and_then(|node| node.run(line)).ok()?;
    let addresses = addresses.trim();
    (!addresses.is_empty()).then(|| addresses.to_owned())
}

fn wireguard_ip(lab: &Lab, node: &str) -> Option<String> {
    let object = lab.api().get(&format!("/api/v1/nodes/{node}")).ok()?;
    let address = object["metadata"]["annotations"]["kilo.squat.ai/wireguard-ip"].as_str()?;
    (!address.is_empty()).then(|| address.to_owned())
}
