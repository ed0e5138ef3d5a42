//! Services of type `NodePort`: the leader that is called translates twice, and the answer comes back
//! through the tunnel, past strict reverse path filters.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use selvedge_lab::topology::MASTER;
use selvedge_lab::traffic::{PORT, source_seen};
use selvedge_lab::{Lab, wait_for};
use serde_json::json;

use super::{FOLLOWER, LEADER, SECOND_LEADER};

/// How long kube-proxy may take to program a service.
const HEARD: Duration = Duration::from_secs(15);
const COLLECTIONS: [&str; 2] = [
    "/api/v1/namespaces/default/services",
    "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
];

/// From outside of the cluster, and from a node of the region for a pod of the region.
pub(super) fn lead_to_pods(lab: &Lab) -> anyhow::Result<String> {
    let mut summary = Vec::new();
    for (number, leader, from) in [
        (30_700, MASTER, lab.network().internet().path()),
        (30_701, LEADER, namespace(lab, FOLLOWER)?),
    ] {
        let port = NodePort::open(lab, number, leader, SECOND_LEADER)?;
        wait_for(&port.what, HEARD, || port.answers(&from))?;
        summary.push(port.what.clone());
    }
    Ok(summary.join("; "))
}

/// A follower that connects to a node port of its own leader for a pod elsewhere gets an answer only where both
/// hosts have loose reverse path filters.
///
/// The leader's strict filter expects packets of its member from flannel's device, and this one arrives by the
/// underlay. The follower's strict filter expects its leader's address on the underlay, and the answer arrives
/// by flannel's device.
pub(super) fn of_the_own_leader(lab: &Lab) -> anyhow::Result<String> {
    let port = NodePort::open(lab, 30_702, LEADER, MASTER)?;
    let leader = namespace(lab, LEADER)?;
    wait_for(&port.what, HEARD, || port.answers(&leader))?;
    let follower = namespace(lab, FOLLOWER)?;
    ensure!(
        !port.answers(&follower),
        "{} is let through by strict filters, too: then the README need not say otherwise",
        port.what
    );
    filter(lab, 2)?;
    let outcome = wait_for(&port.what, HEARD, || port.answers(&follower));
    filter(lab, 1)?;
    outcome?;
    Ok(format!("{}, past loose filters only", port.what))
}

/// A service with one endpoint; deleted when the value is dropped, so that the nodes can be
/// compared with their state before.
struct NodePort<'a> {
    lab: &'a Lab,
    name: String,
    server: SocketAddr,
    what: String,
}

impl<'a> NodePort<'a> {
    fn open(lab: &'a Lab, number: u16, called: &str, pod: &str) -> anyhow::Result<Self> {
        let place = lab.place(&format!("pod@{pod}"))?;
        let server = SocketAddr::from((lab.node(called)?.address(), number));
        let port = Self {
            lab,
            name: format!("port-{number}"),
            server,
            what: format!("{server} on {called}, for {}", place.name),
        };
        let name = &port.name;
        let [services, slices] = COLLECTIONS;
        lab.api().create(
            services,
            &json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
                "spec": {"type": "NodePort", "ports": [{"port": PORT, "nodePort": number}]},
            }),
        )?;
        lab.api().create(
            slices,
            &json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
                "endpoints": [{"addresses": [place.address.to_string()]}],
                "ports": [{"name": "", "port": PORT, "protocol": "TCP"}],
            }),
        )?;
        Ok(port)
    }

    fn answers(&self, from: &std::path::Path) -> bool {
        source_seen(from, self.server).is_ok()
    }
}

impl Drop for NodePort<'_> {
    fn drop(&mut self) {
        for collection in COLLECTIONS {
            // At the end of the lab the API server may be gone.
            let _ = self
                .lab
                .api()
                .delete(&format!("{collection}/{}", self.name));
        }
    }
}

fn namespace(lab: &Lab, node: &str) -> anyhow::Result<PathBuf> {
    Ok(lab.node(node)?.namespace().path())
}

/// Sets the reverse path filters of the leader and its follower: 1 is strict, 2 is loose.
fn filter(lab: &Lab, how: u8) -> anyhow::Result<()> {
    for node in [LEADER, FOLLOWER] {
        for link in ["all", "eth0", "flannel.1"] {
            let setting = format!("ipv4/conf/{link}/rp_filter");
            lab.node(node)?
                .namespace()
                .sysctl(&setting, &how.to_string())?;
        }
    }
    Ok(())
}
