//! A node on which something is in the way of the agent: files, rights, links, ports. Each ends the agent at
//! once, with one sentence on stderr and the exit code 78. And what `selvedge doctor` reports on such a node.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test may wait, read the clock and run programs"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use selvedge_lab::client::get_plain;
use selvedge_lab::netns::require_root;
use selvedge_lab::{Namespace, wait_for};

use crate::refused::refused;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
/// How long a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node without anything: a namespace, and the agent's files in a directory of its own.
struct Node {
    namespace: Namespace,
    files: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        require_root().unwrap();
        let namespace = Namespace::new("cli").unwrap();
        namespace.run("ip link set lo up").unwrap();
        let files = tempfile::tempdir().unwrap();
        fs::write(
            files.path().join("kubeconfig"),
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: c\n  cluster: {server: \"http://127.0.0.1:1\"}\nusers:\n- name: u\n  user: {token: t}\ncontexts:\n- name: c\n  context: {cluster: c, user: u}\n",
        )
        .unwrap();
        Self { namespace, files }
    }

    fn path(&self, name: &str) -> String {
        self.files.path().join(name).display().to_string()
    }

    fn agent(&self, more: &[&str]) -> Command {
        self.command("agent", more)
    }

    /// What `selvedge doctor` prints.
    fn doctor(&self, more: &[&str]) -> String {
        let output = self.command("doctor", more).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(1),
            "no agent runs here: {stderr}"
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn command(&self, name: &str, more: &[&str]) -> Command {
        let mut command = self.namespace.command(SELVEDGE);
        command.args([name, "--hostname=n1", "--interface=clitest0"]);
        command.arg(format!("--kubeconfig={}", self.path("kubeconfig")));
        command.arg(format!("--state-dir={}", self.path("state")));
        command.arg(format!("--control-socket={}", self.path("control.sock")));
        command.arg(format!("--subnet-file={}", self.path("subnet.env")));
        command.args(more);
        command
    }

    /// Waits until no socket has a port. What another test starts holds all sockets of this process until
    /// it runs.
    fn wait_free(&self, protocol: &str, port: u16) {
        let taken = || {
            let sockets = format!("/proc/thread-self/net/{protocol}");
            let sockets = self.namespace.within(|| fs::read_to_string(&sockets));
            sockets.unwrap().contains(&format!(":{port:04X} "))
        };
        wait_for("a free port", PATIENCE, || !taken()).unwrap();
    }

    fn write(&self, name: &str, content: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}

#[test]
fn a_process_without_rights_is_refused() {
    require_root().unwrap();
    let mut command = Command::new("setpriv");
    command.args([
        "--bounding-set=-all",
        "--inh-caps=-all",
        SELVEDGE,
        "agent",
        "--hostname=n1",
    ]);
    refused(command, 78, "NET_ADMIN");
}

#[test]
fn a_private_key_that_cannot_be_trusted_is_refused() {
    let node = Node::new();
    let key = node.write("state/key", "not a key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    refused(node.agent(&[]), 78, "state/key is damaged");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    refused(node.agent(&[]), 78, "is open to others");
}

#[test]
fn a_flannel_that_cannot_work_is_refused() {
    let node = Node::new();
    let conf = node.write(
        "net-conf.json",
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"wireguard"}}"#,
    );
    let flag = format!("--flannel-conf={conf}");
    refused(
        node.agent(&[&flag]),
        78,
        "net-conf.json sets Backend.Type to \"wireguard\"",
    );
    refused(
        node.agent(&["--flannel-conf=/nonexistent"]),
        78,
        "/nonexistent does not exist",
    );
    node.write("subnet.env", "FLANNEL_NETWORK=10.42.0.0/16\n");
    refused(node.agent(&[]), 78, "has no FLANNEL_SUBNET");
    node.write(
        "subnet.env",
        "FLANNEL_NETWORK=10.4.0.0/15\nFLANNEL_SUBNET=10.4.1.1/24\nFLANNEL_MTU=1450\n",
    );
    refused(node.agent(&[]), 78, "overlaps the cluster network");
}

#[test]
fn a_foreign_link_of_the_same_name_is_refused() {
    let node = Node::new();
    node.namespace
        .run("ip link add clitest0 type bridge")
        .unwrap();
    refused(node.agent(&[]), 78, "there is a link clitest0 already");
}

#[test]
fn another_programs_rule_for_a_table_of_the_agents_is_refused() {
    let node = Node::new();
    node.namespace
        .run("ip rule add pref 100 lookup 5131")
        .unwrap();
    refused(node.agent(&[]), 78, "5131");
}

#[test]
fn a_port_for_the_pages_that_is_in_use_is_refused() {
    let node = Node::new();
    // As Kilo's kg has it.
    let tcp = node
        .namespace
        .within(|| std::net::TcpListener::bind("[::]:1107").unwrap());
    refused(node.agent(&[]), 78, "never run both on a node");
    drop(tcp);
}

#[test]
fn a_tunnels_port_that_is_in_use_is_waited_for() {
    let node = Node::new();
    let udp = node
        .namespace
        .within(|| std::net::UdpSocket::bind("0.0.0.0:51820").unwrap());
    let mut agent = node.agent(&[]).stderr(Stdio::null()).spawn().unwrap();
    let reasons = || {
        let page = get_plain(
            &node.namespace.path(),
            ([127, 0, 0, 1], 1107).into(),
            "/ready",
        );
        page.map_or_else(|_| String::new(), |(_, body)| body)
    };
    let is_told = || reasons().contains("UDP port 51820 is held by ");
    wait_for("the reason", PATIENCE, is_told).unwrap();
    assert!(agent.try_wait().unwrap().is_none(), "it ended");
    drop(udp);
    node.wait_free("udp", 51820);
    wait_for("the port", PATIENCE, || {
        let reasons = reasons();
        !reasons.is_empty() && !reasons.contains("UDP port")
    })
    .unwrap();
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn a_state_directory_that_others_can_write_is_refused_with_the_key_in_it() {
    let node = Node::new();
    let key = node.write("state/key", "not looked at");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let state = node.path("state");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
    refused(node.agent(&[]), 78, &format!("run chmod 700 {state}"));
}

#[test]
fn a_node_without_a_tun_device_is_refused() {
    let node = Node::new();
    let mut command = node.namespace.command("unshare");
    let script = format!(
        "mount -t tmpfs none /dev/net && exec {SELVEDGE} agent --hostname=n1 --state-dir={}",
        node.path("state")
    );
    command.args(["-m", "sh", "-c", &script]);
    refused(command, 78, "/dev/net/tun does not exist");
}

#[test]
fn a_second_agent_on_a_node_is_refused() {
    let node = Node::new();
    let mut first = node.agent(&[]).stderr(Stdio::null()).spawn().unwrap();
    let socket = node.path("control.sock");
    wait_for("the first agent", PATIENCE, || Path::new(&socket).exists()).unwrap();
    refused(node.agent(&[]), 78, "another agent runs on this node");
    assert!(first.try_wait().unwrap().is_none(), "the first goes on");
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn doctor_on_a_sound_host_reports_only_what_does_not_run() {
    let node = Node::new();
    node.namespace.sysctl("ipv4/ip_forward", "1").unwrap();

    let text = node.doctor(&[]);

    let problems: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("problem"))
        .collect();
    let [flannel, agent, api] = &problems[..] else {
        panic!("{text}");
    };
    assert!(flannel.contains("subnet.env does not exist"), "{text}");
    assert!(agent.contains("The agent does not answer"), "{text}");
    assert!(
        api.contains("No API server answers: the server in"),
        "{text}"
    );
    assert!(!text.contains("warning"), "{text}");
}

#[test]
fn doctor_names_the_process_that_has_the_tunnels_port() {
    let node = Node::new();
    let socket = node
        .namespace
        .within(|| std::net::UdpSocket::bind("0.0.0.0:51820").unwrap());

    let text = node.doctor(&[]);

    let whose = format!("(process {})", std::process::id());
    assert!(text.contains("UDP port 51820 is held by "), "{text}");
    assert!(text.contains(&whose), "{text}");
    drop(socket);
    node.wait_free("udp", 51820);
    assert!(!node.doctor(&[]).contains("UDP port 51820"));
}

#[test]
fn doctor_lists_what_kilo_left() {
    let node = Node::new();
    assert!(!node.doctor(&[]).contains("Kilo's routing table"));
    // As after a kg that was killed.
    for line in [
        "ip route add 192.168.50.12 dev lo table 1107",
        "ip rule add to 192.168.50.12 iif kilo0 lookup 1107",
    ] {
        node.namespace.run(line).unwrap();
    }
    let text = node.doctor(&[]);
    assert!(
        text.contains(
            "table 1107 is not empty (routes: 1), and the rules of priority 32765 point to it"
        ),
        "{text}"
    );
    // The commands that it prints are enough.
    let (_, todo) = text.split_once("If no kg runs on this node: ").unwrap();
    let todo = todo.lines().next().unwrap().trim_end_matches('.');
    for command in todo.split("; ") {
        node.namespace.run(command).unwrap();
    }
    assert!(!node.doctor(&[]).contains("Kilo's routing table"));
}

#[test]
fn doctor_says_what_an_agent_would_refuse() {
    let node = Node::new();
    node.namespace
        .run("ip rule add pref 100 lookup 5131")
        .unwrap();
    assert!(node.doctor(&[]).contains("would refuse to run: "));
    assert!(node.doctor(&[]).contains("5131"));
    node.namespace.run("ip rule del pref 100").unwrap();
    node.namespace
        .run("ip link add clitest0 type bridge")
        .unwrap();
    assert!(
        node.doctor(&[])
            .contains("there is a link clitest0 already, of the kind bridge")
    );
    node.namespace.run("ip link del clitest0").unwrap();

    let conf = node.write(
        "net-conf.json",
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"ipip"}}"#,
    );
    let text = node.doctor(&[&format!("--flannel-conf={conf}")]);
    assert!(text.contains("sets Backend.Type to \"ipip\""), "{text}");

    let mut command = node.namespace.command("unshare");
    let script = format!("mount -t tmpfs none /dev/net && exec {SELVEDGE} doctor --hostname=n1");
    command.args(["-m", "sh", "-c", &script]);
    let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
    assert!(text.contains("/dev/net/tun does not exist"), "{text}");
}

#[test]
fn doctor_looks_at_the_hosts_settings_and_firewalls() {
    let node = Node::new();
    node.namespace.sysctl("ipv4/ip_forward", "0").unwrap();
    node.namespace.run("iptables -P FORWARD DROP").unwrap();
    node.namespace.run("iptables -P INPUT DROP").unwrap();
    let text = node.doctor(&[]);
    for expected in [
        "problem: net.ipv4.ip_forward is 0",
        "problem: The chain FORWARD of the firewall table ip filter drops forwarded packets by default",
        "warning: The chain INPUT of the firewall table ip filter drops by default, and has no rule for UDP port 51820",
    ] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    assert!(!text.contains("iptables-legacy"), "{text}");

    // As flannel opens it for pods, and an operator for the tunnel.
    node.namespace
        .sh("iptables -N FLANNEL-FWD; iptables -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD
             iptables -A INPUT -p udp --dport 51820 -j ACCEPT")
        .unwrap();
    let text = node.doctor(&[]);
    assert!(
        text.contains("VPN peers do not reach the nodes behind this one"),
        "{text}"
    );
    assert!(!text.contains("UDP port 51820"), "{text}");

    node.namespace
        .run("iptables-legacy -A INPUT -p icmp -j ACCEPT")
        .unwrap();
    let text = node.doctor(&[]);
    assert!(
        text.contains("tables of iptables-legacy in addition to those of nf_tables (filter)"),
        "{text}"
    );
}
