//! The monitor: a change that affects the agent is reported within a second, and repaired.

use std::time::Duration;

use selvedge::kernel::{Kernel, Monitor};
use selvedge_lab::netns::Namespace;

use crate::fixture::{Node, commands, leader, reach};

/// A second is promised; a busy machine gets more before it is a failure.
const SOON: Duration = Duration::from_secs(5);
/// An event that does not come within this time does not come: the kernel notifies at once.
const SILENCE: Duration = Duration::from_millis(150);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Whether an event comes that affects the plan. Other programs' firewalls do not.
async fn notified(monitor: &mut Monitor, within: Duration) -> bool {
    let changed = async { while !monitor.changed().await.unwrap().plan {} };
    tokio::time::timeout(within, changed).await.is_ok()
}

#[test]
fn every_damage_to_the_agents_state_is_noticed_and_repaired() {
    let node = Node::with_tunnel("watch");
    let damages = [
        "ip route del 10.42.0.0/24 table 5130",
        "ip route del unreachable 10.42.0.0/24 table 5130 metric 4278198272",
        "ip -6 route del fd42:0:0:4::/64 table 5130",
        "ip route flush table 5130",
        "ip route replace 10.42.3.0/24 dev cni0 table 5130",
        "ip rule del pref 5194",
        "ip -6 rule del pref 5191",
        "ip addr del 10.42.1.0/32 dev kilo0",
        "ip addr flush dev kilo0",
        "ip -6 addr del fd04::2/128 dev kilo0",
        "ip link set kilo0 down",
        "ip link set kilo0 mtu 1300",
        "nft delete table inet selvedge",
        "nft flush chain inet selvedge transit",
        "nft delete element inet selvedge remote_pods4 { 10.42.4.0/24 }",
        "nft add element inet selvedge remote_pods4 { 10.42.99.0/24 }",
        "nft insert rule inet selvedge transit accept",
        "nft flush chain inet selvedge seal",
        "nft flush ruleset",
    ];
    node.with(|kernel| {
        runtime().block_on(async {
            let mut monitor = Monitor::open("kilo0").unwrap();
            reach(kernel, &leader());
            for damage in damages {
                while notified(&mut monitor, SILENCE).await {}
                node.run(damage);

                assert!(notified(&mut monitor, SOON).await, "{damage}");
                // nf_tables notifies before the transaction is over.
                assert_ne!(
                    commands(kernel, &leader()),
                    Vec::<String>::new(),
                    "{damage}"
                );
                reach(kernel, &leader());
                assert_eq!(kernel.observe().unwrap(), leader(), "{damage}");
            }
        });
    });
}

#[test]
fn changes_of_flannel_and_of_the_underlay_are_noticed() {
    let node = Node::with_tunnel("others");
    node.with(|_| {
        runtime().block_on(async {
            let mut monitor = Monitor::open("kilo0").unwrap();
            for script in [
                "ip neigh del 10.42.2.0 dev flannel.1",
                "bridge fdb del 8e:4d:2a:67:f4:a5 dst 192.168.50.12 dev flannel.1",
                "ip link del flannel.1",
                "ip link add flannel.1 type vxlan id 1 local 192.168.50.11 dev eth0 dstport 8472",
                "ip addr add 10.42.1.0/32 dev flannel.1",
                "ip addr add 192.168.50.99/24 dev eth0",
                "ip addr del 192.168.50.99/24 dev eth0",
                "ip route del default",
                "ip link set eth0 mtu 1400",
            ] {
                while notified(&mut monitor, SILENCE).await {}
                node.sh(script);
                assert!(notified(&mut monitor, SOON).await, "{script}");
            }
        });
    });
}

#[test]
fn changes_that_do_not_affect_the_agent_are_ignored() {
    let node = Node::with_tunnel("noise");
    let pod = Namespace::new("noisepod").unwrap();
    node.with(|kernel| {
        runtime().block_on(async {
            let mut monitor = Monitor::open("kilo0").unwrap();
            reach(kernel, &leader());
            while notified(&mut monitor, SILENCE).await {}
            let noise = format!(
                "
                nft add table ip kube-proxy
                nft 'add chain ip kube-proxy x'
                iptables -t nat -N KUBE-X
                ip route add 198.51.100.0/24 dev eth0
                ip route add 198.51.101.0/24 via 192.168.50.1 table 77
                ip neigh add 192.168.50.77 lladdr 02:00:00:00:00:01 dev eth0
                ip neigh del 192.168.50.77 dev eth0
                ip link add veth1 type veth peer name eth0 netns {}
                ip link set veth1 master cni0
                ip link set veth1 up
                ip link del veth1
                ",
                pod.name()
            );
            node.sh(&noise);

            assert!(!notified(&mut monitor, SILENCE).await);
        });
    });
}

#[test]
fn the_agents_own_changes_lead_to_no_further_change() {
    let node = Node::with_tunnel("loop");
    node.with(|kernel: &Kernel| {
        runtime().block_on(async {
            let mut monitor = Monitor::open("kilo0").unwrap();
            reach(kernel, &leader());
            let mut passes = 0;
            while notified(&mut monitor, SILENCE).await {
                assert_eq!(commands(kernel, &leader()), Vec::<String>::new());
                passes += 1;
            }
            assert!(passes < 10, "{passes}");
        });
    });
}
