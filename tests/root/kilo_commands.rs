//! `graph` and `showconf` on a real API server, as a user runs them with a kubeconfig.
//!
//! What they print of known clusters, case by case, is in `tests/unit/graph_and_showconf.rs`.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run programs and fail by panicking"
)]

use std::net::Ipv4Addr;
use std::process::{Command, Output};

use selvedge::graph;
use selvedge::showconf::{Shape, showconf};
use selvedge::topology::{Granularity, NodeName, Object, Topology};
use selvedge_lab::controlplane::program;
use selvedge_lab::netns::require_root;
use selvedge_lab::{ControlPlane, Namespace, Node, scratch};

use crate::mesh::Mesh;

const MIXED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/mixed.yaml");

fn of_node(topology: &Topology, name: &str) -> String {
    let object = Object::Node(NodeName(name.into()));
    showconf(topology, &object, &Shape::default()).unwrap()
}

fn of_peer(topology: &Topology, name: &str) -> String {
    showconf(topology, &Object::Peer(name.into()), &Shape::default()).unwrap()
}

#[test]
fn the_commands_ask_the_cluster() {
    require_root().unwrap();
    let address = Ipv4Addr::new(203, 0, 113, 10);
    let files = scratch("cli").unwrap();
    let namespace = Namespace::new("cli").unwrap();
    namespace
        .run(&format!("ip addr add {address}/32 dev lo"))
        .unwrap();
    let node = Node::new("here", address, namespace, files.path().join("here")).unwrap();
    let plane = ControlPlane::start(&node, address, &files.path().join("plane")).unwrap();
    let kubeconfig = plane.kubeconfig_path("admin");
    let kubectl = |args: &[&str]| {
        let mut command = Command::new(program("labcp").unwrap());
        command
            .args(["kubectl", "--kubeconfig"])
            .arg(&kubeconfig)
            .args(args);
        let output = node.output(command).unwrap();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let selvedge = |args: &[&str]| -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
        command.args(args).env("KUBECONFIG", &kubeconfig);
        // As in Kilo, so that there is a node that does not lead.
        command.arg("--leaders-per-region=1");
        node.output(command).unwrap()
    };
    let stdout = |output: &Output| String::from_utf8(output.stdout.clone()).unwrap();
    let stderr = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();

    // An empty cluster, without the definition of Peers.
    let empty = selvedge(&["graph"]);
    assert_eq!(empty.status.code(), Some(1));
    assert_eq!(
        stderr(&empty),
        "selvedge: did not find any valid Kilo nodes in the cluster\n"
    );

    let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/base/crd.yaml");
    kubectl(&["apply", "-f", deploy]);
    kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd/peers.kilo.squat.ai",
    ]);
    kubectl(&["apply", "-f", MIXED]);
    // The status is a resource of its own.
    for (name, ip) in [
        ("gcp-1", "10.132.0.2"),
        ("gcp-2", "10.132.0.3"),
        ("edge-1", "192.168.1.10"),
        ("cloud-1", "203.0.113.24"),
    ] {
        let status = serde_json::json!({"status": {
            "addresses": [{"type": "InternalIP", "address": ip}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        let path = format!("/api/v1/nodes/{name}/status");
        plane.admin().merge(&path, &status).unwrap();
    }

    // DNS names do not resolve here, which affects only the nodes that use them.
    let mut mesh = Mesh::from_yaml(include_str!("../testdata/mixed.yaml")).unwrap();
    mesh.agreed.granularity = Granularity::Location;
    let expected = mesh.topology();
    let drawn = selvedge(&["graph"]);
    assert_eq!(drawn.status.code(), Some(0), "{}", stderr(&drawn));
    assert_eq!(stdout(&drawn), format!("{}\n", graph::dot(&expected)));
    let auto = stdout(&selvedge(&["graph", "--mesh-granularity=auto"]));
    assert_eq!(
        auto,
        stdout(&selvedge(&["graph", "--mesh-granularity=location"]))
    );
    assert!(stdout(&selvedge(&["graph", "--format", "svg"])).starts_with("<svg "));

    let shown = selvedge(&["showconf", "node", "gcp-1"]);
    assert_eq!(stdout(&shown), of_node(&expected, "gcp-1"));
    assert_eq!(
        stdout(&selvedge(&["showconf", "peer", "laptop"])),
        of_peer(&expected, "laptop")
    );
    let port = stdout(&selvedge(&["showconf", "node", "gcp-1", "--port", "7"]));
    assert!(port.starts_with("[Interface]\nListenPort = 7\n"));

    let follower = selvedge(&["showconf", "node", "gcp-2"]);
    assert_eq!(
        (follower.status.code(), stdout(&follower)),
        (Some(1), String::new())
    );
    assert!(stderr(&follower).contains("is not a leader node"));
    let absent = selvedge(&["showconf", "peer", "absent"]);
    assert_eq!(absent.status.code(), Some(1));

    // What is shown as a Peer is one: another cluster takes it.
    let peer = selvedge(&[
        "showconf",
        "node",
        "cloud-1",
        "--as-peer",
        "-o",
        "yaml",
        "--allowed-ips",
        "10.143.0.0/16",
    ]);
    let file = files.path().join("peer.yaml");
    std::fs::write(&file, stdout(&peer)).unwrap();
    kubectl(&["apply", "-f", file.to_str().unwrap()]);
}
