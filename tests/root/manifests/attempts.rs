//! Attempts on the mesh's annotations with the tokens that a node has, on a real API server: its agent's,
//! its kubelet's, flannel's, Kilo's. Each refusal stands beside a control: the same write, or the honest
//! form of it, by the party whose it is. A table is printed (`--nocapture`).
//!
//! Installed into a namespace of its own, so that no name of a namespace is relied on.

use super::*;

mod agents;
mod ledger;
mod others;

const NODE_A: &str = "/api/v1/nodes/node-a";
const NODE_B: &str = "/api/v1/nodes/node-b";
const STATUS_A: &str = "/api/v1/nodes/node-a/status";
const STATUS_B: &str = "/api/v1/nodes/node-b/status";
const MERGE: &str = "application/merge-patch+json";
const NAMESPACE: &str = "mesh-system";

/// A party, with what it authenticates with.
#[derive(Clone, Copy)]
struct Party<'a> {
    name: &'a str,
    client: &'a Client,
}

/// A write.
#[derive(Clone)]
struct Write {
    method: &'static str,
    path: String,
    content_type: &'static str,
    body: Value,
}

fn change(path: &str, body: Value) -> Write {
    Write {
        method: "PATCH",
        path: path.to_owned(),
        content_type: MERGE,
        body,
    }
}

/// Sets annotations as the agents do.
fn annotate(path: &str, entries: Value) -> Write {
    change(
        &format!("{path}?fieldManager=selvedge"),
        annotations(&entries),
    )
}

fn create(collection: &str, body: Value) -> Write {
    Write {
        method: "POST",
        path: collection.to_owned(),
        content_type: "application/json",
        body,
    }
}

/// What was tried and what came of it.
#[derive(Default)]
struct Table {
    rows: Vec<String>,
    refusals: usize,
    wrong: usize,
}

impl Table {
    /// A write that a policy must refuse; where several do (`a/b`), the server names any of them.
    fn refused(&mut self, what: &str, party: Party<'_>, policy: &str, write: &Write) {
        let (code, message) = send(party, write);
        let named =
            |policy| message.contains(&format!("ValidatingAdmissionPolicy 'selvedge-{policy}'"));
        let right = code == 403 && policy.split('/').any(named);
        self.refusals += 1;
        self.row(what, party, &format!("403 {policy}"), code, &message, right);
    }

    /// A write that must pass.
    fn allowed(&mut self, what: &str, party: Party<'_>, write: &Write) {
        let (code, message) = send(party, write);
        let right = (200..300).contains(&code);
        self.row(
            &format!("  control: {what}"),
            party,
            "2xx",
            code,
            &message,
            right,
        );
    }

    fn row(
        &mut self,
        what: &str,
        party: Party<'_>,
        expected: &str,
        code: u16,
        message: &str,
        right: bool,
    ) {
        let reason = message.split("denied request: ").last().unwrap_or_default();
        let reason: String = reason.chars().take(110).collect();
        let verdict = if right { "  " } else { "!!" };
        self.wrong += usize::from(!right);
        let name = party.name;
        self.rows.push(format!(
            "{verdict} {what:<66} {name:<20} {expected:<25} {code} {reason}"
        ));
    }
}

fn send(party: Party<'_>, write: &Write) -> (u16, String) {
    let Write {
        method,
        path,
        content_type,
        body,
    } = write;
    let (code, answer) = party
        .client
        .request(method, path, content_type, Some(body))
        .unwrap();
    let message = answer["message"].as_str().unwrap_or_default();
    (code, message.to_owned())
}

/// A time some seconds from now as the ledger has it.
fn time(offset: i64) -> String {
    let now = k8s_openapi::jiff::Timestamp::now().as_second();
    let time = k8s_openapi::jiff::Timestamp::from_second(now + offset);
    time.unwrap().to_string()
}

/// Selvedge in a namespace of its own, by an overlay as its users write them.
fn elsewhere() -> Cluster {
    let mut cluster = Cluster::empty("attempts").unwrap();
    cluster.namespace = NAMESPACE;
    let overlay = cluster.files.path().join("overlay");
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    for part in ["base", "k3s"] {
        std::fs::create_dir_all(overlay.join(part)).unwrap();
        for file in std::fs::read_dir(deploy.join(part)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), overlay.join(part).join(file.file_name())).unwrap();
        }
    }
    let text = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: {NAMESPACE}\nresources: [k3s]\n"
    );
    std::fs::write(overlay.join("kustomization.yaml"), text).unwrap();
    cluster.kubectl(&["create", "namespace", NAMESPACE]);
    cluster
        .install(&["apply", "-k", overlay.to_str().unwrap()])
        .unwrap();
    cluster
}

/// Another service account with rights on Nodes, and the token of its pod on a node.
fn account(cluster: &Cluster, name: &str, resource: &str, node: &str) -> Client {
    let subject = format!("{NAMESPACE}:{name}");
    cluster.kubectl(&["-n", NAMESPACE, "create", "serviceaccount", name]);
    let verbs = "--verb=get,list,watch,patch,update";
    cluster.kubectl(&[
        "create",
        "clusterrole",
        name,
        verbs,
        &format!("--resource={resource}"),
    ]);
    let role = format!("--clusterrole={name}");
    cluster.kubectl(&[
        "create",
        "clusterrolebinding",
        name,
        &role,
        &format!("--serviceaccount={subject}"),
    ]);
    let pod = cluster.api().create(
        &format!("/api/v1/namespaces/{NAMESPACE}/pods"),
        &json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {"serviceAccountName": name, "nodeName": node,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": name, "image": name}]},
        }),
    );
    cluster.bound(NAMESPACE, name, &pod.unwrap())
}

/// All identities that take part.
struct Parties {
    admin: Client,
    agent_a: Client,
    agent_b: Client,
    kubelet: Client,
    flannel: Client,
    kilo: Client,
    operator: Client,
    cloud: Client,
    loose: Client,
}

impl Parties {
    fn new(cluster: &Cluster) -> Self {
        let operator = account(cluster, "gitops", "nodes", "node-a");
        cluster.kubectl(&[
            "create",
            "clusterrolebinding",
            "gitops-manages",
            "--clusterrole=selvedge-operator",
            &format!("--serviceaccount={NAMESPACE}:gitops"),
        ]);
        let token = cluster.plane.token(NAMESPACE, "selvedge").unwrap();
        Self {
            admin: cluster.api().clone(),
            agent_a: cluster.agent_of("node-a"),
            agent_b: cluster.agent_of("node-b"),
            kubelet: cluster.kubelet_of_node_b(),
            flannel: account(cluster, "flannel", "nodes/status", "node-a"),
            kilo: account(cluster, "kilo", "nodes", "node-a"),
            operator,
            cloud: account(cluster, "cloud-controllers", "nodes,nodes/status", "node-a"),
            loose: cluster.api().with_token(&token),
        }
    }
}

#[test]
fn a_node_speaks_for_itself_only_whatever_token_it_uses() {
    let cluster = elsewhere();
    let all = Parties::new(&cluster);
    let mut table = Table::default();

    agents::agents(&mut table, &all);
    agents::marks(&mut table, &all);
    ledger::ledgers(&mut table, &all, &cluster);
    others::kubelets(&mut table, &all);
    others::strangers(&mut table, &all);
    others::kilo(&mut table, &all, &cluster);
    agents::events(&mut table, &all);
    others::another_label(&mut table, &all, &cluster);
    doctor_names_what_is_missing(&cluster);

    let Table {
        rows,
        refusals,
        wrong,
    } = table;
    println!(
        "{}\n{refusals} attempts, {} controls",
        rows.join("\n"),
        rows.len() - refusals
    );
    assert_eq!(wrong, 0, "rows with !! went wrong");
    assert!(refusals >= 30, "{refusals}");
}

/// With the rights of an agent, `doctor` says which policies are not in force, and none while all are.
fn doctor_names_what_is_missing(cluster: &Cluster) {
    let kubeconfig = cluster.files.path().join("agent.kubeconfig");
    let text = cluster
        .plane
        .kubeconfig(&cluster.agents_token("node-a"), NAMESPACE);
    std::fs::write(&kubeconfig, text.unwrap()).unwrap();
    let doctor = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
        command.arg("doctor").arg("--kubeconfig").arg(&kubeconfig);
        let output = cluster.node.output(command).unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let found = doctor();
    assert!(found.contains("(answers)"), "{found}");
    assert!(!found.contains("admission polic"), "{found}");

    let api = cluster.api();
    let map = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/selvedge-networks");
    api.delete(&map).unwrap();
    let found = doctor();
    for policy in ["selvedge-peers", "selvedge-region"] {
        let gap = format!("the admission policy {policy} lacks its ConfigMap");
        assert!(found.contains(&gap), "{found}");
    }

    let registration = "/apis/admissionregistration.k8s.io/v1";
    let delete = |path: &str| api.delete(&format!("{registration}/{path}")).unwrap();
    delete("validatingadmissionpolicies/selvedge-events");
    delete("validatingadmissionpolicybindings/selvedge-region");
    let audit = json!({"spec": {"validationActions": ["Audit"]}});
    let peers = "validatingadmissionpolicybindings/selvedge-peers";
    api.merge(&format!("{registration}/{peers}"), &audit)
        .unwrap();
    let found = doctor();
    for gap in [
        "selvedge-events is missing",
        "selvedge-region has no binding",
        "selvedge-peers has a binding that denies nothing",
    ] {
        assert!(
            found.contains(&format!("the admission policy {gap}")),
            "{found}"
        );
    }
    assert!(found.contains("Apply the manifest again"), "{found}");
    assert!(!found.contains("selvedge-own-node"), "{found}");
}

macro_rules! parties {
    ($all:expr; $($name:ident = $label:literal),* $(,)?) => {
        $(let $name = Party { name: $label, client: &$all.$name };)*
    };
}

use parties;
