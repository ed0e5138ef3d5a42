//! Refused values of the cluster's objects, with reasons, for Events, metrics and log lines.

use std::fmt;

use crate::text::quote;
use crate::topology::Object;

/// A refused value. Its field is not used, or its whole object where the object needs the field; no
/// other object is affected.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Rejected {
    /// The object that holds the value.
    pub object: Object,
    /// The annotation's key, or the field's path in the object.
    pub field: &'static str,
    /// The value, escaped and cut to 256 bytes; never a secret.
    pub value: String,
    /// Why the value is refused: a clause without a full stop.
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

/// Collects the refused values of one object while it is parsed.
#[derive(Debug)]
pub(super) struct Refusals {
    object: Object,
    rejected: Vec<Rejected>,
}

impl Refusals {
    /// An empty collection.
    pub(super) const fn new(object: Object) -> Self {
        Self {
            object,
            rejected: Vec::new(),
        }
    }

    /// Records that the `value` of `field` is refused.
    pub(super) fn add(&mut self, field: &'static str, value: &str, reason: impl fmt::Display) {
        let rejected = Rejected::new(self.object.clone(), field, value, reason);
        self.rejected.push(rejected);
    }

    /// Unwraps the result of parsing the `value` of `field`, or records the error.
    pub(super) fn take<T>(
        &mut self,
        field: &'static str,
        value: &str,
        read: Result<T, impl fmt::Display>,
    ) -> Option<T> {
        read.map_err(|reason| self.add(field, value, reason)).ok()
    }

    /// All refused values, in order of parsing.
    pub(super) fn into_rejected(self) -> Vec<Rejected> {
        self.rejected
    }
}
