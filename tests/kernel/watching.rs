//! Whatever is taken away is noticed within a second and put back.

use std::time::Duration;

use selvedge::kernel::{Event, Kernel, Monitor};
use selvedge_lab::netns::Namespace;

use crate::fixture::{Node, commands, leader, reach};

/// A second is promised; a busy machine gets some more before it is a failure.
const SOON: Duration = Duration::from_secs(5);
/// What is not told within this time is not told at all: the kernel tells at once.
const SILENCE: Duration = Duration::from_millis(150);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

async fn told(monitor: &mut Monitor, within: Duration) -> Option<Event> {
    // Others' firewalls are another matter: nothing is planned again because of them.
    let changed = async {
        loop {
            let event = monitor.changed().await.unwrap();
            if event.concerns_the_plan() {
                return event;
            }
        }
    };
    tokio::time::timeout(within, changed).await.ok()
}

#[test]
fn whatever_of_ours_is_taken_away_is_noticed_and_put_back() {
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
                while told(&mut monitor, SILENCE).await.is_some() {}
                node.run(damage);

                let event = told(&mut monitor, SOON).await;

                assert!(event.is_some_and(|event| event.own), "{damage}: {event:?}");
                // nf_tables tells of a transaction before it is over.
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
fn what_happens_to_flannel_and_below_is_told_as_such() {
    let node = Node::with_tunnel("others");
    node.with(|kernel| {
        runtime().block_on(async {
            let mut monitor = Monitor::open("kilo0").unwrap();
            let mut after = async |script: &str| {
                while told(&mut monitor, SILENCE).await.is_some() {}
                node.sh(script);
                let mut all = Event::default();
                while let Some(event) = told(&mut monitor, SILENCE).await {
                    all = Event {
                        own: all.own || event.own,
                        flannel: all.flannel || event.flannel,
                        underlay: all.underlay || event.underlay,
                        firewall: all.firewall || event.firewall,
                    };
                }
                (all.flannel, all.underlay)
            };
            assert_eq!(after("ip neigh del 10.42.2.0 dev flannel.1").await, (true, false));
            assert_eq!(
                after("bridge fdb del 8e:4d:2a:67:f4:a5 dst 192.168.50.12 dev flannel.1").await,
                (true, false)
            );
            assert_eq!(after("ip link del flannel.1").await, (true, false));
            assert_eq!(
                after("ip link add flannel.1 type vxlan id 1 local 192.168.50.11 dev eth0 dstport 8472").await,
                (true, false)
            );
            assert_eq!(after("ip addr add 10.42.1.0/32 dev flannel.1").await, (true, false));
            assert_eq!(after("ip addr add 192.168.50.99/24 dev eth0").await, (false, true));
            assert_eq!(after("ip addr del 192.168.50.99/24 dev eth0").await, (false, true));
            assert_eq!(after("ip route del default").await, (false, true));
            assert_eq!(after("ip link set eth0 mtu 1400").await, (false, true));
            let _ = kernel;
        });
    });
}

#[test]
fn what_concerns_nobody_of_us_is_not_told() {
    let node = Node::with_tunnel("noise");
    let pod = Namespace::new("noisepod").unwrap();
    node.with(|kernel| {
        runtime().block_on(async {
            let mut monitor = Monitor::open("kilo0").unwrap();
            reach(kernel, &leader());
            while told(&mut monitor, SILENCE).await.is_some() {}
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

            assert_eq!(told(&mut monitor, SILENCE).await, None);
        });
    });
}

#[test]
fn our_own_changes_end_in_silence() {
    let node = Node::with_tunnel("loop");
    node.with(|kernel: &Kernel| {
        runtime().block_on(async {
            let mut monitor = Monitor::open("kilo0").unwrap();
            reach(kernel, &leader());
            let mut passes = 0;
            while told(&mut monitor, SILENCE).await.is_some() {
                assert_eq!(commands(kernel, &leader()), Vec::<String>::new());
                passes += 1;
            }
            assert!(passes < 10, "{passes}");
        });
    });
}
