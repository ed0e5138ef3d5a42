//! A home whose router hands out IPv6 while the other regions have IPv4 only.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use selvedge_lab::topology::{MASTER, Shape, Third};
use selvedge_lab::{Lab, Steps, claims, wait_for};

use crate::{
    LEADER, PATIENCE, THIRD_LEADER, flags, looks, mesh, reached_both_ways, remember_as_at_home, up,
};

/// A leader whose router hands out IPv6, while the internet of the others has IPv4 only.
pub(super) fn home_with_ipv6(steps: &mut Steps) -> Option<()> {
    if !steps.selects("home_with_ipv6") {
        return None;
    }
    let shape = Shape {
        agents: 1,
        third: Third::Distinct,
        ..Shape::default()
    };
    let (mut lab, _servers) = up(steps, "home_with_ipv6::a_cluster_comes_up", shape)?;
    let flags = flags(&[]);
    steps.required("home_with_ipv6::its_agents_become_ready", || {
        hand_out_ipv6(&lab)?;
        remember_as_at_home(&lab, &["nat1", "nat2"])?;
        lab.join(&mesh(&flags))?;
        Ok(String::new())
    })?;
    steps.step(
        "home_with_ipv6::temporary_and_deprecated_addresses_are_not_published",
        || published(&lab),
    );
    steps.step(
        "home_with_ipv6::a_leader_with_an_ipv6_address_that_others_cannot_call_is_found_at_its_nat",
        || reached_both_ways(&lab, LEADER, THIRD_LEADER, Duration::from_secs(40)),
    );
    steps.step(
        "home_with_ipv6::a_public_leader_that_restarts_calls_the_leader_behind_nat_at_once",
        || called_after_restart(&mut lab, &flags),
    );
    steps.step(
        "home_with_ipv6::status_and_doctor_show_the_outcome_of_each_candidate",
        || candidates_shown(&lab),
    );
    Some(())
}

/// A stable address of the home's prefix, a temporary one that the kernel makes for it, and one of a prefix
/// that the router has withdrawn.
fn hand_out_ipv6(lab: &Lab) -> anyhow::Result<()> {
    let home = lab.node(LEADER)?.namespace();
    home.sysctl("ipv6/conf/eth0/disable_ipv6", "0")?;
    home.sysctl("ipv6/conf/eth0/use_tempaddr", "2")?;
    home.sh(
        "ip -6 address add 2001:db8:0:50::11/64 dev eth0 nodad mngtmpaddr
         ip -6 address add 2001:db8:0:51::11/64 dev eth0 nodad preferred_lft 0",
    )?;
    wait_for("the temporary address", PATIENCE, || {
        home.run("ip -6 address show dev eth0 temporary")
            .is_ok_and(|text| text.contains("2001:db8:0:50:"))
    })?;
    Ok(())
}

fn published(lab: &Lab) -> anyhow::Result<String> {
    let candidates = lab.annotation(LEADER, "selvedge.dev/candidates")?;
    let mut offered: Vec<_> = candidates.split(',').collect();
    offered.sort_unstable();
    let expected = ["192.168.50.11:51820", "[2001:db8:0:50::11]:51820"];
    let addresses = lab.node(LEADER)?.run("ip -6 -br address show dev eth0")?;
    ensure!(offered == expected, "{candidates} of {addresses}");
    Ok(candidates)
}

/// The keepalive of the leader at home would come within 25 seconds; the public leader does not wait for it.
fn called_after_restart(lab: &mut Lab, flags: &[&str]) -> anyhow::Result<String> {
    // An agent writes its state within five seconds of a change.
    sleep(Duration::from_secs(6));
    lab.take_agent(MASTER)?.stop()?;
    let mesh = mesh(flags);
    lab.restart_agent(mesh.binary, MASTER, mesh.access, mesh.flags)?;
    let begun = Instant::now();
    wait_for("the tunnel", PATIENCE, || {
        lab.node(MASTER)
            .is_ok_and(|node| node.tunnel_answers("kilo0"))
    })?;
    let up = begun.elapsed();
    let to = format!("pod@{LEADER}");
    claims::reached_within(lab, &format!("pod@{MASTER}"), &to, PATIENCE)
        .with_context(|| lab.tail(MASTER, "agent"))?;
    let called = begun.elapsed().saturating_sub(up);
    ensure!(called < Duration::from_secs(8), "after {called:?}");
    Ok(format!(
        "{:.1} s after its tunnel was up",
        called.as_secs_f64()
    ))
}

fn candidates_shown(lab: &Lab) -> anyhow::Result<String> {
    let mut line = String::new();
    for text in looks(lab, THIRD_LEADER)? {
        let of = |address: &str| {
            let mut lines = text.lines();
            lines
                .find(|line| line.contains(address) && line.contains('('))
                .map(|line| line.trim().to_owned())
                .with_context(|| format!("nothing of {address} in {text}"))
        };
        let used = of("203.0.113.20:")?;
        let other = of("[2001:db8:0:50::11]:51820")?;
        ensure!(used.contains("in use"), "{text}");
        ensure!(other.contains("no answer"), "{text}");
        line = format!("{used}; {other}");
    }
    Ok(line)
}
