//! Two private regions on one subnet, each with a node .11 and a printer .77, and a cloud, on a real flannel, kube-proxy
//! and kube-apiserver: nodes are reached by their aliases, printers by their own address.
//!
//! ```text
//!    region default: node-master, public           192.168.50.0/24, behind a NAT: region nd
//!    region third: 192.168.50.0/24 again, behind     node-agent-01 .11 and -02 .12, which lead, and -03 .13,
//!    another NAT: node-third-01 .11, -02 .12,        printer .77
//!    which lead, printer .77
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use selvedge_lab::lab::{AGENT_FLAGS, Mesh, Options, Proxy};
use selvedge_lab::netns::{Namespace, within_path};
use selvedge_lab::topology::{MASTER, Shape, Site, Third};
use selvedge_lab::traffic::{KUBELET_PORT, PORT, Place, shout, source_seen, transfer};
use selvedge_lab::{Lab, Steps, claims, wait_for};
use serde_json::json;

const SELVEDGE: &str = env!("CARGO_BIN_EXE_selvedge");
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/selvedge-k3s.yaml");
const POD_NETWORK: &str = "10.42.0.0/16";

/// Where each node and printer says its name, on its own address alone.
const NAME_PORT: u16 = 10_255;
/// How long the mesh and kube-proxy may take to follow a change on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// The nodes with the address 192.168.50.11.
const TWINS: [&str; 2] = ["node-agent-01", "node-third-01"];
const PRINTER: &str = "192.168.50.77";

fn main() -> ExitCode {
    let mut steps = Steps::from_args("overlapping_subnets");
    run(&mut steps);
    steps.finish()
}

fn run(steps: &mut Steps) -> Option<()> {
    let options = Options {
        shape: Shape {
            third: Third::Overlapping,
            ..Shape::default()
        },
        proxy: Proxy::Iptables,
        ..Options::default()
    };
    let (mut lab, _servers) = steps.cluster("the_cluster_comes_up", "overlapping", options)?;
    let _printers = steps.required("each_private_region_has_a_printer", || printers(&lab))?;
    say_names(&lab).ok()?;
    let flags = [&["--alias-cidr=10.7.0.0/24"], &AGENT_FLAGS[..]].concat();
    let mesh = Mesh::labelled(Path::new(SELVEDGE), Path::new(MANIFEST), &flags);
    steps.required("all_agents_become_ready", || {
        let time = lab.join(&mesh)?;
        Ok(format!(
            "{:.1} s after the last was started",
            time.as_secs_f64()
        ))
    })?;
    let lab = lab;
    let capture = lab.capture_internet("wan").ok()?;
    let aliases = steps.required("each_private_node_has_an_alias", || {
        Ok(Aliases(aliases(&lab)?))
    })?;
    let aliases = aliases.0;
    steps.step("pods_reach_pods_everywhere_with_their_sources", || {
        wait_for("all pods", PATIENCE, || {
            claims::all_places_reach_every_pod(&lab).is_ok()
        })?;
        claims::pods_keep_their_address(&lab)
    });
    steps.step("every_node_answers_by_its_alias_from_everywhere", || {
        every_place_reaches(&lab, &aliases)
    });
    steps.step("a_server_behind_an_alias_sees_the_pod_that_calls", || {
        sources_are_kept(&lab, &aliases)
    });
    steps.step("large_transfers_by_alias_arrive_intact", || {
        transfers(&lab, &aliases)
    });
    steps.step("an_icmp_error_from_behind_an_alias_arrives", || {
        errors_arrive(&lab, &aliases)
    });
    steps.step("node_ports_answer_by_alias", || node_ports(&lab, &aliases));
    steps.step("the_api_server_reaches_kubelets_by_alias", || {
        api_server_reaches(&lab, &aliases)
    });
    steps.step("each_printer_answers_its_own_region", || {
        printers_answer(&lab)
    });
    steps.step("inside_the_regions_hosts_reach_hosts", || {
        claims::regions_are_undisturbed(&lab)
    });
    steps.step("status_doctor_graph_and_metrics_show_the_aliases", || {
        shown(&lab, &aliases)
    });
    steps.step("nothing_crosses_the_internet_in_clear", || {
        let findings = capture.finish(POD_NETWORK.parse()?)?;
        ensure!(findings.nothing_in_clear(), "{findings}");
        let control = lab.capture_internet("control")?;
        let master = lab.node(MASTER)?.namespace().path();
        shout(&master, "203.0.113.20:9".parse()?)?;
        let seen = control.finish(POD_NETWORK.parse()?)?;
        ensure!(!seen.nothing_in_clear(), "the control: {seen}");
        Ok(format!("{findings}; control: {seen}"))
    });
    Some(())
}

/// The alias of each private node.
struct Aliases(BTreeMap<String, IpAddr>);

impl selvedge_lab::steps::Outcome for Aliases {
    fn detail(&self) -> String {
        let pairs = self.0.iter().map(|(node, alias)| format!("{node} {alias}"));
        pairs.collect::<Vec<_>>().join(", ")
    }
}

/// Two agents that start at the same time may choose the same alias for a moment.
fn aliases(lab: &Lab) -> anyhow::Result<BTreeMap<String, IpAddr>> {
    let mut names = lab.node_names();
    names.retain(|name| name != MASTER);
    let mut aliases = BTreeMap::<String, IpAddr>::new();
    wait_for(
        "an alias of its own for each private node",
        PATIENCE,
        || {
            let alias = |name: &String| {
                let text = lab.annotation(name, "selvedge.dev/alias").ok()?;
                Some((name.clone(), text.parse().ok()?))
            };
            aliases = names.iter().filter_map(alias).collect();
            let different = aliases.values().collect::<BTreeSet<_>>();
            different.len() == names.len()
        },
    )
    .with_context(|| format!("{aliases:?}"))?;
    let of_master = lab.annotation(MASTER, "selvedge.dev/alias")?;
    ensure!(of_master.is_empty(), "the master needs no alias");
    Ok(aliases)
}

/// The printers, up for as long as the value lives.
struct Printers([Namespace; 2]);

impl selvedge_lab::steps::Outcome for Printers {
    fn detail(&self) -> String {
        format!("{} and {} at {PRINTER}", self.0[0].name(), self.0[1].name())
    }
}

fn printers(lab: &Lab) -> anyhow::Result<Printers> {
    let make = |site, name: &str| {
        let router = "192.168.50.1".parse()?;
        let printer = lab
            .network()
            .add_host(site, name, &format!("{PRINTER}/24"), router)?;
        say_name(&printer.path(), PRINTER.parse()?, name)?;
        anyhow::Ok(printer)
    };
    let first = make(Site::DataCentre, "printer-nd")?;
    Ok(Printers([first, make(Site::Third, "printer-third")?]))
}

fn say_names(lab: &Lab) -> anyhow::Result<()> {
    for name in lab.node_names() {
        let node = lab.node(&name)?;
        say_name(&node.namespace().path(), node.address(), &name)?;
    }
    Ok(())
}

/// Answers HTTP requests with a name, and the address that called, at one address alone, until the process ends.
fn say_name(namespace: &Path, address: IpAddr, name: &str) -> anyhow::Result<()> {
    let listener = within_path(namespace, || TcpListener::bind((address, NAME_PORT)))??;
    let name = name.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(stream, &name);
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut request = [0; 4096];
    let _ = stream.read(&mut request)?;
    let body = format!("{name} {}", stream.peer_addr()?.ip());
    let length = body.len();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n";
    write!(stream, "{head}Content-Length: {length}\r\n\r\n{body}")
}

/// The name of what answers at an address, and the source that it sees.
fn name_at(from: &Path, address: IpAddr) -> anyhow::Result<(String, IpAddr)> {
    let mut stream = within_path(from, || {
        let wait = Duration::from_secs(3);
        TcpStream::connect_timeout(&SocketAddr::new(address, NAME_PORT), wait)
    })??;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: node\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (_, body) = text.split_once("\r\n\r\n").context("no answer")?;
    let (name, source) = body.split_once(' ').context("no name")?;
    Ok((name.to_owned(), source.parse()?))
}

fn every_place_reaches(lab: &Lab, aliases: &BTreeMap<String, IpAddr>) -> anyhow::Result<String> {
    let mut asked = 0;
    for from in lab.places() {
        for (node, alias) in aliases {
            let what = format!("{} to {node} by {alias}", from.name);
            let (name, _) = name_at(&from.namespace, *alias).with_context(|| what.clone())?;
            ensure!(name == *node, "{what}: {name} answers");
            let kubelet = SocketAddr::new(*alias, KUBELET_PORT);
            source_seen(&from.namespace, kubelet).with_context(|| format!("{what}, kubelet"))?;
            asked += 1;
        }
    }
    Ok(format!("{asked} pairs of place and alias"))
}

/// From another region a pod is seen with its own address, and a host with that of its node in the pod network.
fn sources_are_kept(lab: &Lab, aliases: &BTreeMap<String, IpAddr>) -> anyhow::Result<String> {
    let mut seen = 0;
    for from in lab.places() {
        for (node, alias) in aliases {
            if !lab.apart(&from.node, node)? {
                continue;
            }
            let own = match from.pod {
                true => from.address,
                false => lab.pod_cidr(&from.node)?.network(),
            };
            let (_, source) = name_at(&from.namespace, *alias)?;
            ensure!(source == own, "{node} sees {} as {source}", from.name);
            seen += 1;
        }
    }
    Ok(format!("{seen} pairs"))
}

/// A megabyte each way between pods and the two nodes of one address.
fn transfers(lab: &Lab, aliases: &BTreeMap<String, IpAddr>) -> anyhow::Result<String> {
    let mut summary = Vec::new();
    for twin in TWINS {
        for from in pods_apart(lab, twin)? {
            let kubelet = SocketAddr::new(aliases[twin], KUBELET_PORT);
            let took = transfer(&from.namespace, kubelet, 1_000_000)
                .with_context(|| format!("{} to {twin}", from.name))?;
            summary.push(format!("{} to {twin} {took:.1?}", from.name));
        }
    }
    Ok(summary.join(", "))
}

fn pods_apart(lab: &Lab, node: &str) -> anyhow::Result<Vec<Place>> {
    let mut pods = Vec::new();
    for place in lab.places() {
        if place.pod && lab.apart(&place.node, node)? {
            pods.push(place);
        }
    }
    Ok(pods)
}

/// A datagram to a closed port is answered by an error that quotes the datagram as it was sent, or the sender's socket
/// would not get it.
fn errors_arrive(lab: &Lab, aliases: &BTreeMap<String, IpAddr>) -> anyhow::Result<String> {
    for twin in TWINS {
        for from in pods_apart(lab, twin)? {
            let socket = within_path(&from.namespace, || {
                let socket = UdpSocket::bind((from.address, 0))?;
                socket.connect((aliases[twin], 9))?;
                socket.send(b"?")?;
                std::io::Result::Ok(socket)
            })??;
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
            let outcome = socket.recv(&mut [0; 8]);
            let refused = outcome.as_ref().err().map(std::io::Error::kind);
            ensure!(
                refused == Some(std::io::ErrorKind::ConnectionRefused),
                "{} to {twin}: {outcome:?}",
                from.name
            );
        }
    }
    Ok(String::new())
}

/// A port of each of the twins, for a pod on it and for one elsewhere.
fn node_ports(lab: &Lab, aliases: &BTreeMap<String, IpAddr>) -> anyhow::Result<String> {
    let mut asked = 0;
    for (number, pod) in [(30_710, TWINS[0]), (30_711, TWINS[1]), (30_712, MASTER)] {
        open_node_port(lab, number, pod)?;
        for twin in TWINS {
            let server = SocketAddr::new(aliases[twin], number);
            for from in lab.places() {
                // A node does not reach a port of its own by its own alias; see the documentation.
                if from.node == twin || !lab.apart(&from.node, twin)? {
                    continue;
                }
                let what = format!("{} to {server} on {twin}, for pod@{pod}", from.name);
                wait_for(&what, PATIENCE, || {
                    source_seen(&from.namespace, server).is_ok()
                })?;
                asked += 1;
            }
        }
    }
    Ok(format!("{asked} pairs of place and port"))
}

fn open_node_port(lab: &Lab, number: u16, pod: &str) -> anyhow::Result<()> {
    let name = format!("port-{number}");
    let address = lab.place(&format!("pod@{pod}"))?.address;
    lab.api().create(
        "/api/v1/namespaces/default/services",
        &json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"type": "NodePort", "ports": [{"port": PORT, "nodePort": number}]},
        }),
    )?;
    lab.api().create(
        "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
        &json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "endpoints": [{"addresses": [address.to_string()]}],
            "ports": [{"name": "", "port": PORT, "protocol": "TCP"}],
        }),
    )?;
    Ok(())
}

/// What the API server's proxy gets from a node at [`NAME_PORT`].
fn by_the_api_server(lab: &Lab, node: &str) -> anyhow::Result<String> {
    let path = format!("/api/v1/nodes/http:{node}:{NAME_PORT}/proxy/");
    let body = lab.kubectl(&["get", "--raw", &path, "--request-timeout=5s"])?;
    Ok(body.split(' ').next().unwrap_or_default().to_owned())
}

/// The lab's API server prefers `ExternalIP`, as the documentation says. Without one it takes the `InternalIP`.
fn api_server_reaches(lab: &Lab, aliases: &BTreeMap<String, IpAddr>) -> anyhow::Result<String> {
    let control = TWINS.map(|twin| by_the_api_server(lab, twin).unwrap_or_else(|_| "none".into()));
    ensure!(control != TWINS, "without aliases both twins answer, too");
    for (node, alias) in aliases {
        let own = lab.node(node)?.address().to_string();
        let addresses = json!({"status": {"addresses": [
            {"type": "InternalIP", "address": own},
            {"type": "ExternalIP", "address": alias.to_string()},
            {"type": "Hostname", "address": node},
        ]}});
        let path = format!("/api/v1/nodes/{node}/status");
        lab.api().merge(&path, &addresses)?;
    }
    for node in aliases.keys() {
        let mut name = String::new();
        wait_for(&format!("the API server to reach {node}"), PATIENCE, || {
            name = by_the_api_server(lab, node).unwrap_or_default();
            name == *node
        })
        .with_context(|| format!("{name} answers for {node}"))?;
        // An alias is no way to the tunnel.
        for key in ["kilo.squat.ai/endpoint", "selvedge.dev/candidates"] {
            let text = lab.annotation(node, key)?;
            ensure!(!text.contains("10.7.0."), "{key} of {node}: {text}");
        }
    }
    Ok(format!(
        "by InternalIP the twins were {}",
        control.join(" and ")
    ))
}

fn printers_answer(lab: &Lab) -> anyhow::Result<String> {
    let mut asked = 0;
    for from in lab.places() {
        let printer = match lab.network().site(&from.node)? {
            Site::DataCentre => "printer-nd",
            Site::Third => "printer-third",
            Site::Cloud | Site::Further(_) => continue,
        };
        let (name, _) = name_at(&from.namespace, PRINTER.parse()?)
            .with_context(|| format!("{} to {printer}", from.name))?;
        ensure!(name == printer, "{}: {name} answers", from.name);
        asked += 1;
    }
    Ok(format!("{asked} places"))
}

fn shown(lab: &Lab, aliases: &BTreeMap<String, IpAddr>) -> anyhow::Result<String> {
    let program = Path::new(SELVEDGE);
    let (twin, alias) = (TWINS[1], aliases[TWINS[1]].to_string());
    for command in ["status", "doctor"] {
        let text = lab.selvedge(program, twin, &[command])?;
        ensure!(text.contains(&alias), "{command}: {text}");
    }
    let (_, graph) = lab.ask_agent(twin, "/graph?format=text")?;
    ensure!(graph.contains(&format!("alias {alias}")), "graph: {graph}");
    let kubeconfig = lab.admin_kubeconfig().display().to_string();
    let command = ["graph", "--format", "text", "--kubeconfig", &kubeconfig];
    let graph = lab.selvedge(program, MASTER, &command)?;
    ensure!(graph.contains(&format!("alias {alias}")), "graph: {graph}");
    let (_, metrics) = lab.ask_agent(twin, "/metrics")?;
    let expected = format!("selvedge_aliases {}", aliases.len());
    ensure!(metrics.contains(&expected), "{expected} is missing");
    Ok(expected)
}
