//! Which ways lead to an API server from here, which of them answer, and whether the admission policies
//! of the mesh are in force there.

use super::Finding;
use crate::cluster::{Access, Origin, Sources, policies};
use crate::config::Config;

/// Asks at all ways that the agent would try.
pub(super) fn findings(config: &Config) -> anyhow::Result<Vec<Finding>> {
    let sources = Sources::new(config.kubeconfig.clone(), config.master.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let tried = runtime.block_on(async {
        match Access::new(sources).await {
            Ok(access) => Ok((access.try_all().await, access.missing_policies().await)),
            Err(refusal) => Err(refusal),
        }
    });
    // Looking names up may go on in a thread; nobody waits for it.
    runtime.shutdown_background();
    Ok(match tried {
        Ok((tried, missing)) => {
            let mut findings = of_ways(&tried);
            if tried.iter().any(|(_, outcome)| outcome.is_ok()) {
                findings.extend(of_policies(&missing));
            }
            findings
        }
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

/// What follows from the policies that are missing.
fn of_policies(missing: &Result<Vec<String>, String>) -> Option<Finding> {
    match missing {
        Ok(missing) if missing.is_empty() => None,
        Ok(missing) => Some(Finding::problem(
            format!(
                "Tokens of nodes may change more of the mesh than they should: {}.",
                missing.join(", ")
            ),
            policies::REMEDY,
        )),
        Err(reason) => Some(Finding::note(format!(
            "Whether the admission policies are in force could not be seen: {reason}."
        ))),
    }
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
    fn a_missing_policy_is_a_problem_and_one_that_cannot_be_seen_a_note() {
        let found = |missing| of_policies(&missing).map(|finding| finding.to_string());
        assert_eq!(found(Ok(vec![])), None);
        let missing = Ok(vec![
            "the admission policy selvedge-region is missing".to_owned(),
        ]);
        let text = found(missing).unwrap();
        let told = "problem: Tokens of nodes may change more of the mesh than they should: the admission policy selvedge-region is missing.\n  to do: Apply the manifest again";
        assert!(text.starts_with(told), "{text}");
        let text = found(Err("403".to_owned())).unwrap();
        assert_eq!(
            text,
            "note: Whether the admission policies are in force could not be seen: 403."
        );
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
