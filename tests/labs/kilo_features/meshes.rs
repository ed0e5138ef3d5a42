//! Every granularity, logical groups and six clouds.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::lab::Proxy;
use selvedge_lab::topology::{MASTER, MASTER_PUBLIC, Master, Shape, Third, public_address};
use selvedge_lab::{Lab, Steps, claims, wait_for};

use crate::{
    LEADER, PATIENCE, SECOND_LEADER, SELVEDGE, THIRD_LEADER, flags, mesh, selvedge, settled, up,
};

/// Tunnels of every node, with `full` to all others, with `cross` to other regions.
pub(crate) fn granularities(steps: &mut Steps, granularity: &str) -> Option<()> {
    let shape = Shape {
        agents: 2,
        third: Third::Distinct,
        ..Shape::default()
    };
    let name = format!("a_{granularity}_mesh_comes_up");
    let flag = format!("--mesh-granularity={granularity}");
    let flags = flags(&[&flag]);
    let (mut lab, _servers) = up(steps, &name, shape, Proxy::None)?;
    steps.required(
        &format!("the_agents_of_the_{granularity}_mesh_become_ready"),
        || {
            lab.join(&mesh(&flags, false))?;
            Ok(String::new())
        },
    )?;
    steps.step(
        &format!("in_a_{granularity}_mesh_all_pods_and_nodes_reach_each_other"),
        || settled(&lab),
    );
    steps.step(
        &format!("in_a_{granularity}_mesh_every_node_has_its_tunnels"),
        || {
            // Five nodes: four others, or with cross those of the two other regions.
            for (node, tunnels) in [(MASTER, (4, 4)), (LEADER, (4, 3)), (THIRD_LEADER, (4, 3))] {
                let expected = if granularity == "full" {
                    tunnels.0
                } else {
                    tunnels.1
                };
                let peers = claims::wg_show(&lab, node)?;
                ensure!(peers.len() == expected, "{node}: {peers:?}");
            }
            Ok(String::new())
        },
    );
    Some(())
}

/// Logical groups: two of a data centre's three nodes form one, the third stands for itself.
pub(crate) fn mixed(steps: &mut Steps) -> Option<()> {
    let (mut lab, _servers) = up(
        steps,
        "a_mixed_mesh_comes_up",
        Shape::default(),
        Proxy::None,
    )?;
    let flags = flags(&[]);
    steps.required("the_agents_of_the_mixed_mesh_become_ready", || {
        let location = ("kilo.squat.ai/location", Some("edge"));
        lab.api().annotate("node-agent-03", &[location])?;
        lab.join(&mesh(&flags, true))?;
        Ok(String::new())
    })?;
    steps.step(
        "in_a_mixed_mesh_all_pods_and_nodes_reach_each_other",
        || settled(&lab),
    );
    steps.step("in_a_mixed_mesh_each_group_has_its_leaders", || {
        // Both nodes of the group lead it, and each other group is one node.
        for (node, tunnels) in [
            (MASTER, 3),
            (LEADER, 2),
            (SECOND_LEADER, 2),
            ("node-agent-03", 3),
        ] {
            let peers = claims::wg_show(&lab, node)?;
            ensure!(peers.len() == tunnels, "{node}: {peers:?}");
        }
        Ok(String::new())
    });
    Some(())
}

/// Six nodes in five clouds, each with a public address by 1:1 NAT; one cloud has two of them.
pub(crate) fn six_clouds(steps: &mut Steps) -> Option<()> {
    let shape = Shape {
        agents: 0,
        master: Master::ElasticIp,
        clouds: 4,
        ..Shape::default()
    };
    let (mut lab, _servers) = up(steps, "five_clouds_come_up", shape, Proxy::None)?;
    let flags = flags(&[]);
    steps.required("the_agents_in_five_clouds_become_ready", || {
        let publics = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)].map(|(cloud, number)| {
            let name = format!("node-cloud{cloud}-{number:02}");
            (name, public_address(cloud, number))
        });
        let master = (MASTER.to_owned(), MASTER_PUBLIC);
        for (node, public) in publics.into_iter().chain([master]) {
            let endpoint = format!("{public}:51820");
            let annotations = [
                ("kilo.squat.ai/force-endpoint", Some(endpoint.as_str())),
                ("kilo.squat.ai/persistent-keepalive", Some("20")),
            ];
            lab.api().annotate(&node, &annotations)?;
        }
        lab.join(&mesh(&flags, false))?;
        Ok(String::new())
    })?;
    steps.step(
        "across_five_clouds_all_pods_and_nodes_reach_each_other",
        || settled(&lab),
    );
    steps.step(
        "across_five_clouds_each_leader_has_a_tunnel_to_each_of_another_cloud",
        || {
            // One cloud has two nodes, and both lead it. A leader keeps the number that was the first free one when
            // it came, so the order of the numbers is that in which the agents came.
            let mut numbers = BTreeMap::new();
            for (node, tunnels) in [
                ("node-cloud1-01", 5),
                ("node-cloud2-01", 4),
                ("node-cloud2-02", 4),
                ("node-cloud3-01", 5),
                ("node-cloud4-01", 5),
                (MASTER, 5),
            ] {
                let peers = claims::wg_show(&lab, node)?;
                ensure!(peers.len() == tunnels, "{node}: {peers:?}");
                let addresses = lab.node(node)?.run("ip -br address show kilo0")?;
                let published = lab.annotation(node, "kilo.squat.ai/wireguard-ip")?;
                let (ip, _) = published.split_once('/').unwrap_or_default();
                ensure!(
                    addresses.contains(&format!(" {ip}/32 ")),
                    "{node}, {published}: {addresses}"
                );
                numbers.insert(ip.to_owned(), node);
            }
            let expected = (1..=6).map(|number| format!("10.4.0.{number}"));
            ensure!(numbers.keys().cloned().eq(expected), "{numbers:?}");
            Ok(format!("{numbers:?}"))
        },
    );
    steps.step("the_agents_page_draws_what_the_command_draws", || {
        let command = selvedge(lab.node(MASTER)?, &lab, &["graph"])?;
        let (status, page) = lab.ask_agent(MASTER, "/graph?format=dot&layout=neato")?;
        ensure!(
            status == 200 && format!("{page}\n") == command,
            "{status} {page}\n{command}"
        );
        let (_, picture) = lab.ask_agent(MASTER, "/graph")?;
        ensure!(picture.starts_with("<svg "), "{picture}");
        let (status, refusal) = lab.ask_agent(MASTER, "/graph?format=foo")?;
        ensure!(
            status == 500 && refusal.trim() == "unsupported format",
            "{status} {refusal}"
        );
        Ok(String::new())
    });
    steps.step("across_five_clouds_showconf_and_wg_agree", || {
        let master = lab.node(MASTER)?;
        let conf = selvedge(master, &lab, &["showconf", "node", MASTER])?;
        let lists = |start: &str| {
            let start = format!("{start} = ");
            let values = conf
                .lines()
                .filter_map(move |line| line.strip_prefix(&start));
            values.map(str::to_owned).collect::<Vec<_>>()
        };
        let allowed = lists("AllowedIPs").into_iter();
        let allowed = allowed.map(|list| list.split(", ").map(str::to_owned).collect());
        let mut shown: BTreeMap<_, BTreeSet<_>> =
            lists("PublicKey").into_iter().zip(allowed).collect();
        let peers = claims::wg_show(&lab, MASTER)?;
        let real: BTreeMap<_, _> = peers
            .into_iter()
            .map(|peer| (peer.key, peer.allowed))
            .collect();
        let texts = format!("showconf: {shown:?}\nwg: {real:?}");
        // WireGuard itself gives a prefix to one peer. So showconf names what two leaders share at one of them.
        let shared: Vec<_> = real.values().filter(|nets| nets.len() == 6).collect();
        ensure!(shared.len() == 2 && shared[0] == shared[1], "{texts}");
        let mut named: BTreeSet<String> = BTreeSet::new();
        for (key, nets) in &mut shown {
            ensure!(nets.iter().all(|net| named.insert(net.clone())), "{texts}");
            let all = real.get(key).with_context(|| texts.clone())?;
            ensure!(nets.is_subset(all), "{texts}");
            if all == shared[0] {
                *nets = all.clone();
            }
        }
        ensure!(shared[0].is_subset(&named), "{texts}");
        ensure!(shown == real, "{texts}");
        Ok(String::new())
    });
    steps.step("an_agent_needs_no_more_than_its_manifest_grants", || {
        confined(&mut lab, &flags)
    });
    Some(())
}

/// The master's agent again, with the one capability of the manifest, no way to more, a read-only root
/// and read-only sysctls.
fn confined(lab: &mut Lab, flags: &[&str]) -> anyhow::Result<String> {
    lab.take_agent(MASTER)?.stop()?;
    let node = lab.node(MASTER)?;
    let script = format!(
        "mount --make-rprivate /
         mount --bind /proc/sys /proc/sys
         mount -o remount,bind,ro /proc/sys
         mount -o remount,bind,ro /
         exec setpriv --no-new-privs --bounding-set=-all,+net_admin --inh-caps=-all --ambient-caps=-all \
             {SELVEDGE} agent --kubeconfig=/run/selvedge-lab.kubeconfig --hostname={MASTER} {}",
        flags.join(" ")
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-euc", &script]);
    let agent = node.spawn("agent", command)?;
    let ready = || {
        lab.ask_agent(MASTER, "/ready")
            .is_ok_and(|(status, _)| status == 200)
    };
    wait_for("the confined agent", Duration::from_secs(30), ready)
        .with_context(|| lab.tail(MASTER, "agent"))?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    // Bit 12 is CAP_NET_ADMIN (linux/capability.h).
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let expected = format!("{set}:\t0000000000001000");
        ensure!(status.contains(&expected), "{status}");
    }

    // It does not only stand there: what is taken away comes back.
    node.run("nft delete table inet selvedge")?;
    node.run("ip route flush table 5130")?;
    node.run("ip link set kilo0 mtu 1300")?;
    let repaired = wait_for("the repair", PATIENCE, || {
        node.run("nft list table inet selvedge").is_ok()
            && node
                .run("ip route show table 5130")
                .is_ok_and(|routes| routes.contains("kilo0"))
            && node
                .run("ip link show kilo0")
                .is_ok_and(|link| link.contains("mtu 1440"))
    });
    repaired.with_context(|| lab.tail(MASTER, "agent"))?;
    let pairs = settled(lab)?;
    agent.stop()?;
    Ok(pairs)
}
