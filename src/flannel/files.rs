//! Reads flannel's files on this node; errors name the file and the remedy.

use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use super::{NetConf, SubnetEnv, Unready};
use crate::refusal::Refusal;

/// The paths of `net-conf.json` with k3s and kube-flannel.
const DEFAULT_PATHS: [&str; 2] = [
    "/var/lib/rancher/k3s/agent/etc/flannel/net-conf.json",
    "/etc/kube-flannel/net-conf.json",
];

/// Most bytes that are read. flannel's files have less than a hundredth; a path to a device must not fill memory.
const MAX_SIZE: u64 = 1 << 20;

/// flannel's files, as far as they exist.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Files {
    /// `net-conf.json`; only a hint, since many clusters have none on the node.
    pub conf: Option<NetConf>,
    /// `subnet.env`; `None` until flannel is up.
    pub env: Option<SubnetEnv>,
    /// The path of `subnet.env`.
    pub env_path: PathBuf,
}

impl Files {
    /// Removes this node's IPv6 pod CIDR, for a node with IPv6 turned off, which has no link for it. The
    /// IPv6 cluster network stays, so that this node computes the same mesh as all others. Returns whether
    /// flannel had an IPv6 pod CIDR.
    ///
    /// # Errors
    ///
    /// Waiting, if the node has no IPv4 pod CIDR.
    pub fn leave_out_ipv6(&mut self) -> Result<bool, Unready> {
        let Some(env) = &mut self.env else {
            return Ok(false);
        };
        let before = env.subnets.len();
        env.subnets.retain(|subnet| subnet.addr().is_ipv4());
        if env.subnets.is_empty() {
            return Err(Unready::Waiting(
                "its only family is IPv6, which is off on this node (sysctl net.ipv6.conf.default.disable_ipv6)"
                    .to_owned(),
            ));
        }
        Ok(env.subnets.len() < before)
    }

    /// Reads the files. A `net-conf.json` that the user named must exist; at the default paths it may be missing.
    pub fn read(conf: Option<&Path>, env: &Path) -> Result<Self, Refusal> {
        let conf = match conf {
            Some(path) => match read(path, "--flannel-conf")? {
                Some(bytes) => Some(net_conf(path, &bytes)?),
                None => {
                    return Err(Refusal::configuration(format!(
                        "--flannel-conf {} does not exist: set the path of flannel's net-conf.json, or remove the flag",
                        path.display()
                    )));
                }
            },
            None => {
                let mut found = None;
                for path in DEFAULT_PATHS.map(Path::new) {
                    if let Some(bytes) = read(path, "flannel's configuration")? {
                        found = Some(net_conf(path, &bytes)?);
                        break;
                    }
                }
                found
            }
        };
        let subnet_env = match read(env, "--subnet-file")? {
            Some(bytes) => Some(SubnetEnv::parse(&bytes).map_err(|error| {
                Refusal::configuration(format!(
                    "{} {error}: flannel writes this file, so read flannel's log",
                    env.display()
                ))
            })?),
            None => None,
        };
        Ok(Self {
            conf,
            env: subnet_env,
            env_path: env.to_owned(),
        })
    }
}

fn net_conf(path: &Path, bytes: &[u8]) -> Result<NetConf, Refusal> {
    NetConf::parse(bytes)
        .map_err(|error| Refusal::configuration(format!("flannel's {} {error}", path.display())))
}

/// The content of a file; `None` where there is no such file.
fn read(path: &Path, what: &str) -> Result<Option<Vec<u8>>, Refusal> {
    let bytes = std::fs::File::open(path).and_then(|file| {
        let mut bytes = Vec::new();
        file.take(MAX_SIZE).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    match bytes {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(Refusal::configuration(format!(
            "cannot read {what} {}: {error}",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_subnet_file_is_none_and_a_missing_named_configuration_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let env = dir.path().join("subnet.env");
        assert_eq!(Files::read(None, &env).unwrap().env, None);

        let conf = dir.path().join("net-conf.json");
        let error = Files::read(Some(&conf), &env).unwrap_err();
        assert!(error.sentence.contains("does not exist"), "{error}");
    }

    #[test]
    fn refusals_name_the_file_and_the_field() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("net-conf.json");
        let env = dir.path().join("subnet.env");
        std::fs::write(
            &conf,
            r#"{"Network":"10.42.0.0/16","Backend":{"Type":"wireguard"}}"#,
        )
        .unwrap();
        let error = Files::read(Some(&conf), &env).unwrap_err().sentence;
        assert!(
            error.contains("net-conf.json sets Backend.Type to \"wireguard\""),
            "{error}"
        );

        std::fs::write(&env, "FLANNEL_NETWORK=x\n").unwrap();
        let error = Files::read(None, &env).unwrap_err().sentence;
        assert!(
            error.contains("subnet.env has a FLANNEL_NETWORK"),
            "{error}"
        );
    }
}
