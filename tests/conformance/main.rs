//! WireGuard's behaviour, scenario by scenario, on real links in network namespaces.
//!
//! Each scenario runs with wireguard-go at both ends (`control`, which proves the harness), with this
//! repository's `selvedge tunnel` at both ends (`ours`), and with one of each (`ours_left`, `ours_right`). Where
//! the control is known to be wrong, the scenario names the message of its failure, and must fail with it; ours
//! must pass all. The scenarios follow the kernel's self-test, netns.sh, and known failures of the daemons.
//!
//! They need root, `wg`, `nft`, `ping` and the cached `wireguard-go`, and touch nothing outside
//! namespaces of their own but the directory of the configuration sockets.
#![expect(
    clippy::unwrap_used,
    reason = "a poisoned lock or a failed thread is a failed test"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "a harness starts programs and waits for them"
)]
#![expect(
    clippy::print_stdout,
    reason = "figures are printed beside the verdict"
)]

use anyhow::Result;

/// One test per pairing of programs for each scenario of two ends.
macro_rules! pairs {
    ($($name:ident $(fails with $program:ident on $($side:ident: $words:literal),+)?;)*) => {
        pairs!(@pairing control, WireguardGo, WireguardGo;
               $($name $(($program $($side $words),+))?)*);
        pairs!(@pairing ours, Selvedge, Selvedge;
               $($name $(($program $($side $words),+))?)*);
        pairs!(@pairing ours_left, Selvedge, WireguardGo;
               $($name $(($program $($side $words),+))?)*);
        pairs!(@pairing ours_right, WireguardGo, Selvedge;
               $($name $(($program $($side $words),+))?)*);
    };
    (@pairing $module:ident, $left:ident, $right:ident;
     $($name:ident $(($program:ident $($side:ident $words:literal),+))?)*) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    let pairing = crate::pair::Pairing {
                        left: crate::tunnel::Program::$left,
                        right: crate::tunnel::Program::$right,
                    };
                    let known: &[(bool, &str)] = &[
                        $($((pairing.$side == crate::tunnel::Program::$program, $words)),+)?
                    ];
                    crate::judge(known, || super::$name(pairing));
                }
            )*
        }
    };
}

/// One test per program for each scenario of a single device.
macro_rules! devices {
    ($($name:ident $(fails with $known:ident: $words:literal)?;)*) => {
        devices!(@program control_device, WireguardGo; $($name $(($known $words))?)*);
        devices!(@program our_device, Selvedge; $($name $(($known $words))?)*);
    };
    (@program $module:ident, $program:ident; $($name:ident $(($known:ident $words:literal))?)*) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    let program = crate::tunnel::Program::$program;
                    let known: &[(bool, &str)] = &[
                        $((program == crate::tunnel::Program::$known, $words))?
                    ];
                    crate::judge(known, || super::$name(program));
                }
            )*
        }
    };
}

mod addresses;
mod carrying;
mod configuring;
mod hostile;
mod pair;
mod peers;
mod relay;
mod routing;
mod traffic;
mod tunnel;
mod uplinks;

/// How often a scenario with a known failure of wireguard-go may pass before the failure shows: some depend on
/// chance.
const CHANCES: usize = 5;

/// Runs a scenario. A known failure must happen, with its message.
fn judge(known: &[(bool, &str)], scenario: impl Fn() -> Result<()>) {
    let known = known.iter().find(|(applies, _)| *applies);
    let mut outcome = scenario();
    for _ in 1..CHANCES {
        if known.is_none() || outcome.is_err() {
            break;
        }
        outcome = scenario();
    }
    let complaint = mismatch(known.map(|(_, words)| *words), outcome);
    let logs = tunnel::take_logs();
    if let Some(complaint) = complaint {
        panic!("{complaint}\n{logs}");
    }
}

/// The difference between an outcome and the expected one, if any.
fn mismatch(known: Option<&str>, outcome: Result<()>) -> Option<String> {
    match (known, outcome) {
        (None, Ok(())) => None,
        (None, Err(error)) => Some(format!("{error:#}")),
        (Some(words), Ok(())) => Some(format!("passes, though it is known for: {words}")),
        (Some(words), Err(error)) => {
            let error = format!("{error:#}");
            (!error.contains(words)).then(|| format!("fails not by {words:?} but: {error}"))
        }
    }
}
