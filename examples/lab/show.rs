//! Prints the state of the lab, with the commands that an operator would use.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use selvedge_lab::Lab;
use selvedge_lab::lab::Parts;
use selvedge_lab::matrix::Matrix;
use selvedge_lab::topology::{LEADER, MASTER, SECOND_LEADER};

/// The nodes with their regions and addresses.
pub(crate) fn nodes(lab: &Lab) -> anyhow::Result<()> {
    println!(
        "\n{:15} {:8} {:15} {:13} pod",
        "node", "region", "InternalIP", "pods"
    );
    for node in lab.network().nodes() {
        let name = node.name();
        println!(
            "{name:15} {:8} {:15} {:13} {}",
            lab.network().site(name)?.region(),
            node.address().to_string(),
            lab.pod_cidr(name)?.to_string(),
            lab.pod(name)?.address()
        );
    }
    println!();
    Ok(())
}

/// A matrix under a heading.
pub(crate) fn matrix(heading: &str, matrix: &Matrix) {
    println!("\n{heading}\n{matrix}\n");
}

/// What Selvedge installed on a node.
pub(crate) fn installed(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let node = lab.node(name)?;
    println!("\n{name}");
    let lines = lab.families().into_iter().flat_map(|family| {
        [
            "-br address show dev kilo0",
            "rule",
            "route show table 5130",
            "route show table 5131",
            "route show table 5132",
        ]
        .map(|line| format!("ip {} {line}", family.option()))
    });
    for line in lines {
        // A table without routes does not exist.
        let text = node.run(&line).unwrap_or_default();
        if !text.trim().is_empty() {
            println!("  # {line}");
            for line in text.lines() {
                println!("  {}", line.trim_end());
            }
        }
    }
    Ok(())
}

/// The tunnels of all leaders: the master, and two nodes of the data centre.
pub(crate) fn wireguard(lab: &Lab) -> anyhow::Result<()> {
    for leader in [MASTER, LEADER, SECOND_LEADER] {
        println!("\n{leader} # wg show kilo0");
        println!("{}", lab.node(leader)?.run("wg show kilo0")?.trim_end());
    }
    println!();
    Ok(())
}

/// The mesh as Selvedge draws it.
pub(crate) fn graph(lab: &Lab, binary: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(binary);
    command
        .args(["graph", "--format", "text", "--kubeconfig"])
        .arg(lab.admin_kubeconfig());
    let output = lab.node(MASTER)?.output(command)?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "selvedge graph: {complaint}");
    println!("selvedge graph --format text");
    println!("{}", String::from_utf8_lossy(&output.stdout).trim_end());
    println!();
    Ok(())
}

/// Commands to continue by hand.
pub(crate) fn hints(lab: &mut Lab) -> anyhow::Result<()> {
    let prefix = lab.network().prefix().to_owned();
    let pod = lab.pod(MASTER)?.address();
    let pid = lab.agent("node-agent-02").map_or(0, |agent| agent.pid());
    let directory = lab.directory().display().to_string();
    let kubeconfig = lab.admin_kubeconfig();
    let mut hints = vec![
        (
            format!("ip netns exec {prefix}-pod-node-agent-02 ping {pod}"),
            "a pod calls another region",
        ),
        (
            format!("ip netns exec {prefix}-internet tcpdump -ni any udp"),
            "the packets on the internet",
        ),
        (
            format!("ip netns exec {prefix}-node-agent-02 ip route flush table 5130"),
            "delete the routes; the agent restores them",
        ),
        (
            format!("nsenter -t {pid} -a bash"),
            "a shell on node-agent-02, with its files",
        ),
        (
            format!("nsenter -t {pid} -a $PWD/target/debug/selvedge status"),
            "the status of its agent",
        ),
        (
            format!("tail -f {directory}/nodes/node-agent-01/log/agent"),
            "the log of a leader's agent",
        ),
    ];
    if lab.options().parts == Parts::Real {
        let kubectl = "~/.cache/selvedge/bin/labcp kubectl --kubeconfig";
        hints.push((
            format!("ip netns exec {prefix}-node-agent-01 ip link delete flannel.1"),
            "flannel recreates the link, Selvedge restores the entries that flannel loses",
        ));
        hints.push((
            format!(
                "ip netns exec {prefix}-{MASTER} {kubectl} {} get nodes",
                kubeconfig.display()
            ),
            "the cluster",
        ));
    }
    hints.push(("make lab ARGS=--down".to_owned(), "take the lab down"));
    println!("\nThe lab stays up. To continue:");
    for (command, meaning) in hints {
        println!("  # {meaning}\n  {command}");
    }
    Ok(())
}
