//! Which ways lead to an API server from here, and which of them answer.

use super::Finding;
use crate::cluster::{Access, Origin, Sources};
use crate::config::Config;

/// Asks at all ways that the agent would try.
pub(super) fn findings(config: &Config) -> anyhow::Result<Vec<Finding>> {
    let sources = Sources::new(config.kubeconfig.clone(), config.master.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let tried = runtime.block_on(async {
        match Access::new(sources).await {
            Ok(access) => Ok(access.try_all().await),
            Err(refusal) => Err(refusal),
        }
    });
    // Looking names up may go on in a thread; nobody waits for it.
    runtime.shutdown_background();
    Ok(match tried {
        Ok(tried) => of_ways(&tried),
        // A person on the node does not have the pod's account.
        Err(refusal) => vec![Finding::note(format!(
            "The API servers could not be tried: {refusal}."
        ))],
    })
}

/// What follows from who answers.
fn of_ways(tried: &[(Origin, Result<(), String>)]) -> Vec<Finding> {
    let all = tried
        .iter()
        .map(|(origin, outcome)| match outcome {
            Ok(()) => format!("{origin} (answers)"),
            Err(reason) => format!("{origin} ({reason})"),
        })
        .collect::<Vec<_>>()
        .join(", ");
    if tried.iter().all(|(_, outcome)| outcome.is_err()) {
        return vec![Finding::problem(
            format!("No API server answers: {all}."),
            "Tunnels stay up from the cache; name a server that can be reached from here with --kubeconfig or --master.",
        )];
    }
    let asked_for = tried.iter().find_map(|(origin, outcome)| match outcome {
        Err(reason) if is_asked_for(origin) => Some(Finding::warning(
            format!("The API server that was asked for does not answer: {origin} ({reason})."),
            "Another way is used; correct the flag or see why that server is not reached.",
        )),
        Ok(()) | Err(_) => None,
    });
    let mut findings = Vec::from_iter(asked_for);
    findings.push(Finding::note(format!(
        "Ways to an API server, the first that answers is used: {all}."
    )));
    findings
}

/// Whether somebody named it; what may listen on this host is only a guess.
fn is_asked_for(origin: &Origin) -> bool {
    match origin {
        Origin::Kubeconfig(_) | Origin::Master(_) => true,
        Origin::Local(_) | Origin::Service(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tried: &[(Origin, Result<(), String>)]) -> String {
        let lines = of_ways(tried);
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn every_way_is_told_and_only_those_asked_for_are_missed() {
        let kubeconfig = || Origin::Kubeconfig("/etc/kubeconfig".into());
        let local = || Origin::Local(([127, 0, 0, 1], 6444).into());
        let refused = || Err("connection refused".to_owned());

        insta::assert_snapshot!(found(&[(kubeconfig(), Ok(())), (local(), refused())]), @"note: Ways to an API server, the first that answers is used: the server in /etc/kubeconfig (answers), 127.0.0.1:6444 on this host (connection refused).");
        let text = found(&[(kubeconfig(), refused()), (local(), Ok(()))]);
        assert!(
            text.starts_with("warning: The API server that was asked for"),
            "{text}"
        );
        let text = found(&[(kubeconfig(), refused()), (local(), refused())]);
        assert!(
            text.starts_with("problem: No API server answers: the server in"),
            "{text}"
        );
    }
}
