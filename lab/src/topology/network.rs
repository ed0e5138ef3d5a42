//! Brings the network up: namespaces for the internet, routers and nodes, and the links between them.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use super::{
    Blueprint, MASTER_PUBLIC, Master, Nat, Shape, Site, Third, beside_master, nodes_of_cloud,
    public_address,
};
use crate::family::Family;
use crate::netns::Namespace;
use crate::node::Node;

/// A network that is up; taken down when the value is dropped.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    nodes: Vec<Node>,
    sites: Vec<(String, Site)>,
    routers: Vec<Namespace>,
    internet: Namespace,
}

impl Network {
    /// Builds the network; `prefix` starts the name of every namespace.
    ///
    /// `directory` receives the nodes' files; see [`Node::new`] for where it may lie.
    ///
    /// # Errors
    ///
    /// Without root, when a program is missing, or when a namespace of such a name exists.
    pub fn up(prefix: &str, directory: &Path, shape: Shape) -> anyhow::Result<Self> {
        if shape.wan == Family::V6 {
            ensure!(
                shape.master == Master::Direct
                    && shape.clouds == 0
                    && shape.third != Third::Overlapping,
                "the lab's internet of IPv6 has neither elastic IPs nor further clouds nor overlaps"
            );
        }
        ensure!(
            shape.beside_master == 0 || shape.master == Master::ElasticIp,
            "nodes beside the master have elastic IPs, as it has"
        );
        ensure!(
            !shape.routed || (shape.wan == Family::V4 && shape.third != Third::Overlapping),
            "leased lines join networks of IPv4 that do not overlap"
        );
        let internet = internet(prefix, shape)?;
        let mut network = Self {
            prefix: prefix.to_owned(),
            nodes: Vec::new(),
            sites: Vec::new(),
            routers: Vec::new(),
            internet,
        };
        network.add_border("nat1", Site::DataCentre, "192.168.50.1/24", shape)?;
        if shape.third != Third::None {
            let inside = match shape.third {
                Third::Overlapping => "192.168.50.1/24",
                Third::Distinct | Third::None => "192.168.60.1/24",
            };
            network.add_border("nat2", Site::Third, inside, shape)?;
        }
        if shape.master == Master::ElasticIp {
            network.add_router("eip", [203, 0, 113, 10], "172.16.0.1/24")?;
            let nodes = (0..=shape.beside_master).map(|number| match number {
                0 => (MASTER_PUBLIC, 10),
                _ => (beside_master(number), 10 + number),
            });
            for (public, last) in nodes {
                // A node that calls another one by its public address gets the answer from there.
                network.router("eip")?.sh(&format!(
                    "ip address replace {public}/24 dev wan
                     iptables -t nat -A PREROUTING -d {public} -j DNAT --to 172.16.0.{last}
                     iptables -t nat -A POSTROUTING -o wan -s 172.16.0.{last} -j SNAT --to {public}
                     iptables -t nat -A POSTROUTING -o br0 -s 172.16.0.0/24 -d 172.16.0.{last} -j MASQUERADE"
                ))?;
            }
        }
        for cloud in 1..=shape.clouds {
            network.add_cloud(cloud)?;
        }
        if shape.routed {
            network.join_private_networks(shape)?;
        }
        for blueprint in shape.blueprints() {
            network.add_node(blueprint, directory.to_owned(), shape)?;
        }
        if let Some(mtu) = shape.mtu {
            let nodes = network.nodes.iter().map(Node::namespace);
            let all = nodes.chain(&network.routers).chain([&network.internet]);
            for namespace in all {
                // Ports first: a bridge has the least MTU of its ports.
                namespace.sh(&format!(
                    "for link in $(ls /sys/class/net | grep -v -e lo -e br0) br0; do
                         [ ! -e /sys/class/net/$link ] || ip link set $link mtu {mtu}
                     done"
                ))?;
            }
        }
        Ok(network)
    }

    /// Makes the internet carry packets of so many bytes between the sites, in each direction.
    ///
    /// # Errors
    ///
    /// When a router refuses.
    pub fn narrow(&self, mtu: u32) -> anyhow::Result<()> {
        let mut routers = self.routers.iter();
        routers.try_for_each(|router| router.run(&format!("ip link set wan mtu {mtu}")).map(drop))
    }

    /// What the names of all its namespaces start with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The nodes: the master, the data centre's, the third region's.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of that name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn node(&self, name: &str) -> anyhow::Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name() == name)
            .with_context(|| format!("the lab has no node {name}"))
    }

    /// Where a node stands.
    ///
    /// # Errors
    ///
    /// When there is no such node.
    pub fn site(&self, node: &str) -> anyhow::Result<Site> {
        self.sites
            .iter()
            .find_map(|(name, site)| (name == node).then_some(*site))
            .with_context(|| format!("the lab has no node {node}"))
    }

    /// The namespace that everything between the sites passes: the place to listen.
    #[must_use]
    pub fn internet(&self) -> &Namespace {
        &self.internet
    }

    /// The router `nat1`, `nat2` or `eip`.
    ///
    /// # Errors
    ///
    /// When this shape has none of that name.
    pub fn router(&self, name: &str) -> anyhow::Result<&Namespace> {
        let full = format!("{}-{name}", self.prefix);
        self.routers
            .iter()
            .find(|router| router.name() == full)
            .with_context(|| format!("the lab has no router {name}"))
    }

    /// Takes a node's cable out (`false`) or plugs it in again.
    ///
    /// # Errors
    ///
    /// When there is no such node.
    pub fn plug(&self, node: &str, connected: bool) -> anyhow::Result<()> {
        let site = self.site(node)?;
        let state = if connected { "up" } else { "down" };
        self.switch(site)?
            .run(&format!("ip link set {node} {state}"))?;
        Ok(())
    }

    /// Adds a host that is no node, such as a printer, to a site. It has an address with its prefix length, and the
    /// site's router as its default route.
    ///
    /// # Errors
    ///
    /// When the site has no router of its own.
    pub fn add_host(
        &self,
        site: Site,
        name: &str,
        address: &str,
        router: IpAddr,
    ) -> anyhow::Result<Namespace> {
        let host = Namespace::named(format!("{}-{name}", self.prefix))?;
        let switch = self.switch(site)?;
        switch.veth(name, &host, "eth0")?;
        switch.run(&format!("ip link set {name} master br0"))?;
        host.sh(&format!(
            "ip address add {address} dev eth0
             ip route add default via {router}"
        ))?;
        Ok(host)
    }

    /// Has the router `nat1` or `nat2` choose the external ports of new flows in this way. Flows that it knows keep theirs.
    ///
    /// # Errors
    ///
    /// When there is no such router.
    pub fn translate(&self, router: &str, nat: Nat) -> anyhow::Result<()> {
        let translation = translation(nat);
        let rules = "iptables -t nat -L POSTROUTING -n --line-numbers";
        self.router(router)?.sh(&format!(
            "rule=$({rules} | awk '/MASQUERADE/ {{ print $1 }}')
             iptables -t nat -R POSTROUTING $rule {translation}"
        ))?;
        Ok(())
    }

    /// Leaves all namespaces behind when the value is dropped.
    pub fn keep(&mut self) {
        self.internet.keep();
        self.routers.iter_mut().for_each(Namespace::keep);
        for node in &mut self.nodes {
            node.namespace_mut().keep();
        }
    }

    /// The namespace whose bridge `br0` the nodes of a site hang on.
    fn switch(&self, site: Site) -> anyhow::Result<&Namespace> {
        match site {
            Site::Further(cloud) => self.router(&format!("cloud{cloud}")),
            Site::Cloud => Ok(self.router("eip").unwrap_or(&self.internet)),
            Site::DataCentre => self.router("nat1"),
            Site::Third => self.router("nat2"),
        }
    }

    fn add_router(&mut self, name: &str, public: [u8; 4], inside: &str) -> anyhow::Result<()> {
        let router = Namespace::named(format!("{}-{name}", self.prefix))?;
        relax(&router)?;
        // What a router must route must not be bridged past it.
        let _ = router.sysctl("bridge/bridge-nf-call-iptables", "0");
        self.internet.veth(name, &router, "wan")?;
        self.internet
            .run(&format!("ip link set {name} master br0"))?;
        let public = Ipv4Addr::from(public);
        router.sh(&format!(
            "ip address add {public}/24 dev wan
             ip route add default via 203.0.113.1
             ip link add br0 type bridge forward_delay 0
             ip link set br0 up
             ip address add {inside} dev br0"
        ))?;
        router.sysctl("ipv4/ip_forward", "1")?;
        self.routers.push(router);
        Ok(())
    }

    /// The router of a private data centre, which lets answers in and nothing else.
    fn add_border(
        &mut self,
        name: &str,
        site: Site,
        inside: &str,
        shape: Shape,
    ) -> anyhow::Result<()> {
        let last: u8 = if site == Site::DataCentre { 20 } else { 30 };
        if shape.wan == Family::V4 {
            self.add_router(name, [203, 0, 113, last], inside)?;
            self.masquerade(name, shape.nat)?;
        } else {
            self.add_firewalled_router(name, site, inside, last)?;
        }
        if shape.has(Family::V6) {
            let router = self.router(name)?;
            router.sysctl("ipv6/conf/all/forwarding", "1")?;
            router.run(&format!(
                "ip -6 address add {}/64 dev br0 nodad",
                site.unique_local(1)
            ))?;
        }
        Ok(())
    }

    /// A router of IPv6: no translation, and a firewall that remembers.
    fn add_firewalled_router(
        &mut self,
        name: &str,
        site: Site,
        inside: &str,
        last: u8,
    ) -> anyhow::Result<()> {
        let router = Namespace::named(format!("{}-{name}", self.prefix))?;
        relax(&router)?;
        let _ = router.sysctl("bridge/bridge-nf-call-ip6tables", "0");
        self.internet.veth(name, &router, "wan")?;
        self.internet
            .run(&format!("ip link set {name} master br0"))?;
        let outside = Site::Cloud.global(u16::from(last));
        router.sh(&format!(
            "ip link add br0 type bridge forward_delay 0
             ip link set br0 up
             ip address add {inside} dev br0
             ip -6 address add {}/64 dev br0 nodad
             ip -6 address add {outside}/64 dev wan nodad
             ip -6 route add default via {}
             ip6tables -P FORWARD DROP
             ip6tables -A FORWARD -i br0 -o wan -s 2001:db8::/32 -j ACCEPT
             ip6tables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
             ip6tables -A INPUT -i wan -p icmpv6 -j ACCEPT
             ip6tables -A INPUT -i wan -j DROP",
            site.global(1),
            Site::Cloud.global(1)
        ))?;
        self.internet.run(&format!(
            "ip -6 route add {}/64 via {outside}",
            site.global(0)
        ))?;
        self.routers.push(router);
        Ok(())
    }

    fn add_cloud(&mut self, cloud: u8) -> anyhow::Result<()> {
        let name = format!("cloud{cloud}");
        let inside = format!("172.16.{cloud}.1/24");
        self.add_router(&name, [203, 0, 113, 100 + 10 * cloud], &inside)?;
        for number in 1..=nodes_of_cloud(cloud) {
            let public = public_address(cloud, number);
            let private = Ipv4Addr::new(172, 16, cloud, 10 + number);
            self.router(&name)?.sh(&format!(
                "ip address add {public}/24 dev wan
                 iptables -t nat -A PREROUTING -d {public} -j DNAT --to {private}
                 iptables -t nat -A POSTROUTING -o wan -s {private} -j SNAT --to {public}"
            ))?;
        }
        Ok(())
    }

    /// Routes what is for private networks over the internet's segment, past its bogon filter and all NAT.
    fn join_private_networks(&self, shape: Shape) -> anyhow::Result<()> {
        let mut sites = vec![("nat1", "192.168.50.0/24", "203.0.113.20")];
        if shape.third == Third::Distinct {
            sites.push(("nat2", "192.168.60.0/24", "203.0.113.30"));
        }
        if shape.master == Master::ElasticIp {
            sites.push(("eip", "172.16.0.0/24", "203.0.113.10"));
        }
        for (name, network, router) in sites {
            self.internet.sh(&format!(
                "ip route add {network} via {router}
                 iptables -I FORWARD -d {network} -j ACCEPT"
            ))?;
            self.router(name)?
                .sh("iptables -I FORWARD -s 172.16.0.0/12 -j ACCEPT
                 iptables -I FORWARD -s 192.168.0.0/16 -j ACCEPT
                 iptables -t nat -I POSTROUTING -o wan -d 172.16.0.0/12 -j ACCEPT
                 iptables -t nat -I POSTROUTING -o wan -d 192.168.0.0/16 -j ACCEPT")?;
        }
        Ok(())
    }

    fn masquerade(&self, router: &str, nat: Nat) -> anyhow::Result<()> {
        let translation = translation(nat);
        self.router(router)?.sh(&format!(
            "iptables -P FORWARD DROP
             iptables -A FORWARD -i br0 -j ACCEPT
             iptables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
             iptables -A INPUT -i wan -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
             iptables -A INPUT -i wan -p icmp -j ACCEPT
             iptables -A INPUT -i wan -j DROP
             iptables -t nat -A POSTROUTING {translation}"
        ))?;
        Ok(())
    }

    fn add_node(
        &mut self,
        plan: Blueprint,
        directory: PathBuf,
        shape: Shape,
    ) -> anyhow::Result<()> {
        let Blueprint { name, site, v4, v6 } = plan;
        let namespace = Namespace::named(format!("{}-{name}", self.prefix))?;
        relax(&namespace)?;
        let switch = self.switch(site)?;
        switch.veth(&name, &namespace, "eth0")?;
        switch.run(&format!("ip link set {name} master br0"))?;
        if shape.has(Family::V4) {
            let [a, b, c, _] = v4.octets();
            namespace.sh(&format!(
                "ip address add {v4}/24 dev eth0
                 ip route add default via {a}.{b}.{c}.1"
            ))?;
        }
        // Not by router advertisements: a host that forwards ignores them.
        let (own, global) = (site.unique_local(v6), site.global(v6));
        let public = shape.wan == Family::V6 && site == Site::Cloud;
        let v6 = if public { global } else { own };
        if shape.has(Family::V6) {
            // The last one added is listed first, and flannel takes the first.
            if shape.wan == Family::V6 {
                namespace.run(&format!("ip -6 address add {global}/64 dev eth0 nodad"))?;
            }
            if !public {
                namespace.run(&format!("ip -6 address add {own}/64 dev eth0 nodad"))?;
            }
            let gateway = match shape.wan {
                Family::V4 => site.unique_local(1),
                Family::V6 => site.global(1),
            };
            namespace.run(&format!("ip -6 route add default via {gateway}"))?;
            namespace.sysctl("ipv6/conf/all/forwarding", "1")?;
        }
        namespace.sysctl("ipv4/ip_forward", "1")?;
        if shape.strict {
            namespace.sysctl("ipv4/conf/all/rp_filter", "1")?;
            namespace.sysctl("ipv4/conf/default/rp_filter", "1")?;
            namespace.sysctl("ipv4/conf/eth0/rp_filter", "1")?;
        }
        let families = shape.inner.families(shape.wan);
        let addresses = families.into_iter().map(|family| match family {
            Family::V4 => IpAddr::V4(v4),
            Family::V6 => IpAddr::V6(v6),
        });
        let addresses: Vec<IpAddr> = addresses.collect();
        let node = Node::with_addresses(&name, &addresses, namespace, directory.join(&name))?;
        self.nodes.push(node);
        self.sites.push((name, site));
        Ok(())
    }
}

fn internet(prefix: &str, shape: Shape) -> anyhow::Result<Namespace> {
    let internet = Namespace::named(format!("{prefix}-internet"))?;
    relax(&internet)?;
    for program in ["iptables", "ip6tables"] {
        let _ = internet.sysctl(&format!("bridge/bridge-nf-call-{program}"), "0");
    }
    let (v4, v6) = match shape.wan {
        Family::V4 => ("203.0.113.1", Site::Cloud.unique_local(1)),
        Family::V6 => ("172.16.0.1", Site::Cloud.global(1)),
    };
    if shape.has(Family::V6) {
        internet.sh(&format!(
            "ip link add br0 type bridge forward_delay 0
             ip link set br0 up
             ip -6 address add {v6}/64 dev br0 nodad
             ip6tables -A FORWARD -d fc00::/7 -j DROP"
        ))?;
        internet.sysctl("ipv6/conf/all/forwarding", "1")?;
    } else {
        internet.sh("ip link add br0 type bridge forward_delay 0; ip link set br0 up")?;
    }
    internet.sh(&format!(
        "ip address add {v4}/24 dev br0
         for bogon in 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16; do
             iptables -A FORWARD -d $bogon -j DROP
         done"
    ))?;
    internet.sysctl("ipv4/ip_forward", "1")?;
    Ok(internet)
}

/// New namespaces inherit some sysctls from the process that runs the test; start from known ones.
fn relax(namespace: &Namespace) -> anyhow::Result<()> {
    namespace.sysctl("ipv4/conf/all/rp_filter", "0")?;
    namespace.sysctl("ipv4/conf/default/rp_filter", "0")?;
    // Absent where the kernel has no IPv6 at all, which is as good.
    let _ = namespace.sysctl("ipv6/conf/all/disable_ipv6", "0");
    Ok(())
}

/// The rule of a router that translates.
const fn translation(nat: Nat) -> &'static str {
    match nat {
        Nat::Cone => "-o wan -j MASQUERADE",
        Nat::Symmetric => "-o wan -j MASQUERADE --random-fully",
    }
}

#[cfg(test)]
mod tests {
    use super::super::MASTER;
    use super::*;
    use crate::netns::unique_prefix;

    fn network(shape: Shape) -> (crate::Scratch, Network) {
        let directory = crate::scratch("net").unwrap();
        let network = Network::up(&unique_prefix(), directory.path(), shape).unwrap();
        (directory, network)
    }

    #[test]
    fn a_node_behind_nat_reaches_the_master_and_is_not_reached() {
        let (_directory, network) = network(Shape {
            agents: 1,
            ..Shape::default()
        });
        let agent = network.node("node-agent-01").unwrap();
        let master = network.node(MASTER).unwrap();

        agent.run("ping -c 1 -W 2 203.0.113.10").unwrap();

        assert!(master.run("ping -c 1 -W 1 192.168.50.11").is_err());
    }

    #[test]
    fn a_master_behind_an_elastic_address_is_reached_by_it() {
        let (_directory, network) = network(Shape {
            agents: 1,
            master: Master::ElasticIp,
            ..Shape::default()
        });
        let agent = network.node("node-agent-01").unwrap();

        agent.run("ping -c 1 -W 2 203.0.113.10").unwrap();

        let master = network.node(MASTER).unwrap();
        assert_eq!(master.address().to_string(), "172.16.0.10");
    }

    #[test]
    fn leased_lines_join_private_networks_and_translate_nothing() {
        let (_directory, network) = network(Shape {
            agents: 1,
            master: Master::ElasticIp,
            routed: true,
            ..Shape::default()
        });
        let (agent, master) = ("node-agent-01", network.node(MASTER).unwrap());

        master.run("ping -c 1 -W 2 192.168.50.11").unwrap();
        let agent = network.node(agent).unwrap();
        agent.run("ping -c 1 -W 2 172.16.0.10").unwrap();

        let router = network.router("nat1").unwrap();
        let translated = router.run("iptables -t nat -L POSTROUTING -vnx").unwrap();
        let masquerade = translated.lines().find(|line| line.contains("MASQUERADE"));
        assert!(
            masquerade.is_some_and(|line| line.trim_start().starts_with("0 ")),
            "{translated}"
        );
    }

    #[test]
    fn two_data_centres_may_use_the_same_subnet() {
        let (_directory, network) = network(Shape {
            agents: 1,
            third: Third::Overlapping,
            ..Shape::default()
        });
        let third = network.node("node-third-01").unwrap();

        third.run("ping -c 1 -W 2 192.168.50.12").unwrap();
        third.run("ping -c 1 -W 2 203.0.113.10").unwrap();
    }

    #[test]
    fn an_unplugged_node_is_silent_until_it_is_plugged_in() {
        let (_directory, network) = network(Shape {
            agents: 2,
            ..Shape::default()
        });
        let other = network.node("node-agent-02").unwrap();

        network.plug("node-agent-01", false).unwrap();
        assert!(other.run("ping -c 1 -W 1 192.168.50.11").is_err());

        network.plug("node-agent-01", true).unwrap();
        other.run("ping -c 3 -i 0.2 -W 2 192.168.50.11").unwrap();
    }
}
