//! A server to test against, an agent's view of it, and words for what is expected.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt as _;
use selvedge::cluster::{Access, ApiStatus, Cluster, ParseSettings, Sources, Timeouts, View};
use selvedge::topology::NodeName;
use selvedge_lab::api::{Api, Options};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take on a busy machine before the test fails.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const KEY: &str = "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=";

/// An API server, real or not, with a client that may do everything.
pub(crate) struct Server {
    pub(crate) kubeconfig: PathBuf,
    client: kube::Client,
}

impl Server {
    pub(crate) async fn at(kubeconfig: &Path) -> Self {
        let read = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
        let options = kube::config::KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(read, &options);
        Self {
            kubeconfig: kubeconfig.to_owned(),
            client: kube::Client::try_from(config.await.unwrap()).unwrap(),
        }
    }

    /// Sends a request; the status and the body, which is null where it is not JSON.
    pub(crate) async fn request(
        &self,
        method: &str,
        path: &str,
        media_type: &str,
        body: &Value,
    ) -> (u16, Value) {
        let body = match (body.is_null(), body.as_str()) {
            (true, _) => Vec::new(),
            (false, Some(text)) => text.as_bytes().to_vec(),
            (false, None) => body.to_string().into_bytes(),
        };
        let mut request = http::Request::builder().method(method).uri(path);
        if !media_type.is_empty() {
            request = request.header("content-type", media_type);
        }
        let request = request
            .header("accept", "application/json")
            .body(body.into())
            .unwrap();
        let response = tokio::time::timeout(LIMIT, self.client.send(request))
            .await
            .unwrap()
            .unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, body) = self.request("GET", path, "", &Value::Null).await;
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    pub(crate) async fn create(&self, path: &str, object: &Value) -> Value {
        let (status, body) = self.request("POST", path, "application/json", object).await;
        assert_eq!(status, 201, "POST {path}: {body}");
        body
    }

    pub(crate) async fn merge(&self, path: &str, patch: &Value) -> Value {
        let (status, body) = self
            .request("PATCH", path, "application/merge-patch+json", patch)
            .await;
        assert_eq!(status, 200, "PATCH {path}: {body}");
        body
    }

    pub(crate) async fn delete(&self, path: &str) {
        let (status, body) = self.request("DELETE", path, "", &Value::Null).await;
        assert!(matches!(status, 200 | 404), "DELETE {path}: {body}");
    }

    pub(crate) async fn create_node(&self, name: &str, annotations: &Value) {
        self.create("/api/v1/nodes", &node(name, annotations)).await;
    }

    pub(crate) async fn annotate(&self, name: &str, annotations: &Value) {
        let patch = json!({"metadata": {"annotations": annotations}});
        self.merge(&format!("/api/v1/nodes/{name}"), &patch).await;
    }

    pub(crate) async fn annotations(&self, name: &str) -> BTreeMap<String, String> {
        let node = self.get(&format!("/api/v1/nodes/{name}")).await;
        serde_json::from_value(node["metadata"]["annotations"].clone()).unwrap_or_default()
    }

    /// An agent of the Node `own` that reaches this server by its kubeconfig.
    pub(crate) async fn agent(&self, own: &str) -> Agent {
        Agent::start(sources(&self.kubeconfig), own, None).await
    }
}

/// No way to a server but this kubeconfig.
pub(crate) fn sources(kubeconfig: &Path) -> Sources {
    Sources {
        kubeconfig: Some(kubeconfig.to_owned()),
        master: None,
        service_account: PathBuf::from("/nonexistent"),
        local: Vec::new(),
        service: None,
        mark: None,
    }
}

/// A Node as kubelets and the controller manager leave it.
pub(crate) fn node(name: &str, annotations: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "annotations": annotations},
        "status": {
            "addresses": [{"type": "InternalIP", "address": "192.168.50.11"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

pub(crate) fn peer(name: &str, allowed_ips: &[&str]) -> Value {
    json!({
        "apiVersion": "kilo.squat.ai/v1alpha1",
        "kind": "Peer",
        "metadata": {"name": name},
        "spec": {"allowedIPs": allowed_ips, "publicKey": KEY},
    })
}

/// Timeouts of seconds, for tests that make it run out.
pub(crate) fn timeouts() -> Timeouts {
    Timeouts {
        silence: Duration::from_secs(4),
        streamed_list: Duration::from_secs(2),
        second_look: Duration::from_secs(1),
        absent: Duration::from_secs(2),
        between_lists: Duration::from_secs(4),
        policies: Duration::from_millis(500),
    }
}

/// An agent's side of the API.
pub(crate) struct Agent {
    pub(crate) cluster: Cluster,
    views: tokio::sync::watch::Receiver<Option<Arc<View>>>,
}

impl Agent {
    pub(crate) async fn start(sources: Sources, own: &str, cached: Option<View>) -> Self {
        Self::start_with(sources, own, cached, &timeouts()).await
    }

    pub(crate) async fn start_with(
        sources: Sources,
        own: &str,
        cached: Option<View>,
        timeouts: &Timeouts,
    ) -> Self {
        let access = Access::new(sources).await.unwrap();
        let own = NodeName(own.to_owned());
        let cluster = Cluster::start_with(access, own, ParseSettings::default(), cached, timeouts);
        let views = cluster.views();
        Self { cluster, views }
    }

    /// Waits for a view of which `expected` holds.
    pub(crate) async fn expect(
        &mut self,
        what: &str,
        expected: impl Fn(&View) -> bool,
    ) -> Arc<View> {
        let mut views = self.views.clone();
        let wait = views.wait_for(|view| view.as_deref().is_some_and(&expected));
        let found = tokio::time::timeout(LIMIT, wait).await;
        if let Ok(view) = found {
            return view.unwrap().clone().unwrap();
        }
        panic!(
            "never seen: {what}; the last view: {:?}",
            self.views.borrow()
        );
    }

    /// Waits for a view from the API that has exactly these Nodes.
    pub(crate) async fn expect_nodes(&mut self, names: &[&str]) -> Arc<View> {
        self.expect(&format!("nodes {names:?}"), |view| {
            view.live && node_names(view) == names
        })
        .await
    }

    pub(crate) fn view(&self) -> Option<Arc<View>> {
        self.views.borrow().clone()
    }

    pub(crate) async fn expect_api_status(
        &self,
        what: &str,
        expected: impl Fn(&ApiStatus) -> bool,
    ) -> ApiStatus {
        let mut contact = self.cluster.api_status();
        let wait = contact.wait_for(|contact| expected(contact));
        let found = tokio::time::timeout(LIMIT, wait).await;
        found
            .unwrap_or_else(|_| panic!("never: {what}"))
            .unwrap()
            .clone()
    }
}

pub(crate) fn node_names(view: &View) -> Vec<&str> {
    view.snapshot
        .nodes
        .keys()
        .map(|name| name.0.as_str())
        .collect()
}

/// Waits until `check` holds; it is asked ten times a second.
pub(crate) async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let until = tokio::time::Instant::now() + LIMIT;
    while !check().await {
        assert!(tokio::time::Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A stand-in whose administrator and agents are the same user.
pub(crate) struct StandIn {
    pub(crate) api: Api,
    pub(crate) directory: TempDir,
    pub(crate) kubeconfig: PathBuf,
}

impl StandIn {
    pub(crate) fn start() -> Self {
        Self::with(Options {
            bookmarks: Duration::from_secs(1),
            ..Options::default()
        })
    }

    pub(crate) fn with(options: Options) -> Self {
        let token = options.tokens.keys().next().cloned().unwrap_or_default();
        let api = Api::start(options).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let kubeconfig = directory.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig, &token).unwrap();
        Self {
            api,
            directory,
            kubeconfig,
        }
    }

    pub(crate) fn add_nodes(&self, names: &[&str]) {
        for name in names {
            self.api.put(node(name, &json!({}))).unwrap();
        }
    }

    pub(crate) async fn agent(&self, own: &str) -> Agent {
        Agent::start(sources(&self.kubeconfig), own, None).await
    }
}
