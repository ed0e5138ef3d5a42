//! A server that fails in every way the stand-in knows.

use std::time::{Duration, Instant};

use selvedge::cluster::{Annotations, Timeouts, View, annotation};
use selvedge_lab::api::{Logged, Options};
use serde_json::json;

use super::bench::{Agent, KEY, StandIn, eventually, node, node_names, peer, sources, timeouts};

fn of_nodes(requests: &[Logged], kind: fn(&Logged) -> bool) -> usize {
    requests
        .iter()
        .filter(|r| r.path == "/api/v1/nodes" && kind(r))
        .count()
}

async fn seconds(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

/// A view of before, as the cache on disk keeps it.
async fn cached(stand_in: &StandIn, names: &[&str]) -> View {
    stand_in.add_nodes(names);
    let mut agent = stand_in.agent(names[0]).await;
    let view = agent.expect_nodes(names).await;
    (*view).clone()
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_without_a_list() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
    stand_in.api.end_watches();
    stand_in.add_nodes(&["a2"]);
    agent.expect_nodes(&["a1", "a2"]).await;
    stand_in.api.cut_connections();
    stand_in.add_nodes(&["a3"]);
    agent.expect_nodes(&["a1", "a2", "a3"]).await;
    assert_eq!(of_nodes(&stand_in.api.requests(), Logged::is_list), 1);
}

#[tokio::test]
async fn after_410_there_is_a_new_list_with_all_deletions() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1", "a2", "a3"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1", "a2", "a3"]).await;

    stand_in.api.fault(|faults| faults.refuse = true);
    stand_in.api.delete("nodes", "a2").unwrap();
    stand_in.api.compact();
    stand_in.api.fault(|faults| faults.refuse = false);
    agent.expect_nodes(&["a1", "a3"]).await;
}

#[tokio::test]
async fn a_storm_of_410_does_not_become_a_storm_of_lists() {
    for gone_as_status in [false, true] {
        let stand_in = StandIn::start();
        stand_in.add_nodes(&["a1"]);
        let mut agent = stand_in.agent("a1").await;
        agent.expect_nodes(&["a1"]).await;
        stand_in.api.fault(|faults| {
            faults.gone = u32::MAX;
            faults.gone_as_status = gone_as_status;
            // Streamed lists are watches that go on by themselves: no 410 after them.
            faults.no_streamed_lists = true;
        });
        stand_in.api.take_requests();
        stand_in.api.cut_connections();
        seconds(9.0).await;
        let lists = of_nodes(&stand_in.api.requests(), Logged::is_list);
        // Three at once, then one each four seconds, and the one that falls back to pages.
        assert!((1..=6).contains(&lists), "{lists} lists");

        stand_in.api.fault(|faults| faults.gone = 0);
        stand_in.add_nodes(&["a2"]);
        agent.expect_nodes(&["a1", "a2"]).await;
    }
}

#[tokio::test]
async fn retry_after_is_kept() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
    stand_in.api.take_requests();
    stand_in.api.fault(|faults| faults.busy = (2, 3));
    stand_in.api.end_watches();
    eventually("two refusals", async || {
        stand_in
            .api
            .requests()
            .iter()
            .filter(|r| r.status == 429)
            .count()
            == 2
    })
    .await;
    stand_in.add_nodes(&["a2"]);
    agent.expect_nodes(&["a1", "a2"]).await;

    let requests = stand_in.api.requests();
    let mut repeated = 0;
    for (at, refused) in requests.iter().enumerate().filter(|(_, r)| r.status == 429) {
        let Some(next) = requests[at + 1..].iter().find(|r| r.path == refused.path) else {
            continue;
        };
        let pause = next.at - refused.at;
        assert!(
            pause >= Duration::from_secs(3),
            "{} again after {pause:?}",
            refused.path
        );
        repeated += 1;
    }
    assert!(repeated > 0);
}

#[tokio::test]
async fn watches_that_end_at_once_are_not_repeated_at_once() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
    stand_in.api.take_requests();
    stand_in.api.fault(|faults| faults.short_watches = true);
    stand_in.api.end_watches();
    seconds(6.0).await;
    let watches = of_nodes(&stand_in.api.requests(), |_| true);
    assert!(
        (2..=8).contains(&watches),
        "{watches} watches in six seconds"
    );
    stand_in.api.fault(|faults| faults.short_watches = false);
    stand_in.add_nodes(&["a2"]);
    agent.expect_nodes(&["a1", "a2"]).await;
}

#[tokio::test]
async fn a_server_without_its_store_is_asked_with_growing_pauses() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    stand_in.api.fault(|faults| faults.unavailable = 5);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
    let requests = stand_in.api.requests();
    assert!(requests.len() < 30, "{} requests", requests.len());
}

#[tokio::test]
async fn a_half_open_connection_is_given_up_and_the_last_view_stays() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let mut agent = stand_in.agent("a1").await;
    let before = agent.expect_nodes(&["a1"]).await;
    stand_in.api.fault(|faults| faults.half_open = true);
    agent
        .expect_api_status("error", |status| status.error.is_some())
        .await;
    assert_eq!(agent.view(), Some(before));
    stand_in.api.fault(|faults| faults.half_open = false);
    stand_in.add_nodes(&["a2"]);
    agent.expect_nodes(&["a1", "a2"]).await;
}

#[tokio::test]
async fn a_watch_that_carries_nothing_is_opened_anew_and_not_listed_anew() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
    stand_in.api.fault(|faults| faults.stall_watches = true);
    stand_in.add_nodes(&["a2"]);
    seconds(1.0).await;
    stand_in.api.take_requests();
    eventually("a new watch", async || {
        of_nodes(&stand_in.api.requests(), Logged::is_resumed_watch) > 0
    })
    .await;
    stand_in.api.fault(|faults| faults.stall_watches = false);
    agent.expect_nodes(&["a1", "a2"]).await;
    assert_eq!(of_nodes(&stand_in.api.requests(), Logged::is_list), 0);
}

#[tokio::test]
async fn a_truncated_list_is_not_believed_without_a_second() {
    let stand_in = StandIn::start();
    let view = cached(&stand_in, &["a1", "a2", "a3", "a4"]).await;
    for streamed in [true, false] {
        stand_in.api.fault(|faults| {
            faults.no_streamed_lists = !streamed;
            // Of the Nodes and of the Peers, which are not there.
            faults.truncate = (1, 1);
        });
        let mut agent = Agent::start(sources(&stand_in.kubeconfig), "a1", Some(view.clone())).await;
        let first = agent.expect("what the API says", |view| view.live).await;
        assert_eq!(
            node_names(&first),
            ["a1", "a2", "a3", "a4"],
            "streamed: {streamed}"
        );
    }
}

#[tokio::test]
async fn an_empty_list_is_not_believed_without_a_second() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    stand_in.api.fault(|faults| faults.truncate = (1, 0));
    let mut agent = stand_in.agent("a1").await;
    let first = agent.expect("a view", |_| true).await;
    assert_eq!(node_names(&first), ["a1"]);
}

#[tokio::test]
async fn a_cluster_that_really_shrank_is_believed_the_second_time() {
    let stand_in = StandIn::start();
    let view = cached(&stand_in, &["a1", "a2", "a3", "a4"]).await;
    for name in ["a2", "a3", "a4"] {
        stand_in.api.delete("nodes", name).unwrap();
    }
    let mut agent = Agent::start(sources(&stand_in.kubeconfig), "a1", Some(view)).await;
    assert!(!agent.expect("the cache", |_| true).await.live);
    agent.expect_nodes(&["a1"]).await;
    let lists = of_nodes(&stand_in.api.requests(), Logged::is_list);
    assert_eq!(lists, 1 + 2, "one for the cache, two for certainty");
}

#[tokio::test]
async fn a_restart_without_an_api_begins_with_the_cache() {
    let stand_in = StandIn::start();
    let view = cached(&stand_in, &["a1", "a2"]).await;
    stand_in.api.fault(|faults| faults.refuse = true);
    let mut agent = Agent::start(sources(&stand_in.kubeconfig), "a1", Some(view)).await;
    let first = agent.expect("the cache", |_| true).await;
    assert_eq!((node_names(&first), first.live), (vec!["a1", "a2"], false));
    agent
        .expect_api_status("error", |status| status.error.is_some())
        .await;
    stand_in.add_nodes(&["a3"]);
    stand_in.api.fault(|faults| faults.refuse = false);
    agent.expect_nodes(&["a1", "a2", "a3"]).await;
}

#[tokio::test]
async fn servers_without_streamed_lists_are_listed_in_pages() {
    for ignores in [false, true] {
        let stand_in = StandIn::start();
        let names: Vec<_> = (0..250).map(|i| format!("n{i:03}")).collect();
        stand_in.add_nodes(&names.iter().map(String::as_str).collect::<Vec<_>>());
        stand_in.api.fault(|faults| {
            faults.no_streamed_lists = !ignores;
            faults.ignore_streamed_lists = ignores;
        });
        let mut agent = stand_in.agent("n000").await;
        let first = agent.expect("a view", |_| true).await;
        assert_eq!(node_names(&first), names);
        let pages = of_nodes(&stand_in.api.requests(), |r| r.query.contains_key("limit"));
        assert_eq!(pages, 3);
    }
}

#[tokio::test]
async fn an_idle_agent_writes_nothing_and_lists_nothing() {
    let stand_in = StandIn::start();
    stand_in.api.define_peers().unwrap();
    stand_in.add_nodes(&["a1", "a2"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1", "a2"]).await;
    agent
        .cluster
        .publish(Annotations::from([(annotation::KEY, KEY.to_owned())]));
    eventually("published", async || {
        stand_in.api.get("nodes", "a1").unwrap()["metadata"]["annotations"][annotation::KEY] == KEY
    })
    .await;
    seconds(1.0).await;
    stand_in.api.take_requests();
    // A kubelet's heartbeat, which changes nothing that is looked at.
    for beat in 0..20 {
        let heartbeat = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": beat}]}});
        stand_in.api.merge("nodes", "a2", &heartbeat).unwrap();
        seconds(0.25).await;
    }
    let requests = stand_in.api.requests();
    assert!(requests.is_empty(), "{requests:?}");
}

/// Asked for by the agents that look for the admission policies.
fn looks(stand_in: &StandIn) -> usize {
    let requests = stand_in.api.requests();
    let policies = |r: &&Logged| r.path.contains("validatingadmissionpolic");
    requests.iter().filter(policies).count()
}

#[tokio::test]
async fn one_agent_says_once_that_the_admission_policies_are_missing() {
    let stand_in = StandIn::start();
    for name in ["a1", "a2"] {
        let mark = json!({"selvedge.dev/agent": "0.1.0", "kilo.squat.ai/key": KEY});
        stand_in.api.put(node(name, &mark)).unwrap();
    }
    let other = stand_in.agent("a2").await;
    seconds(2.0).await;
    assert_eq!(looks(&stand_in), 0, "a1 comes first by its name");

    let agent = stand_in.agent("a1").await;
    let contact = agent
        .expect_api_status("policies are missing", |contact| {
            !contact.missing_policies.is_empty()
        })
        .await;
    assert_eq!(
        contact.missing_policies[0],
        "the admission policy selvedge-annotations is missing"
    );
    let events = || {
        let requests = stand_in.api.requests();
        let posted = |r: &&Logged| r.method == "POST" && r.path.ends_with("/events");
        requests.iter().filter(posted).count()
    };
    eventually("an Event", async || events() == 1).await;
    // Another look has come by then.
    seconds(7.0).await;
    assert_eq!(looks(&stand_in), 12, "six policies, looked for twice");
    assert_eq!(events(), 1);
    let none: &[String] = &[];
    assert_eq!(other.cluster.api_status().borrow().missing_policies, none);
}

#[tokio::test]
async fn an_agent_that_may_not_look_for_policies_says_nothing_of_them() {
    let stand_in = StandIn::start();
    let mark = json!({"selvedge.dev/agent": "0.1.0", "kilo.squat.ai/key": KEY});
    stand_in.api.put(node("a1", &mark)).unwrap();
    stand_in.api.fault(|faults| {
        faults.forbid.insert("validatingadmission".to_owned());
    });
    let agent = stand_in.agent("a1").await;
    eventually("a look", async || looks(&stand_in) > 0).await;
    seconds(1.0).await;
    let none: &[String] = &[];
    assert_eq!(agent.cluster.api_status().borrow().missing_policies, none);
}

#[tokio::test]
async fn two_programs_that_write_the_same_annotation_do_not_flood_the_server() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let agent = stand_in.agent("a1").await;
    agent
        .cluster
        .publish(Annotations::from([(annotation::KEY, KEY.to_owned())]));
    let until = Instant::now() + Duration::from_secs(12);
    while Instant::now() < until {
        stand_in
            .api
            .annotate("a1", annotation::KEY, Some("another"))
            .unwrap();
        seconds(0.1).await;
    }
    let writes = stand_in
        .api
        .requests()
        .iter()
        .filter(|r| r.is_write())
        .count();
    assert!((2..=11).contains(&writes), "{writes} writes");
}

#[tokio::test]
async fn publishing_survives_a_server_that_is_busy_or_gone() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
    stand_in.api.fault(|faults| faults.refuse = true);
    agent
        .cluster
        .publish(Annotations::from([(annotation::KEY, KEY.to_owned())]));
    seconds(1.0).await;
    stand_in.api.fault(|faults| {
        faults.refuse = false;
        faults.busy = (3, 1);
    });
    eventually("published", async || {
        stand_in.api.get("nodes", "a1").unwrap()["metadata"]["annotations"][annotation::KEY] == KEY
    })
    .await;
}

#[tokio::test]
async fn rights_that_are_missing_cost_only_what_they_are_for() {
    let stand_in = StandIn::start();
    stand_in.api.define_peers().unwrap();
    stand_in.api.put(peer("laptop", &["10.5.0.1/32"])).unwrap();
    stand_in
        .api
        .put(node(
            "a1",
            &json!({"selvedge.dev/agent": "0", "kilo.squat.ai/key": "bad"}),
        ))
        .unwrap();
    for part in ["peers", "endpointslices", "events"] {
        stand_in.api.fault(|faults| {
            faults.forbid = [part.to_owned()].into();
        });
        let mut agent = stand_in.agent("a1").await;
        let view = agent.expect_nodes(&["a1"]).await;
        assert_eq!(
            view.snapshot.peers.len(),
            usize::from(part != "peers"),
            "without {part}"
        );
        agent
            .expect("an explanation", |view| {
                view.servers.incomplete.is_some() == (part == "endpointslices")
            })
            .await;
    }
}

#[tokio::test]
async fn an_object_that_cannot_be_decoded_costs_only_itself() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1", "a3"]);
    let mut broken = node("a2", &json!({}));
    broken["status"]["addresses"] = json!("nonsense");
    stand_in.api.put(broken.clone()).unwrap();
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1", "a3"]).await;
    broken["metadata"]["name"] = json!("a4");
    stand_in.api.put(broken).unwrap();
    stand_in.add_nodes(&["a5"]);
    agent.expect_nodes(&["a1", "a3", "a5"]).await;
}

#[tokio::test]
async fn a_slow_server_is_waited_for() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    stand_in
        .api
        .fault(|faults| faults.delay = Duration::from_secs(2));
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
}

#[tokio::test]
async fn many_changes_are_seen_together() {
    let stand_in = StandIn::start();
    stand_in.add_nodes(&["a1"]);
    let mut agent = stand_in.agent("a1").await;
    agent.expect_nodes(&["a1"]).await;
    let mut views = agent.cluster.views();
    views.mark_unchanged();
    let counted = tokio::spawn(async move {
        let mut count = 0;
        while views.changed().await.is_ok() {
            views.mark_unchanged();
            count += 1;
            let all = views
                .borrow()
                .as_ref()
                .is_some_and(|v| v.snapshot.nodes.len() == 301);
            if all {
                return count;
            }
        }
        count
    });
    for i in 0..300 {
        stand_in
            .api
            .put(node(&format!("b{i:03}"), &json!({})))
            .unwrap();
    }
    let count = tokio::time::timeout(super::bench::LIMIT, counted)
        .await
        .unwrap()
        .unwrap();
    assert!(count <= 20, "{count} views for one burst");
}

#[tokio::test]
async fn a_hundred_agents_that_start_together_make_one_list_each() {
    let stand_in = StandIn::with(Options::default());
    stand_in.api.define_peers().unwrap();
    stand_in.add_nodes(&["a1", "a2"]);
    let mut agents = Vec::new();
    for _ in 0..100 {
        let sources = sources(&stand_in.kubeconfig);
        agents.push(Agent::start_with(sources, "a1", None, &Timeouts::default()).await);
    }
    for agent in &mut agents {
        agent.expect_nodes(&["a1", "a2"]).await;
    }
    let requests = stand_in.api.requests();
    assert_eq!(of_nodes(&requests, Logged::is_list), 100);
    // /version, Nodes, Peers, endpoints.
    assert!(requests.len() <= 400, "{} requests", requests.len());
}

#[test]
fn tests_are_less_patient_than_agents() {
    assert!(timeouts().silence < Timeouts::default().silence);
}
