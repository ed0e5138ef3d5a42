//! Scenario 000 in network namespaces, narrated: an internet, a public master, three agents behind
//! NAT, each with flannel and Selvedge. `make lab` runs it; root is needed.
//!
//! By default stand-ins play flannel and the API server, so that it is up at once; `--real` takes
//! the real ones. Nothing outside the namespaces it makes is touched.
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
use selvedge_lab::lab::{Access, Mesh, Options, Parts, Proxy, SCENARIO_FLAGS};
use selvedge_lab::matrix::Matrix;
use selvedge_lab::netns::require_root;
use selvedge_lab::topology::MASTER;
use selvedge_lab::traffic::{PORT, Servers};
use selvedge_lab::{Lab, Scratch, teardown, wait_for};

/// Starts the names of all its namespaces.
const PREFIX: &str = "svlab";
/// Where it keeps its files; the nodes cannot see `/run` and `/var/lib` of the host.
const DIRECTORY: &str = "/tmp/selvedge-lab";

const USAGE: &str = "usage: lab [--real] [--keep] | --down
  --real   real etcd, kube-apiserver and flanneld (lab/build.sh builds them)
  --keep   leave it up, with hints what to play on
  --down   take down what --keep left";

/// Beside the flags: `SELVEDGE_BIN` names another program than the one that was built with this.
fn main() -> ExitCode {
    let mut choice = Choice::default();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--real" => choice.real = true,
            "--keep" => choice.keep = true,
            "--down" => choice.down = true,
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
        bail!("{DIRECTORY} exists, so a lab is up already: make lab ARGS=--down takes it down");
    }
    let start = Instant::now();
    let progress = |what: &str| {
        println!("[{:5.1} s] {what}", start.elapsed().as_secs_f64());
        // Whoever watches a pipe sees it now, too.
        let _ = std::io::stdout().flush();
    };
    let options = Options {
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
    let servers = Servers::start(&places)?;

    show::nodes(&lab)?;
    progress("control run: flannel alone");
    let matrix = Matrix::ask(&places, |to| to.pod.then_some((to.address, PORT)));
    show::matrix("who reaches whose pod, without Selvedge", &matrix);

    progress("selvedge: nodes labelled and annotated, one agent each");
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/selvedge-k3s.yaml");
    lab.join(&Mesh {
        binary: &binary,
        manifest: &manifest,
        access: Access::Kubeconfig,
        flags: &SCENARIO_FLAGS,
        annotate: true,
    })?;
    progress("all agents are ready");
    let patience = Duration::from_secs(15);
    wait_for("a first answer through the tunnel", patience, || {
        claims::reached_within(&lab, "pod@node-agent-03", "pod@node-master", patience).is_ok()
    })?;
    for name in lab.node_names() {
        show::installed(&lab, &name)?;
    }
    show::wireguard(&lab)?;
    progress("everybody calls everybody");
    let matrix = Matrix::ask(&places, |to| Some((to.address, PORT)));
    show::matrix("who reaches whom, by pod IP and InternalIP", &matrix);
    if choice.real {
        println!(
            "by ClusterIP: {}\n",
            claims::everybody_reaches_everybody(&lab, By::Service)?
        );
    }
    println!(
        "{}",
        claims::pods_keep_their_address(&lab)
            .map(|pairs| { format!("a server sees the address of the pod that calls: {pairs}") })?
    );
    println!("{}\n", lab.node(MASTER)?.run("ping -c 1 10.4.0.2")?.trim());
    show::graph(&lab, &binary)?;
    let failed = matrix.failures();
    progress(&format!(
        "{} of {} pairs answered",
        matrix.asked() - failed.len(),
        matrix.asked()
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

/// The program under demonstration: what `SELVEDGE_BIN` names, or what cargo built beside this one.
fn selvedge() -> anyhow::Result<PathBuf> {
    if let Some(binary) = std::env::var_os("SELVEDGE_BIN") {
        return Ok(PathBuf::from(binary));
    }
    let own = std::env::current_exe()?;
    let directory = own.parent().and_then(Path::parent);
    let binary = directory
        .context("this program lies two directories deep")?
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
