//! Shared parts of the objects read from the API.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Seconds since 1970 of the object's creation.
///
/// The API server always sets that time. An object without it counts as created last, so it wins no
/// dispute over a claim.
pub(super) fn created(metadata: &ObjectMeta) -> i64 {
    metadata
        .creation_timestamp
        .as_ref()
        .map_or(i64::MAX, |time| time.0.as_second())
}

/// Implements `kube::Resource` for a type with a `metadata` field, as a cluster-scoped resource.
macro_rules! cluster_scoped {
    ($type:ty, kind: $kind:literal, group: $group:literal, version: $version:literal, plural: $plural:literal) => {
        impl kube::Resource for $type {
            type DynamicType = ();
            type Scope = kube::core::ClusterResourceScope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                $kind.into()
            }

            fn group((): &()) -> std::borrow::Cow<'_, str> {
                $group.into()
            }

            fn version((): &()) -> std::borrow::Cow<'_, str> {
                $version.into()
            }

            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

pub(super) use cluster_scoped;
