//! The `Peer` object that stands for this machine.

use ipnet::IpNet;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Client, Resource as _};
use serde_json::json;

use crate::cluster::peer::{self, API_VERSION, PeerObject, PeerSpec};
use crate::refusal::Refusal;
use crate::survey::describe;
use crate::topology::{ExternalPeer, InterfaceAddr};
use crate::wireguard::key::PublicKey;

/// Marks a Peer that a `connect` on the named machine made; only such a one is ever changed or deleted.
const MADE_BY: &str = "selvedge.dev/connect";

/// The identity of this host in the mesh.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// The name of the Peer.
    pub(super) name: String,
    /// The host that made it.
    pub(super) host: String,
    /// `--allowed-ip`.
    pub(super) address: InterfaceAddr,
    /// The key.
    pub(super) public_key: PublicKey,
    /// `--persistent-keepalive` in seconds.
    pub(super) persistent_keepalive: u16,
}

/// A Peer that exists.
#[derive(Clone, Debug)]
pub(super) struct Registration {
    /// What it says.
    pub(super) peer: ExternalPeer,
    /// Whether it is ours to delete.
    pub(super) ours: bool,
    api: Api<DynamicObject>,
}

impl Registration {
    /// Finds the Peer, or makes it. One that another program made is used as it is.
    ///
    /// # Errors
    ///
    /// If the API server refuses, or a Peer of this name belongs to another host.
    pub(super) async fn find_or_make(client: &Client, who: &Identity) -> anyhow::Result<Self> {
        let kind = GroupVersionKind::gvk("kilo.squat.ai", "v1alpha1", "Peer");
        let resource = ApiResource::from_gvk_with_plural(&kind, "peers");
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let wanted = who.object();
        let (object, ours) = match api.get_opt(&who.name).await.map_err(describe)? {
            None => {
                let object = serde_json::from_value(wanted)?;
                let made = api
                    .create(&PostParams::default(), &object)
                    .await
                    .map_err(describe)?;
                tracing::info!(peer = who.name, "Peer created");
                (made, true)
            }
            Some(found) => match who.is_made_by(&found) {
                // Left by a run that could not clean up.
                true => {
                    let patch = Patch::Merge(wanted);
                    let taken = api.patch(&who.name, &PatchParams::default(), &patch).await;
                    tracing::info!(peer = who.name, "Peer of an earlier run reused");
                    (taken.map_err(describe)?, true)
                }
                false => (found, false),
            },
        };
        let peer = who.check(&object)?;
        Ok(Self { peer, ours, api })
    }

    /// Deletes the Peer if it is ours.
    pub(super) async fn delete(&self) -> anyhow::Result<()> {
        if !self.ours {
            return Ok(());
        }
        let options = DeleteParams::default();
        match self.api.delete(&self.peer.name, &options).await {
            Ok(_) => tracing::info!(peer = self.peer.name, "Peer deleted"),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl Identity {
    fn object(&self) -> serde_json::Value {
        let spec = PeerSpec {
            allowed_ips: vec![self.address.to_string()],
            persistent_keepalive: Some(self.persistent_keepalive.into()),
            public_key: self.public_key.to_string(),
            ..PeerSpec::default()
        };
        json!({
            "apiVersion": API_VERSION, "kind": "Peer",
            "metadata": {"name": self.name, "annotations": {MADE_BY: self.host}},
            "spec": spec,
        })
    }

    fn is_made_by(&self, object: &DynamicObject) -> bool {
        let annotations = object.meta().annotations.as_ref();
        annotations.and_then(|all| all.get(MADE_BY)) == Some(&self.host)
    }

    /// Whether the Peer is this machine.
    fn check(&self, object: &DynamicObject) -> Result<ExternalPeer, Refusal> {
        let read: Result<PeerObject, _> =
            serde_json::to_value(object).and_then(serde_json::from_value);
        let (found, refused) = match read {
            Ok(object) => peer::parse(&object),
            Err(_) => (None, Vec::new()),
        };
        let Some(found) = found else {
            let reason = refused.first().map_or_else(
                || format!("peer {:?} cannot be read", self.name),
                ToString::to_string,
            );
            return Err(Refusal::configuration(format!(
                "{reason}; correct it, or connect by another name"
            )));
        };
        if found.public_key != self.public_key {
            return Err(Refusal::configuration(format!(
                "peer {:?} exists and has another key: give its --private-key, or connect by another name",
                self.name
            )));
        }
        let own = IpNet::from(self.address.addr());
        if !found.allowed_ips.iter().any(|net| net.contains(&own)) {
            return Err(Refusal::configuration(format!(
                "--allowed-ip {} is not among the allowed IPs of peer {:?}",
                self.address, self.name
            )));
        }
        Ok(found)
    }
}
