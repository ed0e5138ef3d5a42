//! Tells the linker to use compact relocations. Otherwise the loader reads all relocations at every start, which
//! takes 0.6 MiB of memory.
//!
//! Only for a C library that supports them: glibc since 2.36, musl since 1.2.4. Static builds with musl, and
//! builds for another target, do without.

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

/// The version of this host's C library, from the output of `getconf`: "glibc 2.36".
#[expect(clippy::disallowed_methods, reason = "it runs on the build host only")]
fn glibc_version() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output();
    let text = String::from_utf8(output.ok()?.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
