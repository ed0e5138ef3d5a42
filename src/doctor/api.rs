//! Checks which API servers answer from this node, and whether the admission policies of the mesh are in
//! force.

use super::Finding;
use crate::cluster::{Access, Origin, Sources, policies};
use crate::config::Config;

/// Probes all API servers that the agent would try.
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
    // A DNS lookup may still block a thread; do not wait for it.
    runtime.shutdown_background();
    Ok(match tried {
        Ok((tried, missing)) => {
            let mut findings = of_servers(&tried);
            if tried.iter().any(|(_, outcome)| outcome.is_ok()) {
                findings.extend(of_policies(&missing));
            }
            findings
        }
        // A shell on the node has no service account.
        Err(refusal) => vec![Finding::note(format!(
            "The API servers could not be tried: {refusal}."
        ))],
    })
}

/// Findings from the answers of the servers.
fn of_servers(tried: &[(Origin, Result<(), String>)]) -> Vec<Finding> {
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
            "Tunnels stay up from the cache; set a server that this node can reach with --kubeconfig or --master.",
        )];
    }
    let configured = tried.iter().find_map(|(origin, outcome)| match outcome {
        Err(reason) if is_configured(origin) => Some(Finding::warning(
            format!("The configured API server does not answer: {origin} ({reason})."),
            "The agent uses another server; correct the flag, or check why this one is not reachable.",
        )),
        Ok(()) | Err(_) => None,
    });
    let mut findings = Vec::from_iter(configured);
    findings.push(Finding::note(format!(
        "API servers in order of preference: {all}."
    )));
    findings
}

/// Findings from the missing policies.
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
            "The admission policies could not be checked: {reason}."
        ))),
    }
}

/// Whether a flag names the server; a port on this host is only a guess.
fn is_configured(origin: &Origin) -> bool {
    match origin {
        Origin::Kubeconfig(_) | Origin::Master(_) => true,
        Origin::Local(_) | Origin::Service(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tried: &[(Origin, Result<(), String>)]) -> String {
        let lines = of_servers(tried);
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn a_missing_policy_is_a_problem_and_a_failed_check_a_note() {
        let found = |missing| of_policies(&missing).map(|finding| finding.to_string());
        assert_eq!(found(Ok(vec![])), None);
        let missing = Ok(vec![
            "the admission policy selvedge-region is missing".to_owned(),
        ]);
        let text = found(missing).unwrap();
        let expected = "problem: Tokens of nodes may change more of the mesh than they should: the admission policy selvedge-region is missing.\n  to do: Apply the manifest again";
        assert!(text.starts_with(expected), "{text}");
        let text = found(Err("403".to_owned())).unwrap();
        assert_eq!(
            text,
            "note: The admission policies could not be checked: 403."
        );
    }

    #[test]
    fn every_server_is_listed_and_only_configured_ones_are_missed() {
        let kubeconfig = || Origin::Kubeconfig("/etc/kubeconfig".into());
        let local = || Origin::Local(([127, 0, 0, 1], 6444).into());
        let refused = || Err("connection refused".to_owned());

        insta::assert_snapshot!(found(&[(kubeconfig(), Ok(())), (local(), refused())]), @"note: API servers in order of preference: the server in /etc/kubeconfig (answers), 127.0.0.1:6444 on this host (connection refused).");
        let text = found(&[(kubeconfig(), refused()), (local(), Ok(()))]);
        assert!(
            text.starts_with("warning: The configured API server"),
            "{text}"
        );
        let text = found(&[(kubeconfig(), refused()), (local(), refused())]);
        assert!(
            text.starts_with("problem: No API server answers: the server in"),
            "{text}"
        );
    }
}
