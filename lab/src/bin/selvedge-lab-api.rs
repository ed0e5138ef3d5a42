//! The stand-in API server as a program, for a lab that stays up: `selvedge-lab-api LISTEN DIR`.
//!
//! It serves on LISTEN and writes `DIR/admin.kubeconfig`; DIR/objects.json, a list of objects, is
//! read at the start where it exists.

use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context as _, bail};
use selvedge_lab::api::{Api, Options};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [listen, directory] = arguments.as_slice() else {
        bail!("usage: selvedge-lab-api LISTEN DIR, as in selvedge-lab-api 127.0.0.1:6443 /tmp/lab");
    };
    let directory = Path::new(directory);
    let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
    let api = Api::serve(listener, Options::default())?;
    api.define_peers()?;

    let objects = directory.join("objects.json");
    if let Ok(text) = std::fs::read_to_string(&objects) {
        let objects: Vec<serde_json::Value> =
            serde_json::from_str(&text).with_context(|| objects.display().to_string())?;
        for object in objects {
            api.put(object)?;
        }
    }
    api.write_kubeconfig(&directory.join("admin.kubeconfig"), "")?;
    // Until a signal ends the program.
    loop {
        std::thread::park();
    }
}
