//! Answers to paths that do not name objects: health, versions, which resources there are.

use std::collections::BTreeMap;

use bytes::Bytes;
use hyper::Response;
use serde_json::json;

use super::super::store::KINDS;
use super::{Body, full, ok, respond};

/// The answer, if the path is one of these.
pub(super) fn fixed(path: &str) -> Option<Response<Body>> {
    let segments: Vec<_> = path.trim_matches('/').split('/').collect();
    let resources = |group: &str, version: &str| {
        let resources: Vec<_> = KINDS
            .iter()
            .filter(|kind| kind.group == group && kind.version == version)
            .map(|kind| {
                json!({
                    "name": kind.plural,
                    "singularName": kind.kind.to_lowercase(),
                    "namespaced": kind.namespaced,
                    "kind": kind.kind,
                    "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
                })
            })
            .collect();
        let version = match group {
            "" => version.to_owned(),
            group => format!("{group}/{version}"),
        };
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources})
    };
    let body = match segments.as_slice() {
        ["readyz" | "livez" | "healthz"] => {
            return Some(respond(200, "text/plain", full(Bytes::from_static(b"ok"))));
        }
        ["version"] => json!({
            "major": "1",
            "minor": "34",
            "gitVersion": "v1.34.0-selvedge-lab",
            "gitCommit": "",
            "gitTreeState": "clean",
            "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": "",
            "compiler": "rustc",
            "platform": "linux",
        }),
        ["api"] => {
            json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
        }
        ["apis"] => {
            let mut groups = BTreeMap::new();
            for kind in KINDS.iter().filter(|kind| !kind.group.is_empty()) {
                let version = json!({"groupVersion": kind.api_version(), "version": kind.version});
                groups.insert(
                    kind.group,
                    json!({
                        "name": kind.group,
                        "versions": [version],
                        "preferredVersion": version,
                    }),
                );
            }
            let groups: Vec<_> = groups.into_values().collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ["api", version] => resources("", version),
        ["apis", group, version] => resources(group, version),
        _ => return None,
    };
    Some(ok(200, &body))
}
