//! Asks the linker for compact relocations, which the loader would else read through at every start:
//! 0.6 MiB of a daemon that is to stay small.
//!
//! Only where the C library is sure to understand them, which glibc does since 2.36 and musl since
//! 1.2.4; static builds with musl, and those for another machine, do without.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let native = env::var("HOST").ok() == env::var("TARGET").ok();
    let glibc = env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|kind| kind == "gnu");
    if native && glibc && glibc_version().is_some_and(|version| version >= (2, 36)) {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

/// The version of this machine's C library, of `getconf`'s "glibc 2.36".
#[expect(
    clippy::disallowed_methods,
    reason = "it runs where the program is built, not where it is used"
)]
fn glibc_version() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output();
    let text = String::from_utf8(output.ok()?.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
