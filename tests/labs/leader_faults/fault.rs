//! The faults: how each is made and unmade, and how long flows may be silent.

use std::path::Path;
use std::time::Duration;

use selvedge_lab::Lab;
use selvedge_lab::topology::Site;

use super::field::{Field, SELVEDGE};
use super::{LEADER, MASTER, PUBLIC, SECOND};

const TWO: Duration = Duration::from_secs(2);
const THREE: Duration = Duration::from_secs(3);

/// Something that happens to a leader.
pub(super) struct Fault {
    /// The step's name.
    pub(super) name: &'static str,
    /// To which leaders it happens, one after the other; the first one alone if it happens once.
    pub(super) victims: &'static [&'static str],
    /// How long a flow may be silent.
    pub(super) promised: Duration,
    /// Whether the leader's own pod stays connected.
    pub(super) own_pod: bool,
    /// Whether that pod is another one afterwards.
    pub(super) renews_pod: bool,
    /// Makes it.
    pub(super) make: fn(&mut Field, &str) -> anyhow::Result<()>,
    /// Unmakes it.
    pub(super) mend: fn(&mut Field, &str) -> anyhow::Result<()>,
}

/// All of them.
pub(super) const FAULTS: [Fault; 9] = [
    Fault {
        name: "a_leaders_agent_is_killed",
        victims: &[LEADER, SECOND],
        promised: TWO,
        own_pod: false,
        renews_pod: false,
        make: kill,
        mend: restart,
    },
    Fault {
        name: "a_far_leaders_agent_is_killed",
        victims: &[PUBLIC, MASTER],
        promised: TWO,
        own_pod: false,
        renews_pod: false,
        make: kill,
        mend: restart,
    },
    Fault {
        name: "a_leader_loses_its_power",
        victims: &[SECOND, PUBLIC, LEADER],
        promised: TWO,
        own_pod: false,
        renews_pod: true,
        make: power_off,
        mend: power_on,
    },
    Fault {
        name: "a_leaders_link_is_cut",
        victims: &[LEADER, PUBLIC, SECOND],
        promised: TWO,
        own_pod: false,
        renews_pod: false,
        make: |field, node| field.lab.network().plug(node, false),
        mend: |field, node| field.lab.network().plug(node, true),
    },
    Fault {
        name: "what_a_leader_sends_into_its_tunnels_is_lost",
        victims: &[SECOND, LEADER],
        promised: TWO,
        own_pod: true,
        renews_pod: false,
        make: |field, node| lose(&field.lab, node, "saddr", "dport"),
        mend: |field, node| lose_nothing(&field.lab, node),
    },
    Fault {
        name: "what_is_sent_into_a_leaders_tunnels_is_lost",
        victims: &[LEADER, SECOND],
        promised: TWO,
        own_pod: true,
        renews_pod: false,
        make: |field, node| lose(&field.lab, node, "daddr", "sport"),
        mend: |field, node| lose_nothing(&field.lab, node),
    },
    Fault {
        name: "a_leaders_kernel_forwards_nothing",
        victims: &[SECOND, PUBLIC, LEADER],
        promised: THREE,
        own_pod: false,
        renews_pod: false,
        make: |field, node| forward(&field.lab, node, "0"),
        mend: |field, node| forward(&field.lab, node, "1"),
    },
    Fault {
        name: "a_leaders_firewall_drops_what_it_forwards",
        victims: &[PUBLIC, LEADER, SECOND],
        promised: THREE,
        own_pod: false,
        renews_pod: false,
        make: |field, node| close(&field.lab, node),
        mend: |field, node| open(&field.lab, node),
    },
    Fault {
        name: "a_leaders_agent_is_killed_while_the_api_server_hangs",
        victims: &[LEADER, PUBLIC, SECOND],
        promised: TWO,
        own_pod: false,
        renews_pod: false,
        make: |field, node| {
            field.lab.plane()?.freeze(true);
            kill(field, node)
        },
        mend: |field, node| {
            field.lab.plane()?.freeze(false);
            restart(field, node)
        },
    },
];

/// Its Node stays Ready, and the agent is not started again.
fn kill(field: &mut Field, node: &str) -> anyhow::Result<()> {
    field.lab.take_agent(node)?.kill();
    Ok(())
}

fn restart(field: &mut Field, node: &str) -> anyhow::Result<()> {
    field.start_agent(node)
}

fn power_off(field: &mut Field, node: &str) -> anyhow::Result<()> {
    field.lab.network().plug(node, false)?;
    field.lab.power_off(node)
}

fn power_on(field: &mut Field, node: &str) -> anyhow::Result<()> {
    // As systemd does before the kubelet starts: else flannel sends in clear until the agent is up.
    field.lab.selvedge(Path::new(SELVEDGE), node, &["guard"])?;
    field.lab.network().plug(node, true)?;
    field.lab.power_on(node)?;
    field.start_agent(node)
}

/// At its router, in one direction.
fn lose(lab: &Lab, node: &str, address: &str, port: &str) -> anyhow::Result<()> {
    let router = lab.network().router("nat1")?;
    let own = lab.node(node)?.address();
    anyhow::ensure!(
        lab.network().site(node)? == Site::DataCentre,
        "{node} has no router"
    );
    router.sh(&format!(
        "nft add table ip lost
         nft add chain ip lost forwarded '{{ type filter hook forward priority 0; }}'
         nft add rule ip lost forwarded ip {address} {own} udp {port} 51820 drop"
    ))?;
    Ok(())
}

fn lose_nothing(lab: &Lab, _: &str) -> anyhow::Result<()> {
    let router = lab.network().router("nat1")?;
    router.run("nft delete table ip lost")?;
    Ok(())
}

fn forward(lab: &Lab, node: &str, value: &str) -> anyhow::Result<()> {
    let namespace = lab.node(node)?.namespace();
    namespace.sysctl("ipv4/ip_forward", value)
}

fn close(lab: &Lab, node: &str) -> anyhow::Result<()> {
    lab.node(node)?.namespace().sh(
        "nft add table inet closed
         nft add chain inet closed forwarded '{ type filter hook forward priority 10; policy drop; }'",
    )?;
    Ok(())
}

fn open(lab: &Lab, node: &str) -> anyhow::Result<()> {
    lab.node(node)?.run("nft delete table inet closed")?;
    Ok(())
}
