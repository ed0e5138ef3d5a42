//! The path MTU between two regions, on a real flannel and a real kube-apiserver, with ICMP filtered: bulk TCP and large
//! datagrams between pods of followers, while the internet between the regions carries 1,280 to 9,000 bytes.
//!
//! ```text
//!    region default: node-master, which leads, and node-public-01, behind a router of elastic IPs
//!    region nd: node-agent-01, which leads, and node-agent-02, behind a NAT
//!    all links carry 9,000 bytes, but the routers' links to the internet
//! ```
//!
//! A capture of the internet counts fragments. The control has a fixed MTU that is too large, and shows them.
//! The short form has two sizes; with `SELVEDGE_PATH_MTU=all` there are more, and the path is raised again.
#![expect(
    clippy::disallowed_methods,
    reason = "a test may run programs and wait"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use selvedge_lab::capture::Capture;
use selvedge_lab::controlplane::POD_NETWORK;
use selvedge_lab::lab::{Mesh, ONE_LEADER, Options};
use selvedge_lab::topology::{LEADER, MASTER, Master, PUBLIC, Shape};
use selvedge_lab::traffic::{Bulk, PORT, Servers};
use selvedge_lab::{Lab, Steps, wait_for};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

/// The followers.
const FOLLOWER: &str = "node-agent-02";
const LEADERS: [&str; 2] = [LEADER, MASTER];

/// The MTU of every link but those to the internet.
const JUMBO: u32 = 9000;
/// What the tunnel adds over IPv4.
const OVERHEAD: u32 = 60;
/// The right value must be there after this, and bulk TCP may stall for this.
const FOUND: Duration = Duration::from_secs(10);
const STALL: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(60);

/// Fragments of either family.
const FRAGMENTS: &str = "(ip[6:2] & 0x3fff) != 0 or (ip6 and ip6[6] == 44)";

fn main() -> ExitCode {
    let mut steps = Steps::from_args("path_mtu");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let options = Options {
        shape: Shape {
            agents: 2,
            master: Master::ElasticIp,
            beside_master: 1,
            mtu: Some(JUMBO),
            ..Shape::default()
        },
        ..Options::default()
    };
    let lab = steps.required("the_cluster_comes_up", || {
        Lab::for_test("path-mtu", options)
    })?;
    let mut field = Field { lab, servers: None };
    steps.required(
        "the_regions_are_joined_over_an_internet_of_1400_bytes",
        || field.join(),
    )?;
    let sizes: &[u32] = if thorough() {
        &[1280, 1400, 1500, 9000]
    } else {
        &[1280, 9000]
    };
    for size in sizes {
        steps.step(&format!("an_internet_of_{size}_bytes_is_measured"), || {
            field.measured(*size)
        });
    }
    steps.step(
        "a_path_that_shrinks_under_load_stalls_for_seconds_at_most",
        || field.shrinks(),
    );
    if thorough() {
        steps.step("a_path_that_grows_is_raised_again", || field.grows());
    }
    steps.step("the_control_with_a_fixed_mtu_sends_fragments", || {
        field.control()
    });
    Some(())
}

/// Whether all sizes are tried.
fn thorough() -> bool {
    std::env::var("SELVEDGE_PATH_MTU").is_ok_and(|which| which == "all")
}

struct Field {
    lab: Lab,
    servers: Option<Servers>,
}

impl Field {
    /// Filters ICMP, and starts the agents.
    fn join(&mut self) -> anyhow::Result<String> {
        let network = self.lab.network();
        network.narrow(1400)?;
        for router in ["nat1", "eip"] {
            // The nodes' own connections to the API server need a small segment size then.
            network.router(router)?.sh(
                "iptables -A OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP
                 iptables -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss 1200",
            )?;
        }
        let places = self.lab.places();
        let pods: Vec<_> = places.into_iter().filter(|place| place.pod).collect();
        self.servers = Some(Servers::start(&pods)?);
        let mesh = Mesh {
            flags: &ONE_LEADER,
            ..Mesh::annotated(Path::new(SELVEDGE), Path::new(MANIFEST))
        };
        let ready = self.lab.join(&mesh)?;
        let found = self.wait_for_size(1400)?;
        self.ready()?;
        Ok(format!("ready after {ready:.1?}, right {found:.1?} later"))
    }

    /// The MTU of a leader's routes to the pods of the other region.
    fn route_mtu(&self, node: &str) -> anyhow::Result<Option<u32>> {
        let far = if node == MASTER { FOLLOWER } else { PUBLIC };
        let pods = self.lab.pod_cidr(far)?;
        let line = format!("ip route show table 5130 {pods} metric 0");
        let shown = self.lab.node(node)?.run(&line)?;
        let mut words = shown.split_whitespace();
        words.find(|word| *word == "mtu");
        Ok(words.next().and_then(|mtu| mtu.parse().ok()))
    }

    /// Waits until both leaders have what an internet of so many bytes carries.
    fn wait_for_size(&self, internet: u32) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let wanted = Some(internet - OVERHEAD);
        let waited = wait_for("the right MTU", PATIENCE, || {
            let mtus = LEADERS.map(|node| self.route_mtu(node).ok().flatten());
            mtus == [wanted; 2]
        });
        waited.with_context(|| self.evidence())?;
        Ok(begun.elapsed())
    }

    /// Waits until both followers reach each other.
    fn ready(&self) -> anyhow::Result<()> {
        let (near, far) = self.ends()?;
        wait_for("the pods to reach each other", PATIENCE, || {
            selvedge_lab::traffic::source_seen(&near, far).is_ok()
        })?;
        Ok(())
    }

    /// The namespace of one follower's pod, and the server of the other's.
    fn ends(&self) -> anyhow::Result<(std::path::PathBuf, SocketAddr)> {
        let near = self.lab.pod(FOLLOWER)?.namespace().path();
        let far = self.lab.pod(PUBLIC)?.address();
        Ok((near, SocketAddr::new(far, PORT)))
    }

    fn bulk(&self) -> anyhow::Result<Bulk> {
        let (near, far) = self.ends()?;
        Bulk::start(&near, far)
    }

    fn capture(&self, name: &str) -> anyhow::Result<Capture> {
        let file = self.lab.directory().join(format!("{name}.pcap"));
        Capture::start_of(self.lab.network().internet(), &file, FRAGMENTS)
    }

    /// Restarts the agents of both leaders, so that all is measured again.
    fn restart(&mut self, flags: &[&str]) -> anyhow::Result<()> {
        let mesh = Mesh::annotated(Path::new(SELVEDGE), Path::new(MANIFEST));
        for name in LEADERS {
            let agent = self.lab.agent(name).context("no agent")?;
            agent.signal(Signal::SIGTERM);
        }
        for name in LEADERS {
            self.lab.take_agent(name)?.stop()?;
            self.lab
                .restart_agent(mesh.binary, name, mesh.access, flags)?;
        }
        self.lab.wait_agents(PATIENCE)?;
        self.forget()
    }

    /// Has the pods forget the path MTUs that they have learned, which they keep for ten minutes.
    fn forget(&self) -> anyhow::Result<()> {
        for node in [FOLLOWER, PUBLIC] {
            let pod = self.lab.pod(node)?.namespace();
            pod.run("ip route flush cache")?;
        }
        Ok(())
    }

    /// A follower's pod reaches the other region with what fits exactly, and learns from its leader what does.
    fn learns(&self, internet: u32) -> anyhow::Result<()> {
        let mtu = internet - OVERHEAD;
        let pod = self.lab.pod(FOLLOWER)?.namespace();
        let far = self.lab.pod(PUBLIC)?.address();
        // Without the headers of IP and ICMP.
        let fits = mtu - 28;
        pod.run(&format!("ping -M do -c 1 -W 2 -s {fits} {far}"))?;
        let larger = format!("ping -M do -c 1 -W 2 -s {} {far}", fits + 1);
        let refused = pod.attempt(&larger)?;
        let mut said = String::from_utf8_lossy(&refused.stdout).into_owned();
        said += &String::from_utf8_lossy(&refused.stderr);
        let is_told = !refused.status.success() && said.contains(&mtu.to_string());
        ensure!(is_told, "{larger}: {said}");
        self.forget()
    }

    /// After a restart the right size is found in time, and bulk TCP does not stall.
    fn measured(&mut self, internet: u32) -> anyhow::Result<String> {
        self.lab.network().narrow(internet)?;
        let capture = self.capture(&format!("internet-{internet}"))?;
        let begun = Instant::now();
        self.restart(&ONE_LEADER)?;
        self.wait_for_size(internet)?;
        let found = begun.elapsed();
        ensure!(found <= FOUND, "{found:.1?} until the MTU was right");
        self.ready()?;
        self.learns(internet)?;
        let bulk = self.bulk()?;
        sleep(Duration::from_secs(4));
        let moved = bulk.stop()?;
        ensure!(moved.stall <= STALL, "{moved}\n{}", self.evidence());
        let fragments = fragments(capture)?;
        ensure!(fragments == 0, "{fragments} fragments\n{}", self.evidence());
        Ok(format!(
            "right {found:.1?} after the agents' start; {moved}; 0 fragments"
        ))
    }

    /// From 1,500 to 1,300 bytes in the middle of a transfer.
    fn shrinks(&mut self) -> anyhow::Result<String> {
        self.lab.network().narrow(1500)?;
        self.restart(&ONE_LEADER)?;
        self.wait_for_size(1500)?;
        self.ready()?;
        let capture = self.capture("shrinks")?;
        let bulk = self.bulk()?;
        sleep(Duration::from_secs(4));
        self.lab.network().narrow(1300)?;
        let found = self.wait_for_size(1300);
        sleep(Duration::from_secs(4));
        let moved = bulk.stop().with_context(|| self.evidence())?;
        let found = found?;
        ensure!(moved.stall <= STALL, "{moved}\n{}", self.evidence());
        ensure!(found <= FOUND, "{found:.1?} until the MTU was right");
        let fragments = fragments(capture)?;
        ensure!(fragments == 0, "{fragments} fragments");
        Ok(format!("right after {found:.1?}; {moved}; 0 fragments"))
    }

    /// Back to 1,500 bytes, without a restart.
    fn grows(&mut self) -> anyhow::Result<String> {
        self.lab.network().narrow(1500)?;
        let found = self.wait_for_size(1500)?;
        Ok(format!("right after {found:.1?}"))
    }

    /// A fixed MTU above what the internet carries.
    fn control(&mut self) -> anyhow::Result<String> {
        self.lab.network().narrow(1500)?;
        let fixed = format!("--mtu={}", JUMBO - OVERHEAD);
        let flags: Vec<_> = ONE_LEADER.into_iter().chain([&*fixed]).collect();
        self.restart(&flags)?;
        self.wait_for_size(JUMBO)?;
        self.ready()?;
        let capture = self.capture("control")?;
        let bulk = self.bulk()?;
        sleep(Duration::from_secs(4));
        let moved = bulk.stop()?;
        let fragments = fragments(capture)?;
        ensure!(fragments > 0, "the capture sees no fragment: {moved}");
        Ok(format!("{fragments} fragments; {moved}"))
    }

    fn evidence(&self) -> String {
        let mut text = String::new();
        for name in LEADERS {
            for line in ["ip route show table 5130", "ip link show kilo0"] {
                let shown = self.lab.node(name).and_then(|node| node.run(line));
                let shown = shown.unwrap_or_else(|error| error.to_string());
                text += &format!("[{name}] {line}\n{shown}\n");
            }
            text += &format!("[{name}] log\n{}\n", self.lab.tail(name, "selvedge"));
        }
        text
    }
}

/// How many fragments a capture has seen.
fn fragments(capture: Capture) -> anyhow::Result<usize> {
    let findings = capture.finish(POD_NETWORK.parse()?)?;
    // The datagram that ends the capture is in it, on the loopback.
    let last = findings.udp.get(&9).copied().unwrap_or(0);
    Ok(findings.packets - last)
}
