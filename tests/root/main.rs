//! Tests that need root and no whole lab: a bare node in a namespace, and a real kube-apiserver.

mod api_contract;
mod bare_node;
mod kilo_commands;
mod kubectl;
mod manifests;
#[expect(dead_code, reason = "the tests without root use more of it")]
#[path = "../unit/mesh.rs"]
mod mesh;
#[path = "../unit/refused.rs"]
mod refused;
