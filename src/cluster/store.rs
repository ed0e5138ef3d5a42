//! The known state of the cluster: parsed objects from lists and watches. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::conditions::{self, Conditions};
use super::listwatch::Event;
use super::node::{self, NodeObject, ParseSettings};
use super::peer::{self, PeerObject};
use super::{Rejected, annotation};
use crate::topology::{ExternalPeer, Node, NodeName, Snapshot};

/// The Nodes and Peers, and the published annotations of this node's own Node.
#[derive(Debug)]
pub(super) struct Store {
    settings: ParseSettings,
    own: NodeName,
    nodes: Collection<Node>,
    peers: Collection<ExternalPeer>,
}

/// One collection: the known objects, and the list that is being received.
#[derive(Debug)]
struct Collection<T> {
    known: BTreeMap<String, Entry<T>>,
    incoming: BTreeMap<String, Entry<T>>,
    /// Whether the known objects come from the API rather than from the cache.
    live: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry<T> {
    value: Option<T>,
    rejected: Vec<Rejected>,
    uid: String,
    /// The annotations that agents of this product and Kilo's publish; of this node's own Node only.
    published: BTreeMap<String, String>,
    /// The last change of the object, in Unix seconds; of this node's own Node only.
    changed: Option<i64>,
    /// The condition `Accepted`; of Peers only.
    condition: Option<Condition>,
}

impl<T> Collection<T> {
    fn of(cached: impl IntoIterator<Item = (String, T)>) -> Self {
        let entry = |value| Entry {
            value: Some(value),
            rejected: Vec::new(),
            uid: String::new(),
            published: BTreeMap::new(),
            changed: None,
            condition: None,
        };
        Self {
            known: cached
                .into_iter()
                .map(|(name, value)| (name, entry(value)))
                .collect(),
            incoming: BTreeMap::new(),
            live: false,
        }
    }

    fn handle<K>(&mut self, event: Event<K>, read: impl FnOnce(K) -> (String, Entry<T>)) -> bool {
        match event {
            Event::Listing => {
                self.incoming = BTreeMap::new();
                false
            }
            Event::Listed(object) => {
                let (name, entry) = read(object);
                self.incoming.insert(name, entry);
                false
            }
            Event::Complete => {
                self.known = std::mem::take(&mut self.incoming);
                self.live = true;
                true
            }
            Event::Applied(object) => {
                let (name, entry) = read(object);
                self.known.insert(name, entry);
                true
            }
            Event::Deleted(object) => {
                let (name, _) = read(object);
                self.known.remove(&name);
                true
            }
            Event::Absent => {
                self.known = BTreeMap::new();
                self.live = true;
                true
            }
            // Unreadable objects may still exist, so the known ones stay.
            Event::Forbidden(_) => {
                let changed = !self.live;
                self.live = true;
                changed
            }
            Event::Undecodable(_) => false,
        }
    }

    fn rejected(&self) -> impl Iterator<Item = &Rejected> {
        self.known.values().flat_map(|entry| &entry.rejected)
    }
}

impl Store {
    /// A store with the objects of the cache.
    pub(super) fn new(settings: ParseSettings, own: NodeName, cached: &Snapshot) -> Self {
        Self {
            settings,
            own,
            nodes: Collection::of(
                (cached.nodes.iter()).map(|(name, node)| (name.0.clone(), node.clone())),
            ),
            peers: Collection::of(cached.peers.clone()),
        }
    }

    /// Applies an event of the Nodes; returns whether the known state may have changed.
    pub(super) fn handle_node(&mut self, event: Event<NodeObject>) -> bool {
        // Without the right to read Nodes nothing can be learned about the cluster.
        if matches!(event, Event::Forbidden(_) | Event::Absent) {
            return false;
        }
        let Self { settings, own, .. } = self;
        self.nodes.handle(event, |object| {
            let (value, rejected) = node::parse(&object, settings);
            let changed = object
                .metadata
                .managed_fields
                .as_ref()
                .filter(|_| object.metadata.name.as_ref() == Some(&own.0));
            let changed = changed.and_then(|fields| {
                let times = fields.iter().filter_map(|entry| entry.time.as_ref());
                times.map(|time| time.0.as_second()).max()
            });
            let name = object.metadata.name.unwrap_or_default();
            let published = match name == own.0 {
                true => published(object.metadata.annotations.unwrap_or_default()),
                false => BTreeMap::new(),
            };
            let uid = object.metadata.uid.unwrap_or_default();
            (
                name,
                Entry {
                    value,
                    rejected,
                    uid,
                    published,
                    changed,
                    condition: None,
                },
            )
        })
    }

    /// Applies an event of the Peers; returns whether the known state may have changed.
    pub(super) fn handle_peer(&mut self, event: Event<PeerObject>) -> bool {
        self.peers.handle(event, |object| {
            let (value, rejected) = peer::parse(&object);
            let condition = conditions::read(&object.status);
            let name = object.metadata.name.unwrap_or_default();
            let uid = object.metadata.uid.unwrap_or_default();
            (
                name,
                Entry {
                    value,
                    rejected,
                    uid,
                    published: BTreeMap::new(),
                    changed: None,
                    condition,
                },
            )
        })
    }

    /// Whether the Nodes have been listed.
    pub(super) const fn knows_nodes(&self) -> bool {
        self.nodes.live
    }

    /// Whether the Peers have been listed, or are known to be absent or unreadable.
    pub(super) const fn knows_peers(&self) -> bool {
        self.peers.live
    }

    /// The numbers of known Nodes and Peers.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.nodes.known.len(), self.peers.known.len())
    }

    /// All objects that could be parsed.
    pub(super) fn snapshot(&self) -> Snapshot {
        let nodes = self
            .nodes
            .known
            .values()
            .filter_map(|entry| entry.value.clone());
        let peers = self
            .peers
            .known
            .values()
            .filter_map(|entry| entry.value.clone());
        Snapshot {
            nodes: nodes.map(|node| (node.name.clone(), node)).collect(),
            peers: peers.map(|peer| (peer.name.clone(), peer)).collect(),
        }
    }

    /// All refused values.
    pub(super) fn rejected(&self) -> BTreeSet<Rejected> {
        self.nodes
            .rejected()
            .chain(self.peers.rejected())
            .cloned()
            .collect()
    }

    /// The annotations that an agent published on the own Node; `None` before the Nodes are listed, and
    /// where there is no such Node.
    pub(super) fn published(&self) -> Option<&BTreeMap<String, String>> {
        let entry = self
            .nodes
            .known
            .get(&self.own.0)
            .filter(|_| self.nodes.live);
        entry.map(|entry| &entry.published)
    }

    /// The last change of the own Node, in Unix seconds of the API server: the newest time of its
    /// `managedFields`.
    pub(super) fn own_changed(&self) -> Option<i64> {
        self.nodes.known.get(&self.own.0)?.changed
    }

    /// The observed conditions of the Peers; empty before the Peers are listed.
    pub(super) fn conditions(&self) -> Conditions {
        let known = self.peers.known.iter().filter(|_| self.peers.live);
        known
            .map(|(name, entry)| (name.clone(), entry.condition.clone()))
            .collect()
    }

    /// The UID of a Peer object; empty where it is not known.
    pub(super) fn peer_uid(&self, name: &str) -> &str {
        self.peers.known.get(name).map_or("", |entry| &entry.uid)
    }
}

/// Filters a Node's annotations to those that agents write.
fn published(mut annotations: BTreeMap<String, String>) -> BTreeMap<String, String> {
    annotations.retain(|key, _| annotation::PUBLISHED.contains(&key.as_str()));
    annotations
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, annotations: serde_json::Value) -> NodeObject {
        let object = json!({"metadata": {"name": name, "annotations": annotations}});
        serde_json::from_value(object).unwrap()
    }

    fn store() -> Store {
        Store::new(
            ParseSettings::default(),
            NodeName("a1".to_owned()),
            &Snapshot::default(),
        )
    }

    fn names(store: &Store) -> Vec<String> {
        store
            .snapshot()
            .nodes
            .into_keys()
            .map(|name| name.0)
            .collect()
    }

    #[test]
    fn an_unfinished_list_replaces_nothing() {
        let mut store = store();
        store.handle_node(Event::Listing);
        store.handle_node(Event::Listed(node("a1", json!({}))));
        assert!(!store.knows_nodes());
        store.handle_node(Event::Listing);
        store.handle_node(Event::Listed(node("a2", json!({}))));
        assert!(store.handle_node(Event::Complete));
        assert!(store.knows_nodes());
        assert_eq!(names(&store), ["a2"]);
    }

    #[test]
    fn a_new_list_drops_objects_deleted_between_watches() {
        let mut store = store();
        for list in [vec!["a1", "a2"], vec!["a1"]] {
            store.handle_node(Event::Listing);
            for name in list {
                store.handle_node(Event::Listed(node(name, json!({}))));
            }
            store.handle_node(Event::Complete);
        }
        assert_eq!(names(&store), ["a1"]);
    }

    #[test]
    fn only_published_annotations_of_the_own_node_are_kept() {
        let mut store = store();
        assert_eq!(store.published(), None);
        store.handle_node(Event::Listing);
        store.handle_node(Event::Complete);
        assert_eq!(store.published(), None);
        let annotations = json!({
            "kilo.squat.ai/endpoint": "203.0.113.10:51820",
            "kilo.squat.ai/force-endpoint": "203.0.113.10:51820",
            "flannel.alpha.coreos.com/public-ip": "203.0.113.10",
        });
        store.handle_node(Event::Applied(node("a1", annotations)));
        let keys: Vec<_> = store.published().unwrap().keys().collect();
        assert_eq!(keys, ["kilo.squat.ai/endpoint"]);
    }

    #[test]
    fn peers_stay_known_when_reading_them_is_forbidden() {
        let peer = serde_json::from_value(json!({
            "metadata": {"name": "laptop"},
            "spec": {
                "allowedIPs": ["10.5.0.1/32"],
                "publicKey": "jm4PRGy7w2oRx87zEekbUmlJNJ8jB8vTR7ooJdAF10w=",
            },
        }));
        let mut store = store();
        store.handle_peer(Event::Listing);
        store.handle_peer(Event::Listed(peer.unwrap()));
        store.handle_peer(Event::Complete);
        store.handle_peer(Event::Forbidden(String::new()));
        assert_eq!(store.snapshot().peers.len(), 1);
        store.handle_peer(Event::Absent);
        assert_eq!(store.snapshot().peers.len(), 0);
    }
}
