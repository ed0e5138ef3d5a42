//! The objects of the stand-in, their versions and the history that watches read. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde_json::{Map, Value, json};

/// How many changes are kept for watches; etcd keeps five minutes.
const HISTORY: usize = 10_000;

/// A resource that is served.
#[derive(Debug, Eq, PartialEq)]
pub struct Kind {
    /// The API group; empty for the core.
    pub group: &'static str,
    /// The version in its group.
    pub version: &'static str,
    /// As in URLs.
    pub plural: &'static str,
    /// As in objects.
    pub kind: &'static str,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
    /// Whether it has the subresource `status`.
    pub status: bool,
}

const fn kind(
    group: &'static str,
    version: &'static str,
    plural: &'static str,
    kind: &'static str,
    namespaced: bool,
    status: bool,
) -> Kind {
    Kind {
        group,
        version,
        plural,
        kind,
        namespaced,
        status,
    }
}

/// Everything that is served.
pub const KINDS: [Kind; 11] = [
    kind("", "v1", "configmaps", "ConfigMap", true, false),
    kind("", "v1", "namespaces", "Namespace", false, true),
    kind("", "v1", "nodes", "Node", false, true),
    kind("", "v1", "pods", "Pod", true, true),
    kind("", "v1", "services", "Service", true, true),
    kind(
        "apiextensions.k8s.io",
        "v1",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        false,
        true,
    ),
    kind("apps", "v1", "daemonsets", "DaemonSet", true, true),
    kind("coordination.k8s.io", "v1", "leases", "Lease", true, false),
    kind(
        "discovery.k8s.io",
        "v1",
        "endpointslices",
        "EndpointSlice",
        true,
        false,
    ),
    kind("events.k8s.io", "v1", "events", "Event", true, false),
    PEERS,
];

/// Served only while its definition exists, as on a real server.
pub(super) const PEERS: Kind = kind("kilo.squat.ai", "v1alpha1", "peers", "Peer", false, false);

impl Kind {
    /// `apiVersion` of its objects.
    #[must_use]
    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }
}

/// The kind of an object, by its `apiVersion` and `kind`.
#[must_use]
pub(super) fn kind_of(object: &Value) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| {
        object["kind"] == kind.kind && object["apiVersion"] == kind.api_version().as_str()
    })
}

/// What happened to an object.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// The version that it led to.
    pub revision: u64,
    /// `ADDED`, `MODIFIED` or `DELETED`.
    pub event: &'static str,
    /// The resource.
    pub plural: &'static str,
    /// The object afterwards, or as it was deleted.
    pub object: Value,
}

/// An answer that is not success.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refused {
    /// The HTTP status.
    pub code: u16,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Refused {
    /// An answer of this status.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
        }
    }

    /// There is no such thing.
    #[must_use]
    pub fn not_found(what: &str) -> Self {
        Self::new(404, "NotFound", format!("{what} not found"))
    }

    /// The version is not kept any more.
    #[must_use]
    pub fn gone() -> Self {
        Self::new(410, "Expired", "too old resource version")
    }

    /// The `Status` object that says so.
    #[must_use]
    pub fn status(&self) -> Value {
        json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        })
    }
}

/// Which objects of a collection are meant.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    /// Of this namespace only.
    pub namespace: Option<String>,
    /// Of this name only.
    pub name: Option<String>,
    /// With all of these labels.
    pub labels: BTreeMap<String, String>,
    /// None of these names: what a partitioned server does not know.
    pub hidden: BTreeSet<String>,
}

impl Selector {
    /// Whether an object is meant.
    #[must_use]
    pub(super) fn matches(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let is = |field: &str, wanted: &Option<String>| {
            wanted
                .as_ref()
                .is_none_or(|wanted| metadata[field] == wanted.as_str())
        };
        is("namespace", &self.namespace)
            && is("name", &self.name)
            && self
                .labels
                .iter()
                .all(|(key, value)| metadata["labels"][key] == value.as_str())
            && !metadata["name"]
                .as_str()
                .is_some_and(|name| self.hidden.contains(name))
    }
}

type Key = (&'static str, String, String);

/// All objects.
#[derive(Debug)]
pub(super) struct Store {
    objects: BTreeMap<Key, Value>,
    revision: u64,
    history: VecDeque<Change>,
    /// Changes up to here are forgotten.
    floor: u64,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            // Version 0 has a meaning of its own.
            revision: 1,
            history: VecDeque::new(),
            floor: 0,
        }
    }
}

impl Store {
    /// The version of the last change.
    #[must_use]
    pub(super) const fn revision(&self) -> u64 {
        self.revision
    }

    /// Forgets all history: a watch from before now gets 410.
    pub(super) fn compact(&mut self) {
        self.history.clear();
        self.floor = self.revision;
    }

    /// The changes after a version.
    ///
    /// # Errors
    ///
    /// 410 when they are not all kept.
    pub(super) fn changes_after(
        &self,
        revision: u64,
    ) -> Result<impl Iterator<Item = &Change>, Refused> {
        if revision < self.floor {
            return Err(Refused::gone());
        }
        let at = self
            .history
            .partition_point(|change| change.revision <= revision);
        Ok(self.history.range(at..))
    }

    /// Whether a list that began at this version can go on.
    #[must_use]
    pub(super) const fn keeps(&self, revision: u64) -> bool {
        revision >= self.floor
    }

    /// One object.
    ///
    /// # Errors
    ///
    /// 404.
    pub(super) fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<&Value, Refused> {
        let key = (kind.plural, namespace.to_owned(), name.to_owned());
        let found = self
            .objects
            .iter()
            .find(|(have, _)| **have == key)
            .map(|(_, object)| object);
        found.ok_or_else(|| Refused::not_found(&format!("{} \"{name}\"", kind.plural)))
    }

    /// The objects of a resource in the order of their names.
    pub(super) fn list<'a>(
        &'a self,
        kind: &Kind,
        selector: &'a Selector,
    ) -> impl Iterator<Item = &'a Value> {
        let plural = kind.plural;
        self.objects
            .iter()
            .filter(move |((of, _, _), object)| *of == plural && selector.matches(object))
            .map(|(_, object)| object)
    }

    /// Adds an object.
    ///
    /// # Errors
    ///
    /// 409 when there is one of its name, 422 without a name.
    pub(super) fn create(
        &mut self,
        kind: &'static Kind,
        namespace: &str,
        mut object: Value,
    ) -> Result<Value, Refused> {
        let metadata = metadata(&mut object);
        if metadata.get("name").is_none_or(Value::is_null)
            && let Some(prefix) = metadata.get("generateName").and_then(Value::as_str)
        {
            let name = format!("{prefix}{:05x}", rand::random::<u32>() & 0xf_ffff);
            metadata.insert("name".to_owned(), json!(name));
        }
        let Some(name) = metadata
            .get("name")
            .and_then(Value::as_str)
            .map(ToOwned::to_owned)
        else {
            return Err(Refused::new(
                422,
                "Invalid",
                "name or generateName is required",
            ));
        };
        let key = (kind.plural, namespace.to_owned(), name.clone());
        if self.objects.contains_key(&key) {
            let message = format!("{} \"{name}\" already exists", kind.plural);
            return Err(Refused::new(409, "AlreadyExists", message));
        }
        if kind.namespaced {
            metadata.insert("namespace".to_owned(), json!(namespace));
        }
        metadata.insert("uid".to_owned(), json!(uid()));
        let now = jiff::Timestamp::now();
        metadata
            .entry("creationTimestamp")
            .or_insert_with(|| json!(format!("{now:.0}")));
        object["apiVersion"] = json!(kind.api_version());
        object["kind"] = json!(kind.kind);
        Ok(self.put(key, "ADDED", object))
    }

    /// Replaces an object by what `edit` makes of it. Nothing changes when it makes the same.
    ///
    /// # Errors
    ///
    /// 404, 409 when the new object names another version than the current, and what `edit` refuses.
    pub(super) fn update(
        &mut self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        edit: impl FnOnce(&Value) -> Result<Value, Refused>,
    ) -> Result<Value, Refused> {
        let old = self.get(kind, namespace, name)?.clone();
        let mut new = edit(&old)?;
        let wanted = new["metadata"]["resourceVersion"].as_str();
        if wanted.is_some_and(|wanted| old["metadata"]["resourceVersion"] != wanted) {
            return Err(Refused::new(
                409,
                "Conflict",
                "the object has been modified",
            ));
        }
        for fixed in [
            "name",
            "namespace",
            "uid",
            "creationTimestamp",
            "resourceVersion",
        ] {
            let value = old["metadata"].get(fixed).cloned();
            if let Some(value) = value {
                metadata(&mut new).insert(fixed.to_owned(), value);
            }
        }
        if new == old {
            return Ok(old);
        }
        let key = (kind.plural, namespace.to_owned(), name.to_owned());
        Ok(self.put(key, "MODIFIED", new))
    }

    /// Removes an object.
    ///
    /// # Errors
    ///
    /// 404.
    pub(super) fn delete(
        &mut self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Value, Refused> {
        let mut object = self.get(kind, namespace, name)?.clone();
        self.objects
            .remove(&(kind.plural, namespace.to_owned(), name.to_owned()));
        self.record(kind.plural, "DELETED", &mut object);
        Ok(object)
    }

    fn put(&mut self, key: Key, event: &'static str, mut object: Value) -> Value {
        self.record(key.0, event, &mut object);
        self.objects.insert(key, object.clone());
        object
    }

    fn record(&mut self, plural: &'static str, event: &'static str, object: &mut Value) {
        self.revision += 1;
        let version = json!(self.revision.to_string());
        metadata(object).insert("resourceVersion".to_owned(), version);
        self.history.push_back(Change {
            revision: self.revision,
            event,
            plural,
            object: object.clone(),
        });
        if self.history.len() > HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.floor = oldest.revision;
        }
    }
}

/// The metadata of an object, made where there is none.
fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    if !object.is_object() {
        *object = json!({});
    }
    let metadata = &mut object["metadata"];
    if !metadata.is_object() {
        *metadata = json!({});
    }
    metadata
        .as_object_mut()
        .expect("it was made an object just now")
}

fn uid() -> String {
    let random = format!("{:032x}", rand::random::<u128>());
    let (a, b, c, d, e) = (
        &random[..8],
        &random[8..12],
        &random[12..16],
        &random[16..20],
        &random[20..],
    );
    format!("{a}-{b}-{c}-{d}-{e}")
}
