//! Scenario 000 end to end, on a real flannel and a real kube-apiserver: a public master, three
//! agents behind NAT. First without Selvedge, then with it.

use std::process::ExitCode;

use anyhow::ensure;
use selvedge_lab::lab::{Options, Proxy};
use selvedge_lab::matrix::Matrix;
use selvedge_lab::netns::unique_prefix;
use selvedge_lab::traffic::{PORT, Servers};
use selvedge_lab::{Lab, Steps, scratch};

fn main() -> ExitCode {
    let mut steps = Steps::from_args("scenario000");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let options = Options {
        proxy: Proxy::Iptables,
        ..Options::default()
    };
    let lab = steps.required("the_cluster_comes_up", || {
        Lab::up(&unique_prefix(), scratch("scenario000")?, options, &|_| {})
    })?;
    let places = lab.places();
    let _servers = Servers::start(&places).ok()?;

    steps.step("flannel_alone_connects_no_two_regions", || {
        let matrix = Matrix::ask(&places, |to| to.pod.then_some((to.address, PORT)));
        println!("{matrix}");
        for from in &places {
            for to in places.iter().filter(|to| to.pod && to.name != from.name) {
                let apart = lab.apart(&from.node, &to.node)?;
                let reached = matrix.reached(&from.name, &to.name);
                ensure!(reached != apart, "{} -> {}: {reached}", from.name, to.name);
            }
        }
        Ok(String::new())
    });
    Some(())
}
