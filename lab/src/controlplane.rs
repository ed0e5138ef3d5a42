//! A real Kubernetes control plane: etcd, kube-apiserver with RBAC, controller manager, scheduler
//! and kube-proxy, all in the one binary `labcp` that `lab/build.sh` makes.
//!
//! There is no kubelet: nodes are registered by the lab, and so is their status.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::client::Client;
use crate::family::{Family, Inner};
use crate::flannel::nth;
use crate::node::Node;
use crate::pki::Pki;
use crate::process::{Process, wait_for};

/// The pods' IPv4 addresses, as in k3s.
pub const POD_NETWORK: &str = Family::V4.pod_network();

/// The service `kubernetes`, of the cluster's primary family.
#[must_use]
pub fn kubernetes_service(primary: Family) -> IpAddr {
    let network = primary.service_network().parse();
    nth(network.expect("a constant that is a network"), 1)
}

/// How a control plane is reached, and what it hands out.
#[derive(Clone, Debug)]
pub struct Reach {
    /// The address under which all others reach the API server.
    pub public: IpAddr,
    /// What the service `kubernetes` stands for: an address of the primary family.
    pub advertised: IpAddr,
    /// The families of pods and services, the primary one first.
    pub families: Vec<Family>,
}

impl Reach {
    fn join(&self, part: impl Fn(Family) -> &'static str) -> String {
        let parts: Vec<_> = self.families.iter().map(|family| part(*family)).collect();
        parts.join(",")
    }

    fn pod_networks(&self) -> String {
        self.join(Family::pod_network)
    }

    fn primary(&self) -> Family {
        Family::of(self.advertised)
    }
}

impl From<Ipv4Addr> for Reach {
    fn from(address: Ipv4Addr) -> Self {
        Self {
            public: address.into(),
            advertised: address.into(),
            families: Inner::V4.families(Family::V4),
        }
    }
}

const PORT: u16 = 6443;

/// Metadata of every request but those of the control plane's own parts.
const AUDIT_POLICY: &str = r#"apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  users: [system:apiserver, system:kube-controller-manager, system:kube-scheduler]
- level: None
  userGroups: [system:serviceaccounts:kube-system]
  verbs: [get, list, watch]
- level: Metadata
"#;

/// A control plane that runs on a node; stopped when the value is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    // Declared in the order in which they must end.
    scheduler: Option<Process>,
    controllers: Option<Process>,
    apiserver: Option<Process>,
    etcd: Option<Process>,
    directory: PathBuf,
    url: String,
    reach: Reach,
    pki: Pki,
    admin: Client,
}

/// Where `lab/build.sh` puts its programs, with the program's name appended.
///
/// # Errors
///
/// When it is not there; the error says how to build it.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let cache = match std::env::var_os("SELVEDGE_CACHE") {
        Some(directory) => PathBuf::from(directory),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?)
            .join(".cache/selvedge"),
    };
    let path = cache.join("bin").join(name);
    if !path.exists() {
        bail!(
            "{} is missing: run lab/build.sh, which needs Go and takes a few minutes",
            path.display()
        );
    }
    Ok(path)
}

impl ControlPlane {
    /// Starts all parts on `node` and waits until the API server is ready (three to four seconds
    /// on two idle cores); all others reach it as `reach` says.
    ///
    /// # Errors
    ///
    /// When the binary is missing or a part exits; the error carries the end of its log.
    pub fn start(node: &Node, reach: impl Into<Reach>, directory: &Path) -> anyhow::Result<Self> {
        let reach = reach.into();
        fs::create_dir_all(directory)?;
        let labcp = program("labcp")?;
        let pki = Pki::create(
            &directory.join("pki"),
            &[
                "localhost",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "127.0.0.1",
                &kubernetes_service(reach.primary()).to_string(),
                &reach.public.to_string(),
                &reach.advertised.to_string(),
            ],
        )?;
        let tokens = [
            ("admin", "system:masters"),
            ("system:kube-controller-manager", ""),
            ("system:kube-scheduler", ""),
            ("system:kube-proxy", ""),
            ("system:node:node-b", "system:nodes"),
        ]
        .map(|(user, group)| (user, group, secret()));
        let table: String = tokens
            .iter()
            .map(|(user, group, token)| format!("{token},{user},{user},\"{group}\"\n"))
            .collect();
        let token_file = directory.join("tokens.csv");
        fs::write(&token_file, table)?;
        let audit_policy = directory.join("audit-policy.yaml");
        fs::write(&audit_policy, AUDIT_POLICY)?;

        let local = SocketAddr::from(([127, 0, 0, 1], PORT));
        let admin = Client::new(&node.namespace().path(), local, &pki.ca, &tokens[0].2)?;
        let mut plane = Self {
            scheduler: None,
            controllers: None,
            apiserver: None,
            etcd: None,
            directory: directory.to_owned(),
            url: format!("https://{}", SocketAddr::new(reach.public, PORT)),
            reach,
            pki,
            admin,
        };
        for (user, _, token) in &tokens {
            fs::write(
                plane.kubeconfig_path(user),
                plane.kubeconfig(token, "default")?,
            )?;
        }

        let start = |part: &str, flags: &[String]| {
            let mut command = Command::new(&labcp);
            command.arg(part).args(flags);
            node.spawn(part, command)
        };
        plane.etcd = Some(start("etcd", &etcd_flags(directory))?);
        plane.apiserver = Some(start(
            "kube-apiserver",
            &apiserver_flags(directory, &plane.pki, &plane.reach),
        )?);
        plane.wait_ready(node)?;
        plane.controllers = Some(start("kube-controller-manager", &plane.controller_flags())?);
        plane.scheduler = Some(start("kube-scheduler", &plane.scheduler_flags())?);
        Ok(plane)
    }

    /// A client with all rights, connecting from the master.
    #[must_use]
    pub fn admin(&self) -> &Client {
        &self.admin
    }

    /// The kubeconfig of `admin`, `system:kube-proxy`, …, by the public address.
    #[must_use]
    pub fn kubeconfig_path(&self, user: &str) -> PathBuf {
        self.directory
            .join(format!("{}.kubeconfig", user.replace("system:", "")))
    }

    /// The authority's certificate.
    #[must_use]
    pub fn authority(&self) -> &Path {
        &self.pki.ca
    }

    /// A real token of a service account, good for a day.
    ///
    /// # Errors
    ///
    /// When there is no such account.
    pub fn token(&self, namespace: &str, account: &str) -> anyhow::Result<String> {
        self.bound_token(namespace, account, &Value::Null)
    }

    /// The same, bound to an object (`apiVersion`, `kind`, `name`, `uid`) as a pod's token is.
    ///
    /// # Errors
    ///
    /// When there is no such account or object.
    pub fn bound_token(
        &self,
        namespace: &str,
        account: &str,
        object: &Value,
    ) -> anyhow::Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": 86400, "boundObjectRef": object},
        });
        let answer = self.admin.create(&path, &request)?;
        let token = answer["status"]["token"].as_str();
        Ok(token.context("an answer without a token")?.to_owned())
    }

    /// A kubeconfig's text for this server and a token.
    ///
    /// # Errors
    ///
    /// When the authority's certificate cannot be read.
    pub fn kubeconfig(&self, token: &str, namespace: &str) -> anyhow::Result<String> {
        // JSON is YAML, and kubeconfigs name the certificate by file as well as by content.
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {
                "server": self.url, "certificate-authority": self.pki.ca}}],
            "users": [{"name": "lab", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {
                "cluster": "lab", "user": "lab", "namespace": namespace}}],
        });
        Ok(serde_json::to_string_pretty(&config)?)
    }

    /// Every request that the audit log has recorded so far, one JSON value each.
    ///
    /// # Errors
    ///
    /// When the log cannot be read.
    pub fn audit(&self) -> anyhow::Result<Vec<Value>> {
        let text = fs::read_to_string(self.directory.join("audit.log"))?;
        // The last line may be half written.
        Ok(text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect())
    }

    /// Starts kube-proxy on a node; `mode` is `iptables` or `nftables`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn kube_proxy(&self, node: &Node, mode: &str, path: &str) -> anyhow::Result<Process> {
        let mut command = Command::new(program("labcp")?);
        command
            .env("PATH", path)
            .arg("kube-proxy")
            .arg(format!("--proxy-mode={mode}"))
            .arg(format!("--cluster-cidr={}", self.reach.pod_networks()))
            .arg(format!("--hostname-override={}", node.name()))
            .arg("--kubeconfig")
            .arg(self.kubeconfig_path("system:kube-proxy"))
            // These are not a namespace's to change.
            .args(["--conntrack-max-per-core=0", "--conntrack-min=0"])
            .arg("--conntrack-tcp-timeout-established=0")
            .arg("--conntrack-tcp-timeout-close-wait=0");
        node.spawn("kube-proxy", command)
    }

    /// Stops the API server in its tracks, so that connections stand and nothing answers; or lets it
    /// go on.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        if let Some(apiserver) = &self.apiserver {
            apiserver.signal(signal);
        }
    }

    /// Leaves all parts running when the value is dropped.
    pub fn keep(&mut self) {
        let parts = [
            &mut self.scheduler,
            &mut self.controllers,
            &mut self.apiserver,
            &mut self.etcd,
        ];
        parts.into_iter().flatten().for_each(Process::keep);
    }

    fn wait_ready(&mut self, node: &Node) -> anyhow::Result<()> {
        let Self {
            apiserver, admin, ..
        } = self;
        let mut gone = false;
        let outcome = wait_for("the API server", Duration::from_secs(180), || {
            gone = apiserver
                .as_mut()
                .is_none_or(|process| process.ended().is_some());
            gone || admin.ready()
        });
        if gone || outcome.is_err() {
            let log = fs::read_to_string(node.log("kube-apiserver")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(8)..].join("\n");
            bail!("kube-apiserver did not become ready; the end of its log:\n{tail}");
        }
        Ok(())
    }

    fn controller_flags(&self) -> Vec<String> {
        vec![
            format!(
                "--kubeconfig={}",
                self.kubeconfig_path("kube-controller-manager").display()
            ),
            "--bind-address=127.0.0.1".to_owned(),
            "--leader-elect=false".to_owned(),
            "--allocate-node-cidrs".to_owned(),
            format!("--cluster-cidr={}", self.reach.pod_networks()),
            "--kube-api-qps=300".to_owned(),
            "--kube-api-burst=500".to_owned(),
            format!("--root-ca-file={}", self.pki.ca.display()),
            format!(
                "--service-account-private-key-file={}",
                self.pki.service_account.display()
            ),
            // No kubelet sends heartbeats, so every node would be tainted as unreachable.
            "--controllers=*,-node-lifecycle-controller".to_owned(),
            "--use-service-account-credentials".to_owned(),
        ]
    }

    fn scheduler_flags(&self) -> Vec<String> {
        vec![
            format!(
                "--kubeconfig={}",
                self.kubeconfig_path("kube-scheduler").display()
            ),
            "--bind-address=127.0.0.1".to_owned(),
            "--leader-elect=false".to_owned(),
        ]
    }
}

fn etcd_flags(directory: &Path) -> Vec<String> {
    vec![
        "--name=lab".to_owned(),
        format!("--data-dir={}", directory.join("etcd").display()),
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
        "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
        "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
        "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        "--initial-advertise-peer-urls=http://127.0.0.1:2380".to_owned(),
        "--initial-cluster=lab=http://127.0.0.1:2380".to_owned(),
    ]
}

fn apiserver_flags(directory: &Path, pki: &Pki, reach: &Reach) -> Vec<String> {
    let file = |name: &str| directory.join(name).display().to_string();
    // The second takes IPv4 as well.
    let all_v4 = reach.public.is_ipv4() && reach.advertised.is_ipv4();
    let bind = if all_v4 { "0.0.0.0" } else { "::" };
    vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--bind-address={bind}"),
        format!("--advertise-address={}", reach.advertised),
        format!("--secure-port={PORT}"),
        format!("--tls-cert-file={}", pki.certificate.display()),
        format!("--tls-private-key-file={}", pki.key.display()),
        format!("--client-ca-file={}", pki.ca.display()),
        format!("--token-auth-file={}", file("tokens.csv")),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        format!(
            "--service-account-key-file={}",
            pki.service_account_public.display()
        ),
        format!(
            "--service-account-signing-key-file={}",
            pki.service_account.display()
        ),
        format!(
            "--service-cluster-ip-range={}",
            reach.join(Family::service_network)
        ),
        "--allow-privileged".to_owned(),
        // As for aliases; nodes of most labs have no ExternalIP.
        "--kubelet-preferred-address-types=ExternalIP,InternalIP".to_owned(),
        format!("--audit-policy-file={}", file("audit-policy.yaml")),
        format!("--audit-log-path={}", file("audit.log")),
        "--shutdown-delay-duration=0s".to_owned(),
    ]
}

fn secret() -> String {
    format!("{:032x}", rand::random::<u128>())
}
