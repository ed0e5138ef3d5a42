//! What the manifests of `deploy/` say of the agent. What an API server makes of them is in `tests/root/manifests`.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests run the program and fail by panicking"
)]

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

#[test]
fn the_agent_gets_net_admin_and_nothing_else_of_the_host() {
    for overlay in ["k3s", "kubeadm"] {
        let daemonset = object(overlay, "DaemonSet");
        let pod = &daemonset["spec"]["template"]["spec"];
        assert_eq!(pod["priorityClassName"], "system-node-critical");
        assert_eq!(pod["hostNetwork"], true);
        assert_eq!(pod["hostPID"], Value::Null);
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
            "/var/lib/selvedge/bin",
            "/run/selvedge",
            "/var/run/wireguard",
            "/run/flannel",
            "/var/lib/kilo",
        ];
        if overlay == "k3s" {
            expected.push("/var/lib/rancher/k3s/agent/etc/flannel");
        }
        let units = drop_ins(overlay);
        expected.extend(units.iter().map(String::as_str));
        assert_eq!(mounted, expected);
    }
}

/// The directories in which the boot guard leaves drop-ins.
fn drop_ins(overlay: &str) -> Vec<String> {
    let units: &[&str] = match overlay {
        "k3s" => &["k3s", "k3s-agent"],
        _ => &["kubelet"],
    };
    let directory = |unit| format!("/etc/systemd/system/{unit}.service.d");
    units.iter().map(directory).collect()
}

#[test]
fn the_boot_guard_writes_its_program_and_drop_ins_and_has_no_capability() {
    for overlay in ["k3s", "kubeadm"] {
        let daemonset = object(overlay, "DaemonSet");
        let pod = &daemonset["spec"]["template"]["spec"];
        let [guard] = &pod["initContainers"].as_array().unwrap()[..] else {
            panic!("not one init container: {}", pod["initContainers"]);
        };
        assert_eq!(
            guard["securityContext"],
            json!({
                "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "runAsUser": 0, "runAsGroup": 0, "capabilities": {"drop": ["ALL"]},
            })
        );
        assert_eq!(guard["image"], pod["containers"][0]["image"]);
        let paths = |mounts: &Value| -> Vec<String> {
            let mounts = mounts.as_array().unwrap().iter();
            let paths = mounts.map(|mount| mount["mountPath"].as_str().unwrap().to_owned());
            paths.collect()
        };
        let mut expected = vec!["/var/lib/selvedge/bin".to_owned()];
        expected.extend(drop_ins(overlay));
        assert_eq!(paths(&guard["volumeMounts"]), expected);

        // What root of the host runs at boot is not the agent's to write.
        let agent = &pod["containers"][0]["volumeMounts"];
        let program = agent.as_array().unwrap().iter();
        let mut program = program.filter(|mount| mount["mountPath"] == "/var/lib/selvedge/bin");
        assert_eq!(program.next().unwrap()["readOnly"], true);
        let systemd = paths(agent);
        let systemd = systemd.iter().filter(|path| path.starts_with("/etc"));
        assert_eq!(systemd.count(), 0);
    }
}

#[test]
fn the_boot_guards_command_is_valid() {
    for overlay in ["k3s", "kubeadm"] {
        let daemonset = object(overlay, "DaemonSet");
        let command = daemonset["spec"]["template"]["spec"]["initContainers"][0]["command"].clone();
        let command: Vec<String> = serde_json::from_value(command).unwrap();
        assert_eq!(command[0], "/usr/bin/selvedge");
        let host = tempfile::tempdir().unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_selvedge"))
            .args(&command[1..])
            .arg(format!("--state-dir={}/state", host.path().display()))
            .arg(format!("--systemd-dir={}", host.path().display()))
            .output()
            .unwrap();
        let output_text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        for directory in drop_ins(overlay) {
            let unit = directory.rsplit('/').next().unwrap();
            let path = host.path().join(unit).join("50-selvedge-guard.conf");
            assert!(path.exists() && output_text.contains(unit), "{output_text}");
        }
    }
}

#[test]
fn the_agents_rights_are_these() {
    let role = named("k3s", "ClusterRole", "selvedge");
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
            {"apiGroups": ["selvedge.dev"], "resources": ["nodeannotations"], "verbs": ["publish"]},
            {
                "apiGroups": ["admissionregistration.k8s.io"],
                "resources": ["validatingadmissionpolicies", "validatingadmissionpolicybindings"],
                "resourceNames": selvedge::cluster::policies::NAMES,
                "verbs": ["get"],
            },
            {
                "apiGroups": [""],
                "resources": ["configmaps"],
                "resourceNames": ["selvedge-networks"],
                "verbs": ["get"],
            },
        ])
    );
    // What others can be given says nothing about any other resource.
    for (name, verb) in [
        ("selvedge-operator", "manage"),
        ("selvedge-kilo", "publish-as-kilo"),
    ] {
        assert_eq!(
            named("k3s", "ClusterRole", name)["rules"],
            json!([{"apiGroups": ["selvedge.dev"], "resources": ["nodeannotations"], "verbs": [verb]}])
        );
    }
}

#[test]
fn every_policy_is_bound_looked_for_and_names_no_namespace() {
    for overlay in ["k3s", "kubeadm"] {
        let names = |kind| {
            let all = objects(overlay).filter(|object| object["kind"] == kind);
            all.map(|object| object["metadata"]["name"].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            names("ValidatingAdmissionPolicy"),
            selvedge::cluster::policies::NAMES
        );
        assert_eq!(
            names("ValidatingAdmissionPolicyBinding"),
            selvedge::cluster::policies::NAMES
        );
        for policy in
            objects(overlay).filter(|object| object["kind"] == "ValidatingAdmissionPolicy")
        {
            let spec = policy["spec"].to_string();
            for word in ["kube-system", "kube-flannel", "serviceaccount:"] {
                assert!(
                    !spec.contains(word),
                    "{word} in {}",
                    policy["metadata"]["name"]
                );
            }
        }
    }
}

#[test]
fn the_policy_lets_an_agent_publish_what_it_publishes() {
    let policy = named("k3s", "ValidatingAdmissionPolicy", "selvedge-annotations");
    let variables = policy["spec"]["variables"].as_array().unwrap();
    let owned = variables
        .iter()
        .find(|variable| variable["name"] == "owned");
    let owned = owned.unwrap()["expression"].as_str().unwrap();
    for key in selvedge::cluster::annotation::PUBLISHED {
        assert!(owned.contains(&format!("'{key}'")), "{key}");
    }
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
    let mut objects = objects(overlay).filter(|object| object["kind"] == kind);
    let object = objects.next().unwrap();
    assert!(objects.next().is_none(), "more than one {kind}");
    object
}

/// The object of a kind and a name in the file of an overlay.
fn named(overlay: &str, kind: &str, name: &str) -> Value {
    objects(overlay)
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap()
}

fn objects(overlay: &str) -> impl Iterator<Item = Value> {
    use serde::Deserialize as _;
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("deploy/selvedge-{overlay}.yaml"));
    let text = std::fs::read_to_string(path).unwrap();
    serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap())
        .collect::<Vec<_>>()
        .into_iter()
}
