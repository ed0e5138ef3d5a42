//! Real agents beside stand-ins of Kilo's, on a real flannel and a real kube-apiserver: a running mesh
//! is moved to Selvedge node by node, back to Kilo, and again to Selvedge in another order.
//!
//! After every node all pods and nodes reach each other: Selvedge leads Kilo's followers, and follows Kilo's
//! leaders. A connection that Selvedge's leaders carry is kept over the change of the algorithm and over
//! the change back, its own node's turn included. What Kilo's leaders carry is masqueraded there by
//! flannel, so it ends with its leader's turn, as with any other change of a leader in Kilo.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::claims::{self, By};
use selvedge_lab::kg::Kg;
use selvedge_lab::lab::{AGENT_FLAGS, Access, Options};
use selvedge_lab::topology::{FOLLOWER, LEADER, MASTER, Master, Shape};
use selvedge_lab::traffic::{Conversation, PORT, Servers, Stream};
use selvedge_lab::{Lab, Steps, wait_for};

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");

const LAST: &str = "node-agent-03";

/// How long the mesh may take to follow a change on a loaded machine: both Kilo and Selvedge look
/// at least every half minute.
const PATIENCE: Duration = Duration::from_secs(40);

/// What the migration guide starts agents with while both are in the mesh.
fn flags() -> Vec<&'static str> {
    [AGENT_FLAGS.as_slice(), &["--beside-kilo"]].concat()
}

fn main() -> ExitCode {
    let mut steps = Steps::from_args("migration_from_kilo");
    run(&mut steps);
    steps.finish()
}

/// A mesh in which each node runs one of the two.
struct Mixed {
    lab: Lab,
    kilos: BTreeMap<String, Kg>,
}

impl selvedge_lab::steps::Outcome for Mixed {
    fn detail(&self) -> String {
        String::new()
    }
}

fn run(steps: &mut Steps) -> Option<()> {
    let mut mesh = steps.required("a_mesh_of_kilos_comes_up", Mixed::up)?;
    let _servers = Servers::start(&mesh.lab.places()).ok()?;
    steps.required(
        "in_a_mesh_of_kilos_all_pods_and_nodes_reach_each_other",
        || mesh.settled(),
    )?;
    for node in [MASTER, LEADER] {
        steps.required(&format!("leaders_first_{node}_moves_to_selvedge"), || {
            mesh.give_to_selvedge(node)?;
            mesh.settled()
        })?;
    }
    let kept = steps.required("a_connection_between_two_regions_is_opened", || {
        let to = SocketAddr::from((mesh.lab.pod(FOLLOWER)?.address(), PORT));
        let from = mesh.lab.pod(MASTER)?.namespace().path();
        Ok(Kept(Conversation::start(&from, to)?))
    })?;

    steps.required(
        &format!("leaders_first_{FOLLOWER}_moves_to_selvedge"),
        || {
            mesh.give_to_selvedge(FOLLOWER)?;
            mesh.settled()
        },
    )?;
    steps.required(
        "when_the_last_kilo_leaves_no_other_node_loses_a_packet",
        || mesh.undisturbed(|mesh| mesh.give_to_selvedge(LAST)),
    )?;
    steps.required("the_agents_report_that_kilos_algorithm_is_over", || {
        mesh.reports_algorithm(&[])
    })?;
    steps.required("when_a_kilo_appears_no_other_node_loses_a_packet", || {
        mesh.undisturbed(|mesh| mesh.give_to_kilo(LAST))
    })?;
    steps.required("the_agents_report_that_kilos_algorithm_is_back", || {
        mesh.reports_algorithm(&[LAST])
    })?;
    steps.required("a_mark_that_an_agent_left_behind_hides_no_kilo", || {
        let mark = ("selvedge.dev/agent", Some("0.1.0"));
        mesh.undisturbed(|mesh| mesh.lab.api().annotate(LAST, &[mark]))?;
        mesh.reports_algorithm(&[LAST])
    })?;
    steps.required(
        "the_connection_was_kept_over_the_change_and_the_change_back",
        || {
            let report = kept.0.stop()?;
            Ok(report.to_string())
        },
    )?;
    for node in [LEADER, MASTER, FOLLOWER] {
        steps.required(&format!("{node}_goes_the_way_back_to_kilo"), || {
            mesh.give_to_kilo(node)?;
            mesh.settled()
        })?;
    }
    for node in [LAST, FOLLOWER, LEADER, MASTER] {
        steps.required(&format!("followers_first_{node}_moves_to_selvedge"), || {
            mesh.give_to_selvedge(node)?;
            mesh.settled()
        })?;
    }
    Some(())
}

struct Kept(Conversation);

impl selvedge_lab::steps::Outcome for Kept {
    fn detail(&self) -> String {
        String::new()
    }
}

impl Mixed {
    fn up() -> anyhow::Result<Self> {
        let options = Options {
            shape: Shape {
                master: Master::ElasticIp,
                ..Shape::default()
            },
            ..Options::default()
        };
        let lab = Lab::for_test("migration", options)?;
        lab.kubectl_apply(Path::new(MANIFEST))?;
        lab.annotate_nodes()?;
        // Where no other rule accepts what is forwarded, Kilo's followers reach no remote node.
        lab.policy_of_forward("ACCEPT")?;
        let mut kilos = BTreeMap::new();
        for node in lab.node_names() {
            kilos.insert(node.clone(), Kg::start(&lab, &node)?);
        }
        Ok(Self { lab, kilos })
    }

    /// Kilo's agent ends, ours begins, as when a DaemonSet's pod is replaced.
    fn give_to_selvedge(&mut self, node: &str) -> anyhow::Result<()> {
        let kilo = self.kilos.remove(node).context("no Kilo there")?;
        kilo.stop()?;
        let access = Access::Kubeconfig;
        self.lab
            .start_agent(Path::new(SELVEDGE), node, access, &flags())?;
        self.lab.wait_agents(PATIENCE)?;
        let key = self.lab.node(node)?.run("wg show kilo0 public-key")?;
        let object = self.lab.api().get(&format!("/api/v1/nodes/{node}"))?;
        let published = object["metadata"]["annotations"]["kilo.squat.ai/key"].as_str();
        ensure!(published == Some(key.trim()), "{published:?} is not {key}");
        let before = self.lab.node(node)?.run("cat /var/lib/kilo/key")?;
        let now = self.lab.node(node)?.run("cat /var/lib/selvedge/key")?;
        ensure!(before.trim() == now.trim(), "Kilo's key was not taken over");
        Ok(())
    }

    /// The way back, as the migration guide describes it.
    fn give_to_kilo(&mut self, node: &str) -> anyhow::Result<()> {
        self.lab.take_agent(node)?.stop()?;
        let mesh_flags = flags();
        let flags = [
            mesh_flags.as_slice(),
            &["--clean-up", "--clean-up-interface"],
        ];
        let access = Access::Kubeconfig;
        self.lab
            .restart_agent(Path::new(SELVEDGE), node, access, &flags.concat())?;
        self.lab.wait_agents(PATIENCE)?;
        self.lab.take_agent(node)?.stop()?;
        let object = self.lab.api().get(&format!("/api/v1/nodes/{node}"))?;
        let marker = &object["metadata"]["annotations"]["selvedge.dev/agent"];
        ensure!(
            marker.is_null(),
            "the Node still has the mark of a Selvedge agent"
        );
        self.kilos
            .insert(node.to_owned(), Kg::start(&self.lab, node)?);
        Ok(())
    }

    fn settled(&self) -> anyhow::Result<String> {
        let logs = || {
            let nodes = self.lab.node_names();
            let logs = nodes.iter().map(|node| self.lab.tail(node, "kg"));
            logs.collect::<Vec<_>>().join("\n")
        };
        claims::all_places_come_to_reach_each_other(&self.lab, By::OwnAddress, PATIENCE)
            .with_context(logs)
    }

    /// While one node changes, traffic between two others of two regions goes on.
    fn undisturbed(
        &mut self,
        change: impl FnOnce(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<String> {
        let server = SocketAddr::from((self.lab.pod(LEADER)?.address(), PORT));
        let client = self.lab.pod(MASTER)?.namespace().path();
        let talk = Conversation::start(&client, server)?;
        let stream = Stream::start_warm(&client, server)?;
        change(self)?;
        let pairs = self.settled()?;
        let report = stream.stop()?;
        let talk = talk.stop()?;
        ensure!(report.lost() == 0, "{report}");
        Ok(format!(
            "{pairs}; {report}; TCP's longest wait {:.0?}",
            talk.silence
        ))
    }

    /// Status, log and metrics show which algorithm is in force, and why.
    fn reports_algorithm(&self, kilos: &[&str]) -> anyhow::Result<String> {
        let expected = if kilos.is_empty() {
            "Selvedge's own algorithm".to_owned()
        } else {
            format!(
                "Kilo's algorithm, because Kilo runs on {}",
                kilos.join(", ")
            )
        };
        for node in [MASTER, LEADER, FOLLOWER] {
            let mut seen = String::new();
            wait_for("the agent's status", PATIENCE, || {
                let answer = self.lab.ask_agent(node, "/status");
                seen = answer.map(|(_, text)| text).unwrap_or_default();
                seen.contains(&expected)
            })
            .with_context(|| format!("{node}: {seen}"))?;
            let (_, metrics) = self.lab.ask_agent(node, "/metrics")?;
            let line = format!("selvedge_kilo_nodes {}", kilos.len());
            ensure!(metrics.lines().any(|other| other == line), "{metrics}");
            let log = std::fs::read_to_string(self.lab.node(node)?.log("agent"))?;
            let last = log
                .lines()
                .rfind(|line| line.contains("mesh algorithm changed"));
            ensure!(
                last.is_some_and(|line| line.contains(&expected)),
                "{node}: {last:?}"
            );
        }
        Ok(expected)
    }
}
