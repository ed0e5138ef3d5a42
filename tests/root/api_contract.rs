//! The contract of `tests/unit/api` on a real kube-apiserver, so that the stand-in behaves as the real one.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use selvedge_lab::{ControlPlane, Namespace, Node, scratch};

#[expect(dead_code, reason = "the tests on the stand-in use more of it")]
#[path = "../unit/api/bench.rs"]
mod bench;
#[path = "../unit/api/contract.rs"]
mod contract;

use bench::Server;
use contract::{ADDRESS, Case, cases, runtime};

macro_rules! list {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), |server| Box::pin(contract::$name(server)))),*]
    };
}

const CASES: &[(&str, Case)] = cases!(list);

#[test]
fn a_real_kube_apiserver_is_as_the_stand_in() {
    let namespace = Namespace::new("api").unwrap();
    namespace
        .run(&format!("ip addr add {ADDRESS}/32 dev lo"))
        .unwrap();
    let directory = scratch("api").unwrap();
    let node = Node::new(
        "master",
        ADDRESS,
        namespace,
        directory.path().join("master"),
    )
    .unwrap();
    let plane = ControlPlane::start(&node, ADDRESS, &directory.path().join("plane")).unwrap();

    node.namespace().within(|| {
        runtime().block_on(async {
            let server = Server::at(&plane.kubeconfig_path("admin")).await;
            for (name, case) in CASES {
                eprintln!("{name}");
                case(&server).await;
                clean(&server).await;
            }
        });
    });
}

async fn clean(server: &Server) {
    let nodes = server.get("/api/v1/nodes").await;
    for node in nodes["items"].as_array().unwrap() {
        let name = node["metadata"]["name"].as_str().unwrap();
        server.delete(&format!("/api/v1/nodes/{name}")).await;
    }
    server
        .delete("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/peers.kilo.squat.ai")
        .await;
}
