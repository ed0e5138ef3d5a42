//! Scenario 000 in network namespaces, narrated: an internet, a public master, three agents behind
//! NAT, each with flannel and Selvedge. `make lab` runs it; root is needed.
//!
//! By default stand-ins replace flannel and the API server, so that the lab is up at once; `--real` uses
//! the real ones. The lab touches nothing outside its namespaces.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "it shows what happens, and runs programs to do so"
)]

mod show;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use selvedge_lab::claims::{self, By};
use selvedge_lab::family::{Family, Inner};
use selvedge_lab::lab::{Mesh, Options, Parts, Places as _, Proxy};
use selvedge_lab::matrix::Matrix;
use selvedge_lab::netns::require_root;
use selvedge_lab::topology::{MASTER, Shape};
use selvedge_lab::traffic::{PORT, Servers};
use selvedge_lab::{Lab, Scratch, teardown, wait_for};

/// Starts the names of all its namespaces.
const PREFIX: &str = "svlab";
/// The directory of the lab's files; the nodes cannot see `/run` and `/var/lib` of the host.
const DIRECTORY: &str = "/tmp/selvedge-lab";

const USAGE: &str = "usage: lab [--real] [--family v4|v6|dual] [--wan v4|v6] [--keep] | --down
  --real   real etcd, kube-apiserver and flanneld (lab/build.sh builds them)
  --family of pods and services; v4 if it is left out
  --wan    the internet's family; v4 if it is left out
  --keep   leave it up, with hints what to play on
  --down   take down a lab that --keep left up";

/// In addition to the flags, `SELVEDGE_BIN` selects another program than the one built with this example.
fn main() -> ExitCode {
    let mut choice = Choice::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = match argument.as_str() {
            "--family" | "--wan" => arguments.next().unwrap_or_default(),
            _ => String::new(),
        };
        match (argument.as_str(), value.as_str()) {
            ("--real", _) => choice.real = true,
            ("--keep", _) => choice.keep = true,
            ("--down", _) => choice.down = true,
            ("--family", "v4") => choice.inner = Inner::V4,
            ("--family", "v6") => choice.inner = Inner::V6,
            ("--family", "dual") => choice.inner = Inner::Dual,
            ("--wan", "v4") => choice.wan = Family::V4,
            ("--wan", "v6") => choice.wan = Family::V6,
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(64);
            }
        }
    }
    match run(choice) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Choice {
    real: bool,
    keep: bool,
    down: bool,
    inner: Inner,
    wan: Family,
}

fn run(choice: Choice) -> anyhow::Result<()> {
    require_root()?;
    if choice.down {
        let ended = teardown(PREFIX)?;
        if Path::new(DIRECTORY).exists() {
            std::fs::remove_dir_all(DIRECTORY)?;
        }
        println!("taken down; {ended} processes ended");
        return Ok(());
    }
    if Path::new(DIRECTORY).exists() {
        bail!("{DIRECTORY} exists, so a lab is up: take it down with make lab ARGS=--down");
    }
    let start = Instant::now();
    let progress = |what: &str| {
        println!("[{:5.1} s] {what}", start.elapsed().as_secs_f64());
        // Flush, so that a reader of a pipe sees the line at once.
        let _ = std::io::stdout().flush();
    };
    let options = Options {
        shape: Shape {
            inner: choice.inner,
            wan: choice.wan,
            ..Shape::default()
        },
        parts: if choice.real {
            Parts::Real
        } else {
            Parts::StandIns
        },
        proxy: if choice.real {
            Proxy::Iptables
        } else {
            Proxy::None
        },
        ..Options::default()
    };
    let binary = selvedge()?;
    let mut lab = Lab::up(
        PREFIX,
        Scratch::at(PathBuf::from(DIRECTORY))?,
        options,
        &progress,
    )?;
    let places = lab.places();
    let servers = Servers::start(&lab.places_of_all_families())?;

    show::nodes(&lab)?;
    progress("control run: flannel without Selvedge");
    let matrix = Matrix::ask(&places, |to| to.pod.then_some((to.address, PORT)));
    show::matrix("connections to pods, without Selvedge", &matrix);

    progress("selvedge: nodes labelled and annotated, one agent each");
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/selvedge-k3s.yaml");
    lab.join(&Mesh::annotated(&binary, &manifest))?;
    progress("all agents are ready");
    let patience = Duration::from_secs(15);
    wait_for("a first answer through the tunnel", patience, || {
        claims::reached_within(&lab, "pod@node-agent-03", "pod@node-master", patience).is_ok()
    })?;
    for name in lab.node_names() {
        show::installed(&lab, &name)?;
    }
    show::wireguard(&lab)?;
    progress("all pods and nodes call each other");
    let (mut asked, mut failed) = (0, Vec::new());
    for family in lab.families() {
        let view = lab.of(family);
        let matrix = Matrix::ask(&view.places(), |to| Some((to.address, PORT)));
        show::matrix("connections by pod IP and InternalIP", &matrix);
        asked += matrix.asked();
        failed.extend(matrix.failures());
        if choice.real {
            println!(
                "by ClusterIP: {}\n",
                claims::all_places_reach_each_other(&view, By::Service)?
            );
        }
        println!(
            "a server sees the source address of the calling pod: {}",
            claims::pods_keep_their_address(&view)?
        );
    }
    if choice.inner.has(Family::V4) {
        println!("{}\n", lab.node(MASTER)?.run("ping -c 1 10.4.0.2")?.trim());
    }
    show::graph(&lab, &binary)?;
    progress(&format!(
        "{} of {asked} pairs answered",
        asked - failed.len()
    ));
    if choice.keep {
        drop(servers);
        show::hints(&mut lab)?;
        lab.keep();
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

/// The program to show: the one in `SELVEDGE_BIN`, or the one that cargo built with this example.
fn selvedge() -> anyhow::Result<PathBuf> {
    if let Some(binary) = std::env::var_os("SELVEDGE_BIN") {
        return Ok(PathBuf::from(binary));
    }
    let own = std::env::current_exe()?;
    let directory = own.parent().and_then(Path::parent);
    let binary = directory
        .context("this program is two directories deep")?
        .join("selvedge");
    if !Command::new(&binary)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
    {
        bail!("{} is missing: run cargo build", binary.display());
    }
    Ok(binary)
}
