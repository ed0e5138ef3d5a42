//! Two regions behind NAT whose agents start in every order.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use selvedge_lab::topology::{MASTER, Shape, Third};
use selvedge_lab::{Lab, Steps};

use crate::{
    FOLLOWER, LEADER, THIRD_LEADER, flags, looks, mesh, reached_both_ways, remember_as_at_home, up,
};

/// Two regions behind NAT whose agents start without any state, in one order after another.
pub(super) fn orders_of_start(steps: &mut Steps) -> Option<()> {
    if !steps.selects("orders_of_start") {
        return None;
    }
    let shape = Shape {
        agents: 2,
        third: Third::Distinct,
        ..Shape::default()
    };
    let (mut lab, _servers) = up(steps, "orders_of_start::a_cluster_comes_up", shape)?;
    let flags = flags(&["--clean-up=true", "--clean-up-interface"]);
    steps.required("orders_of_start::its_agents_become_ready", || {
        remember_as_at_home(&lab, &["nat1", "nat2"])?;
        lab.join(&mesh(&flags))?;
        Ok(String::new())
    })?;
    steps.step(
        "orders_of_start::two_regions_behind_nat_find_each_other_in_whatever_order_their_agents_start",
        || start_in_every_order(&mut lab, &flags),
    );
    steps.step(
        "orders_of_start::a_leader_whose_router_keeps_its_port_for_another_node_takes_another_port",
        || port_kept_for_another(&mut lab, &flags),
    );
    Some(())
}

/// How agents are started: their order, and how long after the one before each.
type Order = (Vec<String>, Duration);

/// A few orders, among them those in which another node leads a region for a moment and gets the router's own
/// port; with `SELVEDGE_START_ORDERS=all` every order, all agents at once and one after the other.
fn orders(lab: &Lab) -> Vec<Order> {
    let names = lab.node_names();
    let all = permutations(&names);
    let gaps = [Duration::ZERO, Duration::from_secs(2)];
    if std::env::var("SELVEDGE_START_ORDERS").is_ok_and(|which| which == "all") {
        return gaps
            .into_iter()
            .flat_map(|gap| all.iter().map(move |order| (order.clone(), gap)))
            .collect();
    }
    let second = "node-third-02";
    let order = |names: [&str; 5]| names.map(str::to_owned).to_vec();
    vec![
        (
            order([MASTER, LEADER, FOLLOWER, THIRD_LEADER, second]),
            gaps[0],
        ),
        (
            order([FOLLOWER, second, MASTER, LEADER, THIRD_LEADER]),
            gaps[1],
        ),
        (
            order([MASTER, FOLLOWER, THIRD_LEADER, LEADER, second]),
            gaps[1],
        ),
        (
            order([second, THIRD_LEADER, FOLLOWER, LEADER, MASTER]),
            gaps[0],
        ),
    ]
}

fn permutations(names: &[String]) -> Vec<Vec<String>> {
    if names.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (index, first) in names.iter().enumerate() {
        let mut others = names.to_vec();
        others.remove(index);
        for mut rest in permutations(&others) {
            rest.insert(0, first.clone());
            all.push(rest);
        }
    }
    all
}

fn start_in_every_order(lab: &mut Lab, flags: &[&str]) -> anyhow::Result<String> {
    let mut times = Vec::new();
    let mut failures = Vec::new();
    for (order, gap) in orders(lab) {
        let label = format!("{gap:?} apart: {}", order.join(", "));
        match start_in_order(lab, flags, &order, gap) {
            Ok(time) => {
                eprintln!("{:.1} s, {label}", time.as_secs_f64());
                times.push(time);
            }
            Err(error) => {
                eprintln!("failed, {label}");
                failures.push(format!("{label}: {error:#}"));
            }
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    times.sort();
    let seconds = |time: &Duration| format!("{:.1}", time.as_secs_f64());
    let (count, median) = (times.len(), seconds(&times[times.len() / 2]));
    let longest = times.last().map(seconds).unwrap_or_default();
    Ok(format!(
        "{count} fresh starts; after the last agent was started they reached each other within {median} s (median) and {longest} s (longest)"
    ))
}

/// Starts all agents as if for the first time, and returns how long after the last the two regions behind NAT
/// reached each other.
fn start_in_order(
    lab: &mut Lab,
    flags: &[&str],
    order: &[String],
    gap: Duration,
) -> anyhow::Result<Duration> {
    stop_and_forget(lab, order)?;
    start_and_wait(lab, flags, order, gap, Duration::from_secs(30))
}

/// Stops all agents, and has them and the routers forget everything.
fn stop_and_forget(lab: &mut Lab, order: &[String]) -> anyhow::Result<()> {
    for name in order {
        // The start before may have failed halfway.
        if let Ok(agent) = lab.take_agent(name) {
            agent.stop()?;
        }
        let state = lab.node(name)?.outside("/var/lib/selvedge");
        if state.exists() {
            std::fs::remove_dir_all(state)?;
        }
    }
    for (router, last) in [("nat1", 20), ("nat2", 30)] {
        // A link that goes down takes the mappings of its MASQUERADE rules with it.
        lab.network().router(router)?.sh(&format!(
            "ip link set wan down
             conntrack -F
             ip link set wan up
             ip address replace 203.0.113.{last}/24 dev wan
             ip route replace default via 203.0.113.1"
        ))?;
    }
    Ok(())
}

fn start_and_wait(
    lab: &mut Lab,
    flags: &[&str],
    order: &[String],
    gap: Duration,
    patience: Duration,
) -> anyhow::Result<Duration> {
    let mesh = mesh(flags);
    for (index, name) in order.iter().enumerate() {
        if index > 0 {
            sleep(gap);
        }
        lab.restart_agent(mesh.binary, name, mesh.access, mesh.flags)?;
    }
    let begun = Instant::now();
    let found = reached_both_ways(lab, LEADER, THIRD_LEADER, patience);
    found.with_context(|| evidence(lab))?;
    Ok(begun.elapsed())
}

/// Both routers know the leader's port towards the master. One, then the other, then both have it taken by another
/// node of the region towards the other leader. That mapping stays while the other leader sends there, so it is
/// made to last.
///
/// Each region has one leader and none relays, or the two would reach each other another way.
fn port_kept_for_another(lab: &mut Lab, flags: &[&str]) -> anyhow::Result<String> {
    let alone = ["--leaders-per-region=1", "--relay=off"];
    let flags = &[flags, &alone[..]].concat();
    let order = lab.node_names();
    let mut told = Vec::new();
    for routers in [&["nat1"][..], &["nat2"], &["nat1", "nat2"]] {
        stop_and_forget(lab, &order)?;
        for (router, inside, here, there) in [
            ("nat1", "192.168.50", "203.0.113.20", "203.0.113.30"),
            ("nat2", "192.168.60", "203.0.113.30", "203.0.113.20"),
        ] {
            let router_of = lab.network().router(router)?;
            let ports = "-t 3600 --sport 51820 --dport 51820";
            let map = |host: &str, to: &str| {
                router_of.run(&format!(
                    "conntrack -I -p udp {ports} -s {inside}.{host} -d {to} --src-nat {here}"
                ))
            };
            map("11", "203.0.113.10")?;
            if routers.contains(&router) {
                map("12", there)?;
            }
        }
        let took = start_and_wait(lab, flags, &order, Duration::ZERO, Duration::from_secs(40))?;
        let mut moved = Vec::new();
        for node in [LEADER, THIRD_LEADER] {
            let [doctor, status] = looks(lab, node)?;
            let mut lines = status.lines();
            let port = lines.find_map(|line| line.trim().strip_prefix("listening port: "));
            let port = port.context("no listening port")?;
            if port != "51820" {
                ensure!(port.contains("instead of 51820"), "{port}");
                ensure!(doctor.contains("another node"), "{doctor}");
                moved.push(format!("{node} on {port}"));
            }
        }
        ensure!(
            !moved.is_empty(),
            "{routers:?}: no leader took another port: {}",
            evidence(lab)
        );
        told.push(format!(
            "{}: after {:.1} s, {}",
            routers.join(" and "),
            took.as_secs_f64(),
            moved.join(", ")
        ));
    }
    Ok(told.join("; "))
}

/// What each leader knows of the other, for the message of a failure.
fn evidence(lab: &Lab) -> String {
    let mut text = String::new();
    let nodes = [LEADER, FOLLOWER, THIRD_LEADER, MASTER];
    let mut observed = BTreeMap::new();
    for node in nodes {
        let status = looks(lab, node).map(|[_, status]| status);
        let status = status.unwrap_or_else(|error| error.to_string());
        let lines = status.lines().filter(|line| {
            let line = line.trim_start();
            ["node:", "peer:", "endpoint:", "candidate:", "latest"]
                .iter()
                .any(|start| line.starts_with(start))
        });
        let lines: Vec<_> = lines.collect();
        let _ = writeln!(text, "{}", lines.join("\n"));
        let endpoints = lab.annotation(node, "kilo.squat.ai/discovered-endpoints");
        observed.insert(node, endpoints.unwrap_or_default());
    }
    let _ = writeln!(text, "observed: {observed:?}");
    for router in ["nat1", "nat2"] {
        let router = lab.network().router(router);
        let flows = router.and_then(|router| router.run("conntrack -L -p udp --dport 51820"));
        let _ = writeln!(text, "{}", flows.unwrap_or_else(|error| error.to_string()));
    }
    text
}
