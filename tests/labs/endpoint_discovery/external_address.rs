//! Nodes whose ExternalIP is the address of the NAT before them.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use selvedge_lab::topology::{MASTER, Shape};
use selvedge_lab::{Lab, Steps, claims, wait_for};
use serde_json::json;

use crate::{FOLLOWER, LEADER, PATIENCE, flags, mesh, reached_both_ways, remember_as_at_home, up};

/// A pause that is longer than a home router keeps a mapping.
const REST: Duration = Duration::from_secs(60);

/// Nodes whose cloud provider reports the address of their NAT as their own.
pub(super) fn external_address_of_the_nat(steps: &mut Steps) -> Option<()> {
    if !steps.selects("external_address_of_the_nat") {
        return None;
    }
    let shape = Shape {
        agents: 2,
        ..Shape::default()
    };
    let (mut lab, _servers) = up(
        steps,
        "external_address_of_the_nat::a_cluster_comes_up",
        shape,
    )?;
    let flags = flags(&[]);
    steps.required(
        "external_address_of_the_nat::its_agents_become_ready",
        || {
            remember_as_at_home(&lab, &["nat1"])?;
            for node in [LEADER, FOLLOWER] {
                let object = lab.api().get(&format!("/api/v1/nodes/{node}"))?;
                let mut addresses = object["status"]["addresses"].clone();
                let list = addresses.as_array_mut().context("no addresses")?;
                list.push(json!({"type": "ExternalIP", "address": "203.0.113.20"}));
                lab.api().merge(
                    &format!("/api/v1/nodes/{node}/status"),
                    &json!({"status": {"addresses": addresses}}),
                )?;
            }
            lab.join(&mesh(&flags))?;
            Ok(String::new())
        },
    )?;
    steps.step(
        "external_address_of_the_nat::a_leader_is_reached_from_outside_after_a_minute_of_rest",
        || {
            let keepalives = keepalives(&lab)?;
            let is_off = keepalives.iter().any(|one| one == "off");
            ensure!(!keepalives.is_empty() && !is_off, "{keepalives:?}");
            let lost = lost_after_a_rest(&lab)?;
            ensure!(lost == 0, "{lost} of 15 pings were lost");
            Ok("0 of 15 pings lost".to_owned())
        },
    );
    steps.step(
        "external_address_of_the_nat::without_keepalives_the_leaders_echoes_keep_the_nats_memory",
        || {
            for node in [LEADER, MASTER] {
                lab.api()
                    .annotate(node, &[("kilo.squat.ai/persistent-keepalive", Some("0"))])?;
            }
            wait_for("the operator's setting", PATIENCE, || {
                keepalives(&lab).is_ok_and(|all| all.iter().all(|one| one == "off"))
            })?;
            let lost = lost_after_a_rest(&lab)?;
            ensure!(lost == 0, "{lost} of 15 pings were lost");
            Ok("0 of 15 pings lost".to_owned())
        },
    );
    // The control: neither keepalives nor echoes.
    steps.step(
        "external_address_of_the_nat::without_any_packet_the_nat_forgets",
        || {
            ensure!(is_remembered(&lab)?, "the NAT does not know {LEADER}");
            for name in lab.node_names() {
                lab.agent(&name)
                    .context("no agent")?
                    .signal(Signal::SIGSTOP);
            }
            sleep(REST);
            let remembered = is_remembered(&lab);
            for name in lab.node_names() {
                lab.agent(&name)
                    .context("no agent")?
                    .signal(Signal::SIGCONT);
            }
            ensure!(!remembered?, "the NAT still knows {LEADER}");
            reached_both_ways(&lab, MASTER, LEADER, PATIENCE)
        },
    );
    Some(())
}

/// How many of fifteen pings from outside are lost after a minute in which no pod sent anything.
fn lost_after_a_rest(lab: &Lab) -> anyhow::Result<u32> {
    reached_both_ways(lab, MASTER, LEADER, PATIENCE)?;
    sleep(REST);
    let pod = lab.pod(LEADER)?.address();
    let ping = format!("ping -n -q -i 0.2 -c 15 -W 1 {pod}");
    let output = lab.pod(MASTER)?.namespace().attempt(&ping)?;
    let text = String::from_utf8(output.stdout)?;
    let received = text.split(", ").find_map(|part| {
        let count = part.strip_suffix(" received")?;
        count.parse::<u32>().ok()
    });
    Ok(15 - received.with_context(|| format!("ping printed {text}"))?)
}

/// The keepalives of the tunnels of the leader behind the NAT.
fn keepalives(lab: &Lab) -> anyhow::Result<Vec<String>> {
    let peers = claims::wg_show(lab, LEADER)?;
    Ok(peers.into_iter().map(|peer| peer.keepalive).collect())
}

/// Whether the NAT has a mapping of the leader's tunnel.
fn is_remembered(lab: &Lab) -> anyhow::Result<bool> {
    let router = lab.network().router("nat1")?;
    let flows = router.run("conntrack -L -p udp --dport 51820 -s 192.168.50.11")?;
    Ok(flows.contains("dport=51820"))
}
