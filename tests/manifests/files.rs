//! What the files say of the agent, without any API server.

use super::*;

#[test]
fn the_files_people_apply_are_in_step_with_their_overlays() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    for overlay in ["k3s", "kubeadm"] {
        let output = Command::new(program("labcp").unwrap())
            .args(["kubectl", "kustomize"])
            .arg(root.join(overlay))
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{overlay}: {complaint}");
        let file = std::fs::read_to_string(root.join(format!("selvedge-{overlay}.yaml"))).unwrap();
        let rendered = String::from_utf8(output.stdout).unwrap();
        let stored: String = file.split_inclusive('\n').skip(2).collect();
        assert!(
            stored == rendered,
            "run deploy/generate: selvedge-{overlay}.yaml is out of step"
        );
    }
}

#[test]
fn the_agent_gets_net_admin_and_nothing_else_of_the_host() {
    for overlay in ["k3s", "kubeadm"] {
        let daemonset = object(overlay, "DaemonSet");
        let pod = &daemonset["spec"]["template"]["spec"];
        assert_eq!(pod["priorityClassName"], "system-node-critical");
        assert_eq!(pod["hostNetwork"], true);
        assert_eq!(pod["hostPID"], Value::Null);
        assert_eq!(pod["initContainers"], Value::Null);
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );

        let containers = pod["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 1);
        let container = &containers[0];
        assert_eq!(
            container["securityContext"],
            json!({
                "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "runAsUser": 0, "runAsGroup": 0,
                "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            })
        );
        for probe in ["livenessProbe", "readinessProbe"] {
            assert_eq!(container[probe]["httpGet"]["host"], "127.0.0.1", "{probe}");
        }
        assert!(
            container["ports"]
                == json!([{"name": "metrics", "containerPort": 1107, "hostPort": 1107, "hostIP": "127.0.0.1"}]),
            "the host's loopback alone: {}",
            container["ports"]
        );
        assert!(container["resources"]["limits"]["memory"].is_string());
        assert!(container["resources"]["limits"]["cpu"].is_null());

        let mounted: Vec<_> = pod["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|volume| {
                volume["hostPath"]["path"]
                    .as_str()
                    .expect("only paths of the host")
            })
            .collect();
        let mut expected = vec![
            "/dev/net/tun",
            "/var/lib/selvedge",
            "/run/selvedge",
            "/var/run/wireguard",
            "/run/flannel",
            "/var/lib/kilo",
        ];
        if overlay == "k3s" {
            expected.push("/var/lib/rancher/k3s/agent/etc/flannel");
        }
        assert_eq!(mounted, expected);
    }
}

#[test]
fn the_agents_rights_are_these() {
    let role = object("k3s", "ClusterRole");
    assert_eq!(
        role["rules"],
        json!([
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch", "patch"]},
            {"apiGroups": ["kilo.squat.ai"], "resources": ["peers"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": ["kilo.squat.ai"], "resources": ["peers/status"], "verbs": ["patch"]},
            {
                "apiGroups": ["discovery.k8s.io"],
                "resources": ["endpointslices"],
                "resourceNames": ["kubernetes"],
                "verbs": ["list"],
            },
            {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
        ])
    );
}

#[test]
fn the_agents_arguments_are_valid_flags() {
    for overlay in ["k3s", "kubeadm"] {
        let daemonset = object(overlay, "DaemonSet");
        let args = daemonset["spec"]["template"]["spec"]["containers"][0]["args"].clone();
        let mut args: Vec<String> = serde_json::from_value(args).unwrap();
        args.iter_mut()
            .for_each(|arg| *arg = arg.replace("$(NODE_NAME)", "node-a"));
        // A bad value after them is what gets refused, so they themselves were not.
        args.push("--log-level=loud".into());
        let output = Command::new(env!("CARGO_BIN_EXE_selvedge"))
            .arg("agent")
            .args(&args)
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{complaint}");
        assert!(complaint.contains("--log-level \"loud\""), "{complaint}");
    }
}

/// The one object of a kind in the file of an overlay.
fn object(overlay: &str, kind: &str) -> Value {
    use serde::Deserialize as _;
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("deploy/selvedge-{overlay}.yaml"));
    let text = std::fs::read_to_string(path).unwrap();
    let mut objects = serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|object| object["kind"] == kind);
    let object = objects.next().unwrap();
    assert!(objects.next().is_none(), "more than one {kind}");
    object
}
