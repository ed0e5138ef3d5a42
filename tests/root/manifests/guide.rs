//! The migration guide's commands, as they stand in it, on a real API server: Kilo goes node by node, and
//! no node ever has both. The way back is left out, because it waits for the garbage collector.
//!
//! A stand-in acts as the kubelets, and pods run nothing: `tests/labs/migration_from_kilo.rs` shows what the
//! agents do.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;

const GUIDE: &str = include_str!("../../../docs/migration.md");
const PODS: &str = "/api/v1/namespaces/kube-system/pods";
const PATIENCE: Duration = Duration::from_secs(60);

/// Kilo's DaemonSet, as far as it matters where its pods go, and its rights on Nodes.
const KILO: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: kilo, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: kilo}
rules: [{apiGroups: [''], resources: [nodes], verbs: [list, patch, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: kilo}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: kilo}
subjects: [{kind: ServiceAccount, name: kilo, namespace: kube-system}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: kilo, namespace: kube-system}
spec:
  selector: {matchLabels: {app.kubernetes.io/name: kilo}}
  template:
    metadata: {labels: {app.kubernetes.io/name: kilo}}
    spec:
      serviceAccountName: kilo
      hostNetwork: true
      tolerations: [{operator: Exists}]
      containers:
      - {name: kilo, image: 'squat/kilo:0.7.0', ports: [{containerPort: 1107, name: metrics}]}
";

/// The shell commands under a heading, one text for each block.
fn blocks(heading: &str) -> Vec<String> {
    let (_, rest) = GUIDE.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let blocks = section.split("```sh\n").skip(1);
    blocks
        .map(|block| block.split("```").next().unwrap().to_owned())
        .collect()
}

/// Which agents have a pod on a node, those included that have not ended.
fn agents_of(cluster: &Cluster, node: &str) -> BTreeSet<String> {
    let pods = cluster.api().get(PODS).unwrap();
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    pods.iter()
        .filter(|pod| pod["spec"]["nodeName"] == node)
        .filter_map(|pod| pod["metadata"]["labels"]["app.kubernetes.io/name"].as_str())
        .map(str::to_owned)
        .collect()
}

/// The uids of Kilo's pods, by node.
fn kilos_pods(cluster: &Cluster) -> BTreeSet<(String, String)> {
    let pods = cluster.api().get(PODS).unwrap();
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    pods.iter()
        .filter(|pod| pod["metadata"]["labels"]["app.kubernetes.io/name"] == "kilo")
        .map(|pod| {
            (
                text(&pod["spec"]["nodeName"]),
                text(&pod["metadata"]["uid"]),
            )
        })
        .collect()
}

/// What kubelets do: pods that should run are Ready, and those that should end are gone after a while.
fn play_kubelets(cluster: &Cluster, end: &AtomicBool) {
    while !end.load(Ordering::Relaxed) {
        let pods = cluster.api().get(PODS).unwrap_or_default();
        for pod in pods["items"].as_array().into_iter().flatten() {
            let metadata = &pod["metadata"];
            let path = format!("{PODS}/{}", metadata["name"].as_str().unwrap_or_default());
            if metadata["deletionTimestamp"].is_string() {
                std::thread::sleep(Duration::from_millis(500));
                let now = json!({"gracePeriodSeconds": 0});
                let _ = cluster
                    .api()
                    .request("DELETE", &path, "application/json", Some(&now));
            } else if pod["spec"]["nodeName"].is_string() && pod["status"]["phase"] != "Running" {
                let ready = json!({"type": "Ready", "status": "True"});
                let status = json!({"status": {"phase": "Running", "conditions": [ready]}});
                let _ = cluster.api().merge(&format!("{path}/status"), &status);
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until every node has exactly these agents.
fn settled(cluster: &Cluster, expected: [(&str, &str); 2]) {
    let mut seen = Vec::new();
    wait_for("the pods", PATIENCE, || {
        seen = expected.map(|(node, _)| agents_of(cluster, node)).to_vec();
        assert!(
            seen.iter().all(|agents| agents.len() < 2),
            "both on one node: {seen:?}"
        );
        let wanted = expected.map(|(_, agent)| BTreeSet::from([agent.to_owned()]));
        seen == wanted
    })
    .unwrap_or_else(|error| panic!("{expected:?}: {seen:?}: {error:#}"));
}

#[test]
fn the_migration_guide_moves_a_cluster_node_by_node() {
    let cluster = Cluster::empty("guide").unwrap();
    for name in ["node-a", "node-b"] {
        cluster.register(name).unwrap();
    }
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| play_kubelets(&cluster, &end));
        let outcome =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| node_by_node(&cluster)));
        end.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

fn node_by_node(cluster: &Cluster) {
    let shell = Shell::new(cluster);
    shell.run("kubectl apply -f kilo-k3s-flannel.yaml", "");
    settled(cluster, [("node-a", "kilo"), ("node-b", "kilo")]);
    let before = kilos_pods(cluster);

    let [prepare, label, finish] = &blocks("How")[..] else {
        panic!("the guide has other steps");
    };
    shell.run(prepare, "");
    // Time for the controllers to do something wrong.
    let watched = Instant::now();
    while watched.elapsed() < Duration::from_secs(3) {
        assert_eq!(kilos_pods(cluster), before, "Kilo's pods are left alone");
        std::thread::sleep(Duration::from_millis(200));
    }
    settled(cluster, [("node-a", "kilo"), ("node-b", "kilo")]);

    shell.run(label, "node-a");
    settled(cluster, [("node-a", "selvedge"), ("node-b", "kilo")]);
    kilo_checks_in_under_the_policies(cluster);
    shell.run(label, "node-b");
    settled(cluster, [("node-a", "selvedge"), ("node-b", "selvedge")]);
    shell.run(finish, "");
    settled(cluster, [("node-a", "selvedge"), ("node-b", "selvedge")]);
    let binding = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/selvedge-kilo";
    assert!(
        cluster.api().get(binding).is_err(),
        "Kilo lost its permission"
    );
}

/// The Kilo that is left writes its annotations, while another account with its rights on Nodes cannot.
fn kilo_checks_in_under_the_policies(cluster: &Cluster) {
    let pods = cluster
        .api()
        .get(&format!("{PODS}?labelSelector=app.kubernetes.io/name=kilo"));
    let pods = pods.unwrap();
    let mut pods = pods["items"].as_array().unwrap().iter();
    let pod = pods
        .find(|pod| pod["spec"]["nodeName"] == "node-b")
        .unwrap();
    let kilo = cluster.bound("kube-system", "kilo", pod);
    cluster.wait_for_admission().unwrap();
    let check_in = annotations(&json!({"kilo.squat.ai/last-seen": "1", "kilo.squat.ai/key": KEY}));
    assert_eq!(
        patch(&kilo, "/api/v1/nodes/node-b", &check_in),
        (200, String::new())
    );
    let kubelet = cluster.kubelet_of_node_b();
    assert_eq!(
        patch(&kubelet, "/api/v1/nodes/node-b", &check_in).0,
        200,
        "no change"
    );
    let other = annotations(&json!({"kilo.squat.ai/last-seen": "2"}));
    assert_eq!(patch(&kubelet, "/api/v1/nodes/node-b", &other).0, 403);
}

/// Where an operator types: `kubectl` speaks to the cluster, and the files lie where the guide has them.
struct Shell<'a> {
    cluster: &'a Cluster,
    directory: std::path::PathBuf,
}

impl<'a> Shell<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let directory = cluster.files.path().join("operator");
        std::fs::create_dir(&directory).unwrap();
        symlink(
            concat!(env!("CARGO_MANIFEST_DIR"), "/deploy"),
            directory.join("deploy"),
        )
        .unwrap();
        std::fs::write(directory.join("kilo-k3s-flannel.yaml"), KILO).unwrap();
        let kubectl = directory.join("kubectl");
        let text = format!(
            "#!/bin/sh\nexec {} kubectl --kubeconfig {} \"$@\"\n",
            program("labcp").unwrap().display(),
            cluster.plane.kubeconfig_path("admin").display()
        );
        std::fs::write(&kubectl, text).unwrap();
        std::fs::set_permissions(&kubectl, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { cluster, directory }
    }

    /// Runs commands as they stand in the guide; each must succeed.
    fn run(&self, commands: &str, node: &str) {
        let mut command = Command::new("timeout");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(["120", "sh", "-ec", commands])
            .current_dir(&self.directory)
            .env("PATH", format!("{}:{path}", self.directory.display()))
            .env("NODE", node);
        let output = self.cluster.node.output(command).unwrap();
        assert!(
            output.status.success(),
            "{commands}{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
