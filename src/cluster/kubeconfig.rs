//! Reads kubeconfigs, and describes an error in one clause.
//!
//! The parser's own messages quote the lines around a mistake, and in a kubeconfig those lines may hold
//! tokens and keys.

use std::error::Error as _;
use std::path::Path;

use kube::config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError};

/// Reads a file.
///
/// # Errors
///
/// A clause without secrets.
pub(super) fn read(path: &Path) -> Result<Kubeconfig, String> {
    Kubeconfig::read_from(path).map_err(|error| explain(&error))
}

/// Reads a file; without a path, what `kubectl` reads: the merged files of `KUBECONFIG`, or
/// `~/.kube/config`. Uses the named context, or the current one.
///
/// # Errors
///
/// A clause without secrets.
pub(crate) async fn load(
    path: Option<&Path>,
    context: Option<&str>,
) -> Result<kube::Config, String> {
    let kubeconfig = match path {
        Some(path) => read(path)?,
        None => Kubeconfig::read().map_err(|error| explain(&error))?,
    };
    let options = KubeConfigOptions {
        context: context.map(str::to_owned),
        ..KubeConfigOptions::default()
    };
    kube::Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .map_err(|error| explain(&error))
}

/// Uses the current context.
///
/// # Errors
///
/// A clause without secrets.
pub(super) async fn choose(kubeconfig: Kubeconfig) -> Result<kube::Config, String> {
    let options = KubeConfigOptions::default();
    kube::Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .map_err(|error| explain(&error))
}

/// The error in the kubeconfig that `kubectl` would read by default; `None` where there is no such
/// file.
pub(crate) fn explain_default(error: &InferConfigError) -> Option<String> {
    let error: &KubeconfigError = error.source()?.downcast_ref()?;
    let is_missing = matches!(error, KubeconfigError::FindPath)
        || matches!(error, KubeconfigError::ReadConfig(error, _) if error.kind() == std::io::ErrorKind::NotFound);
    (!is_missing).then(|| explain(error))
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the other errors concern one field and quote nothing"
)]
fn explain(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::Parse(error) => match error.location() {
            Some(at) => format!(
                "it cannot be parsed at line {}, column {}",
                at.line(),
                at.column()
            ),
            None => "it is not a kubeconfig".to_owned(),
        },
        KubeconfigError::ReadConfig(error, _) => error.to_string(),
        KubeconfigError::CurrentContextNotSet => {
            "it has no current context: choose one with kubectl config use-context".to_owned()
        }
        KubeconfigError::LoadContext(name) => format!("it has no context {name:?}"),
        KubeconfigError::LoadClusterOfContext(name) => format!("it has no cluster {name:?}"),
        KubeconfigError::MissingClusterUrl => "its cluster has no server".to_owned(),
        KubeconfigError::ParseClusterUrl(error) => format!("its server is not a URL: {error}"),
        other => super::access::chain(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn reason(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        load(Some(file.path()), None).await.unwrap_err()
    }

    #[tokio::test]
    async fn an_error_message_quotes_no_neighbouring_line() {
        for (text, expected) in [
            (
                "users:\n- name: a\n  user: {token: hidden, client-key-data: [x]}\n",
                "line 3",
            ),
            ("not: [yaml\n token: hidden\n", "line 2"),
            (
                "users:\n- name: a\n  user: {token: hidden}\n",
                "no current context",
            ),
            ("current-context: x\n", "no context \"x\""),
            (
                "current-context: x\ncontexts:\n- name: x\n  context: {cluster: c, user: a}\nusers:\n- name: a\n  user: {token: hidden}\n",
                "no cluster \"c\"",
            ),
            (
                "current-context: x\ncontexts:\n- name: x\n  context: {cluster: c, user: a}\nclusters:\n- name: c\n  cluster: {server: '::'}\nusers:\n- name: a\n  user: {token: hidden}\n",
                "not a URL",
            ),
            (
                "current-context: x\ncontexts:\n- name: x\n  context: {cluster: c, user: a}\nclusters:\n- name: c\n  cluster: {server: 'https://127.0.0.1:1', certificate-authority-data: 'hidden!'}\nusers:\n- name: a\n  user: {token: hidden}\n",
                "certificate authority",
            ),
        ] {
            let reason = reason(text).await;
            assert!(reason.contains(expected), "{reason}");
            assert!(
                !reason.contains("hidden") && !reason.contains('\n'),
                "{reason}"
            );
        }
    }
}
