//! What was refused of the cluster's objects, and why: the material of Events, metrics and log lines.

use std::fmt;

use crate::text::quote;
use crate::topology::NodeName;

/// The object that holds a refused value.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Object {
    /// A Node.
    Node(NodeName),
    /// A `peers.kilo.squat.ai` object, by name.
    Peer(String),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(NodeName(name)) => write!(f, "node {}", quote(name)),
            Self::Peer(name) => write!(f, "peer {}", quote(name)),
        }
    }
}

/// A value that is not used. It costs the field it stands in, or its object where the object is
/// nothing without it, and never another object.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Rejected {
    /// Where it stands.
    pub object: Object,
    /// The annotation's key, or the field's path in the object.
    pub field: &'static str,
    /// The value, escaped and cut to 256 bytes; never a secret.
    pub value: String,
    /// Why it is refused: a clause without a full stop.
    pub reason: String,
}

impl Rejected {
    /// Describes a refused `value`, which may be hostile text.
    pub fn new(
        object: Object,
        field: &'static str,
        value: &str,
        reason: impl fmt::Display,
    ) -> Self {
        Self {
            object,
            field,
            value: quote(value),
            reason: reason.to_string(),
        }
    }
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} \"{}\" is refused: {}",
            self.object, self.field, self.value, self.reason
        )
    }
}

/// Collects what is refused of one object while it is read.
#[derive(Debug)]
pub(super) struct Refusals {
    object: Object,
    rejected: Vec<Rejected>,
}

impl Refusals {
    /// Nothing is refused yet.
    pub(super) const fn new(object: Object) -> Self {
        Self {
            object,
            rejected: Vec::new(),
        }
    }

    /// Notes that the `value` of `field` is refused.
    pub(super) fn add(&mut self, field: &'static str, value: &str, reason: impl fmt::Display) {
        let rejected = Rejected::new(self.object.clone(), field, value, reason);
        self.rejected.push(rejected);
    }

    /// Takes what was read from the `value` of `field`, or notes why it could not be read.
    pub(super) fn take<T>(
        &mut self,
        field: &'static str,
        value: &str,
        read: Result<T, impl fmt::Display>,
    ) -> Option<T> {
        read.map_err(|reason| self.add(field, value, reason)).ok()
    }

    /// All that was refused, in order of reading.
    pub(super) fn into_rejected(self) -> Vec<Rejected> {
        self.rejected
    }
}
