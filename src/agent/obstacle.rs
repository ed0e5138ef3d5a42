//! What keeps this node from its part in the mesh, although its agent does all it can.
//!
//! Each is one sentence that says what to do. It makes the node not ready, and stands in `status`,
//! `doctor` and an Event on the node's own Node.

use std::path::PathBuf;

use crate::cluster::Notice;
use crate::topology::{Excluded, Field, Node, NodeName, Object, Reason, Snapshot, Topology};
use crate::wireguard::key::PublicKey;

/// An obstacle that the operator has to remove.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Obstacle {
    /// What it is about, in the words of an Event; one is reported at a time of each.
    pub field: String,
    /// The sentence.
    pub sentence: String,
}

impl Obstacle {
    /// The notice about it on the Node `own`.
    pub fn report(&self, own: &NodeName) -> Notice {
        Notice {
            object: Object::Node(own.clone()),
            field: self.field.clone(),
            reason: "SelvedgeNotReady",
            note: self.sentence.clone(),
        }
    }
}

/// Whether an exclusion says that this node's own key is another's.
pub fn is_key_taken(excluded: &Excluded, own: &NodeName) -> bool {
    excluded.object == Object::Node(own.clone())
        && excluded.field == Field::Key
        && matches!(excluded.reason, Reason::TakenBy(_))
}

/// The other node that has this node's key, while this node's own Node does not say so yet.
///
/// An agent on a cloned disk learns of it before it has sent anything: its cached state is the other's, too,
/// and says that the key leads a region, perhaps. A handshake with that key would take the other's sessions
/// away, and its timestamp would keep the other from making new ones. So such an agent neither publishes the
/// key nor has any peer.
pub fn holder_of_key(snapshot: &Snapshot, own: &NodeName, key: PublicKey) -> Option<NodeName> {
    let has_it = |node: &&Node| node.has_key(&key);
    let mine = snapshot.nodes.get(own);
    if mine.as_ref().is_some_and(has_it) {
        return None;
    }
    let holder = snapshot.nodes.values().find(has_it)?;
    Some(holder.name.clone())
}

/// Another node has this node's key and claimed it before: the disk is a copy of the other's, most likely.
///
/// `files` hold the key on this node.
pub fn key_taken(
    topology: &Topology,
    holder: Option<NodeName>,
    own: &NodeName,
    files: &[PathBuf],
) -> Option<Obstacle> {
    let taken = |excluded: &Excluded| {
        let Reason::TakenBy(holder) = &excluded.reason else {
            return None;
        };
        is_key_taken(excluded, own).then(|| holder.clone())
    };
    let holder = holder
        .map(Object::Node)
        .or_else(|| topology.excluded.iter().find_map(taken))?;
    let files = files
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>();
    Some(Obstacle {
        field: Field::Key.to_string(),
        sentence: format!(
            "{holder} has the private key of this node and claimed it first, as when a disk was cloned, so this node is left out: stop its agent, run rm -f {} here, and start the agent again, which makes a new key",
            files.join(" ")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ParseSettings, node};

    fn name(text: &str) -> NodeName {
        NodeName(text.to_owned())
    }

    fn topology(reason: Reason) -> Topology {
        Topology {
            excluded: [Excluded {
                object: Object::Node(name("b2")),
                field: Field::Key,
                reason,
            }]
            .into(),
            ..Topology::default()
        }
    }

    #[test]
    fn a_cloned_disk_is_told_with_the_files_and_the_command() {
        let topology = topology(Reason::TakenBy(Object::Node(name("b1"))));
        let files = ["/var/lib/selvedge/key", "/var/lib/kilo/key"].map(PathBuf::from);
        let obstacle = key_taken(&topology, None, &name("b2"), &files).unwrap();
        assert!(obstacle.sentence.starts_with("node b1 has the private key"));
        let command = "rm -f /var/lib/selvedge/key /var/lib/kilo/key";
        assert!(obstacle.sentence.contains(command), "{obstacle:?}");
        assert_eq!(key_taken(&topology, None, &name("b1"), &files), None);

        let early = key_taken(&Topology::default(), Some(name("b1")), &name("b2"), &files);
        assert_eq!(early, Some(obstacle));
    }

    #[test]
    fn a_clone_is_silent_before_it_has_published_its_key() {
        let node = |text: &str, key: Option<u8>| {
            let object = serde_json::json!({"metadata": {"name": text}});
            let object = serde_json::from_value(object).unwrap();
            let (node, _) = node::parse(&object, &ParseSettings::default());
            let public_key = key.map(|key| PublicKey([key; 32]));
            (
                name(text),
                Node {
                    public_key,
                    ..node.unwrap()
                },
            )
        };
        let snapshot = |own| Snapshot {
            nodes: [node("b1", Some(1)), node("b2", own)].into(),
            ..Snapshot::default()
        };
        let holder = |own, key| {
            let key = PublicKey([key; 32]);
            holder_of_key(&snapshot(own), &name("b2"), key)
        };
        assert_eq!(holder(Some(2), 1), Some(name("b1")), "a cloned disk");
        assert_eq!(holder(None, 1), Some(name("b1")), "a cloned machine");
        assert_eq!(holder(Some(2), 2), None);
        assert_eq!(holder(None, 3), None, "a new node");
        // Between two Nodes that both claim the key, the topology decides.
        assert_eq!(holder(Some(1), 1), None);
    }
}
