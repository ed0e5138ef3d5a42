//! The sysctls of the tunnel's own link.
//!
//! They are read and set through netlink: in an unprivileged container `/proc/sys` is read-only, and a
//! process without free file descriptors cannot open it.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use anyhow::Context as _;

use super::link;

/// The settings of a link that the agent reads and sets, below `net/FAMILY/conf/LINK/`.
const KEYS: [(&str, &str); 2] = [("ipv4", "rp_filter"), ("ipv6", "addr_gen_mode")];

/// The settings of the link, by path below `/proc/sys`, without those this kernel does not have.
pub(super) fn of(link: &link::Found) -> BTreeMap<String, String> {
    let [v4, v6] = KEYS.map(|(family, key)| format!("net/{family}/conf/{}/{key}", link.name));
    let rp_filter = link.rp_filter.map(|value| (v4, value.to_string()));
    let addr_gen_mode = link.addr_gen_mode.map(|value| (v6, value.to_string()));
    rp_filter.into_iter().chain(addr_gen_mode).collect()
}

/// Whether the kernel carries no IPv6 on a link: it has no IPv6, or the operator has turned it off.
///
/// For a link that does not exist yet the setting for new links counts. A setting that cannot be read counts
/// as on: pods must not lose their IPv6 over a lack of file descriptors.
pub fn ipv6_is_off(link: &str) -> bool {
    let setting =
        |link: &str| fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6"));
    let is_absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let setting = match setting(link) {
        Err(error) if is_absent(&error) => setting("default"),
        setting => setting,
    };
    match setting {
        Ok(value) => value.trim() != "0",
        Err(error) => is_absent(&error),
    }
}

/// The family and name (`ipv4/rp_filter`) of a setting of the link; an error for any other path.
pub(super) fn key(path: &str, link: &str) -> anyhow::Result<String> {
    let parts: Vec<&str> = path.split('/').collect();
    let key = match parts[..] {
        ["net", family, "conf", of, name] if of == link => Some((family, name)),
        _ => None,
    };
    let (family, name) = key
        .filter(|key| KEYS.contains(key))
        .with_context(|| format!("{} is not for the agent to set", crate::text::quote(path)))?;
    Ok(format!("{family}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tunnel_links_settings_can_be_set() {
        assert_eq!(
            key("net/ipv4/conf/kilo0/rp_filter", "kilo0").unwrap(),
            "ipv4/rp_filter"
        );
        for path in [
            "net/ipv4/conf/all/rp_filter",
            "net/ipv4/conf/kilo0/forwarding",
            "net/ipv4/ip_forward",
            "net/ipv4/conf/../rp_filter",
            "kernel/core_pattern",
        ] {
            assert!(key(path, "kilo0").is_err(), "{path}");
        }
    }
}
