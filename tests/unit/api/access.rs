//! Which server the agent chooses, and what it does when that one is gone.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use selvedge::cluster::{Access, Origin, Sources};
use selvedge::refusal;
use selvedge_lab::api::Options;

use super::bench::{Agent, StandIn, sources};

fn with_token(token: &str) -> Options {
    Options {
        tokens: [(token.to_owned(), "agent".to_owned())].into(),
        bookmarks: Duration::from_secs(1),
        ..Options::default()
    }
}

/// A port without a server.
fn dead() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap()
}

fn in_pod(
    stand_in: &StandIn,
    token: &str,
    local: Vec<SocketAddr>,
    service: Option<String>,
) -> Sources {
    let directory = stand_in.directory.path().join("account");
    Sources {
        kubeconfig: None,
        master: None,
        service_account: stand_in
            .api
            .write_service_account(&directory, token)
            .unwrap(),
        local,
        service,
        mark: None,
    }
}

#[tokio::test]
async fn the_first_way_that_answers_is_taken() {
    let stand_in = StandIn::with(with_token("secret"));
    stand_in.add_nodes(&["a1"]);
    let local = vec![dead(), stand_in.api.addr()];
    let sources = in_pod(
        &stand_in,
        "secret",
        local,
        Some(format!("https://{}", dead())),
    );
    let mut agent = Agent::start(sources, "a1", None).await;
    agent.expect_nodes(&["a1"]).await;
    let contact = agent
        .expect_api_status("connected", |contact| contact.origin.is_some())
        .await;
    assert_eq!(contact.origin, Some(Origin::Local(stand_in.api.addr())));
}

#[tokio::test]
async fn a_kubeconfig_whose_server_is_gone_does_not_keep_the_agent_from_others() {
    let gone = StandIn::start();
    let stand_in = StandIn::with(with_token("secret"));
    stand_in.add_nodes(&["a1"]);
    gone.api.fault(|faults| faults.refuse = true);
    let sources = Sources {
        kubeconfig: Some(gone.kubeconfig.clone()),
        ..in_pod(&stand_in, "secret", vec![stand_in.api.addr()], None)
    };
    let mut agent = Agent::start(sources, "a1", None).await;
    agent.expect_nodes(&["a1"]).await;
}

#[tokio::test]
async fn a_server_of_another_ca_never_sees_the_token() {
    let stranger = StandIn::with(with_token("secret"));
    let stand_in = StandIn::with(with_token("secret"));
    stand_in.add_nodes(&["a1"]);
    let local = vec![stranger.api.addr(), stand_in.api.addr()];
    let mut agent = Agent::start(in_pod(&stand_in, "secret", local, None), "a1", None).await;
    agent.expect_nodes(&["a1"]).await;
    assert!(stranger.api.requests().is_empty());
}

#[tokio::test]
async fn when_a_server_dies_the_next_is_taken_and_the_watch_goes_on() {
    let stand_in = StandIn::with(with_token("secret"));
    stand_in.add_nodes(&["a1"]);
    // A balancer on the host in front of the same server, which then dies.
    let balancer = Balancer::start(stand_in.api.addr());
    let service = Some(stand_in.api.url());
    let sources = in_pod(&stand_in, "secret", vec![balancer.addr], service);
    let mut agent = Agent::start(sources, "a1", None).await;
    agent.expect_nodes(&["a1"]).await;
    agent
        .expect_api_status("by the balancer", |c| {
            c.origin == Some(Origin::Local(balancer.addr))
        })
        .await;
    let lists = || {
        stand_in
            .api
            .requests()
            .iter()
            .filter(|r| r.is_list() && r.path.ends_with("nodes"))
            .count()
    };
    assert_eq!(lists(), 1);

    drop(balancer);
    agent
        .expect_api_status("by the service", |c| {
            matches!(c.origin, Some(Origin::Service(_)))
        })
        .await;
    stand_in.add_nodes(&["a2"]);
    agent.expect_nodes(&["a1", "a2"]).await;
    assert_eq!(lists(), 1, "the watch goes on where it was");
}

#[tokio::test]
async fn a_token_that_was_replaced_is_read_again() {
    let stand_in = StandIn::with(with_token("old"));
    stand_in.add_nodes(&["a1"]);
    let local = vec![stand_in.api.addr()];
    let mut agent = Agent::start(in_pod(&stand_in, "old", local, None), "a1", None).await;
    agent.expect_nodes(&["a1"]).await;

    stand_in
        .api
        .write_service_account(&stand_in.directory.path().join("account"), "new")
        .unwrap();
    stand_in
        .api
        .set_tokens([("new".to_owned(), "agent".to_owned())].into());
    stand_in.add_nodes(&["a2"]);
    stand_in.api.cut_connections();
    agent.expect_nodes(&["a1", "a2"]).await;
}

#[tokio::test]
async fn a_plain_master_is_spoken_to_without_a_token() {
    let stand_in = StandIn::with(Options {
        tls: false,
        ..Options::default()
    });
    stand_in.add_nodes(&["a1"]);
    let sources = Sources {
        kubeconfig: None,
        master: Some(stand_in.api.url()),
        service_account: PathBuf::from("/nonexistent"),
        local: Vec::new(),
        service: None,
        mark: None,
    };
    let mut agent = Agent::start(sources, "a1", None).await;
    agent.expect_nodes(&["a1"]).await;
}

#[tokio::test]
async fn what_cannot_work_is_refused_with_the_file_or_the_flag() {
    let refused = |sources| async {
        let refused = Access::new(sources).await.unwrap_err();
        assert_eq!(refused.code, refusal::CONFIGURATION);
        refused.sentence
    };
    let sentence = refused(sources(&PathBuf::from("/nonexistent/kubeconfig"))).await;
    assert_eq!(
        sentence,
        "--kubeconfig /nonexistent/kubeconfig: No such file or directory (os error 2)"
    );

    let directory = tempfile::tempdir().unwrap();
    let garbage = directory.path().join("kubeconfig");
    std::fs::write(&garbage, "\u{0}: [").unwrap();
    assert!(refused(sources(&garbage)).await.contains("kubeconfig"));

    let nothing = Sources {
        kubeconfig: None,
        ..sources(&garbage)
    };
    assert!(refused(nothing).await.contains("set --kubeconfig"));
}

/// Passes connections on until it is dropped.
struct Balancer {
    addr: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Balancer {
    fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                connections.spawn(async move {
                    let mut server = tokio::net::TcpStream::connect(to).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { addr, task }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
