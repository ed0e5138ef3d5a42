//! Removing all that the agent installed: `selvedge cleanup`, and SIGTERM with `--clean-up`.
//!
//! The private key stays: it is the node's identity, and the next agent uses it again.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;

use super::saved_view;
use crate::cluster::{self, Access, Sources};
use crate::config::Config;
use crate::guard::install;
use crate::kernel::Kernel;
use crate::node_lock::NodeLock;
use crate::preflight;
use crate::secure_file;
use crate::telemetry;
use crate::wireguard::uapi;

/// How long the API server may take; Kilo's clean-up gives it as long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Removes everything of the agent's from this node and its Node object.
///
/// # Errors
///
/// A [`crate::refusal::Refusal`] while the agent runs, or without the right to remove anything; all that could
/// not be removed otherwise.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    telemetry::start_logging(config.log_level, config.log_format);
    preflight::check_rights()?;
    let _lock = NodeLock::take(&config.interface)?;
    let kernel = Kernel::open(&config.interface)?;
    let mut failures = kernel
        .cleanup()
        .iter()
        .map(|error| format!("{error:#}"))
        .collect::<Vec<_>>();
    let uapi = Path::new(uapi::DIRECTORY).join(format!("{}.sock", config.interface));
    for socket in [uapi.as_path(), &config.control_socket] {
        if let Err(error) = secure_file::remove(socket) {
            failures.push(format!("removing {}: {error}", socket.display()));
        }
    }
    if let Err(error) = saved_view::forget(&config.state_dir) {
        failures.push(format!("removing the cached state: {error}"));
    }
    failures.extend(install::uninstall(
        &config.state_dir,
        Path::new(install::SYSTEMD),
    ));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let sources = Sources::new(config.kubeconfig.clone(), config.master.clone());
    match runtime.block_on(async {
        let access = Access::new(sources).await?;
        withdraw(&access, config).await
    }) {
        Ok(()) => tracing::info!(node = %config.node, "annotations removed"),
        // A person who cleans a node up by hand need not have a kubeconfig there.
        Err(error) => tracing::warn!(
            node = %config.node,
            error = %format_args!("{error:#}"),
            "removing the annotations failed: they stay until the Node is deleted or the agent runs again"
        ),
    }
    runtime.shutdown_background();
    if failures.is_empty() {
        tracing::info!("everything removed but the key");
        Ok(ExitCode::SUCCESS)
    } else {
        Err(anyhow!("not all could be removed: {}", failures.join("; ")))
    }
}

/// Removes what the agent published, within a bounded time.
pub(super) async fn withdraw(access: &Access, config: &Config) -> anyhow::Result<()> {
    tokio::time::timeout(PATIENCE, cluster::withdraw(access, &config.node))
        .await
        .map_err(|_| anyhow!("no API server answers within {} s", PATIENCE.as_secs()))?
}
