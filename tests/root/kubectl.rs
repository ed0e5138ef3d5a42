//! A real kubectl on a real API server: the program as its plugin, with the user's own kubeconfigs and
//! contexts, and the quick start of the README as it is written there.
//!
//! No agents run: what they would publish is written for them.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run programs and fail by panicking"
)]

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use selvedge_lab::controlplane::program;
use selvedge_lab::lab::register_node;
use selvedge_lab::netns::require_root;
use selvedge_lab::{ControlPlane, Namespace, Node, Scratch, scratch};
use serde_json::{Value, json};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// A control plane, and a user's machine that has kubectl and the plugin on its path.
struct Cluster {
    // Declared in the order in which they must end.
    plane: ControlPlane,
    node: Node,
    files: Scratch,
}

impl Cluster {
    fn start(label: &str) -> Self {
        require_root().unwrap();
        let files = scratch(label).unwrap();
        let namespace = Namespace::new(label).unwrap();
        namespace
            .run(&format!("ip addr add {ADDRESS}/32 dev lo"))
            .unwrap();
        let node = Node::new("here", ADDRESS, namespace, files.path().join("here")).unwrap();
        let plane = ControlPlane::start(&node, ADDRESS, &files.path().join("plane")).unwrap();
        let tools = files.path().join("tools");
        fs::create_dir_all(&tools).unwrap();
        symlink(program("labcp").unwrap(), tools.join("kubectl")).unwrap();
        symlink(
            env!("CARGO_BIN_EXE_selvedge"),
            tools.join("kubectl-selvedge"),
        )
        .unwrap();
        Self { plane, node, files }
    }

    fn admin(&self) -> PathBuf {
        self.plane.kubeconfig_path("admin")
    }

    /// Runs a line of a shell in the repository, without any cluster but by the user's kubeconfig.
    fn shell(&self, line: &str, environment: &[(&str, &str)]) -> Output {
        let tools = self.files.path().join("tools");
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("sh");
        command
            .args(["-c", line])
            .current_dir(ROOT)
            .env("PATH", format!("{}:{path}", tools.display()))
            .env("HOME", self.files.path().join("home"))
            .env_remove("KUBECONFIG")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .envs(environment.iter().copied());
        self.node.output(command).unwrap()
    }

    /// What a line prints that must succeed.
    fn prints(&self, line: &str, environment: &[(&str, &str)]) -> String {
        let output = self.shell(line, environment);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {complaint}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Writes for the agents of the two regions what they publish, and their kubelets' status.
    fn publish(&self) {
        let keys = [
            "ZFYh7Bi5FA0fNTizfHhMy0v+Wy+BVP2U85lC5PnHtFs=",
            "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=",
            "h/wYe0dl8DAI8SLTR2E+bEkgxVvTFwS0ArNTXESFtFw=",
            "wiUQEPcJjQbzuVj3TcsI6NUvnvaau+Lej0HpefSCL2g=",
        ];
        // The NAT gives each of the two leaders behind it a port.
        let at = |port: u16| json!({"IP": "198.51.100.7", "Port": port, "Zone": ""});
        let seen = json!({keys[1]: at(24276), keys[2]: at(24277)}).to_string();
        for ((name, address), key) in NODES.into_iter().zip(keys) {
            let endpoint = format!("{address}:51820");
            let internal_ip = format!("{address}/24");
            let mut published = vec![
                ("kilo.squat.ai/endpoint", Some(endpoint.as_str())),
                ("kilo.squat.ai/granularity", Some("location")),
                ("kilo.squat.ai/internal-ip", Some(internal_ip.as_str())),
                ("kilo.squat.ai/key", Some(key)),
                ("selvedge.dev/agent", Some("0.1.0")),
            ];
            if name == "node-master" {
                published.push(("kilo.squat.ai/discovered-endpoints", Some(seen.as_str())));
            }
            self.plane.admin().annotate(name, &published).unwrap();
        }
    }
}

/// The nodes of the README with their addresses.
const NODES: [(&str, Ipv4Addr); 4] = [
    ("node-master", Ipv4Addr::new(172, 16, 0, 10)),
    ("node-agent-01", Ipv4Addr::new(192, 168, 50, 11)),
    ("node-agent-02", Ipv4Addr::new(192, 168, 50, 12)),
    ("node-agent-03", Ipv4Addr::new(192, 168, 50, 13)),
];

/// A cluster as flannel alone leaves it: nodes with pod CIDRs.
fn register(cluster: &Cluster) {
    for (number, (name, address)) in NODES.into_iter().enumerate() {
        let pods = format!("10.42.{number}.0/24");
        register_node(cluster.plane.admin(), name, address, Some(&pods)).unwrap();
    }
}

#[test]
fn the_quick_start_works_as_it_is_written() {
    let cluster = Cluster::start("quick");
    register(&cluster);
    let home = cluster.files.path().join("home/.kube");
    fs::create_dir_all(&home).unwrap();
    fs::copy(cluster.admin(), home.join("config")).unwrap();

    let readme = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let start = readme.split_once("## Use it").unwrap().1;
    let block = start.split_once("```console\n").unwrap().1;
    let block = block.split_once("```").unwrap().0;
    let mut commands = block.split("$ ").skip(1).collect::<Vec<_>>();
    let (last, expected) = commands.pop().unwrap().split_once('\n').unwrap();

    assert_eq!(commands.len(), 4, "{commands:?}");
    for command in commands {
        cluster.prints(command, &[]);
    }
    let daemonset = "kubectl --namespace kube-system get daemonset selvedge --output name";
    assert_eq!(cluster.prints(daemonset, &[]), "daemonset.apps/selvedge\n");
    cluster.publish();
    assert_eq!(cluster.prints(last, &[]).trim_end(), expected.trim_end());
}

#[test]
fn as_a_plugin_of_kubectls_it_sees_the_cluster_that_kubectl_sees() {
    let cluster = Cluster::start("plugin");
    register(&cluster);
    cluster.publish();
    let admin = cluster.admin().display().to_string();
    let by_environment = [("KUBECONFIG", admin.as_str())];

    let listed = cluster.prints("kubectl plugin list", &by_environment);
    assert!(listed.contains("/kubectl-selvedge\n"), "{listed}");
    let drawn = cluster.prints("kubectl selvedge graph", &by_environment);
    assert!(drawn.starts_with("digraph kilo {\n"), "{drawn}");
    assert!(drawn.contains("\"node-agent-03\""), "{drawn}");
    let shown = cluster.prints(
        "kubectl selvedge showconf node node-agent-01",
        &by_environment,
    );
    assert!(
        shown.starts_with("[Interface]\nListenPort = 51820\n"),
        "{shown}"
    );

    // By a flag, before the command or behind it, and where kubectl looks without a flag.
    for line in [
        format!("kubectl selvedge graph --kubeconfig {admin}"),
        format!("kubectl selvedge --kubeconfig={admin} graph"),
    ] {
        assert_eq!(cluster.prints(&line, &[]), drawn, "{line}");
    }
    let nowhere = cluster.shell("kubectl selvedge graph", &[]);
    assert_eq!(nowhere.status.code(), Some(78));
    assert_eq!(
        String::from_utf8_lossy(&nowhere.stderr),
        "selvedge: found no kubeconfig: set --kubeconfig FILE or KUBECONFIG\n"
    );
    let home = cluster.files.path().join("home/.kube");
    fs::create_dir_all(&home).unwrap();
    symlink(&admin, home.join("config")).unwrap();
    assert_eq!(cluster.prints("kubectl selvedge graph", &[]), drawn);
    fs::remove_file(home.join("config")).unwrap();

    contexts(&cluster, &drawn);
    in_a_pod(&cluster, &drawn);
}

/// Several files taken together, whose current context leads elsewhere.
fn contexts(cluster: &Cluster, drawn: &str) {
    let other = cluster.files.path().join("elsewhere");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "elsewhere",
        "clusters": [{"name": "elsewhere", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "elsewhere", "user": {}}],
        "contexts": [{"name": "elsewhere", "context": {"cluster": "elsewhere", "user": "elsewhere"}}],
    });
    fs::write(&other, config.to_string()).unwrap();
    let files = format!("{}:{}", other.display(), cluster.admin().display());
    let files = [("KUBECONFIG", files.as_str())];

    let current = cluster.shell("kubectl selvedge graph", &files);
    assert!(!current.status.success());
    assert_eq!(
        cluster.prints("kubectl selvedge graph --context lab", &files),
        drawn
    );
    let unknown = cluster.shell("kubectl selvedge graph --context nowhere", &files);
    assert_eq!(unknown.status.code(), Some(78));
    assert_eq!(
        String::from_utf8_lossy(&unknown.stderr),
        "selvedge: the kubeconfig is invalid: it has no context \"nowhere\"\n"
    );
}

/// Without any kubeconfig, with a service account's files where a pod has them.
fn in_a_pod(cluster: &Cluster, drawn: &str) {
    let kubeconfig = fs::read(cluster.admin()).unwrap();
    let kubeconfig: Value = serde_json::from_slice(&kubeconfig).unwrap();
    let token = cluster.files.path().join("token");
    fs::write(
        &token,
        kubeconfig["users"][0]["user"]["token"].as_str().unwrap(),
    )
    .unwrap();
    let server = kubeconfig["clusters"][0]["cluster"]["server"]
        .as_str()
        .unwrap();
    let port = server.rsplit(':').next().unwrap();
    let authority = cluster.plane.authority().display();
    let script = format!(
        "mount -t tmpfs none /var/run && d=/var/run/secrets/kubernetes.io/serviceaccount && mkdir -p $d &&
         cp {} $d/token && cp {authority} $d/ca.crt && echo -n default > $d/namespace &&
         exec kubectl selvedge graph",
        token.display()
    );
    let service = [
        ("KUBERNETES_SERVICE_HOST", "203.0.113.10"),
        ("KUBERNETES_SERVICE_PORT", port),
    ];
    let line = format!("unshare --mount sh -c '{script}'");
    assert_eq!(cluster.prints(&line, &service), drawn);
}
