//! The contract, each case a test on a stand-in of its own.

use serde_json::json;

use super::bench::{Server, StandIn};
use super::contract::{self, ADDRESS, Case, cases, runtime};

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                run(|server| Box::pin(contract::$name(server)));
            }
        )*
    };
}

cases!(tests);

fn run(case: Case) {
    let stand_in = StandIn::start();
    let slices = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [ADDRESS.to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}],
    });
    stand_in.api.put(slices).unwrap();
    runtime().block_on(async {
        case(&Server::at(&stand_in.kubeconfig).await).await;
    });
}
