//! The API server: Node objects, what agents write to them, and every version that a watch may still show.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use selvedge::cluster::{ParseSettings, annotation, node};
use selvedge::topology::{Node, NodeName, Snapshot};
use serde_json::{Value, json};

use super::network::Place;

/// The objects, and their versions.
pub(crate) struct Api {
    objects: BTreeMap<String, Value>,
    nodes: BTreeMap<NodeName, Node>,
    /// When each version began, the oldest first.
    versions: Vec<(Instant, Arc<Snapshot>)>,
    /// The last version that an agent did not cause.
    pub(crate) caused: usize,
    pub(crate) is_up: bool,
}

impl Api {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            objects: BTreeMap::new(),
            nodes: BTreeMap::new(),
            versions: vec![(now, Arc::default())],
            caused: 0,
            is_up: true,
        }
    }

    /// The number of the latest version.
    pub(crate) fn latest(&self) -> usize {
        self.versions.len() - 1
    }

    /// When a version began, and what it holds.
    pub(crate) fn version(&self, number: usize) -> Option<&(Instant, Arc<Snapshot>)> {
        self.versions.get(number)
    }

    pub(crate) fn nodes(&self) -> &BTreeMap<NodeName, Node> {
        &self.nodes
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.objects.contains_key(name)
    }

    /// A kubelet registers its Node, and flannel writes its lease. Annotations of an earlier run stay.
    pub(crate) fn register(&mut self, now: Instant, name: &str, number: u8, place: Place) {
        let mut addresses = vec![json!({"type": "InternalIP", "address": place.address})];
        if let Some(public) = place.public {
            addresses.push(json!({"type": "ExternalIP", "address": public}));
        }
        let mut annotations = self
            .objects
            .get(name)
            .and_then(|object| object["metadata"]["annotations"].as_object().cloned())
            .unwrap_or_default();
        for (key, value) in [
            (
                "backend-data",
                format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:{number:02x}\"}}"),
            ),
            ("backend-type", "vxlan".to_owned()),
            ("kube-subnet-manager", "true".to_owned()),
            ("public-ip", place.address.to_string()),
        ] {
            annotations.insert(format!("flannel.alpha.coreos.com/{key}"), json!(value));
        }
        let object = json!({
            "metadata": {
                "name": name,
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"topology.kubernetes.io/region": region_name(place.region)},
                "annotations": annotations,
            },
            "spec": {"podCIDRs": [format!("10.42.{number}.0/24")]},
            "status": {
                "addresses": addresses,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        self.objects.insert(name.to_owned(), object);
        self.parse(name);
        self.commit(now, true);
    }

    pub(crate) fn delete(&mut self, now: Instant, name: &str) {
        self.objects.remove(name);
        self.nodes.remove(&NodeName(name.to_owned()));
        self.commit(now, true);
    }

    pub(crate) fn set_ready(&mut self, now: Instant, name: &str, ready: bool) {
        let Some(object) = self.objects.get_mut(name) else {
            return;
        };
        let status = json!(if ready { "True" } else { "False" });
        let condition = &mut object["status"]["conditions"][0]["status"];
        if *condition != status {
            *condition = status;
            self.parse(name);
            self.commit(now, true);
        }
    }

    /// Writes what an agent publishes; true if that changes its Node.
    pub(crate) fn publish(
        &mut self,
        now: Instant,
        name: &str,
        published: &BTreeMap<&'static str, String>,
    ) -> bool {
        let Some(object) = self.objects.get_mut(name) else {
            return false;
        };
        let annotations = object["metadata"]["annotations"]
            .as_object_mut()
            .expect("an object");
        let is_same = annotation::PUBLISHED.iter().all(|key| {
            annotations.get(*key).and_then(Value::as_str) == published.get(key).map(String::as_str)
        });
        if is_same {
            return false;
        }
        annotations.retain(|key, _| !annotation::PUBLISHED.contains(&&**key));
        for (key, value) in published {
            annotations.insert((*key).to_owned(), json!(value));
        }
        self.parse(name);
        self.commit(now, false);
        true
    }

    fn parse(&mut self, name: &str) {
        let object = serde_json::from_value(self.objects[name].clone()).expect("a Node");
        let (node, _) = node::parse(&object, &ParseSettings::default());
        let node = node.expect("it has a name");
        self.nodes.insert(node.name.clone(), node);
    }

    fn commit(&mut self, now: Instant, is_cause: bool) {
        let snapshot = Snapshot {
            nodes: self.nodes.clone(),
            ..Snapshot::default()
        };
        self.versions.push((now, Arc::new(snapshot)));
        if is_cause {
            self.caused = self.latest();
        }
    }
}

/// The name of a region.
pub(crate) fn region_name(region: usize) -> String {
    format!("r{region}")
}
